"""The output axis: pooling of token states to one vector per document or passage, by the methods of `config.pooling`.

The states of all documents are packed: T tokens in all, N segments (documents or passages), d model width.
"""

import torch
from torch import Tensor

from .packing_longembed import PackedDocuments, segment_numbers


def weighted_sum(hidden_states: Tensor, weights: Tensor, segment_ids: Tensor, segments: int) -> Tensor:
    """Compute the weighted mean of each segment, in fp32 because half precision cannot add up thousands of terms.

    Args:
        hidden_states: `(T, d)`.
        weights: `(T,)`.
        segment_ids: `(T,)` int64, the segment of each token.
        segments: N, number of segments.

    Returns:
        `(N, d)`, fp32 or wider; zeros for a segment without tokens.
    """
    with torch.autocast(hidden_states.device.type, enabled=False):
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        total = wide.new_zeros(segments, wide.shape[1]).index_add(
            0, segment_ids, wide * weights[:, None].to(wide.dtype)
        )
        norm = wide.new_zeros(segments).index_add(0, segment_ids, weights.to(wide.dtype))
        return total / norm.clamp(min=torch.finfo(wide.dtype).tiny)[:, None]  # not 0 / 0 for a segment without tokens


def mean_pooling(hidden_states: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average all tokens, special tokens included (SBERT, Reimers and Gurevych 2019, arXiv:1908.10084).

    Args:
        hidden_states: `(T, d)`.
        segment_ids: `(T,)` int64, the segment of each token.
        cu_seqlens: `(N + 1,)` int32, cumulative lengths of the segments.

    Returns:
        `(N, d)`.
    """
    return weighted_sum(hidden_states, torch.ones_like(segment_ids), segment_ids, cu_seqlens.shape[0] - 1)


def weighted_mean_pooling(hidden_states: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average all tokens, weighted by their places 1 to L (SGPT, Muennighoff 2022, arXiv:2202.08904).

    Args:
        hidden_states: `(T, d)`.
        segment_ids: `(T,)` int64, the segment of each token.
        cu_seqlens: `(N + 1,)` int32, cumulative lengths of the segments.

    Returns:
        `(N, d)`.
    """
    place = torch.arange(segment_ids.shape[0], device=segment_ids.device) - cu_seqlens[:-1].long()[segment_ids] + 1
    return weighted_sum(hidden_states, place, segment_ids, cu_seqlens.shape[0] - 1)


def cls_pooling(hidden_states: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Take the state of the first token of each segment.

    Args:
        hidden_states: `(T, d)`.
        segment_ids: `(T,)` int64, the segment of each token.
        cu_seqlens: `(N + 1,)` int32, cumulative lengths of the segments.

    Returns:
        `(N, d)`; zeros for a segment without tokens.
    """
    return _row_or_zero(hidden_states, cu_seqlens[:-1].long(), cu_seqlens)


def last_pooling(hidden_states: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Take the state of the last token of each segment.

    Args:
        hidden_states: `(T, d)`.
        segment_ids: `(T,)` int64, the segment of each token.
        cu_seqlens: `(N + 1,)` int32, cumulative lengths of the segments.

    Returns:
        `(N, d)`; zeros for a segment without tokens.
    """
    return _row_or_zero(hidden_states, cu_seqlens[1:].long() - 1, cu_seqlens)


def _row_or_zero(hidden_states: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    if hidden_states.shape[0] == 0:
        return hidden_states.new_zeros(rows.shape[0], hidden_states.shape[1])
    picked = hidden_states[rows.clamp(0, hidden_states.shape[0] - 1)]
    return torch.where((cu_seqlens.diff() > 0)[:, None], picked, 0.0)


POOLINGS = {"mean": mean_pooling, "cls": cls_pooling, "last": last_pooling, "weighted_mean": weighted_mean_pooling}


def token_weights(
    hidden_states: Tensor, documents: PackedDocuments, regularization: float, rarity: Tensor | None = None
) -> Tensor:
    """Compute the weight of each token in the mean over its document, by generalized max pooling.

    Murray and Perronnin 2014, arXiv:1406.0312. With the unit vectors x of the tokens of a document and lambda =
    `regularization`, the weight of a token is

        1 - x . v    where    v = (sum of x x^T + lambda I)^-1 (sum of x)

    so that the inner products of v with all x are as close to 1 as the penalty allows. The paper pools to v itself,
    which is the sum of weight * x / lambda. Here the weights apply to the states with their lengths, so that the
    embedding of a short document does not change. A token that occurs n times and is orthogonal to all others has the
    weight lambda / (n + lambda) each time: the sum saturates, as the count of a word does in BM25.

    With a weight r of each token, the ridge regression is weighted by them, and so is its residual:

        r (1 - x . v)    where    v = (sum of r x x^T + lambda I)^-1 (sum of r x)

    Args:
        hidden_states: `(T, d)`.
        documents: which rows belong to which document.
        regularization: lambda, positive; the weights of a document with far fewer tokens are close to r.
        rarity: r, `(T,)`, at least 0; None: 1.

    Returns:
        `(T,)`, fp32 or wider.
    """
    with torch.autocast(hidden_states.device.type, enabled=False):
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        root = wide.new_ones(len(wide)) if rarity is None else rarity.to(wide.dtype).sqrt()
        rows = torch.nn.functional.normalize(wide, dim=-1) * root[:, None]
        parts = zip(rows.split(documents.lengths), root.split(documents.lengths), strict=True)
        return torch.cat([_weights(*part, regularization) for part in parts])


def _weights(rows: Tensor, root: Tensor, regularization: float) -> Tensor:
    """Compute the weights `(L,)` of one document by the smaller of two Gram matrices.

    Args:
        rows: `(L, d)`, unit vectors times `root`.
        root: `(L,)`, the square root of r.
        regularization: lambda.
    """
    short = rows.shape[0] <= rows.shape[1]
    gram, total = (rows @ rows.T, root) if short else (rows.T @ rows, rows.T @ root)
    ridge = gram + regularization * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.cholesky_solve(total[:, None], torch.linalg.cholesky(ridge))[:, 0]
    return root * (regularization * solution if short else root - rows @ solution)


def pool(hidden_states: Tensor, cu_seqlens: Tensor, method: str) -> Tensor:
    """Pool the tokens of each segment to one vector.

    Args:
        hidden_states: `(T, d)`.
        cu_seqlens: `(N + 1,)` int32, cumulative lengths of the segments, which may be empty.
        method: name in `POOLINGS`.

    Returns:
        `(N, d)`, not normalized; zeros for an empty segment.
    """
    return POOLINGS[method](hidden_states, segment_numbers(cu_seqlens, hidden_states.shape[0]), cu_seqlens)


def pool_incrementally(pooled: Tensor, seen: Tensor, hidden_states: Tensor, cu_seqlens: Tensor, method: str) -> Tensor:
    """Update the vectors of B documents that are read in chunks; the result equals `pool` of all chunks read so far.

    Args:
        pooled: `(B, d)`, the vectors of the earlier chunks.
        seen: `(B,)` int64, number of tokens in the earlier chunks.
        hidden_states: `(T, d)`, the states of the new chunks.
        cu_seqlens: `(B + 1,)` int32, cumulative lengths of the new chunks, which may be empty.
        method: name in `POOLINGS`.

    Returns:
        `(B, d)`, the vectors of the earlier and the new chunks together.
    """
    chunk, length = pool(hidden_states, cu_seqlens, method), cu_seqlens.diff().long()
    pooled, total = pooled.to(chunk.dtype), seen + length

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return (part.to(chunk.dtype) / whole.clamp(min=1).to(chunk.dtype))[:, None]

    if method == "cls":
        return torch.where((seen > 0)[:, None], pooled, chunk)
    if method == "last":
        return torch.where((length > 0)[:, None], chunk, pooled)
    if method == "weighted_mean":  # the weight of a token is its place in the document: in the chunk, plus `seen`
        within, before = length * (length + 1), 2 * seen * length
        chunk = torch.lerp(chunk, pool(hidden_states, cu_seqlens, "mean"), share(before, within + before))
        length, total = within + before, total * (total + 1)
    return torch.lerp(pooled, chunk, share(length, total))
