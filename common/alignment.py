"""Alignment and uniformity, the two properties that a contrastive loss optimizes. Lower is better for both."""

import math

import torch
from torch import Tensor


def alignment(first: Tensor, second: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Compute the mean distance of positive pairs (Wang and Isola 2020, arXiv:2005.10242, section 4.1).

        E |x - y|^alpha

    Args:
        first: `(N, d)`, unit length.
        second: `(N, d)`, unit length; row i is the positive of row i of `first`.
        alpha: exponent of the distance.

    Returns:
        A scalar; 0 if the two vectors of each pair are equal.
    """
    return (first - second).norm(dim=1).pow(alpha).mean()


def uniformity(embeddings: Tensor, *, t: float = 2.0, max_rows: int = 2048) -> Tensor:
    """Measure how evenly embeddings lie on the sphere (Wang and Isola 2020, arXiv:2005.10242, section 4.1).

        log E_{x != y} exp(-t |x - y|^2)

    Args:
        embeddings: `(N, d)`, unit length, of different documents.
        t: scale of the Gaussian kernel; the larger it is, the more near neighbours count.
        max_rows: if there are more rows, this many are taken at equal distances, because the number of pairs grows
            with the square of the rows.

    Returns:
        A scalar: 0 if all vectors are equal (or there is only one), about -2t for many random vectors of high
        dimension.
    """
    count = len(embeddings)
    if count < 2:
        return embeddings.new_zeros(())
    if count > max_rows:
        embeddings = embeddings[torch.arange(max_rows, device=embeddings.device) * count // max_rows]
    exponents = -t * torch.pdist(embeddings).square()
    return exponents.logsumexp(dim=0) - math.log(len(exponents))
