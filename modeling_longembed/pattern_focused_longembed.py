"""Attention pattern of the Focused Transformer: other documents as negatives in training, nearest keys in evaluation.

Tworkowski et al. 2023, arXiv:2307.03170. Keys outside the segment of a query are read as if they were at the first
place of that segment, with every position scheme (section 3.2): RoPE leaves them unrotated, and a bias by distance uses
the place of the query in its segment. T tokens of all documents, H heads, D head size, L tokens of one document.
"""

from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_kernels_longembed import MAX_SCORES, causal_mask, masked_softmax, recompute_in_backward
from .attention_past_longembed import PastKeys, Segments, past_attention
from .packing_longembed import PackedDocuments, segment_numbers, split_documents
from .pattern_base_longembed import AttentionInputs, AttentionPattern, parameter, register_pattern
from .position_base_longembed import Rotary, moved_rotary


class Moves(NamedTuple):
    """Rotations that move T packed tokens, which are already rotated, from their places in the document."""

    to_place: Rotary  # to the place in the segment
    to_first: Rotary  # to the first place of a segment


@register_pattern
class FocusedAttention(AttentionPattern):
    """Focused attention: segments of `size` tokens, and beyond them the best keys of the document.

    In training a segment reads all keys of itself and of the `negatives` segments before it IN THE PACKED BATCH,
    whichever document they belong to, in one softmax and with gradients: keys learn to differ from those of other
    documents. This is the only pattern under which documents see each other (`couples_documents`), and it is so in
    training alone; the training scripts refuse a batch that does not fit into one forward pass. In evaluation every
    query reads its own segment and, per head, those `top_k` keys of the rest of its document (if causal, of what comes
    before the segment) that score highest, found by exact search.

    With `negatives=0` training is that of `block`, with `top_k=0` evaluation is. Use the pattern for documents in which
    few distant tokens matter, and train it in batches with long documents.

    Cost: in training L x size x (negatives + 1); in evaluation L^2 for the search and L x (size + top_k) for the rest;
    L in memory.
    """

    type = "focused"
    layer_type = "chunked_attention"
    size: int = parameter(256)
    negatives: int = parameter(1, least=0)
    top_k: int = parameter(32, least=0)

    def check(self, config):
        if config.extends_by_groups and (neighbours := config.position_extension["neighbours"]) < self.size:
            raise ValueError(
                f"attention_patterns: 'focused' reads segments of size={self.size} at their own places, and "
                f"position_extension 'group' on rope what is beyond neighbours={neighbours} at others; use "
                "neighbours >= size, or extend by 'yarn'"
            )

    @property
    def is_mask(self):
        return False

    @property
    def couples_documents(self):
        return self.negatives > 0

    def visible(self, query, key, head, num_heads):
        """Return whether the query may select the key, see `AttentionPattern.visible`."""
        own = query.index // self.size == key.index // self.size
        return own | (key.index >= 0) if self.top_k else own

    def sees_all(self, length):
        return length <= self.size

    def reach(self, documents):
        return max(0, min(documents.max_seqlen, self.size) - 1)

    def prepare(self, attention, states, context):
        plan = context.positions.rotations.get(attention.layer_type)
        if plan is None:
            return None
        documents = context.documents

        def moves() -> Moves:
            first = documents.cu_seqlens[:-1].long()[documents.document_ids]
            dtype = torch.promote_types(states.dtype, torch.float32)
            place = first + documents.token_index % self.size
            return Moves(moved_rotary(plan.near, place, dtype), moved_rotary(plan.near, first, dtype))

        return documents.once((self, "moves", attention.layer_type), moves)

    def attend(self, inputs):
        query, key, past = self.local(inputs)
        documents, cu_segments = inputs.documents, self.cut(inputs.documents)
        negatives = self.negatives if inputs.training else 0
        if inputs.training or not self.top_k or documents.max_seqlen <= self.size:
            segments = documents.once((self, negatives), lambda: packed_context(cu_segments, negatives))
            return past_attention(
                *(query, key, inputs.value),
                past,
                segments,
                inputs.scaling,
                inputs.dropout,
                inputs.bias,
                causal=inputs.causal,
            )
        contexts = []
        for start, end in documents.bounds:
            rows = slice(start, end)
            states = (x[rows].transpose(0, 1) for x in (query, key, inputs.value, past.key))
            contexts.append(self.one_document(inputs, *states))
        return torch.cat(contexts, dim=1).transpose(0, 1)

    def local(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor, PastKeys]:
        """Return query and key `(T, H, D)` at their places in the segment, and the keys as other segments read them."""
        query, key, value = inputs.query, inputs.key, inputs.value
        if inputs.own is None:
            return query, key, PastKeys(key, value)
        return inputs.own.to_place(query), inputs.own.to_place(key), PastKeys(inputs.own.to_first(key), value)

    def cut(self, documents: PackedDocuments) -> Tensor:
        """Return the cumulative lengths of the S segments of all documents, int32 `(S + 1,)`."""
        return documents.once((self, "segments"), lambda: split_documents(documents.cu_seqlens, self.size))

    def one_document(self, inputs: AttentionInputs, query, key, value, far_key) -> Tensor:
        """Attend to the own segment and to the nearest other keys of one document, a chunk of queries at a time.

        Args:
            inputs: the options of the call.
            query, key, value: `(H, L, D)`, at their places in the segment.
            far_key: `(H, L, D)`, the keys as other segments read them.

        Returns:
            The context `(H, L, D)`.
        """
        (heads, length, width), device = query.shape, query.device

        def some_queries(query: Tensor, key: Tensor, value: Tensor, far_key: Tensor, at: Tensor, start: int, end: int):
            """Compute queries `(H, Q, D)` at the places `at` `(Q,)`, all in the segment from `start` to `end`."""
            own, first = torch.arange(start, end, device=device), torch.zeros(1, dtype=torch.long, device=device)
            scores = query @ key[:, start:end].transpose(1, 2) * inputs.scaling
            mask = causal_mask(at, own) if inputs.causal else torch.ones_like(scores, dtype=torch.bool)
            others = torch.cat([own.new_zeros(0), torch.arange(start, device=device)])
            if not inputs.causal:
                others = torch.cat([others, torch.arange(end, length, device=device)])
            nearest = nearest_keys(query, far_key, others, self.top_k)  # (H, Q, k)
            chosen = (nearest + length * torch.arange(heads, device=device)[:, None, None]).flatten()
            far_key, far_value = (
                x.flatten(0, 1).index_select(0, chosen).unflatten(0, nearest.shape) for x in (far_key, value)
            )  # (H, Q, k, D)
            far = (far_key @ query[..., None])[..., 0] * inputs.scaling
            if inputs.bias is not None:
                scores = scores + inputs.bias.dense(query, at, own)
                far = far + inputs.bias.dense(query, at - start, first)
            mask = torch.cat([mask.expand_as(scores), torch.ones_like(far, dtype=torch.bool)], dim=-1)
            weights = masked_softmax(torch.cat([scores, far], dim=-1), mask).to(value.dtype)
            weights = torch.dropout(weights, inputs.dropout, train=inputs.dropout > 0)
            near, far = weights.split([end - start, nearest.shape[-1]], dim=-1)
            return near @ value[:, start:end] + (far[..., None, :] @ far_value)[..., 0, :]

        step = max(1, MAX_SCORES // (heads * (min(self.size, length) + self.top_k * width)))
        contexts = []
        for start in range(0, length, self.size):
            end = min(start + self.size, length)
            for at in torch.arange(start, end, device=device).split(step):
                contexts.append(recompute_in_backward(some_queries, query[:, at], key, value, far_key, at, start, end))
        return torch.cat(contexts, dim=1)

    def dense(self, inputs, rows):
        query, key, past = self.local(inputs)
        cu_segments = self.cut(inputs.documents)
        segment = segment_numbers(cu_segments, len(query))
        negatives = self.negatives if inputs.training else 0
        first = int(cu_segments[max(0, int(segment[rows.start]) - negatives)])
        columns = slice(first, rows.stop)
        index = torch.arange(len(query), device=query.device)
        place = inputs.documents.token_index[rows] % self.size
        near, far = (
            (query[rows].transpose(0, 1) @ keys[columns].permute(1, 2, 0)) * inputs.scaling for keys in (key, past.key)
        )
        if inputs.bias is not None:
            query_HLD = query[rows].transpose(0, 1)
            near = near + inputs.bias.dense(query_HLD, index[rows], index[columns])
            far = far + inputs.bias.dense(query_HLD, place, index[:1])
        behind = segment[rows, None] - segment[columns]  # number of segments from the key to the query
        own = (behind == 0).expand_as(near)
        read = own & causal_mask(index[rows], index[columns]) if inputs.causal else own
        if inputs.training:
            read = read | ((behind > 0) & (behind <= negatives))
        elif self.top_k:
            other = (behind > 0) if inputs.causal else ~own
            candidates = far.masked_fill(~other, float("-inf"))
            best = candidates.topk(min(self.top_k, candidates.shape[-1]), dim=-1).indices
            read = read | (torch.zeros_like(read).scatter(-1, best, True) & other)
        weights = masked_softmax(torch.where(own, near, far), read).to(inputs.value.dtype)
        dropped = torch.dropout(weights, inputs.dropout, train=inputs.dropout > 0)
        context = (dropped @ inputs.value[columns].transpose(0, 1)).transpose(0, 1)
        return context, weights[..., rows.start - first :]


def packed_context(cu_segments: Tensor, negatives: int) -> list[Segments]:
    """Return every segment of a packed batch with the `negatives` segments before it, grouped by shape."""
    starts = cu_segments.tolist()
    shapes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, (start, end) in enumerate(pairwise(starts)):
        before = starts[max(0, number - negatives)]  # never below 0: that would wrap to the end of the batch
        shapes[end - start, start - before].append((start, before))
    segments = []
    for (length, read), members in shapes.items():
        first, before = torch.tensor(members, device=cu_segments.device).unbind(1)
        past = before[:, None] + torch.arange(read, device=cu_segments.device)
        segments.append(Segments(length, first, past, torch.zeros_like(past[0])))
    return segments


@torch.no_grad()
def nearest_keys(query: Tensor, key: Tensor, among: Tensor, top_k: int) -> Tensor:
    """Find the keys with the largest scores by exact search, a chunk of keys at a time.

    Args:
        query: `(H, Q, D)`.
        key: `(H, L, D)`.
        among: `(C,)` int64, rows of the keys to choose from.
        top_k: number of keys per query.

    Returns:
        The rows of the keys, int64 `(H, Q, min(top_k, C))`.
    """
    heads, queries = query.shape[:2]
    best = query.new_zeros(heads, queries, 0)
    rows = torch.zeros(heads, queries, 0, dtype=torch.long, device=query.device)
    for chunk in among.split(max(top_k, MAX_SCORES // (heads * queries))):
        scores, place = (query @ key[:, chunk].transpose(1, 2)).topk(min(top_k, len(chunk)), dim=-1)
        best, kept = torch.cat([best, scores], dim=-1).topk(min(top_k, best.shape[-1] + scores.shape[-1]), dim=-1)
        rows = torch.cat([rows, chunk[place]], dim=-1).gather(-1, kept)
    return rows
