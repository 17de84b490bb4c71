"""Focused-Transformer layers against the paper's formula: one softmax over the own segment and the keys of a memory."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from modeling_longembed import LongEmbedConfig, LongEmbedModel, attention_past_longembed, pattern_focused_longembed
from modeling_longembed.attention_longembed import KERNELS, AttentionInputs
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_registry_longembed import build_pattern
from tests.covering import covering_first
from tests.modeling_longembed.memory_use import Allocated, KeptForBackward

SCHEMES = {
    "absolute": {},
    "rope": {"position_embedding_type": "rope"},
    "yarn": {
        "position_embedding_type": "rope",
        "position_extension": {"method": "yarn", "original_max_position_embeddings": 16},
    },
    "alibi": {"position_embedding_type": "alibi"},
    "relative": {"position_embedding_type": "relative"},
    "buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    "none": {"position_embedding_type": "none", "is_causal": True},
}
PATHS = ("longembed_varlen", "eager")


def focused(size, negatives=1, top_k=3):
    return {"type": "focused", "size": size, "negatives": negatives, "top_k": top_k}


@pytest.fixture(scope="module")
def build_focused(build_tiny_model):
    """`build(patterns, **fields)`: a one-layer encoder in float64 without dropout; biases are drawn too, not zero."""

    def build(patterns, kernel=None, cls=LongEmbedModel, **fields):
        fields = {"hidden_dropout_prob": 0.0, "max_position_embeddings": 256, "num_hidden_layers": 1} | fields
        model = build_tiny_model(cls, kernel, attention_patterns=patterns, **fields).double()
        for name, parameter in model.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return build


def batch(lengths, seed=0):
    """Packed documents as arguments of the model."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(1, 64, (1, sum(lengths)), generator=generator), "cu_seq_lens_q": cu_seqlens}


# The formula ----------------------------------------------------------------------------------------------------------


def context_of(number, segments, negatives, training, causal):
    """Numbers of the segments whose keys are read beside the own one, all of them (training) or the best of them."""
    if training:
        return [n for n in range(len(segments)) if number - negatives <= n < number]
    same = [n for n in range(len(segments)) if n != number and segments[n][0] == segments[number][0]]
    return [n for n in same if n < number or not causal]


def yarn_frequency(config, length):
    """transformers' own YaRN, for documents that are longer than the original context."""

    class View:
        rope_parameters = {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 256 / 16,
            "original_max_position_embeddings": 16,
        }
        head_dim, hidden_size, num_attention_heads, max_position_embeddings = config.head_dim, 32, 4, 16

        def standardize_rope_params(self):
            pass

    return ROPE_INIT_FUNCTIONS["yarn"](View(), torch.device("cpu"), seq_len=length)


def turned(config, states, place, length):
    """Rotary embeddings of `(L, H, D)` at `place` `(L,)`; the angles in float32."""
    half = config.head_dim // 2
    frequency, factor = 10_000.0 ** (-torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half)), 1.0
    if config.position_extension is not None and length > 16:
        frequency, factor = yarn_frequency(config, length)
    angle = (place.float()[:, None] * frequency)[:, None]
    turn = torch.complex(angle.cos() * factor, angle.sin() * factor)
    product = torch.complex(states[..., :half], states[..., half:]) * turn
    return torch.cat([product.real, product.imag], dim=-1)


def attention_by_hand(model, states, lengths, training):
    """The attention sublayer on `states` `(T, d)`, a query and a head at a time: `(T, d)`."""
    config, attention = model.config, model.layers[0].attention
    size, negatives, top_k = (config.attention_patterns[0][name] for name in ("size", "negatives", "top_k"))
    scheme, scaling, heads = config.position_embedding_type, config.head_dim**-0.5, config.num_attention_heads
    query, key, value = (
        project(states).unflatten(-1, (heads, -1)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    segments = [
        (number, start + offset, min(start + offset + size, start + length))
        for number, (start, length) in enumerate(zip(starts, lengths, strict=False))
        for offset in range(0, length, size)
    ]

    def bias(one_query, head, distance):  # (K,) of distances query - key
        if scheme == "alibi":
            return -torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]).double()[head] * distance.abs()
        if config.relative_attention_num_buckets:
            bucket = MPNetEncoder.relative_position_bucket(-distance, config.relative_attention_num_buckets, 20)
            return model.relative_attention_bias.weight[bucket, head]
        if scheme == "relative":
            own = attention.distance
            frequency = 10_000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float32) / 32)
            angle = distance.float()[:, None] * frequency
            sinusoid = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).double()
            keys = own.r_proj(sinusoid).unflatten(-1, (heads, -1))[:, head]
            return scaling * keys @ (one_query + own.distance_bias[head])
        return torch.zeros(len(distance)).double()

    rows = []
    for number, (document, start, end) in enumerate(segments):
        place, length = torch.arange(end - start), lengths[document]
        local_query, local_key = query[start:end], key[start:end]
        others = context_of(number, segments, negatives, training, config.is_causal)
        far = torch.cat([torch.arange(0), *(torch.arange(*segments[n][1:]) for n in others)])
        far_key = key[far]
        if scheme == "rope":  # keys at place 0: not turned, and scaled as their document is
            local_query, local_key = (turned(config, x, place, length) for x in (local_query, local_key))
            parts = [
                turned(config, key[first:last], torch.zeros(last - first), lengths[other])
                for other, first, last in (segments[n] for n in others)
            ]
            far_key = torch.cat([far_key[:0], *parts])
        u = attention.distance.content_bias if scheme == "relative" else torch.zeros(heads, config.head_dim)
        for i in range(end - start):
            contexts = []
            for head in range(heads):
                content = local_query[i, head] + u[head]
                own = place[: i + 1] if config.is_causal else place
                near = local_key[own, head] @ content * scaling + bias(query[start + i, head], head, i - own)
                chosen = far_key[:, head] @ content * scaling
                best = torch.arange(len(far))
                if not training:
                    best = chosen.argsort(descending=True)[:top_k]
                first = bias(query[start + i, head], head, torch.tensor([i]))
                weights = torch.cat([near, chosen[best] + first]).softmax(0)
                contexts.append(weights @ torch.cat([value[start + own, head], value[far[best], head]]))
            rows.append(torch.cat(contexts))
    return attention.o_proj(torch.stack(rows))


def encoder_by_hand(model, documents, training):
    lengths = documents["cu_seq_lens_q"].diff().tolist()
    config, embeddings = model.config, model.embeddings
    place = torch.cat([torch.arange(length) for length in lengths])
    states = embeddings.word_embeddings(documents["input_ids"][0]) + embeddings.token_type_embeddings.weight[0]
    if config.position_embedding_type == "absolute":
        states = states + embeddings.position_embeddings.weight[place]
    states = embeddings.norm(states)
    attention, feed_forward = model.layers
    states = attention.norm(states + attention_by_hand(model, states, lengths, training))
    return feed_forward.norm(states + feed_forward.feed_forward(states))


def gradients(model, output):
    weights = torch.linspace(-1, 1, output.numel()).double().view(output.shape)
    loss = (output * weights).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(model.parameters(), grads, strict=True)]


@pytest.mark.promise("A10")
@pytest.mark.parametrize(
    ("scheme", "causal", "training"),
    covering_first(
        [
            pytest.param(scheme, causal, training, id=f"{scheme}{'-causal' * causal}{'-training' * training}")
            for scheme in SCHEMES
            for causal in (False, True)
            for training in (True, False)
            if causal or scheme != "none"
        ]
    ),
)
@settings(max_examples=settings.default.max_examples // 6)
@given(data=st.data())
def test_both_paths_are_the_formula(build_focused, scheme, causal, training, data):
    fields = SCHEMES[scheme] | {"is_causal": causal}
    size, negatives, top_k = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 9))
    around = [0, 1, 2, size - 1, size, size + 1, 11, 19]
    lengths = data.draw(st.lists(st.sampled_from(around), min_size=1, max_size=4).filter(any))
    documents = batch(lengths)
    model = build_focused(focused(size, negatives, top_k), **fields).train(training)
    expected = encoder_by_hand(model, documents, training)
    expected_gradients = gradients(model, expected)
    most = data.draw(st.sampled_from([60, 500, 2**24]))
    for path in PATHS:
        model.set_attn_implementation(path)
        with (
            patch.object(attention_past_longembed, "MAX_SCORES", most),
            patch.object(pattern_focused_longembed, "MAX_SCORES", most),
        ):
            output = model(**documents).last_hidden_state[0]
            torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
            for ours, theirs in zip(gradients(model, output), expected_gradients, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


# What it is in the limit ----------------------------------------------------------------------------------------------


@pytest.mark.promise("A10")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("path", PATHS)
def test_without_a_memory_it_is_block_attention(build_focused, path, scheme):
    documents = batch([13, 1, 40])
    for entry, training in ((focused(7, 0, 5), True), (focused(7, 5, 0), False)):
        model, block = (
            build_focused(p, path, **SCHEMES[scheme]).train(training) for p in (entry, {"type": "block", "size": 7})
        )
        output, expected = (m(**documents).last_hidden_state for m in (model, block))
        # Angles are float32, and those of places in the segment are not those of places in the document.
        rotated = model.config.position_embedding_type == "rope"
        torch.testing.assert_close(output, expected, atol=1e-5 if rotated else 1e-12, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_with_no_positions_in_the_layer_and_all_keys_it_is_full_attention(build_focused, path):
    documents = batch([13, 1, 40])
    model, full = build_focused(focused(7, 0, 40), path), build_focused("full", path)
    output, expected = (m(**documents).last_hidden_state for m in (model, full))
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


# Who sees whom --------------------------------------------------------------------------------------------------------


def segments_that_reach(model, lengths, size):
    """For every segment of a packed batch, by gradient: the segments whose tokens its output depends on."""
    documents = batch(lengths)
    embeds = torch.randn(1, sum(lengths), 32, dtype=torch.float64, requires_grad=True)
    cu_seqlens = documents["cu_seq_lens_q"]
    output = model(inputs_embeds=embeds, cu_seq_lens_q=cu_seqlens).last_hidden_state[0]
    owner = torch.cat([1000 * number + torch.arange(length) // size for number, length in enumerate(lengths)])
    names = owner.unique()
    reached = []
    for name in names:
        (grad,) = torch.autograd.grad(output[owner == name].square().sum(), embeds, retain_graph=True)
        reached.append([n for n, other in enumerate(names) if grad[0, owner == other].any()])
    return reached


@pytest.mark.promise("A10")
@pytest.mark.parametrize("path", PATHS)
def test_in_training_the_segments_before_are_read_whosever_they_are_and_learn(build_focused, path):
    model = build_focused(focused(4, 2), path).train()
    reached = segments_that_reach(model, [8, 3, 9, 4], 4)  # segments 0 1 | 2 | 3 4 5 | 6
    assert reached == [[n for n in range(7) if number - 2 <= n <= number] for number in range(7)]


@pytest.mark.promise("A10")
@pytest.mark.parametrize("path", PATHS)
def test_an_edit_moves_those_that_have_it_in_their_context_and_no_others(build_focused, path):
    model = build_focused(focused(4, 2), path).train()
    lengths = [8, 3, 9, 4]
    documents = batch(lengths)
    before = model(**documents).last_hidden_state[0]
    bounds = [0, 4, 8, 11, 15, 19, 20, 24]
    for number in range(7):
        changed = documents["input_ids"].clone()
        changed[0, bounds[number]] = (changed[0, bounds[number]] + 5) % 60 + 1
        after = model(**documents | {"input_ids": changed}).last_hidden_state[0]
        moved = [(after - before)[start:end].any().item() for start, end in pairwise(bounds)]
        assert moved == [number <= n <= number + 2 for n in range(7)]


@pytest.mark.promise("A10")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
def test_in_evaluation_no_document_sees_another(build_focused, path, causal):
    model = build_focused(focused(4, 2, 40), path, is_causal=causal)
    reached = segments_that_reach(model, [8, 3, 9, 4], 4)
    documents = [[0, 1], [2], [3, 4, 5], [6]]
    own = [next(d for d in documents if n in d) for n in range(7)]
    assert reached == [[m for m in own[n] if m <= n or not causal] for n in range(7)]


def test_causal_training_sees_nothing_later(build_focused):
    model = build_focused(focused(4, 2), is_causal=True).train()
    embeds = torch.randn(1, 20, 32, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 9, 20], dtype=torch.int32)
    output = model(inputs_embeds=embeds, cu_seq_lens_q=cu_seqlens).last_hidden_state[0]
    for place in range(20):
        (grad,) = torch.autograd.grad(output[place].square().sum(), embeds, retain_graph=True)
        assert not grad[0, place + 1 :].any()


# The search -----------------------------------------------------------------------------------------------------------


@settings(max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_the_nearest_keys_are_those_of_a_flat_index(data):
    faiss = pytest.importorskip("faiss")
    queries, keys, top_k = (data.draw(st.integers(1, 40)) for _ in range(3))
    query, key = torch.randn(2, queries, 8), torch.randn(2, keys, 8)
    among = torch.randperm(keys)[: data.draw(st.integers(1, keys))].sort().values
    with patch.object(pattern_focused_longembed, "MAX_SCORES", data.draw(st.sampled_from([1, 100, 2**24]))):
        found = pattern_focused_longembed.nearest_keys(query, key, among, top_k)
    for head in range(2):
        index = faiss.IndexFlatIP(8)
        index.add(key[head, among].numpy())
        _, expected = index.search(query[head].numpy(), min(top_k, len(among)))
        assert found[head].tolist() == among[torch.from_numpy(expected)].tolist()


# What it costs --------------------------------------------------------------------------------------------------------


def make_inputs(length, training, dtype=torch.float32, size=64, top_k=8, negatives=2):
    leaves = [torch.randn(length, 4, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    documents = PackedDocuments(torch.tensor([0, length], dtype=torch.int32), length)
    pattern = build_pattern(focused(size, negatives, top_k))
    return AttentionInputs(*leaves, pattern, documents, scaling=0.3, dropout=0.0, training=training), leaves


@pytest.fixture
def small_steps():
    with (
        patch.object(attention_past_longembed, "MAX_SCORES", 2**15),
        patch.object(pattern_focused_longembed, "MAX_SCORES", 2**15),
    ):
        yield


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_memory_grows_with_the_length_and_not_its_square(training, small_steps):
    largest = []
    for length in (1024, 2048):
        inputs, _ = make_inputs(length, training)
        with torch.no_grad(), Allocated() as allocated:
            inputs.pattern.attend(inputs)
        largest.append(allocated.largest)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 2048**2 / 20


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_no_scores_are_kept_for_the_backward_pass(training, small_steps):
    inputs, leaves = make_inputs(1024, training)
    with KeptForBackward() as kept:
        output = inputs.pattern.attend(inputs)
    assert kept.total < 10 * 1024 * 32  # a few times query, key and value; the scores are 4 * 1024 * 192
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), leaves))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_half_precision_loses_no_more_than_a_dense_softmax_would(path, training):
    inputs, _ = make_inputs(131, training, dtype=torch.bfloat16, size=16, top_k=131)
    segment = torch.arange(131) // 16
    behind = segment[:, None] - segment[None]
    visible = (behind >= 0) & (behind <= 2) if training else behind == behind

    def dense(dtype):
        query, key, value = (x.to(dtype).transpose(0, 1) for x in inputs[:3])
        scores = (query @ key.transpose(1, 2) * 0.3).masked_fill(~visible, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(0, 1)

    expected = dense(torch.float64)
    output = KERNELS[path].function(inputs)[0]
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() <= 3 * (dense(torch.bfloat16) - expected).norm()


@pytest.mark.parametrize("path", PATHS)
def test_dropout_is_on_the_weights(path):
    inputs, _ = make_inputs(400, True)
    inputs = inputs._replace(value=torch.ones_like(inputs.value), dropout=0.5)
    output = KERNELS[path].function(inputs)[0]
    assert output.std() > 0.05
    torch.testing.assert_close(output.mean().item(), 1.0, atol=0.1, rtol=0)


def test_weights_are_those_of_the_document(build_focused):
    """In training, what goes to other documents is missing from them."""
    model = build_focused(focused(4, 2), "eager")
    input_ids = torch.randint(1, 64, (2, 8))
    evaluation = model(input_ids, output_attentions=True).attentions[0]
    torch.testing.assert_close(evaluation.sum(-1), torch.ones_like(evaluation[..., 0]), atol=1e-10, rtol=0)
    training = model.train()(input_ids, output_attentions=True).attentions[0].sum(-1)
    torch.testing.assert_close(training[0], torch.ones_like(training[0]), atol=1e-10, rtol=0)
    assert (training[1] < 1 - 1e-3).all()


# Refusals -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_combined_is_refused():
    group = {"method": "group", "original_max_position_embeddings": 64, "neighbours": 16}
    fields = {"position_embedding_type": "rope", "position_extension": group}
    message = r"^attention_patterns: 'focused' .* size=17 .* neighbours=16 .*; use neighbours >= size, or extend by"
    with pytest.raises(ValueError, match=message):
        LongEmbedConfig(attention_patterns=focused(17), **fields)
    LongEmbedConfig(attention_patterns=focused(16), **fields)


def test_a_stream_and_kernels_for_masks_are_refused(build_focused):
    with pytest.raises(ValueError, match=r"^memory: a sublayer of the pattern 'focused' reads the whole document"):
        build_focused(focused(4)).new_memory()
    with pytest.raises(
        ValueError, match=r"^attn_implementation='sdpa' computes masks alone, and the pattern 'focused'"
    ):
        build_focused(focused(4), "sdpa")(torch.ones(1, 4, dtype=torch.long))
