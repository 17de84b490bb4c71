"""InfoNCE: recognise the document that belongs to a query among the other documents of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    query: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    temperature: float = 0.05,
    symmetric: bool = False,
    query_id: Tensor | None = None,
    positive_id: Tensor | None = None,
    negative_id: Tensor | None = None,
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
        temperature: t.
        symmetric: also find the query of a positive.
        query_id: `(N,)` integers that are equal where the texts are equal. With `positive_id`, a column that shares the
            query or the text with row i's own positive is no negative of row i and leaves the sum.
        positive_id: `(N,)`, from the same numbering of texts.
        negative_id: `(N * M,)`, from the same numbering of texts; needed if `negative` and `positive_id` are given.
        rows: the rows that the loss is averaged over; the others only serve as columns. A process of a distributed run
            passes its own rows of the gathered batch.

    Returns:
        The loss, and `accuracy`: the share of `rows` whose own positive has the highest score.
    """
    target = torch.arange(len(query), device=query.device)[rows]
    document = positive if negative is None else torch.cat([positive, negative])
    scores = query[rows] @ document.T / temperature
    back = positive[rows] @ query.T / temperature if symmetric else None

    if query_id is not None and positive_id is not None:
        other = torch.arange(len(query), device=query.device) != target[:, None]
        same_pair = (query_id[rows, None] == query_id) | (positive_id[rows, None] == positive_id)
        excluded = same_pair & other
        if back is not None:
            back = back.masked_fill(excluded, -torch.inf)
        if negative is not None and negative_id is not None:
            excluded = torch.cat([excluded, positive_id[rows, None] == negative_id], dim=1)
        scores = scores.masked_fill(excluded, -torch.inf)

    loss = F.cross_entropy(scores, target)
    if back is not None:
        loss = (loss + F.cross_entropy(back, target)) / 2
    return loss, {"accuracy": (scores.argmax(dim=1) == target).float().mean()}
