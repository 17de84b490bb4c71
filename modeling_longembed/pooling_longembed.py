"""Pooling: packed token states become one vector a document (or a passage). The registry behind `config.pooling`."""

import torch
from torch import Tensor


def weighted_sum(hidden_states: Tensor, weights: Tensor, segment_ids: Tensor, segments: int) -> Tensor:
    """Weighted mean by segment, `(T, d)`, `(T,)`, `(T,)` to `(N, d)`; fp32, for half precision loses 8,000 terms."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        total = wide.new_zeros(segments, wide.shape[1]).index_add(
            0, segment_ids, wide * weights[:, None].to(wide.dtype)
        )
        norm = wide.new_zeros(segments).index_add(0, segment_ids, weights.to(wide.dtype))
        return total / norm.clamp(min=torch.finfo(wide.dtype).tiny)[:, None]  # a segment without tokens gives zeros


def mean_pooling(hidden_states: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over all tokens, special ones too (SBERT, Reimers & Gurevych 2019)."""
    return weighted_sum(hidden_states, torch.ones_like(segment_ids), segment_ids, len(cu_seqlens) - 1)


def weighted_mean_pooling(hidden_states: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean weighted by place, 1 to L (SGPT, Muennighoff 2022)."""
    place = torch.arange(len(segment_ids), device=segment_ids.device) - cu_seqlens[:-1].long()[segment_ids] + 1
    return weighted_sum(hidden_states, place, segment_ids, len(cu_seqlens) - 1)


def cls_pooling(hidden_states: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """State of the first token; zeros for a segment without tokens."""
    return _row_or_zero(hidden_states, cu_seqlens[:-1].long(), cu_seqlens)


def last_pooling(hidden_states: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """State of the last token; zeros for a segment without tokens."""
    return _row_or_zero(hidden_states, cu_seqlens[1:].long() - 1, cu_seqlens)


def _row_or_zero(hidden_states: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    if not len(hidden_states):
        return hidden_states.new_zeros(len(rows), hidden_states.shape[1])
    picked = hidden_states[rows.clamp(0, len(hidden_states) - 1)]
    return torch.where((cu_seqlens.diff() > 0)[:, None], picked, 0.0)


POOLINGS = {"mean": mean_pooling, "cls": cls_pooling, "last": last_pooling, "weighted_mean": weighted_mean_pooling}


def pool(hidden_states: Tensor, cu_seqlens: Tensor, method: str) -> Tensor:
    """One vector a segment.

    Args:
        hidden_states: `(T, d)` packed.
        cu_seqlens: `(N + 1,)` int32 cumulative segment lengths; segments may be empty.
        method: name in `POOLINGS`.

    Returns:
        `(N, d)`, not normalised; zeros for an empty segment.
    """
    lengths = cu_seqlens.diff().long()
    segment_ids = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    return POOLINGS[method](hidden_states, segment_ids, cu_seqlens)
