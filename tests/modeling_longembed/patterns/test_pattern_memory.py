"""Transformer-XL's memory against the recurrence written out: concatenate, project, softmax, remember, next segment."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import XLNetConfig, XLNetModel
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

import tests.modeling_longembed.pattern_settings as pattern_settings
from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel, attention_past_longembed, pattern_memory_longembed
from modeling_longembed.attention_longembed import KERNELS, AttentionInputs
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_registry_longembed import build_pattern
from tests.covering import covering_first
from tests.modeling_longembed.memory_use import Allocated, KeptForBackward

NEIGHBOURS, GROUP = 6, 3
SCHEMES = pattern_settings.SCHEMES | {
    "rope+group": {
        "position_embedding_type": "rope",
        "position_extension": {
            "method": "group",
            "original_max_position_embeddings": 16,
            "factor": GROUP,
            "neighbours": NEIGHBOURS,
            "keep_short": False,
        },
    },
}
PRE_NORM = {"norm_placement": "pre", "final_norm": True, "first_attention_norm": True}
KERNELS_OF_MEMORY = ("longembed_varlen", "eager")


def remember(size, memory):
    return {"type": "memory", "size": size, "memory": memory}


@pytest.fixture(scope="module")
def build_memory(build_tiny_model):
    """`build(patterns, **fields)`: an encoder in float64 without dropout; biases are drawn too, not zero."""

    def build(patterns, cls=LongEmbedModel, kernel=None, **fields):
        fields = {"hidden_dropout_prob": 0.0, "max_position_embeddings": 256} | fields
        model = build_tiny_model(cls, kernel, attention_patterns=patterns, **fields).double()
        for name, parameter in model.named_parameters():
            if "bias" in name:  # u and v of Transformer-XL among them
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return build


# The recurrence, written out ------------------------------------------------------------------------------------------


def sinusoid(place, width):
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = place.float()[..., None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2).double()


def turned(states, place):
    """Rotary embeddings of `(H, L, D)`, channels t and t + D/2 as one complex number; angles in float32."""
    half = states.shape[-1] // 2
    angle = place.float()[:, None] * 10_000.0 ** (-torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    product = torch.complex(states[..., :half], states[..., half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat([product.real, product.imag], dim=-1)


def scores_of(model, attention, query, key, i, j):
    """Scores `(H, Q, K)` of queries at the places `i` and keys at `j`, pair by pair, for every scheme."""
    config, distance = model.config, i[:, None] - j[None, :]
    scheme, scaling = config.position_embedding_type, config.head_dim**-0.5
    if scheme == "rope":
        near = turned(query, i) @ turned(key, j).transpose(1, 2)
        if config.position_extension is None:
            return near * scaling
        shift, far_key = NEIGHBOURS - NEIGHBOURS // GROUP, turned(key, j // GROUP).transpose(1, 2)
        left, right = (turned(query, i // GROUP + move) @ far_key for move in (shift, -shift))
        return torch.where(distance.abs() < NEIGHBOURS, near, torch.where(distance > 0, left, right)) * scaling
    if scheme == "relative":
        own = attention.distance
        keys = own.r_proj(sinusoid(distance, config.hidden_size)).unflatten(-1, (-1, config.head_dim))  # (Q, K, H, D)
        content = torch.einsum("hqd,hkd->hqk", query + own.content_bias[:, None], key)
        return scaling * (content + torch.einsum("hqd,qkhd->hqk", query + own.distance_bias[:, None], keys))
    scores = query @ key.transpose(1, 2) * scaling
    if scheme == "alibi":
        scores = scores - torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]).double()[:, None, None] * distance.abs()
    if config.relative_attention_num_buckets:
        bucket = MPNetEncoder.relative_position_bucket(-distance, config.relative_attention_num_buckets, 20)
        scores = scores + model.relative_attention_bias.weight[bucket].permute(2, 0, 1)
    return scores


def recurrence(model, input_ids):
    """One document `(L,)` segment by segment, with what each sublayer remembers and no gradient into that: `(L, d)`.

    All sublayers have segments of one size.
    """
    config, embeddings = model.config, model.embeddings
    patterns = iter(config.attention_patterns * len(input_ids))
    size, outputs = config.attention_patterns[0]["size"], []
    remembered = [torch.zeros(0, config.hidden_size).double() for _ in model.layers]
    for start in range(0, len(input_ids), size):
        place = torch.arange(start, min(start + size, len(input_ids)))
        states = embeddings.word_embeddings(input_ids[place]) + embeddings.token_type_embeddings.weight[0]
        if config.position_embedding_type == "absolute":
            states = states + embeddings.position_embeddings.weight[place]
        if config.position_embedding_type == "sinusoidal":
            states = states + sinusoid(place, config.hidden_size)
        states = embeddings.norm(states)
        for number, layer in enumerate(model.layers):
            read = layer.norm(states) if config.norm_placement == "pre" else states
            if layer.attention is None:
                added = layer.feed_forward(read)
            else:
                attention, memory = layer.attention, next(patterns)["memory"]
                both = torch.cat([remembered[number], read])
                before = torch.arange(start - len(remembered[number]), place[-1] + 1)
                query, key, value = (
                    project(x).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
                    for project, x in ((attention.q_proj, read), (attention.k_proj, both), (attention.v_proj, both))
                )
                scores = scores_of(model, attention, query, key, place, before)
                if config.is_causal:
                    scores = scores.masked_fill(before[None] > place[:, None], float("-inf"))
                added = attention.o_proj((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))
                remembered[number] = both[len(both) - min(memory, len(both)) :].detach()
            states = states + added
            states = layer.norm(states) if config.norm_placement == "post" else states
        outputs.append(states if model.final_norm is None else model.final_norm(states))
    return torch.cat(outputs)


def packed(lengths, seed=0):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (1, sum(lengths)), generator=generator), cu_seqlens


def gradients(model, output):
    weights = torch.linspace(-1, 1, output.numel()).double().view(output.shape)
    loss = (output * weights).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(model.parameters(), grads, strict=True)]


def assert_gradients(model, output, expected):
    pairs = list(zip(gradients(model, output), expected, strict=True))
    scale = max(theirs.abs().max().item() for _, theirs in pairs)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-10 * max(1.0, scale), rtol=0)


FIELDS = [
    pytest.param(SCHEMES[scheme] | placement | {"is_causal": causal}, id=case.id, marks=case.marks)
    for case in covering_first(
        [
            pytest.param(scheme, placement, causal, id=f"{scheme}{'-pre' * bool(placement)}{'-causal' * causal}")
            for scheme in SCHEMES
            for placement in ({}, PRE_NORM)
            for causal in (False, True)
            if causal or scheme != "none"
        ]
    )
    for scheme, placement, causal in [case.values]
]


@pytest.mark.promise("A9")
@pytest.mark.parametrize("fields", FIELDS)
@settings(max_examples=settings.default.max_examples // 6)
@given(data=st.data())
def test_a_document_at_once_is_the_recurrence_segment_by_segment(build_memory, fields, data):
    size = data.draw(st.integers(1, 9))
    memories = data.draw(st.lists(st.sampled_from([0, 1, size, 2 * size + 1, 40]), min_size=2, max_size=2))
    around = [1, 2, max(1, size - 1), size, size + 1, 13, 31]
    lengths = data.draw(st.lists(st.sampled_from(around), min_size=1, max_size=3))
    input_ids, cu_seqlens = packed(lengths)
    model = build_memory([remember(size, memory) for memory in memories], **fields)
    expected = torch.cat([recurrence(model, document) for document in input_ids[0].split(lengths)])
    expected_gradients = gradients(model, expected)
    for kernel in KERNELS_OF_MEMORY:
        model.set_attn_implementation(kernel)
        with patch.object(attention_past_longembed, "MAX_SCORES", data.draw(st.sampled_from([60, 500, 2**24]))):
            output = model(input_ids, cu_seq_lens_q=cu_seqlens).last_hidden_state[0]
            torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
            assert_gradients(model, output, expected_gradients)
            with torch.no_grad():  # one projection serves own keys and memory alike
                output = model(input_ids, cu_seq_lens_q=cu_seqlens).last_hidden_state[0]
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)


@pytest.mark.promise("A9")
def test_the_memory_is_that_of_xlnet(build_memory):
    """XLNet reads a segment both ways and its memory, at relative positions: the same model, chunk by chunk."""
    sizes = {"d_model": 32, "n_head": 4, "d_inner": 48, "n_layer": 2}
    config = XLNetConfig(vocab_size=64, **sizes, attn_type="bi", mem_len=11, dropout=0.0, initializer_range=0.3)
    config.layer_norm_eps = 1e-12
    theirs = XLNetModel(config).eval().double()
    model = build_memory(
        remember(8, 11),
        position_embedding_type="relative",
        embedding_norm=False,
        type_vocab_size=0,
        attention_bias=False,
    )
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.copy_(theirs.word_embedding.weight)
        for attention, feed_forward, layer in zip(model.layers[::2], model.layers[1::2], theirs.layer, strict=True):
            own, other = attention.attention, layer.rel_attn
            for name in ("q", "k", "v"):
                getattr(own, f"{name}_proj").weight.copy_(getattr(other, name).flatten(1).T)
            own.o_proj.weight.copy_(other.o.flatten(1))
            half = torch.arange(32).view(2, 16).T.flatten()  # sines first there, sine and cosine in turn here
            own.distance.r_proj.weight.copy_(other.r.flatten(1).T[:, half])
            own.distance.content_bias.copy_(other.r_w_bias)
            own.distance.distance_bias.copy_(other.r_r_bias)
            attention.norm.load_state_dict(other.layer_norm.state_dict())
            feed_forward.norm.load_state_dict(layer.ff.layer_norm.state_dict())
            feed_forward.feed_forward.up_proj.load_state_dict(layer.ff.layer_1.state_dict())
            feed_forward.feed_forward.down_proj.load_state_dict(layer.ff.layer_2.state_dict())
        input_ids, mems, parts = torch.randint(1, 64, (2, 45)), None, []
        for chunk in input_ids.split(8, dim=1):
            output = theirs(chunk, mems=mems, use_mems=True)
            mems = output.mems
            parts.append(output.last_hidden_state)
        expected = torch.cat(parts, dim=1)
        output = model(input_ids).last_hidden_state
    # Both take the sinusoids in float32, each rounding in its own way.
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
    assert (build_memory(remember(8, 0), position_embedding_type="relative")(input_ids)[0] - expected).abs().max() > 0.1


# What it is in the limit ----------------------------------------------------------------------------------------------


@pytest.mark.promise("A9")
@pytest.mark.parametrize("fields", [p for p in FIELDS if p.values[0].get("is_causal")])
def test_one_causal_layer_that_remembers_all_is_full_attention(build_memory, fields):
    input_ids = torch.randint(1, 64, (2, 61))
    model, full = (build_memory(p, num_hidden_layers=1, **fields) for p in (remember(8, 61), "full"))
    model.load_state_dict(full.state_dict())
    expected = full(input_ids).last_hidden_state
    torch.testing.assert_close(model(input_ids).last_hidden_state, expected, atol=1e-12, rtol=0)
    memory, parts = model.new_memory(2), []
    for chunk in input_ids.split(16, dim=1):
        output = model(chunk, memory=memory)
        memory = output.memory
        parts.append(output.last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS_OF_MEMORY)
def test_no_memory_is_block_attention(build_memory, kernel):
    input_ids, cu_seqlens = packed([13, 1, 40])
    outputs = []
    for entry in (remember(7, 0), {"type": "block", "size": 7}):
        model = build_memory(entry, kernel=kernel, position_embedding_type="rope")
        outputs.append(model(input_ids, cu_seq_lens_q=cu_seqlens).last_hidden_state)
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)


# Where the gradient goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS_OF_MEMORY)
def test_no_gradient_reaches_what_is_remembered_and_all_of_it_is_seen(build_memory, kernel):
    model = build_memory(remember(8, 8), kernel=kernel)
    embeds = torch.randn(1, 32, 32, dtype=torch.float64, requires_grad=True)
    output = model(inputs_embeds=embeds).last_hidden_state
    (grad,) = torch.autograd.grad(output[:, 16:24].square().sum(), embeds)
    assert grad[:, 16:24].abs().min() > 0
    assert not grad[:, :16].any()
    assert not grad[:, 24:].any()
    changed = embeds.detach().clone()
    changed[:, 15, 0] += 1  # remembered in the first sublayer, and from before it in the second
    assert (model(inputs_embeds=changed).last_hidden_state[:, 16:24] - output[:, 16:24]).abs().min() > 1e-6
    changed[:, 15, 0] -= 1
    changed[:, 7, 0] += 1  # two segments back: by way of two sublayers
    assert (model(inputs_embeds=changed).last_hidden_state[:, 16:24] - output[:, 16:24]).abs().max() > 1e-6
    assert (model(inputs_embeds=changed).last_hidden_state[:, 24:] - output[:, 24:]).abs().max() < 1e-12


def without_gradient(function):
    def call(*args):
        with torch.no_grad():
            return function(*args)

    return call


def test_a_memory_carries_no_gradient_and_the_projections_learn_from_it(build_memory):
    model = build_memory(remember(8, 8), num_hidden_layers=1)
    input_ids = torch.randint(1, 64, (1, 16))
    memory = model(input_ids[:, :8], memory=model.new_memory()).memory
    assert not any(tensor.requires_grad for tensor in (*memory.states, memory.seen, memory.pooled))
    attention = model.layers[0].attention
    loss = model(input_ids[:, 8:], memory=memory).last_hidden_state.square().sum()
    grads = torch.autograd.grad(loss, [attention.k_proj.weight, attention.v_proj.weight], retain_graph=True)
    with patch.object(
        pattern_memory_longembed, "project_past", without_gradient(pattern_memory_longembed.project_past)
    ):
        loss = model(input_ids[:, 8:], memory=memory).last_hidden_state.square().sum()
        others = torch.autograd.grad(loss, [attention.k_proj.weight, attention.v_proj.weight])
    for grad, other in zip(grads, others, strict=True):
        assert (grad - other).norm() > 0.01 * grad.norm()


def test_no_document_sees_another(build_memory):
    model = build_memory(remember(4, 9))
    lengths = [9, 30, 1, 12]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    embeds = torch.randn(1, sum(lengths), 32, dtype=torch.float64, requires_grad=True)
    output = model(inputs_embeds=embeds, cu_seq_lens_q=cu_seqlens).last_hidden_state
    for number, (start, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        (grad,) = torch.autograd.grad(output[:, start:end].square().sum(), embeds, retain_graph=True)
        assert not grad[:, :start].any()
        assert not grad[:, end:].any()
        changed = torch.where(torch.arange(sum(lengths))[:, None] == start, embeds.flip(-1), embeds)  # and by value
        moved = (model(inputs_embeds=changed, cu_seq_lens_q=cu_seqlens).last_hidden_state - output).abs()[0].amax(-1)
        assert moved[start] > 0, number
        assert not moved[:start].any()
        assert not moved[end:].any()


# Pieces ---------------------------------------------------------------------------------------------------------------


MIXED = [remember(4, 11), {"type": "block", "size": 2}, remember(2, 3), remember(4, 0)]


def streamed(model, documents, cuts, padding):
    """The documents in chunks of up to `cuts` tokens; states of each `(L, d)`, last embeddings, memories.

    A document that has ended has no tokens in a chunk: of a packed batch, or of a padded one (on either side).
    """
    memory, start = model.new_memory(len(documents)), 0
    states, memories = [[] for _ in documents], []
    for cut in cuts:
        chunks = [document[start : start + cut] for document in documents]
        lengths = [len(chunk) for chunk in chunks]
        if padding is None:
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            output = model(torch.cat(chunks)[None], cu_seq_lens_q=cu_seqlens, memory=memory)
            parts = output.last_hidden_state[0].split(lengths)
        else:
            ids, mask = torch.zeros(2, len(chunks), max(lengths), dtype=torch.long)
            for number, chunk in enumerate(chunks):
                at = slice(0, len(chunk)) if padding == "right" else slice(max(lengths) - len(chunk), None)
                ids[number, at], mask[number, at] = chunk, 1
            output = model(ids, attention_mask=mask, memory=memory)
            parts = [output.last_hidden_state[number][mask[number] == 1] for number in range(len(chunks))]
        for list_of_states, part in zip(states, parts, strict=True):
            list_of_states.append(part)
        memory, start = output.memory, start + cut
        memories.append(memory)
    return [torch.cat(parts) for parts in states], output.pooler_output, memories


@pytest.mark.promise("A9")
@pytest.mark.parametrize("fields", FIELDS)
@settings(max_examples=settings.default.max_examples // 12)
@given(data=st.data())
def test_chunks_are_the_whole(build_memory, fields, data):
    kernel, padding = data.draw(st.sampled_from(KERNELS_OF_MEMORY)), data.draw(st.sampled_from([None, "right", "left"]))
    pooling = data.draw(st.sampled_from(["mean", "last", "weighted_mean"]))
    model = build_memory(MIXED, kernel=kernel, num_hidden_layers=4, pooling=pooling, **fields)
    cuts = data.draw(st.lists(st.sampled_from([4, 8, 12, 20]), min_size=1, max_size=5))
    lengths = data.draw(st.lists(st.integers(0, sum(cuts)), min_size=1, max_size=3).filter(any))
    documents = list(packed(lengths)[0][0].split(lengths))
    cuts = [cut for n, cut in enumerate(cuts) if sum(cuts[:n]) < max(lengths)]
    states, embeddings, _ = streamed(model, documents, cuts, padding)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    whole = model(torch.cat(documents)[None], cu_seq_lens_q=cu_seqlens)
    torch.testing.assert_close(torch.cat(states), whole.last_hidden_state[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(embeddings, whole.pooler_output, atol=1e-10, rtol=0)
    assert_gradients(model, torch.cat(states), gradients(model, whole.last_hidden_state[0]))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "weighted_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_of_a_stream_in_every_pooling(build_memory, pooling, dtype):
    model = build_memory(MIXED, num_hidden_layers=4, pooling=pooling).to(dtype)
    documents = list(packed([61, 0, 8, 33])[0][0].split([61, 0, 8, 33]))
    with torch.no_grad():
        _, embeddings, memories = streamed(model, documents, [16, 4, 24, 20], "right")
        expected = [model(document[None]).pooler_output[0] for document in documents if len(document)]
    expected.insert(1, torch.zeros_like(expected[0]))
    torch.testing.assert_close(embeddings, torch.stack(expected), atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)
    assert memories[-1].seen.tolist() == [61, 0, 8, 33]
    assert {states.dtype for states in memories[-1].states} == {dtype}


@pytest.mark.parametrize(
    "extension",
    [
        {"method": "restart", "period": 4},
        {"method": "repeat"},
        {"method": "interpolate", "keep_short": False},
        {"method": "yarn", "keep_short": False},
        {"method": "linear", "keep_short": False},
        {"method": "ntk", "keep_short": False},
        {"method": "theta", "keep_short": False},
    ],
    ids=lambda extension: extension["method"],
)
def test_extensions_that_do_not_ask_for_the_length(build_memory, extension):
    scheme = "rope" if extension["method"] in ("yarn", "linear", "ntk", "theta") else "absolute"
    extension = extension | {"original_max_position_embeddings": 32}
    model = build_memory(MIXED, num_hidden_layers=4, position_embedding_type=scheme, position_extension=extension)
    document = torch.randint(1, 64, (61,))
    states, _, _ = streamed(model, [document], [8, 40, 16], None)
    torch.testing.assert_close(states[0], model(document[None]).last_hidden_state[0], atol=1e-10, rtol=0)


def test_a_slot_that_is_reset_begins_a_new_document(build_memory):
    model = build_memory(MIXED, num_hidden_layers=4)
    documents = torch.randint(1, 64, (3, 12))
    for first in (12, 9):  # the old document may have ended anywhere
        memory = model(documents[:2, :first], memory=model.new_memory(2)).memory
        memory = memory.reset(torch.tensor([False, True]))
        if first == 12:
            output = model(torch.stack([documents[0], documents[2]]), memory=memory)
        else:
            mask = torch.tensor([[0] * 12, [1] * 12])
            output = model(documents[[0, 2]], attention_mask=mask, memory=memory)
        alone = model(documents[2:])
        torch.testing.assert_close(output.last_hidden_state[1], alone.last_hidden_state[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(output.pooler_output[1], alone.pooler_output[0], atol=1e-12, rtol=0)
        assert output.memory.seen.tolist() == [24 if first == 12 else 9, 12]
        (grad,) = torch.autograd.grad(output.pooler_output[1].sum(), model.embeddings.word_embeddings.weight)
        assert grad.isfinite().all()


def test_masked_language_models_return_the_memory_too(build_memory):
    model = build_memory(MIXED, cls=LongEmbedForMaskedLM, num_hidden_layers=4)
    input_ids = torch.randint(1, 64, (1, 20))
    memory, parts = model.model.new_memory(), []
    for chunk in input_ids.split(8, dim=1):
        output = model(chunk, memory=memory)
        memory = output.memory
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids).logits, atol=1e-10, rtol=0)
    assert model(input_ids).memory is None


def test_under_autocast_and_with_gradient_checkpointing(build_memory):
    model = build_memory(remember(8, 8)).float().train()
    input_ids = torch.randint(1, 64, (2, 24))
    with torch.autocast("cpu", torch.bfloat16):
        memory = model(input_ids[:, :16], memory=model.new_memory(2)).memory
        output = model(input_ids[:, 16:], memory=memory)
        whole = model(input_ids)
    cosine = torch.cosine_similarity(output.pooler_output, whole.pooler_output)
    assert (cosine > 0.999).all()
    memory = model(input_ids[:, :16], memory=model.new_memory(2)).memory
    weight = model.layers[0].attention.k_proj.weight
    plain, checkpointed = [], []
    for grads, switch in ((plain, lambda: None), (checkpointed, model.gradient_checkpointing_enable)):
        switch()
        output = model(input_ids[:, 16:], memory=memory)
        grads += torch.autograd.grad(output.last_hidden_state.square().sum(), weight)
        grads.append(output.memory.states[0])
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


# What it costs --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("A9")
@pytest.mark.parametrize("scheme", ["rope", "rope+group", "alibi", "relative"])
def test_a_stream_is_encoded_at_constant_memory(build_memory, scheme):
    model = build_memory([remember(16, 40), {"type": "block", "size": 8}], **SCHEMES[scheme])
    memory, held, largest = model.new_memory(), [], []
    for chunk in torch.randint(1, 64, (1, 64 * 12)).split(64, dim=1):
        with torch.no_grad(), Allocated() as allocated:
            memory = model(chunk, memory=memory).memory
        held.append(sum(states.untyped_storage().nbytes() for states in (*memory.states, memory.seen, memory.pooled)))
        largest.append(allocated.largest)
    assert held[0] == held[-1] == 8 * (40 * 32 + 1 + 32)
    assert largest[1] == largest[2] == largest[-1]


def make_inputs(length, size=32, memory=64, dtype=torch.float32):
    leaves = [torch.randn(length, 4, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    documents = PackedDocuments(torch.tensor([0, length], dtype=torch.int32), length)
    return AttentionInputs(*leaves, build_pattern(remember(size, memory)), documents, scaling=0.3, dropout=0.0), leaves


def test_memory_grows_with_the_length_and_not_its_square():
    largest = []
    for length in (2048, 4096):
        with torch.no_grad(), Allocated() as allocated, patch.object(attention_past_longembed, "MAX_SCORES", 2**15):
            inputs, _ = make_inputs(length)
            inputs.pattern.attend(inputs)
        largest.append(allocated.largest)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 4096**2 / 50


def test_no_scores_are_kept_for_the_backward_pass():
    inputs, leaves = make_inputs(2048)
    with patch.object(attention_past_longembed, "MAX_SCORES", 2**15), KeptForBackward() as kept:
        output = inputs.pattern.attend(inputs)
    assert kept.total < 10 * 2048 * 32  # a few times query, key and value; the scores would be 24 times
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), leaves))


@pytest.mark.parametrize("kernel", KERNELS_OF_MEMORY)
def test_half_precision_loses_no_more_than_a_dense_softmax_would(kernel):
    inputs, _ = make_inputs(131, size=16, memory=20, dtype=torch.bfloat16)
    place = torch.arange(131)
    start = place // 16 * 16
    visible = (place[None] >= start[:, None] - 20) & (place[None] < start[:, None] + 16)

    def dense(dtype):
        query, key, value = (x.to(dtype).transpose(0, 1) for x in inputs[:3])
        scores = (query @ key.transpose(1, 2) * 0.3).masked_fill(~visible, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(0, 1)

    expected = dense(torch.float64)
    output = KERNELS[kernel].function(inputs)[0]
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() <= 3 * (dense(torch.bfloat16) - expected).norm()


@pytest.mark.parametrize("kernel", KERNELS_OF_MEMORY)
def test_dropout_is_on_the_weights(kernel):
    inputs, _ = make_inputs(400, size=64, memory=64)
    inputs = inputs._replace(value=torch.ones_like(inputs.value), dropout=0.5)
    output = KERNELS[kernel].function(inputs)[0]
    assert output.std() > 0.05
    torch.testing.assert_close(output.mean().item(), 1.0, atol=0.1, rtol=0)


# Refusals -------------------------------------------------------------------------------------------------------------


def extended(method, **more):
    return {"position_extension": {"method": method, "original_max_position_embeddings": 32} | more}


@pytest.mark.parametrize(
    ("patterns", "fields", "message"),
    [
        ([remember(4, 4), "full"], {}, "memory: a sublayer of the pattern 'full' reads the whole document"),
        ([remember(4, 4), {"type": "sliding", "window": 4}], {}, "memory: a sublayer of the pattern 'sliding' reads"),
        (
            remember(4, 4),
            {"position_embedding_type": "rope"} | extended("dynamic"),
            "memory: position_extension 'dynamic' depends on the length .*; use 'yarn' with keep_short=false",
        ),
        (
            remember(4, 4),
            {"position_embedding_type": "rope"} | extended("yarn"),
            "memory: position_extension 'yarn' with keep_short=true depends on the length .*; set keep_short=false",
        ),
        (
            remember(4, 4),
            {"token_weighting": "generalized_max"},
            "memory: token_weighting='generalized_max' depends on the whole document, .*; use .*'none'",
        ),
    ],
)
def test_models_that_cannot_be_computed_in_chunks_are_refused(build_memory, patterns, fields, message):
    model = build_memory(patterns, **fields)
    with pytest.raises(ValueError, match=f"^{message}"):
        model.new_memory()
    memory = build_memory(remember(4, 4)).new_memory()
    with pytest.raises(ValueError, match=f"^{message}"):
        model(torch.ones(1, 4, dtype=torch.long), memory=memory)


def test_layerdrop_is_refused_in_training(build_memory):
    model = build_memory(remember(4, 4), layerdrop=0.5).train()
    with pytest.raises(ValueError, match=r"^memory: layerdrop=0.5 drops sublayers .*; set layerdrop=0"):
        model.new_memory()
    model.eval().new_memory()


def test_chunks_that_do_not_fit_are_refused(build_memory):
    model = build_memory([remember(4, 4), {"type": "block", "size": 6}], max_position_embeddings=32)
    ids = torch.randint(1, 64, (2, 12))
    memory = model(ids[:, :9], memory=model.new_memory(2)).memory
    with pytest.raises(ValueError, match=r"^memory: document 0 continues after 9 tokens, .* not a multiple of 12"):
        model(ids, memory=memory)
    memory = model(ids, memory=model.new_memory(2)).memory
    with pytest.raises(ValueError, match=r"^memory holds 2 documents and the input 1; give a chunk of each"):
        model(ids[:1], memory=memory)
    memory = model(ids, memory=memory).memory
    with pytest.raises(ValueError, match=r"^memory: document 0 has 36 tokens .* has 32 rows; extend the context"):
        model(ids, memory=memory)
    with pytest.raises(ValueError, match=r"^memory does not fit this model's attention_patterns; begin with"):
        model(ids, memory=build_memory(remember(4, 5)).new_memory(2))
    for more in ({"position_ids": torch.arange(12)[None]}, {"output_attentions": True}):
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match=r"^memory: positions continue from .* leave position_ids"):
            model(ids, memory=memory, **more)


def test_kernels_that_compute_masks_alone_refuse(build_memory):
    with pytest.raises(ValueError, match=r"^attn_implementation='sdpa' computes masks alone, and the pattern 'memory'"):
        build_memory(remember(4, 4), kernel="sdpa")


def test_the_predicate_is_segments_and_what_is_before_them():
    pattern = build_pattern(remember(3, 2))
    documents = PackedDocuments(torch.tensor([0, 8], dtype=torch.int32), 8)
    inputs = AttentionInputs(*torch.zeros(3, 8, 1, 1), pattern, documents, scaling=1.0, dropout=0.0)
    seen = inputs.mask(*[inputs.places(slice(0, 8))] * 2)[0].long()
    assert (
        seen.tolist()
        == [[1, 1, 1, 0, 0, 0, 0, 0]] * 3 + [[0, 1, 1, 1, 1, 1, 0, 0]] * 3 + [[0, 0, 0, 0, 1, 1, 1, 1]] * 2
    )
    assert pattern.reach(documents) == 4
