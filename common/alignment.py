"""Alignment and uniformity: what a contrastive loss does, taken apart into two numbers. Lower is better for both."""

import math

import torch
from torch import Tensor


def alignment(first: Tensor, second: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Mean distance of what belongs together (Wang and Isola 2020, arXiv:2005.10242, section 4.1).

        E |x - y|^alpha

    Args:
        first: `(N, d)`, unit length.
        second: `(N, d)`, unit length; row i belongs to row i.
        alpha: the power.

    Returns:
        A scalar, 0 if each pair is one vector.
    """
    return (first - second).norm(dim=1).pow(alpha).mean()


def uniformity(embeddings: Tensor, *, t: float = 2.0, max_rows: int = 2048) -> Tensor:
    """How evenly embeddings lie on the sphere (Wang and Isola 2020, arXiv:2005.10242, section 4.1).

        log E_{x != y} exp(-t |x - y|^2)

    Args:
        embeddings: `(N, d)`, unit length, of different documents.
        t: the larger, the more near neighbours count.
        max_rows: of more rows than that, these many at equal distances are taken: the pairs grow with the square.

    Returns:
        A scalar: 0 if all vectors are one (or there is one), about -2t for many points at random in many dimensions.
    """
    count = len(embeddings)
    if count < 2:
        return embeddings.new_zeros(())
    if count > max_rows:
        embeddings = embeddings[torch.arange(max_rows, device=embeddings.device) * count // max_rows]
    exponents = -t * torch.pdist(embeddings).square()
    return exponents.logsumexp(dim=0) - math.log(len(exponents))
