"""InfoNCE: recognise the document that belongs to a query among the other documents of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.objectives.losses.similarity import similarity

Columns = tuple[Tensor, Tensor, Tensor | None]


def info_nce(
    query: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    symmetric: bool = False,
    negative_weight: float = 0.0,
    negative_row: Tensor | None = None,
    query_id: Tensor | None = None,
    positive_id: Tensor | None = None,
    negative_id: Tensor | None = None,
    guide: Columns | None = None,
    guide_margin: float = 0.0,
    guide_relative: bool = False,
    rows: slice = slice(None),
) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE with in-batch and hard negatives (van den Oord et al. 2018, arXiv:1807.03748, equation 4).

        L = -1/|rows| sum_{i in rows} log( exp(q_i.d_i / t) / sum_j exp(q_i.d_j / t) )

    The sum runs over the N positives and the N * M hard negatives of the batch. `symmetric` averages L with the same
    loss of the positives against the queries. A batch whose vectors are all equal has L = ln(N + N * M).

    Args:
        query: `(N, d)`, unit length.
        positive: `(N, d)`, unit length; row i belongs to query i.
        negative: `(N * M, d)`, unit length, in any order, or None.
        temperature: t; a scalar tensor that requires a gradient is learned (CLIP, Radford et al. 2021,
            arXiv:2103.00020, trains log(1 / t) and keeps 1 / t at or below 100).
        symmetric: also find the query of a positive.
        negative_weight: added to the score of the row's own hard negatives: the logarithm of how often each of them
            counts (supervised SimCSE, Gao et al. 2021, arXiv:2104.08821, appendix). 0 is neutral, -inf drops them.
        negative_row: `(N * M,)`, the row whose own hard negative each is; needed with a `negative_weight`. In gathered
            columns these are rows of the gathered batch.
        query_id: `(N,)` integers that are equal where the texts are equal. With `positive_id`, a column that shares the
            query or the text with row i's own positive is no negative of row i and leaves the sum.
        positive_id: `(N,)`, from the same numbering of texts.
        negative_id: `(N * M,)`, from the same numbering of texts; needed if `negative` and `positive_id` are given.
        guide: queries, positives and negatives, of unit length, by which false negatives are told: a column that is
            more like the row than the row's own positive is leaves the sum. They come from another model (GISTEmbed,
            Solatorio 2024, arXiv:2402.16829, without its query-query and positive-positive columns), or are `query`,
            `positive` and `negative` themselves.
        guide_margin: how far below the own positive's a column's similarity by the guide must stay; if negative, how
            far above it may go.
        guide_relative: the margin is a share of the own positive's similarity.
        rows: the rows that the loss is averaged over; the others only serve as columns. A process of a distributed run
            passes its own rows of the gathered batch.

    Returns:
        The loss, and `accuracy`: the share of `rows` whose own positive has the highest score; with a guide
        `false_negative_share`: the share of the other columns that it takes out of the sum.
    """
    target = torch.arange(len(query), device=query.device)[rows]
    scores = similarity(query[rows], positive if negative is None else torch.cat([positive, negative]), temperature)
    back = similarity(positive[rows], query, temperature) if symmetric else None
    metrics = {}

    if negative_weight and negative is not None:
        if negative_row is None:
            raise ValueError("a negative_weight needs negative_row, the row that each hard negative belongs to")
        own = torch.zeros_like(scores[:, len(positive) :])
        own = own.masked_fill(negative_row == target[:, None], negative_weight)
        scores = torch.cat([scores[:, : len(positive)], scores[:, len(positive) :] + own], dim=1)

    if query_id is not None and positive_id is not None:
        other = torch.arange(len(query), device=query.device) != target[:, None]
        same_pair = (query_id[rows, None] == query_id) | (positive_id[rows, None] == positive_id)
        excluded = same_pair & other
        if back is not None:
            back = back.masked_fill(excluded, -torch.inf)
        if negative is not None and negative_id is not None:
            excluded = torch.cat([excluded, positive_id[rows, None] == negative_id], dim=1)
        scores = scores.masked_fill(excluded, -torch.inf)

    if guide is not None:
        guide_query, guide_positive, guide_negative = guide
        documents = guide_positive if guide_negative is None else torch.cat([guide_positive, guide_negative])
        excluded = _nearer_than_own(guide_query[rows], documents, target, guide_margin, guide_relative)
        scores = scores.masked_fill(excluded, -torch.inf)
        metrics["false_negative_share"] = excluded.sum() / max(1, excluded.numel() - len(target))
        if back is not None:
            excluded = _nearer_than_own(guide_positive[rows], guide_query, target, guide_margin, guide_relative)
            back = back.masked_fill(excluded, -torch.inf)

    loss = F.cross_entropy(scores, target)
    if back is not None:
        loss = (loss + F.cross_entropy(back, target)) / 2
    return loss, {"accuracy": (scores.argmax(dim=1) == target).float().mean()} | metrics


def _nearer_than_own(row: Tensor, column: Tensor, own: Tensor, margin: float, relative: bool) -> Tensor:
    """Which columns are, up to a margin, more like a row than its own column is; never the own column itself."""
    scores = similarity(row, column, temperature=1.0)
    limit = scores.gather(1, own[:, None])
    limit = limit - (limit.abs() * margin if relative else margin)
    return (scores > limit).scatter(1, own[:, None], False)
