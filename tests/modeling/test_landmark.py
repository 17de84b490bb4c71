"""Landmark attention against the grouped softmax of the paper, written out query by query."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_longembed import landmark_longembed
from modeling_longembed.attention_longembed import KERNELS
from modeling_longembed.attention_pattern_longembed import AttentionInputs
from modeling_longembed.landmark_longembed import LandmarkAttention
from modeling_longembed.packing_longembed import PackedDocuments

HEADS, DIM, SCALING = 3, 8, 0.7
PATHS = ("eager", "longembed_varlen")


def make_inputs(lengths, size=5, top_k=2, dtype=torch.float64, **more):
    """Random inputs of documents whose landmarks stand in them already."""
    states = [torch.randn(sum(lengths), HEADS, DIM, dtype=dtype, requires_grad=torch.is_grad_enabled()) for _ in "qkv"]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    pattern = LandmarkAttention(size=size, top_k=top_k)
    return AttentionInputs(*states, pattern, PackedDocuments(cu_seqlens, max(lengths)), SCALING, 0.0, **more)


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
        scores = {c: float(summary @ key[blocks[c][1], head]) for c in others}
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
@settings(max_examples=15)
@given(data=st.data())
def test_equals_the_grouped_softmax(path, causal, training, data):
    size, top_k = data.draw(st.integers(2, 7)), data.draw(st.integers(0, 3))
    words = [0, 1, 2, size - 2, size - 1, size, size + 1, 2 * size - 2, 11, 13, 23]
    lengths = data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=3).filter(any))
    inputs = make_inputs([lengthened(n, size) for n in lengths], size, top_k, causal=causal, training=training)
    with patch.object(landmark_longembed, "MAX_UNFUSED_SCORES", data.draw(st.sampled_from([1, 500, 2**24]))):
        assert_equal_with_gradients(run(inputs, path), grouped_softmax(inputs)[0], inputs)
