"""Attention of segments to their own tokens and, in the same softmax, to tokens of the past (memory layers)."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .attention_kernels_longembed import MAX_SCORES, attend, causal_mask, masked_softmax, recompute_in_backward
from .position_base_longembed import GroupedRotary, ScoreBias, merge_far


class PastKeys(NamedTuple):
    """Keys and values of P tokens that later segments read."""

    key: Tensor  # (P, H, D)
    value: Tensor  # (P, H, D)
    far_key: Tensor | None = None  # (P, H, D), at the grouped positions of Self-Extend


class Segments(NamedTuple):
    """N segments of L tokens, each of which reads R tokens of the past.

    Args:
        length: L.
        first: `(N,)` int64, packed row of the first token.
        past: `(N, R)` int64, rows of `PastKeys`.
        past_index: `(R,)` int64, their positions relative to the segment's first token; negative: before it.
    """

    length: int
    first: Tensor  # (N,) int64, packed row of the first token
    past: Tensor  # (N, R) int64, rows of `PastKeys`
    past_index: Tensor  # (R,) int64, positions relative to the segment's first token; negative: before it


def past_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: PastKeys,
    segments: list[Segments],
    scaling: float,
    dropout: float,
    bias: ScoreBias | None = None,
    grouped: GroupedRotary | None = None,
    causal: bool = False,
) -> Tensor:
    """Compute attention of every segment to its own tokens and its past; segments of one shape are batched.

    Args:
        query, key, value: `(T, H, D)`.
        past: the keys and values that `segments` indexes.
        segments: the segments; every packed row is in exactly one of them.
        scaling: factor of the scores.
        dropout: probability to leave out an attention weight.
        bias: added to the scores by the distance of query and key, or None.
        grouped: the second rotation of Self-Extend for far keys, or None; `past.far_key` goes with it.
        causal: no query sees a later key of its segment.

    Returns:
        `(T, H, D)`. Memory is linear in T, because the backward pass recomputes scores and gathered keys.
    """
    heads, device = query.shape[1], query.device
    contexts, rows = [query.new_zeros(0, heads, value.shape[-1])], [torch.zeros(0, dtype=torch.long, device=device)]
    for length, all_first, all_past, past_index in segments:

        def some_queries(first: Tensor, past_rows: Tensor, index: Tensor, length=length, past_index=past_index):
            """Compute the queries at `index` `(Q,)` of the segments that begin at `first` `(n,)`: `(n, H, Q, D)`."""
            own_index = torch.arange(length, device=device)
            at, own, key_index = first[:, None] + index, first[:, None] + own_index, torch.cat([past_index, own_index])

            def keys(past_states: Tensor, states: Tensor) -> Tensor:  # (n, H, R + L, D)
                return torch.cat([_take(past_states, past_rows), _take(states, own)], dim=2)

            queries, values = _take(query, at), keys(past.value, value)
            mask = causal_mask(index, key_index) if causal else None
            if bias is not None:
                dense = bias.dense(queries, index, key_index)
                mask = dense if mask is None else dense.masked_fill(~mask, float("-inf"))
            if grouped is None:
                return attend(queries, keys(past.key, key), values, mask, scaling, dropout)
            scores = merge_far(
                queries @ keys(past.key, key).transpose(2, 3),
                _take(grouped.query_left, at),
                _take(grouped.query_right, at),
                keys(cast(Tensor, past.far_key), grouped.key),
                index[:, None] - key_index,
                grouped.neighbours[at][:, None, :, None],
            )
            visible = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
            weights = masked_softmax(scores * scaling, visible).to(values.dtype)
            return torch.dropout(weights, dropout, train=dropout > 0) @ values

        fit = max(1, MAX_SCORES // (heads * (length + len(past_index))))  # number of queries computed at once
        together = max(1, fit // length)
        for first, past_rows in zip(all_first.split(together), all_past.split(together), strict=True):
            for index in torch.arange(length, device=device).split(fit):
                context = recompute_in_backward(some_queries, first, past_rows, index)
                contexts.append(context.transpose(1, 2).flatten(0, 1))
                rows.append((first[:, None] + index).flatten())
    return torch.cat(contexts)[torch.cat(rows).argsort()]


def _take(states: Tensor, rows: Tensor) -> Tensor:
    """Return the rows `(n, K)` of `(T, H, D)` as `(n, H, K, D)`."""
    return states.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)
