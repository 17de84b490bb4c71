"""LSH attention against the definition of Reformer written out token by token, and against transformers' Reformer."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_longembed import lsh_longembed
from modeling_longembed.attention_longembed import KERNELS
from modeling_longembed.attention_pattern_longembed import AttentionInputs
from modeling_longembed.lsh_longembed import LshAttention
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.positions_longembed import AlibiBias, BucketBias, alibi_slopes

HEADS, DIM = 3, 8
SCALING = DIM**-0.5
PATHS = ("eager", "longembed_varlen")


def make_inputs(lengths, pattern, dtype=torch.float64, **more):
    """Random inputs; the key is a tensor of its own, so that the gradients of query and key are seen apart."""
    trainable = torch.is_grad_enabled()
    query, value = (torch.randn(sum(lengths), HEADS, DIM, dtype=dtype, requires_grad=trainable) for _ in range(2))
    key = query.detach().clone().requires_grad_(trainable)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    documents = PackedDocuments(cu_seqlens, max(lengths))
    return AttentionInputs(query, key, value, pattern, documents, SCALING, 0.0, **more)


def run(inputs, path):
    return KERNELS[path].function(inputs)[0]


def hashes_of(query, pattern):
    """Buckets `(R, L)` of one head's vectors: Kitaev et al. 2020, section 2, `argmax([xR; -xR])`."""
    length = len(query)
    count = pattern.buckets or 2 * -(-length // pattern.chunk)
    if length <= pattern.chunk or count == 1:
        return torch.zeros(1, length, dtype=torch.long)
    sizes = [count]
    if count > 2 * pattern.chunk:
        first = next(n for n in range(2, count + 2, 2) if n * n >= count)
        sizes = [first, next(n for n in range(2, count + 2, 2) if n * first >= count)]
    generator = torch.Generator().manual_seed(pattern.seed)
    rotations = torch.randn(DIM, pattern.hashes, sum(sizes) // 2, generator=generator).to(query.dtype)
    buckets, start, scale = 0, 0, 1
    for size in sizes:
        rotated = torch.einsum("ld,drb->rlb", query, rotations[..., start : start + size // 2])
        buckets = buckets + scale * torch.cat([rotated, -rotated], -1).argmax(-1)
        start, scale = start + size // 2, scale * size
    return buckets


def reformer(inputs):
    """Section 2 of the paper, a query at a time: `(T, H, D)`. One round after the other is sorted and cut."""
    pattern, contexts = inputs.pattern, []
    for start, end in pairwise(inputs.documents.cu_seqlens.tolist()):
        query, key, value = (x[start:end].double() for x in inputs[:3])
        length = end - start
        of_heads = []
        for head in range(HEADS):
            if not length:
                continue
            buckets = hashes_of(query[:, head].detach(), pattern).tolist()
            unit = key[:, head] / (key[:, head].square().mean(-1, keepdim=True) + 1e-6).sqrt()
            scores = query[:, head] @ unit.T * inputs.scaling
            if inputs.bias is not None:
                index = torch.arange(length)
                scores = scores + inputs.bias.dense(query.transpose(0, 1), index, index)[head]
            orders = [sorted(range(length), key=lambda token, of=of: (of[token], token)) for of in buckets]
            chunks = [
                [(r, o[n : n + pattern.chunk]) for n in range(0, length, pattern.chunk)] for r, o in enumerate(orders)
            ]
            chain = [chunk for of_round in chunks for chunk in of_round]
            rows = []
            for i in range(length):
                outputs, totals = [], []
                for number, (r, chunk) in enumerate(chain):
                    if i not in chunk:
                        continue
                    before_r, before = chain[number - 1] if len(chain) > 1 else (r, [])
                    keys = [(r, j) for j in chunk] + [(before_r, j) for j in before]
                    if not pattern.across_buckets:
                        keys = [(s, j) for s, j in keys if s == r and buckets[s][j] == buckets[r][i]]
                    keys = [j for _, j in keys if j <= i or not inputs.causal]
                    others = [j for j in keys if j != i]
                    chosen = torch.tensor(others or [i])
                    of_round = scores[i, chosen] if others else torch.full((1,), -1e5, dtype=torch.float64)
                    outputs.append(of_round.softmax(0) @ value[chosen, head])
                    totals.append(of_round.logsumexp(0))
                shares = (torch.stack(totals) - torch.stack(totals).logsumexp(0)).exp()
                rows.append((shares[:, None] * torch.stack(outputs)).sum(0))
            of_heads.append(torch.stack(rows))
        contexts.append(torch.stack(of_heads, 1) if of_heads else query)
    return torch.cat(contexts)


def assert_equal_with_gradients(output, expected, leaves):
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    ours, theirs = (
        torch.autograd.grad((x * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
        for x in (output, expected)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.promise("A11")
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=15)
@given(data=st.data())
def test_equals_the_definition(path, causal, data):
    pattern = LshAttention(
        chunk=data.draw(st.integers(1, 7)),
        hashes=data.draw(st.integers(1, 3)),
        buckets=data.draw(st.sampled_from([0, 0, 1, 2, 6])),
        seed=data.draw(st.integers(0, 5)),
        across_buckets=data.draw(st.booleans()),
    )
    around = [0, 1, 2, pattern.chunk, pattern.chunk + 1, 2 * pattern.chunk, 11, 13, 23]
    lengths = data.draw(st.lists(st.sampled_from(around), min_size=1, max_size=3).filter(any))
    bias, leaves = data.draw(st.sampled_from([None, "alibi", "buckets"])), []
    if bias == "buckets":
        leaves = [torch.randn(8, HEADS, dtype=torch.float64, requires_grad=True)]
    bias = {
        "alibi": AlibiBias(torch.tensor(alibi_slopes(HEADS))),
        "buckets": BucketBias(*leaves, 20) if leaves else None,
    }.get(bias)
    inputs = make_inputs(lengths, pattern, causal=causal, bias=bias)
    with patch.object(lsh_longembed, "MAX_UNFUSED_SCORES", data.draw(st.sampled_from([1, 500, 2**24]))):
        assert_equal_with_gradients(run(inputs, path), reformer(inputs), [*inputs[:3], *leaves])
