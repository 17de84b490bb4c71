"""Matryoshka: the first dimensions of an embedding are an embedding."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def matryoshka(loss: Loss, dims: Sequence[int], weights: Sequence[float] | None = None, normalize: bool = True) -> Loss:
    """Matryoshka representation learning (Kusupati et al. 2022, arXiv:2205.13147, equation 1) over any loss.

        L(Z, ...) = sum_m weight_m loss(Z[:, :m] / |Z[:, :m]|, ...)

    Args:
        loss: takes embeddings `(n_i, d)`, one or several arguments, and returns the loss and detached scalars.
        dims: the m, at most d. What is d is passed on as it is: the loss of `dims=[d]` is the plain loss.
        weights: of the dims; 1 each if None.
        normalize: unit length for the shortened embeddings; False for a loss of embeddings that have none (VICReg).

    Returns:
        A loss of the same arguments. Its scalars are those of the widest of `dims`, and `loss_at_<m>` of all.

    Raises:
        ValueError: no dims, dims below 1, not as many weights as dims; when called, dims above d.
    """
    weights = [1.0] * len(dims) if weights is None else weights
    if not dims or min(dims) < 1 or len(weights) != len(dims):
        raise ValueError(f"dims must be at least 1, with as many weights: {dims}, {weights}")
    widest_first = sorted(zip(dims, weights, strict=True), reverse=True)

    def shortened(embeddings: Tensor, dim: int) -> Tensor:
        if dim > embeddings.shape[-1]:
            raise ValueError(f"embeddings have {embeddings.shape[-1]} dimensions, fewer than {dim}")
        if dim == embeddings.shape[-1]:
            return embeddings
        return F.normalize(embeddings[..., :dim], dim=-1) if normalize else embeddings[..., :dim]

    def sum_over_dims(*embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        for dim, weight in widest_first:
            value, scalars = loss(*(shortened(z, dim) for z in embeddings))
            total = weight * value if total is None else total + weight * value
            metrics = scalars | metrics | {f"loss_at_{dim}": value.detach()}
        assert total is not None
        return total, metrics

    return sum_over_dims
