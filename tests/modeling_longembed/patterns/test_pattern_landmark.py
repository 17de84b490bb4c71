"""Landmark attention against the grouped softmax of the paper, written out query by query."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_longembed import LongEmbedModel, pattern_landmark_longembed
from modeling_longembed.attention_longembed import KERNELS
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_base_longembed import AttentionInputs
from modeling_longembed.pattern_landmark_longembed import LandmarkAttention, Landmarks
from tests.modeling_longembed.memory_use import Allocated, KeptForBackward
from tests.modeling_longembed.pattern_settings import refused
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, save_checkpoint

HEADS, DIM, SCALING = 3, 8, 0.7
PATHS = ("eager", "longembed_varlen")


def make_inputs(lengths, size=5, top_k=2, dtype=torch.float64, **more):
    """Random inputs of documents whose landmarks stand in them already."""
    states = [torch.randn(sum(lengths), HEADS, DIM, dtype=dtype, requires_grad=torch.is_grad_enabled()) for _ in "qkv"]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    pattern = LandmarkAttention(size=size, top_k=top_k)
    return AttentionInputs(
        *states, pattern, PackedDocuments(cu_seqlens, max(lengths)), scaling=SCALING, dropout=0.0, **more
    )


def run(inputs, path):
    return KERNELS[path].function(inputs)[0]


def blocks_of(length, size):
    """Words and landmark of each block: the landmark is the last token of a block."""
    blocks = [list(range(start, min(start + size, length))) for start in range(0, length, size)]
    return [(block[:-1], block[-1]) for block in blocks]


def chosen(query, key, size, top_k, causal, head):
    """For each block the others that its mean query, or under a causal mask its first one, scores highest."""
    blocks = blocks_of(len(query), size)
    choices = []
    for number, (words, landmark) in enumerate(blocks):
        own = query[[*words, landmark], head]
        summary = own[0] if causal else own.mean(0)
        others = [c for c in range(len(blocks)) if (c < number if causal else c != number)]
        scores = {c: (summary @ key[blocks[c][1], head]).item() for c in others}
        choices.append(sorted(others, key=lambda c: -scores[c])[:top_k])
    return choices


def grouped_softmax(inputs):
    """Mohtashami & Jaggi, section 3.1, token by token: context `(T, H, D)` and weights `(H, L, L)` of each document.

    A word of another block has the weight of its block's landmark in the main group times its own within its block.
    """
    size, causal = inputs.pattern.size, inputs.causal
    contexts, all_weights = [], []
    for start, end in pairwise(inputs.documents.cu_seqlens.tolist()):
        query, key, value = (x[start:end].double() for x in inputs[:3])
        length, blocks = end - start, blocks_of(end - start, size)
        rows = []
        for head in range(HEADS):
            choices = chosen(query, key, size, inputs.pattern.top_k, causal, head)
            for i in range(length):
                own, scores = i // size, key[:, head] @ query[i, head] * SCALING
                words = [j for j in blocks[own][0] if j <= i or not causal]
                others = [c for c in range(len(blocks)) if c != own and (c < own or not causal)]
                if not inputs.training:
                    others = [c for c in others if c in choices[own]]
                main = scores[[*words, *(blocks[c][1] for c in others)]].softmax(0)
                row = torch.zeros(length, dtype=torch.float64)
                row = row.index_put((torch.tensor(words, dtype=torch.long),), main[: len(words)])
                for share, c in zip(main[len(words) :], others, strict=True):
                    inside = torch.tensor(blocks[c][0])
                    row = row.index_put((inside,), share * scores[inside].softmax(0))
                rows.append(row)
        weights = torch.stack(rows).view(HEADS, length, length) if length else torch.zeros(HEADS, 0, 0).double()
        all_weights.append(weights)
        contexts.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(contexts), all_weights


def gradients(output, inputs):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs[:3], retain_graph=True)


def assert_equal_with_gradients(output, expected, inputs):
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    for ours, theirs in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


# A document that the model has lengthened never ends in a block of a landmark alone.
def lengthened(words, size):
    return words + -(-words // (size - 1))


@pytest.mark.promise("A8")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=settings.default.max_examples // 5)
@given(data=st.data())
def test_equals_the_grouped_softmax(path, causal, training, data):
    size, top_k = data.draw(st.integers(2, 7)), data.draw(st.integers(0, 3))
    words = [0, 1, 2, size - 2, size - 1, size, size + 1, 2 * size - 2, 11, 13, 23]
    lengths = data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=3).filter(any))
    inputs = make_inputs([lengthened(n, size) for n in lengths], size, top_k, causal=causal, training=training)
    budget = data.draw(st.sampled_from([1, 500, 2**24]))
    with patch.multiple(pattern_landmark_longembed, MAX_SCORES=budget, MAX_UNFUSED_SCORES=budget):
        assert_equal_with_gradients(run(inputs, path), grouped_softmax(inputs)[0], inputs)


@pytest.mark.promise("A8")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
def test_rows_sum_to_1_and_landmarks_get_nothing(causal, training):
    lengths = [lengthened(words, 5) for words in (30, 1, 4, 9)]
    inputs = make_inputs(lengths, causal=causal, training=training)
    weights, expected = KERNELS["eager"].function(inputs)[1], grouped_softmax(inputs)[1]
    for ours, theirs, length in zip(weights, expected, lengths, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]), atol=1e-12, rtol=0)
        assert not ours[..., [landmark for _, landmark in blocks_of(length, 5)]].any()


@pytest.mark.promise("A8")
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("path", PATHS)
def test_with_every_block_chosen_evaluation_is_training(path, causal):
    lengths, size = [25, 45, 2], 5  # 5, 9 and 1 blocks
    inputs = make_inputs(lengths, size, top_k=8, causal=causal)
    training = run(inputs._replace(training=True), path)
    assert torch.equal(run(inputs, path), training)

    fewer = run(inputs._replace(pattern=LandmarkAttention(size=size, top_k=7)), path)
    differs = ((fewer - training).abs() > 1e-6).flatten(1).any(1)
    assert not differs[:25].any()
    assert not differs[70:].any()
    # Under a causal mask only the last block has 8 others: all but it read everything, as chosen.
    assert torch.equal(differs[25:70].view(9, 5).all(1), torch.arange(9) >= (8 if causal else 0))
    same = ~differs
    torch.testing.assert_close(fewer[same], training[same], atol=1e-12, rtol=0)


# Where landmarks stand ------------------------------------------------------------------------------------------------


@given(words=st.lists(st.integers(0, 14), min_size=1, max_size=4).filter(any), size=st.integers(2, 6), data=st.data())
def test_a_landmark_follows_every_block_and_the_last_word(words, size, data):
    rows, cu_seqlens, token = [], [0], 0  # (token, is it a landmark)
    for length in words:
        for place in range(length):
            rows.append((token, False))
            if (place + 1) % (size - 1) == 0 or place + 1 == length:
                rows.append((token, True))
            token += 1
        cu_seqlens.append(len(rows))
    marked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=token, max_size=token)))
    documents = PackedDocuments(torch.tensor([0, *words]).cumsum(0).to(torch.int32), max(words), marked)
    landmarks = Landmarks.insert(documents, size)
    assert [*zip(landmarks.source.tolist(), landmarks.is_landmark.tolist(), strict=True)] == rows
    assert landmarks.tokens.tolist() == [row for row, (_, is_landmark) in enumerate(rows) if not is_landmark]
    assert landmarks.documents.cu_seqlens.tolist() == cu_seqlens
    assert landmarks.documents.max_seqlen == max(end - start for start, end in pairwise(cu_seqlens))
    expected = [bool(marked[token]) and not is_landmark for token, is_landmark in rows]
    assert landmarks.documents.is_global.tolist() == expected


# In a model -----------------------------------------------------------------------------------------------------------

SCHEMES = {
    "absolute": {},
    "restart": {"position_extension": {"method": "restart", "original_max_position_embeddings": 8, "period": 8}},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "rope": {"position_embedding_type": "rope"},
    "rope+dynamic": {
        "position_embedding_type": "rope",
        "position_extension": {"method": "dynamic", "original_max_position_embeddings": 16},
    },
}
LENGTHS = (23, 1, 4, 9)


@pytest.fixture
def build_landmark(build_tiny_model):
    """`build(patterns, like=None, **fields)`: an encoder in float64, with the weights that `like` has."""

    def build(patterns, like=None, kernel=None, **fields):
        fields = {"hidden_dropout_prob": 0.0, "max_position_embeddings": 64} | fields
        model = build_tiny_model(attention_patterns=patterns, attn_implementation=kernel, **fields).double()
        if like is not None:
            model.load_state_dict(like.state_dict(), strict=False)
        return model

    return build


def batch(lengths=LENGTHS):
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {
        "input_ids": torch.randint(1, 64, mask.shape),
        "token_type_ids": torch.randint(0, 2, mask.shape),
        "attention_mask": mask,
    }


def landmark(size=5, top_k=1):
    return {"type": "landmark", "size": size, "top_k": top_k}


def first_attention(model, documents):
    """What the first attention sublayer of the model reads."""
    pattern, seen = type(model.layers[0].attention.pattern), []
    original = pattern.attend

    def attend(self, inputs):
        seen.append(inputs)
        return original(self, inputs)

    with patch.object(pattern, "attend", attend):
        model(**documents)
    return seen[0]


@pytest.mark.parametrize("given_positions", [False, True], ids=["counted", "given"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_words_are_embedded_and_rotated_as_without_landmarks(build_landmark, scheme, given_positions):
    plain = build_landmark("full", **SCHEMES[scheme])
    model, documents = build_landmark(landmark(), plain, **SCHEMES[scheme]), batch()
    if given_positions:
        documents["position_ids"] = torch.randint(0, 24, documents["input_ids"].shape)
    inputs, expected = first_attention(model, documents), first_attention(plain, documents)
    ends = [words + -(-words // 4) for words in LENGTHS]
    closing = [(row % 5 == 4) | (row == length - 1) for length in ends for row in range(length)]
    is_landmark = torch.tensor(closing)
    for ours, theirs in zip(inputs[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours[~is_landmark], theirs, atol=1e-12, rtol=0)
        assert not torch.equal(ours[is_landmark], ours[is_landmark.roll(-1)])

    # A landmark whose vector is a word's is that word again, at the place and in the segment of the token before it.
    documents["input_ids"].fill_(7)
    with torch.no_grad():
        model.embeddings.landmark_embedding.weight.copy_(model.embeddings.word_embeddings.weight[7:8])
    for states in first_attention(model, documents)[:3]:
        torch.testing.assert_close(states[is_landmark], states[is_landmark.roll(-1)], atol=1e-12, rtol=0)


@pytest.mark.parametrize("scheme", ["absolute", "rope"])
def test_landmarks_leave_the_model_with_its_last_sublayer(build_landmark, scheme):
    """Where attention adds nothing, all that is left of landmarks is the room that they took."""
    plain = build_landmark("full", norm_placement="pre", final_norm=True, **SCHEMES[scheme])
    with torch.no_grad():
        for layer in plain.layers:
            if layer.attention is not None:
                layer.attention.o_proj.weight.zero_()
    fields = {"norm_placement": "pre", "final_norm": True} | SCHEMES[scheme]
    model, documents = build_landmark([landmark(), "full"], plain, **fields), batch()
    output, expected = (m(**documents, output_hidden_states=True) for m in (model, plain))
    assert output.last_hidden_state.shape == (len(LENGTHS), max(LENGTHS), 32)
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=1e-12, rtol=0)
    torch.testing.assert_close(output.pooler_output, expected.pooler_output, atol=1e-12, rtol=0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_document_of_one_block_is_read_with_full_attention(build_landmark, scheme, training):
    plain = build_landmark("full", **SCHEMES[scheme]).train(training)
    model = build_landmark(landmark(size=10), plain, **SCHEMES[scheme]).train(training)
    documents = batch((9, 1, 4, 10))
    output, expected = (m(**documents).last_hidden_state for m in (model, plain))
    torch.testing.assert_close(output[:3], expected[:3], atol=1e-12, rtol=0)
    assert (output[3] - expected[3]).abs().max() > 1e-3  # 10 words and a landmark are two blocks


@pytest.mark.promise("A8")
def test_weights_of_a_model_are_those_of_its_words(build_landmark):
    """They sum to 1: landmarks, which are left out, have none. Of other patterns' weights landmarks get their part."""
    model, documents = build_landmark([landmark(), "full"], kernel="eager"), batch()
    real = documents["attention_mask"] == 1
    for training in (True, False):
        output = model.train(training)(**documents, output_attentions=True)
        ours, other = (weights.sum(-1).transpose(1, 2) for weights in output.attentions)  # (B, S, H)
        assert output.attentions[0].shape == (len(LENGTHS), 4, max(LENGTHS), max(LENGTHS))
        torch.testing.assert_close(ours[real], torch.ones_like(ours[real]), atol=1e-12, rtol=0)
        assert not ours[~real].any()
        assert (other[real] < 1 - 1e-6).all()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_causal_model_reads_the_beginning_of_a_document_alike_however_it_goes_on(build_landmark, training):
    model = build_landmark([landmark(), "full"], position_embedding_type="rope", is_causal=True).train(training)
    input_ids = torch.randint(1, 64, (1, 23))
    whole = model(input_ids).last_hidden_state
    for length in (1, 3, 4, 5, 14, 22):
        part = model(input_ids[:, :length]).last_hidden_state
        torch.testing.assert_close(part, whole[:, :length], atol=1e-12, rtol=0)


def test_the_landmark_is_learned_where_it_decides_something(build_landmark):
    model = build_landmark(landmark()).train()
    for words, learns in ((23, True), (4, False)):  # who has one block reads no landmark
        model.zero_grad()
        (model(torch.randint(1, 64, (1, words))).last_hidden_state ** 3).sum().backward()
        gradient = model.embeddings.landmark_embedding.weight.grad
        assert gradient.abs().max() > 1e-3 if learns else not gradient.any()


def test_from_an_encoder_the_landmark_starts_as_the_mean_of_all_words(tmp_path):
    save_checkpoint(tmp_path, "bert")
    model = LongEmbedModel.from_encoder(tmp_path, attention_patterns=landmark(size=CONTEXT))
    words = model.embeddings.word_embeddings.weight
    torch.testing.assert_close(model.embeddings.landmark_embedding.weight[0], words.mean(0))


@pytest.mark.parametrize(
    ("patterns", "fields", "names"),
    [
        ("landmark", {"position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
        ("landmark", {"position_embedding_type": "relative"}, "position_embedding_type='relative'"),
        ("landmark", {"relative_attention_num_buckets": 8}, "relative_attention_num_buckets=8"),
        (
            "landmark",
            {
                "position_embedding_type": "rope",
                "position_extension": {"method": "group", "original_max_position_embeddings": 128, "neighbours": 64},
            },
            "Self-Extend",
        ),
        ([landmark(5), landmark(6)], {}, "the sizes [5, 6]"),
    ],
    ids=["alibi", "relative", "buckets", "self-extend", "sizes"],
)
def test_what_cannot_be_combined_is_refused(patterns, fields, names):
    patterns = patterns if isinstance(patterns, list) else [patterns, "full"]
    message = refused(patterns, {"num_hidden_layers": 2} | fields)
    assert message.startswith("attention_patterns: 'landmark' ")
    assert names in message
    assert "\n" not in message
    assert refused([landmark(5, top_k=1), landmark(5, top_k=2)], {"num_hidden_layers": 2}) is None


# What it costs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "training"), [(8192, False), (1024, True)], ids=["evaluation", "training"])
def test_memory_grows_with_the_length_and_not_its_square(length, training):
    """Forward and backward: what is allocated on the way, and what is kept for the backward pass."""
    largest, kept = [], []
    for tokens in (length // 2, length):
        inputs = make_inputs([tokens], size=32, dtype=torch.float32, training=training)
        with (
            patch.multiple(pattern_landmark_longembed, MAX_SCORES=2**16, MAX_UNFUSED_SCORES=2**16),
            Allocated() as allocated,
            KeptForBackward() as held,
        ):
            run(inputs, "longembed_varlen").sum().backward()
        largest.append(allocated.largest)
        kept.append(held.total)
    assert largest[1] <= max(2**16, length * HEADS * DIM)  # a step's scores, or a query, key or value
    assert largest[1] < length**2 / 10
    assert kept[1] <= 2.1 * kept[0]
    assert kept[1] < 2 * 3 * length * HEADS * DIM  # twice query, key and value


@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_a_query_reads_its_own_block_and_top_k_others_however_long_the_document(top_k):
    for length in (50, 200, 800):
        inputs = make_inputs([length], size=5, top_k=top_k)
        values = torch.eye(length, dtype=torch.float64)[:, None].expand(-1, HEADS, -1)  # the context is the weights
        weights = run(inputs._replace(value=values), "longembed_varlen")
        assert ((weights > 0).sum(-1) == (1 + top_k) * 4).all()
