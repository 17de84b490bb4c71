"""Online softmax over chunks (Rabe & Staats) against the whole softmax, and what it keeps in memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_longembed.attention_kernels_longembed import online_attention
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_base_longembed import AttentionInputs, AttentionPattern
from modeling_longembed.position_alibi_longembed import AlibiBias, alibi_slopes
from tests.modeling_longembed.memory_use import Allocated, KeptForBackward

HEADS, DIM = 3, 8


def problem(length, dtype=torch.float64):
    torch.manual_seed(length)
    return [torch.randn(length, HEADS, DIM, dtype=dtype, requires_grad=True) for _ in range(3)]


def whole_softmax(query, key, value, mask, bias):
    scores = torch.einsum("qhd,khd->hqk", query, key) * 0.4 + bias
    weights = torch.where(mask, scores.exp(), 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("hqk,khd->qhd", weights, value)


@pytest.mark.promise("A2")
@pytest.mark.parametrize("key_chunk", [1, 4, 9])  # the time goes by the number of pairs of chunks
@pytest.mark.parametrize("query_chunk", [1, 4, 9])
@pytest.mark.parametrize("kind", ["plain", "causal", "band", "blind"])
def test_any_chunks_give_the_whole_softmax(query_chunk, key_chunk, kind):
    length = 9
    inputs = problem(length)
    index = torch.arange(length)
    difference = index[:, None] - index
    mask = {
        "plain": torch.ones(length, length, dtype=torch.bool),
        "causal": difference >= 0,
        "band": difference.abs() <= 2,
        "blind": (difference >= 0) & (index[:, None] % 5 > 0),  # every fifth query sees nothing
    }[kind]
    alibi = AlibiBias(torch.tensor(alibi_slopes(HEADS)))
    output = online_attention(
        *inputs,
        0.4,
        0.0,
        mask=lambda query, key: mask[query][:, key][None],
        bias=alibi,
        query_chunk=query_chunk,
        key_chunk=key_chunk,
    )
    slopes = torch.tensor(alibi_slopes(HEADS)).double()[:, None, None]
    expected = whole_softmax(*inputs, mask, -slopes * difference.abs())
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    weights = torch.linspace(-1, 1, output.numel()).double().view(output.shape)
    for ours, theirs in zip(
        *(torch.autograd.grad((x * weights).sum(), inputs) for x in (output, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.promise("A2")
@given(length=st.integers(1, 30), query_chunk=st.integers(1, 35), key_chunk=st.integers(1, 35))
def test_any_length_and_any_chunks(length, query_chunk, key_chunk):
    inputs = problem(length)
    output = online_attention(*inputs, 0.4, 0.0, query_chunk=query_chunk, key_chunk=key_chunk)
    mask = torch.ones(length, length, dtype=torch.bool)
    torch.testing.assert_close(output, whole_softmax(*inputs, mask, 0.0), atol=1e-10, rtol=0)


def test_scores_far_out_of_the_range_of_exp():
    inputs = [1000 * x.detach() for x in problem(40)[:2]] + [problem(40)[2].detach()]
    output = online_attention(*inputs, 0.4, 0.0, query_chunk=7, key_chunk=7)
    assert output.isfinite().all()
    query, key, value = (x.transpose(0, 1) for x in inputs)
    expected = ((query @ key.transpose(1, 2) * 0.4).softmax(-1) @ value).transpose(0, 1)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)


def test_dropout_leaves_out_weights_and_keeps_their_mean():
    torch.manual_seed(0)
    query, key, _ = (x.detach().repeat(1, 50, 1) for x in problem(24))
    inputs = query, key, torch.ones_like(query)
    samples = torch.stack([online_attention(*inputs, 0.4, 0.3, query_chunk=7, key_chunk=5) for _ in range(4)])
    assert samples.std() > 0.01
    assert samples.mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.promise("A2")
def test_neither_forward_nor_backward_holds_length_times_length_elements():
    length, chunk = 400, 40
    inputs = problem(length, torch.float32)
    with (
        KeptForBackward() as kept,
        Allocated() as allocated,
    ):
        online_attention(*inputs, 0.4, 0.0, query_chunk=chunk, key_chunk=chunk).sum().backward()
    assert kept.largest <= HEADS * DIM * length
    # the summaries of one chunk of queries over all chunks of keys, or the inputs themselves
    assert allocated.largest <= max(HEADS * DIM * length, HEADS * chunk * length * DIM // chunk)
    assert allocated.largest < HEADS * length * length / 10


class EveryThird(AttentionPattern):
    """What a researcher writes: a predicate, and nothing else."""

    type = "every_third"
    layer_type = "full_attention"

    def visible(self, query, key, head, num_heads):
        return (query.index - key.index) % 3 == 0


def test_a_pattern_that_is_a_predicate_alone_can_be_computed():
    lengths = [40, 1, 0, 23]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = problem(sum(lengths))
    pattern = EveryThird()
    output = pattern.attend(
        AttentionInputs(*inputs, pattern, PackedDocuments(cu_seqlens, 40), scaling=0.4, dropout=0.0)
    )
    for start, end in ((0, 40), (40, 41), (41, 64)):
        index = torch.arange(end - start)
        mask = (index[:, None] - index) % 3 == 0
        expected = whole_softmax(*(x[start:end] for x in inputs), mask, 0.0)
        torch.testing.assert_close(output[start:end], expected, atol=1e-10, rtol=0)
