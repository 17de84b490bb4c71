"""Pooling: packed token states become one vector a document (or a passage). The registry behind `config.pooling`."""

import torch
from torch import Tensor

from .packing_longembed import PackedDocuments, segment_numbers


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
    return weighted_sum(hidden_states, torch.ones_like(segment_ids), segment_ids, cu_seqlens.shape[0] - 1)


def weighted_mean_pooling(hidden_states: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean weighted by place, 1 to L (SGPT, Muennighoff 2022)."""
    place = torch.arange(segment_ids.shape[0], device=segment_ids.device) - cu_seqlens[:-1].long()[segment_ids] + 1
    return weighted_sum(hidden_states, place, segment_ids, cu_seqlens.shape[0] - 1)


def cls_pooling(hidden_states: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """State of the first token; zeros for a segment without tokens."""
    return _row_or_zero(hidden_states, cu_seqlens[:-1].long(), cu_seqlens)


def last_pooling(hidden_states: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """State of the last token; zeros for a segment without tokens."""
    return _row_or_zero(hidden_states, cu_seqlens[1:].long() - 1, cu_seqlens)


def _row_or_zero(hidden_states: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    if hidden_states.shape[0] == 0:
        return hidden_states.new_zeros(rows.shape[0], hidden_states.shape[1])
    picked = hidden_states[rows.clamp(0, hidden_states.shape[0] - 1)]
    return torch.where((cu_seqlens.diff() > 0)[:, None], picked, 0.0)


POOLINGS = {"mean": mean_pooling, "cls": cls_pooling, "last": last_pooling, "weighted_mean": weighted_mean_pooling}


def token_weights(hidden_states: Tensor, documents: PackedDocuments, regularization: float) -> Tensor:
    """What each token counts in a mean over its document, by generalized max pooling (Murray and Perronnin 2014).

    It is `1 - x . v`, with the unit vectors x of the document's tokens and the vector v whose inner products with all
    of them are as near to 1 as a penalty allows: `v = (sum of x x^T + regularization I)^-1 (sum of x)`. The paper
    (arXiv:1406.0312) pools to v itself, which is `sum of weight x / regularization`; here the states keep their
    lengths, so that a short document keeps its embedding. Tokens that come n times and are orthogonal to all others
    count `regularization / (n + regularization)` each: together they saturate, as a word does in BM25.

    Args:
        hidden_states: `(T, d)` packed.
        documents: which rows belong together.
        regularization: positive; a document of far fewer tokens has weights near 1.

    Returns:
        `(T,)`, fp32 or wider.
    """
    with torch.autocast(hidden_states.device.type, enabled=False):
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        unit = torch.nn.functional.normalize(wide, dim=-1)
        return torch.cat([_weights(tokens, regularization) for tokens in unit.split(documents.lengths)])


def _weights(unit: Tensor, regularization: float) -> Tensor:
    """Of one document, `(L, d)` to `(L,)`; by inner products of tokens or of channels, whichever are fewer."""
    short = unit.shape[0] <= unit.shape[1]
    gram, total = (unit @ unit.T, unit.new_ones(len(unit))) if short else (unit.T @ unit, unit.sum(0))
    ridge = gram + regularization * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.cholesky_solve(total[:, None], torch.linalg.cholesky(ridge))[:, 0]
    return regularization * solution if short else 1 - unit @ solution


def pool(hidden_states: Tensor, cu_seqlens: Tensor, method: str) -> Tensor:
    """One vector a segment.

    Args:
        hidden_states: `(T, d)` packed.
        cu_seqlens: `(N + 1,)` int32 cumulative segment lengths; segments may be empty.
        method: name in `POOLINGS`.

    Returns:
        `(N, d)`, not normalised; zeros for an empty segment.
    """
    return POOLINGS[method](hidden_states, segment_numbers(cu_seqlens, hidden_states.shape[0]), cu_seqlens)


def pool_on(pooled: Tensor, seen: Tensor, hidden_states: Tensor, cu_seqlens: Tensor, method: str) -> Tensor:
    """`pool` of documents that come in pieces.

    Args:
        pooled: `(B, d)`, the vectors of what came before.
        seen: `(B,)` int64, tokens that came before.
        hidden_states, cu_seqlens, method: of the pieces here, as in `pool`; a piece may be empty.

    Returns:
        `(B, d)`, the vectors of what came before and the pieces together.
    """
    piece, length = pool(hidden_states, cu_seqlens, method), cu_seqlens.diff().long()
    pooled, total = pooled.to(piece.dtype), seen + length

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return (part.to(piece.dtype) / whole.clamp(min=1).to(piece.dtype))[:, None]

    if method == "cls":
        return torch.where((seen > 0)[:, None], pooled, piece)
    if method == "last":
        return torch.where((length > 0)[:, None], piece, pooled)
    if method == "weighted_mean":  # a token's weight is its place: that in the piece, and `seen`
        within, before = length * (length + 1), 2 * seen * length
        piece = torch.lerp(piece, pool(hidden_states, cu_seqlens, "mean"), share(before, within + before))
        length, total = within + before, total * (total + 1)
    return torch.lerp(pooled, piece, share(length, total))
