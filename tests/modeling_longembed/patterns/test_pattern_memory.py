"""Transformer-XL's memory against the recurrence written out: concatenate, project, softmax, remember, next segment."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import XLNetConfig, XLNetModel

from modeling_longembed import attention_past_longembed
from modeling_longembed.attention_longembed import KERNELS, AttentionInputs
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_registry_longembed import build_pattern
from tests.modeling_longembed.memory_use import Allocated, KeptForBackward
from tests.modeling_longembed.patterns.memory_recurrence import (
    FIELDS,
    KERNELS_OF_MEMORY,
    assert_gradients,
    gradients,
    packed,
    recurrence,
    remember,
)


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


# What it costs --------------------------------------------------------------------------------------------------------


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
