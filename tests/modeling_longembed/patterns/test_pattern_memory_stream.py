"""A document chunk by chunk, with the memory between the chunks, against the whole document at once."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_longembed import LongEmbedForMaskedLM, pattern_memory_longembed
from tests.modeling_longembed.memory_use import Allocated
from tests.modeling_longembed.patterns.memory_recurrence import (
    FIELDS,
    KERNELS_OF_MEMORY,
    SCHEMES,
    assert_gradients,
    gradients,
    packed,
    remember,
)

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
