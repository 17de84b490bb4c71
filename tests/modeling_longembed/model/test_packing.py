"""Packed, padded and one by one are the same computation, and no text changes the embedding of another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_longembed.output_pooling_longembed import POOLINGS
from modeling_longembed.packing_longembed import PackedDocuments, split_documents
from modeling_longembed.pattern_registry_longembed import PATTERNS
from modeling_longembed.position_schemes_longembed import POSITION_SCHEMES
from tests.modeling_longembed.pattern_settings import refused

ORIGINAL, CONTEXT = 8, 64  # tokens of context, trained and extended
EXTENDED = [(scheme, method) for scheme in POSITION_SCHEMES for method in (None, *POSITION_SCHEMES[scheme].extensions)]
RELATIVE = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
PATTERN_SETTINGS = {
    "sliding": {"window": 3, "global_tokens": 1},
    "block": {"size": 5},
    "landmark": {"size": 5, "top_k": 1},
    "lsh": {"chunk": 4},
}
SCHEMES = {
    "rope": {"position_embedding_type": "rope"},
    "alibi": {"position_embedding_type": "alibi"},
    "buckets": RELATIVE,
}
BATCHES = st.lists(st.integers(1, 24), min_size=1, max_size=5)


def position_fields(scheme, method):
    extension = {"method": method, "original_max_position_embeddings": ORIGINAL}
    if method == "restart":
        extension["period"] = 5
    if (scheme, method) == ("rope", "group"):
        extension["neighbours"] = 4
    return {
        "position_embedding_type": scheme,
        "is_causal": scheme == "none",
        "max_position_embeddings": CONTEXT,
        "position_extension": extension if method else None,
    }


def draw_documents(lengths):
    return [torch.randint(1, 64, (length,)) for length in lengths]


def pad_batch(documents, side="right"):
    """`(B, S)` ids and mask, with the padding to the right, to the left, or anywhere between the tokens."""
    width = max(len(document) for document in documents) + 3
    input_ids, attention_mask = torch.zeros(2, len(documents), width, dtype=torch.long)
    for row, document in enumerate(documents):
        places = torch.arange(len(document))
        if side == "left":
            places = places + width - len(document)
        elif side == "holes":
            places = torch.randperm(width)[: len(document)].sort().values
        input_ids[row, places], attention_mask[row, places] = document, 1
    return input_ids, attention_mask


def run_packed(model, documents):
    cu_seqlens = torch.tensor([0, *map(len, documents)]).cumsum(0).to(torch.int32)
    longest = max(map(len, documents))
    return model(torch.cat(documents)[None], cu_seq_lens_q=cu_seqlens, max_length_q=longest)


def run_single(model, documents):
    outputs = [model(document[None]) for document in documents]
    return torch.cat([o.last_hidden_state[0] for o in outputs]), torch.cat([o.pooler_output for o in outputs])


# The computation ------------------------------------------------------------------------------------------------------


@pytest.mark.promise("A12")
@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=settings.default.max_examples // 4)
@given(lengths=BATCHES)
def test_packed_equals_padded_equals_single(build_tiny_model, pattern, lengths):
    model = build_tiny_model(attention_patterns={"type": pattern} | PATTERN_SETTINGS.get(pattern, {}))
    documents = draw_documents(lengths)
    with torch.no_grad():
        states, pooled = run_single(model, documents)
        packed = run_packed(model, documents)
        torch.testing.assert_close(packed.last_hidden_state[0], states, atol=1e-5, rtol=0)
        torch.testing.assert_close(packed.pooler_output, pooled, atol=1e-5, rtol=0)
        for side in ("right", "left", "holes"):
            input_ids, attention_mask = pad_batch(documents, side)
            padded = model(input_ids, attention_mask=attention_mask)
            torch.testing.assert_close(padded.last_hidden_state[attention_mask == 1], states, atol=1e-5, rtol=0)
            torch.testing.assert_close(padded.pooler_output, pooled, atol=1e-5, rtol=0)
            assert not padded.last_hidden_state[attention_mask == 0].any()


@pytest.mark.promise("A12")
@pytest.mark.parametrize(
    ("entry", "more"),
    [
        pytest.param(entry, more, id=f"{entry['type']}-{scheme}")
        for entry in ({"type": pattern} | PATTERN_SETTINGS.get(pattern, {}) for pattern in PATTERNS)
        for scheme, more in SCHEMES.items()
        if refused(entry, more) is None
    ],
)
def test_packed_and_padded_have_the_gradients_of_single(build_tiny_model, entry, more):
    model = build_tiny_model(attention_patterns=entry, **more)
    documents = draw_documents([7, 1, 20, 12])
    input_ids, attention_mask = pad_batch(documents, "holes")
    gradients = []
    for states, pooled in (
        run_single(model, documents),
        (lambda o: (o.last_hidden_state[0], o.pooler_output))(run_packed(model, documents)),
        (lambda o: (o.last_hidden_state[attention_mask == 1], o.pooler_output))(
            model(input_ids, attention_mask=attention_mask)
        ),
    ):
        weights = torch.linspace(-1, 1, states.numel()).view(states.shape)
        loss = (states * weights).mean() + pooled.square().mean()
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    assert any(grad.abs().max() > 1e-3 for grad in gradients[0])
    for others in gradients[1:]:
        for ours, expected in zip(others, gradients[0], strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.promise("P10")
@pytest.mark.parametrize(("scheme", "method"), EXTENDED)
@settings(max_examples=settings.default.max_examples // 4)
@given(lengths=st.lists(st.sampled_from([1, 4, 5, 7, 8, 9, 15, 16, 17, 40, 63, 64]), min_size=2, max_size=4))
def test_an_embedding_does_not_depend_on_batch_mates(build_tiny_model, scheme, method, lengths):
    model = build_tiny_model(**position_fields(scheme, method))
    documents = draw_documents(lengths)
    input_ids, attention_mask = pad_batch(documents)
    with torch.no_grad():
        _, alone = run_single(model, documents)
        together = (run_packed(model, documents), model(input_ids, attention_mask=attention_mask))
    for output in together:
        torch.testing.assert_close(output.pooler_output, alone, atol=1e-6 * alone.abs().max().item(), rtol=0)


@pytest.mark.promise("P9")
@pytest.mark.parametrize(("scheme", "method"), [pair for pair in EXTENDED if pair[1]])
def test_an_extension_leaves_texts_within_the_original_context(build_tiny_model, scheme, method):
    fields = position_fields(scheme, method)
    if method == "restart":
        fields["position_extension"]["period"] = ORIGINAL
    extended = build_tiny_model(**fields)
    base = build_tiny_model(**fields | {"position_extension": None})
    state = extended.state_dict()
    if scheme == "absolute":  # a table whose rows are those of the extended one at the places it reads
        rows = torch.arange(ORIGINAL) * (CONTEXT // ORIGINAL if method == "interpolate" else 1)
        name = "embeddings.position_embeddings.weight"
        state[name] = torch.cat([state[name][rows], torch.zeros(CONTEXT - ORIGINAL, 32)])
    base.load_state_dict(state)
    with torch.no_grad():
        for length in range(1, ORIGINAL + 1):
            (document,) = draw_documents([length])
            assert torch.equal(*(m(document[None]).last_hidden_state for m in (extended, base)))
        (document,) = draw_documents([CONTEXT])
        difference = (extended(document[None]).pooler_output - base(document[None]).pooler_output).abs().max()
    assert difference > 1e-3


@pytest.mark.promise("P10")
def test_a_batch_can_be_permuted(build_tiny_model):
    model = build_tiny_model(attention_patterns=[{"type": "block", "size": 4}, {"type": "sliding", "window": 2}])
    documents = draw_documents([3, 24, 1, 9, 9])
    order = [3, 0, 4, 2, 1]
    input_ids, attention_mask = pad_batch(documents)
    with torch.no_grad():
        expected = model(input_ids, attention_mask=attention_mask).pooler_output[order]
        padded = model(input_ids[order], attention_mask=attention_mask[order]).pooler_output
        packed = run_packed(model, [documents[n] for n in order]).pooler_output
    torch.testing.assert_close(padded, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(packed, expected, atol=1e-6, rtol=0)


def test_more_padding_changes_nothing(build_tiny_model):
    model = build_tiny_model()
    documents = draw_documents([5, 9])
    input_ids, attention_mask = pad_batch(documents)
    wide_ids, wide_mask = (torch.nn.functional.pad(x, (0, 40)) for x in (input_ids, attention_mask))
    wide_ids[wide_mask == 0] = 13  # what stands in the padding must not matter either
    with torch.no_grad():
        narrow = model(input_ids, attention_mask=attention_mask)
        wide = model(wide_ids, attention_mask=wide_mask)
    assert torch.equal(wide.pooler_output, narrow.pooler_output)


def test_an_empty_document_in_a_pack(build_tiny_model):
    model = build_tiny_model(attention_patterns=[{"type": "block", "size": 4}, {"type": "sliding", "window": 2}])
    documents = draw_documents([6, 5])
    cu_seqlens = torch.tensor([0, 0, 6, 6, 11, 11], dtype=torch.int32)
    with torch.no_grad():
        pooled = model(torch.cat(documents)[None], cu_seq_lens_q=cu_seqlens).pooler_output
        _, expected = run_single(model, documents)
    torch.testing.assert_close(pooled[[1, 3]], expected, atol=1e-6, rtol=0)
    assert not pooled[[0, 2, 4]].any()


def test_inputs_that_contradict_each_other_are_refused(build_tiny_model):
    model, ids, cu_seqlens = (
        build_tiny_model(),
        torch.ones(2, 5, dtype=torch.long),
        torch.tensor([0, 5], dtype=torch.int32),
    )
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\), the input \(2, 5\); they must agree"):
        model(ids, attention_mask=torch.ones(2, 4))
    for wrong in ({"input_ids": ids}, {"input_ids": ids[:1], "attention_mask": torch.ones(1, 5)}):
        with pytest.raises(ValueError, match=r"packed input \(cu_seq_lens_q\) is one row of tokens"):
            model(**wrong, cu_seq_lens_q=cu_seqlens)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q ends at 5 and the input has 6 tokens; they must agree"):
        model(torch.ones(1, 6, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 2, 5], dtype=torch.int32))


# The bookkeeping ------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), extra=st.integers(1, 3))
def test_pack_and_unpack_are_inverse(lengths, extra):
    width = max(lengths) + extra
    attention_mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        attention_mask[row, torch.randperm(width)[:length]] = 1
    documents = PackedDocuments.from_attention_mask(attention_mask)
    padded = torch.randn(len(lengths), width, 3)
    packed = documents.pack(padded)
    assert torch.equal(packed, torch.cat([padded[n][attention_mask[n] == 1] for n in range(len(lengths))]))
    assert torch.equal(documents.unpack(packed), padded * attention_mask[..., None])
    assert documents.lengths == lengths
    assert documents.max_seqlen == max(lengths)
    assert documents.document_ids.tolist() == [n for n, length in enumerate(lengths) for _ in range(length)]
    assert documents.token_index.tolist() == [place for length in lengths for place in range(length)]
    assert documents.document_lengths.tolist() == [length for length in lengths for _ in range(length)]


@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6), size=st.integers(1, 25))
def test_split_documents_cuts_each_document(lengths, size):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    pieces = split_documents(cu_seqlens, size)
    expected = [min(size, length - start) for length in lengths for start in range(0, length, size)]
    assert pieces.dtype == torch.int32
    assert pieces.diff().tolist() == expected
    assert pieces[-1] == sum(lengths)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_a_document_is_pooling_its_row(build_tiny_model, pooling):
    model = build_tiny_model(pooling=pooling)
    documents = draw_documents([4, 1, 11])
    with torch.no_grad():
        output = run_packed(model, documents)
        _, expected = run_single(model, documents)
    torch.testing.assert_close(output.pooler_output, expected, atol=1e-6, rtol=0)
