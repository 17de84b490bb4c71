"""Attention problems under any pattern and position scheme, and the dense softmax that all kernels have to equal."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from modeling_longembed import LongEmbedConfig
from modeling_longembed.attention_longembed import KERNELS
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_base_longembed import AttentionInputs, Places
from modeling_longembed.position_alibi_longembed import AlibiBias, alibi_slopes
from modeling_longembed.position_buckets_longembed import BucketBias
from modeling_longembed.position_relative_longembed import DistanceBias
from modeling_longembed.position_rope_longembed import rope_plan

HEADS, DIM = 4, 8
BUCKETS, DISTANCE = 8, 20


@dataclass
class Problem:
    """Attention inputs and the leaves that gradients are taken at."""

    inputs: AttentionInputs
    scheme: str
    leaves: list[Tensor]

    def attend(self, kernel):
        return KERNELS[kernel][0](self.inputs)[0]


def scheme_fields(scheme, neighbours):
    """Config fields of a position scheme; under Self-Extend documents beyond 8 tokens are extended."""
    if scheme == "buckets":
        return {"relative_attention_num_buckets": BUCKETS, "relative_attention_max_distance": DISTANCE}
    extension = {"method": "group", "original_max_position_embeddings": 8, "factor": 3, "neighbours": neighbours}
    return {
        "position_embedding_type": scheme.partition("+")[0],
        "position_extension": extension if scheme == "rope+group" else None,
    }


def make_problem(pattern, scheme, lengths, is_global=None, neighbours=16, dtype=torch.float64, causal=False):
    """Random inputs, with gradients unless they are turned off. ValueError where the config refuses the combination."""
    config = LongEmbedConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        max_position_embeddings=256,
        attention_patterns={"type": pattern.type, **vars(pattern)},
        is_causal=causal,
        **scheme_fields(scheme, neighbours),
    )
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    documents = PackedDocuments(cu_seqlens, max(lengths), is_global=is_global)
    trainable = torch.is_grad_enabled()
    leaves = [torch.randn(sum(lengths), HEADS, DIM, dtype=dtype, requires_grad=trainable) for _ in range(3)]
    query, key, value = leaves
    bias = grouped = None
    if config.position_embedding_type == "rope":
        query, key, grouped = rope_plan(config, config.rope_parameters, documents, documents.token_index)(query, key)
    elif scheme == "alibi":
        bias = AlibiBias(torch.tensor(alibi_slopes(HEADS)))
    elif scheme == "buckets":
        leaves.append(torch.randn(BUCKETS, HEADS, dtype=dtype, requires_grad=trainable))
        bias = BucketBias(leaves[-1], DISTANCE)
    elif scheme == "relative":  # Transformer-XL: keys of the distances -reach to reach, u and v
        reach = max(lengths)
        leaves.append(torch.randn(HEADS, 2 * reach + 1, DIM, dtype=dtype, requires_grad=trainable))
        leaves += [torch.randn(HEADS, DIM, dtype=dtype, requires_grad=trainable) for _ in range(2)]
        keys, u, v = leaves[3:]
        query, bias = query + u, DistanceBias(keys, v - u, 0.3)
    inputs = AttentionInputs(
        query, key, value, pattern, documents, scaling=0.3, dropout=0.0, bias=bias, grouped=grouped, causal=causal
    )
    return Problem(inputs, scheme, leaves)


def predicate(pattern, length, marked):
    """The pattern's own definition, on every pair of tokens of a document: bool `(1 or H, L, L)`."""
    fields = (torch.arange(length), torch.full((length,), length), marked)
    query, key = (Places(*(x.view(shape) for x in fields)) for shape in ((-1, 1), (1, -1)))
    return pattern.visible(query, key, torch.arange(HEADS)[:, None, None], HEADS)


def dense_attention(problem, dtype=torch.float64):
    """The definition: softmax over all the keys that the predicate allows, document by document, in `dtype`."""
    inputs, cu_seqlens = problem.inputs, problem.inputs.documents.cu_seqlens.tolist()
    query, key, value = (x.to(dtype) for x in inputs[:3])
    contexts = []
    for start, end in pairwise(cu_seqlens):
        rows, i = slice(start, end), torch.arange(end - start)[:, None]
        j = i.T
        marked = inputs.documents.is_global
        marked = torch.zeros(end - start, dtype=torch.bool) if marked is None else marked[rows]
        scores = torch.einsum("qhd,khd->hqk", query[rows], key[rows])
        if inputs.grouped is not None:
            left, right = inputs.grouped.query_left[rows].to(dtype), inputs.grouped.query_right[rows].to(dtype)
            far_key = inputs.grouped.key[rows].to(dtype)
            far = torch.where(
                j < i, torch.einsum("qhd,khd->hqk", left, far_key), torch.einsum("qhd,khd->hqk", right, far_key)
            )
            scores = torch.where((i - j).abs() < inputs.grouped.neighbours[rows][:, None], scores, far)
        scores = scores * inputs.scaling
        if problem.scheme == "alibi":
            scores = scores - torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=dtype)[:, None, None] * (i - j).abs()
        if problem.scheme == "relative":  # (q + v) . r_{i - j}, pair by pair; the query carries u already
            keys, u, v = (leaf.to(dtype) for leaf in problem.leaves[3:])
            pairs = keys[:, i - j + keys.shape[1] // 2]  # (H, L, L, D)
            scores = scores + inputs.scaling * torch.einsum("qhd,hqkd->hqk", query[rows] - u + v, pairs)
        if problem.scheme == "buckets":
            buckets = MPNetEncoder.relative_position_bucket(j - i, BUCKETS, DISTANCE)
            scores = scores + problem.leaves[3].to(dtype)[buckets].permute(2, 0, 1)
        visible = predicate(inputs.pattern, end - start, marked).expand(scores.shape)
        visible = visible & (j <= i) if inputs.causal else visible
        weights = torch.where(visible, scores.exp(), 0.0)
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
        contexts.append(torch.einsum("hqk,khd->qhd", weights, value[rows]))
    return torch.cat(contexts).to(dtype)


def gradients(output, leaves):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    grads = torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def assert_same_gradients(output, expected, leaves):
    for ours, theirs in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
