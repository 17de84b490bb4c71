"""InfoNCE: classify the document that belongs to a query among the other documents of the batch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.objectives.losses.similarity import Texts, in_one, similarity

Columns = tuple[Any, Any, Any]  # queries, positives, and negatives or None


def info_nce(
    query: Texts,
    positive: Texts,
    negative: Texts | None = None,
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
    """Compute InfoNCE: classify the positive of each query among the documents of the batch.

        L = -1/|rows| sum_{i in rows} log( exp(q_i.d_i / t) / sum_j exp(q_i.d_j / t) )

    The sum over j runs over the N positives and the N * M hard negatives of the batch. With `symmetric`, L is averaged
    with the same loss of the positives against the queries. If all vectors are equal, L = ln(N + N * M). For texts as
    token vectors q_i.d_j is the MaxSim of query i and document j, in both directions.

    Source: van den Oord et al. 2018 (arXiv:1807.03748, equation 4). The weight of hard negatives is from supervised
    SimCSE (Gao et al. 2021, arXiv:2104.08821, appendix), the guide from GISTEmbed (Solatorio 2024, arXiv:2402.16829,
    here without its query-query and positive-positive columns), the learned temperature from CLIP (Radford et al. 2021,
    arXiv:2103.00020, which trains log(1 / t) and keeps 1 / t at or below 100).

    When to use it: the default for pairs of a query and its document. The more rows, the better: all other documents of
    the batch are negatives, and they are free. Not for data in which most documents of a batch answer most queries
    (use labels and `sup_con`), and not if large batches do not fit even with cached gradients (use
    `momentum_contrast`). Pass text ids whenever texts can repeat, because a duplicate is a false negative.

    Related losses: `nt_xent` also uses the other queries as negatives; `momentum_contrast` takes its negatives from a
    queue; `soft_targets` over scores of candidates replaces the one positive by a teacher's distribution.

    Args:
        query: `(N, d)`, unit length; or N texts as token vectors, as then all others are.
        positive: `(N, d)`, unit length; row i belongs to query i.
        negative: `(N * M, d)`, unit length, in any order, or None.
        temperature: t; a scalar tensor that requires a gradient is learned.
        symmetric: whether to classify the query of each positive as well.
        negative_weight: added to the score of a row's own hard negatives: the logarithm of how often each of them
            counts. 0 is neutral, -inf drops them.
        negative_row: `(N * M,)`, the row of the (gathered) batch that each hard negative belongs to; needed with a
            `negative_weight`.
        query_id: `(N,)` integers that are equal where the texts are equal. With `positive_id`, a column that shares the
            query or the text of row i's own positive is not a negative of row i and leaves the sum.
        positive_id: `(N,)`, from the same numbering of texts.
        negative_id: `(N * M,)`, from the same numbering of texts; needed with `negative` and `positive_id`.
        guide: queries, positives and negatives as a guide gives them: unit vectors of another model, or what the model
            in training gives (`query`, `positive` and `negative` themselves). A column that the guide scores higher
            than the row's own positive is a false negative and leaves the sum.
        guide_margin: how far a column's score must stay below the own positive's; if negative, how far it may exceed
            it.
        guide_relative: whether the margin is a fraction of the own positive's score.
        rows: the rows that the loss is averaged over; the others only serve as columns. A process of a distributed run
            passes its own rows of the gathered batch.

    Returns:
        The loss, and `accuracy`: the share of `rows` whose own positive has the highest score. With a guide also
        `false_negative_share`: the share of the other columns that leave the sum.

    Raises:
        ValueError: there is a `negative_weight` without `negative_row`.

    Examples:
        >>> import torch
        >>> query = torch.eye(3)
        >>> loss, metrics = info_nce(query, query.roll(1, 0), temperature=1.0)  # every positive is another row's query
        >>> round(loss.item(), 4), metrics["accuracy"].item()
        (1.5514, 0.0)
        >>> round(info_nce(query, query, temperature=1.0)[0].item(), 4)
        0.5514
    """
    documents = positive if negative is None else in_one([positive, negative])
    similar = similarity(query[rows], documents, temperature=1.0)
    similar_back: Tensor | None = None  # of every query, `(rows, N)`, to the positives of `rows`
    if symmetric and len(similar) == len(query):
        similar_back = similar[:, : len(positive)].T
    elif symmetric:
        similar_back = similarity(query, positive[rows], temperature=1.0).T
    scores = similar / temperature
    back = None if similar_back is None else similar_back / temperature
    number = torch.arange(len(query), device=scores.device)
    target, metrics = number[rows], dict[str, Tensor]()

    if negative_weight and negative is not None:
        if negative_row is None:
            raise ValueError("a negative_weight needs negative_row, the row that each hard negative belongs to")
        own = torch.zeros_like(scores[:, len(positive) :])
        own = own.masked_fill(negative_row == target[:, None], negative_weight)
        scores = torch.cat([scores[:, : len(positive)], scores[:, len(positive) :] + own], dim=1)

    if query_id is not None and positive_id is not None:
        other = number != target[:, None]
        same_pair = (query_id[rows, None] == query_id) | (positive_id[rows, None] == positive_id)
        excluded = same_pair & other
        if back is not None:
            back = back.masked_fill(excluded, -torch.inf)
        if negative is not None and negative_id is not None:
            excluded = torch.cat([excluded, positive_id[rows, None] == negative_id], dim=1)
        scores = scores.masked_fill(excluded, -torch.inf)

    if guide is not None:
        guide_query, guide_positive, guide_negative = guide
        judged, judged_back = similar.detach(), None if similar_back is None else similar_back.detach()
        if guide_query is not query or guide_positive is not positive or guide_negative is not negative:
            guide_documents = guide_positive if guide_negative is None else in_one([guide_positive, guide_negative])
            judged = similarity(guide_query[rows], guide_documents, temperature=1.0)
            if symmetric:
                judged_back = similarity(guide_query, guide_positive[rows], temperature=1.0).T
        excluded = _nearer_than_own(judged, target, guide_margin, guide_relative)
        scores = scores.masked_fill(excluded, -torch.inf)
        metrics["false_negative_share"] = excluded.sum() / max(1, excluded.numel() - len(target))
        if back is not None and judged_back is not None:
            back = back.masked_fill(_nearer_than_own(judged_back, target, guide_margin, guide_relative), -torch.inf)

    loss = F.cross_entropy(scores, target)
    if back is not None:
        loss = (loss + F.cross_entropy(back, target)) / 2
    return loss, {"accuracy": (scores.argmax(dim=1) == target).float().mean()} | metrics


def _nearer_than_own(scores: Tensor, own: Tensor, margin: float, relative: bool) -> Tensor:
    """Which columns are, up to a margin, more like a row than its own column is; never the own column itself."""
    limit = scores.gather(1, own[:, None])
    limit = limit - (limit.abs() * margin if relative else margin)
    return (scores > limit).scatter(1, own[:, None], False)
