"""Scores of one query by different systems on one scale, so that they can be combined."""

from torch import Tensor


def min_max_(scores: Tensor) -> Tensor:
    """Scale the scores of each query, in place, so that the smallest is 0 and the largest 1.

    `(s - min) / (max - min)`, which a convex combination of systems takes (Bruch et al. 2023, arXiv:2210.11934,
    equations 1 and 3). Where all scores are equal, they become 0.

    Args:
        scores: `(queries, documents)`, of which no gradient is taken; without documents they stay as they are.

    Returns:
        `scores`.

    Examples:
        >>> import torch
        >>> min_max_(torch.tensor([[5.0, 7.0, 6.0], [3.0, 3.0, 3.0]]))
        tensor([[0.0000, 1.0000, 0.5000],
                [0.0000, 0.0000, 0.0000]])
    """
    if not scores.numel():
        return scores
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return scores.sub_(low).div_((high - low).where(high > low, 1))
