"""Matryoshka: the first dimensions of an embedding are an embedding of their own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from training.objectives.losses.similarity import Texts
from training.objectives.losses.token_vectors import TokenVectors

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def matryoshka(loss: Loss, dims: Sequence[int], weights: Sequence[float] | None = None, normalize: bool = True) -> Loss:
    """Build the Matryoshka form of a loss: its sum over embeddings that are cut to their first dimensions.

        L(Z, ...) = sum_m weight_m loss(Z[:, :m] / |Z[:, :m]|, ...)

    Source: Matryoshka representation learning (Kusupati et al. 2022, arXiv:2205.13147, equation 1; weights 1).

    When to use it: around any loss of embeddings, if the model is to be served at several embedding sizes; include the
    full width in `dims`. Not if one size is served: the sizes compete for the first dimensions.

    Args:
        loss: takes embeddings `(n_i, d)`, one or several arguments, and returns the loss and detached scalars. Of texts
            as token vectors each vector is cut, and keeps its length.
        dims: the sizes m, at most d. A size of d passes the embeddings on as they are, so `dims=[d]` is the plain loss.
        weights: weights of the sizes; 1 each if None.
        normalize: whether shortened embeddings are scaled to unit length; False for a loss of embeddings that are not
            normalised (VICReg).

    Returns:
        A loss of the same arguments. Its scalars are those of the largest of `dims`, and `loss_at_<m>` of each.

    Raises:
        ValueError: there are no dims, one is below 1, or the number of weights is another; when the loss is called,
            a size is above d.

    Examples:
        >>> import torch
        >>> from training.objectives.losses.contrastive import info_nce
        >>> loss, metrics = matryoshka(info_nce, dims=[4, 2])(torch.eye(4), torch.eye(4))
        >>> sorted(metrics)
        ['accuracy', 'loss_at_2', 'loss_at_4']
    """
    weights = [1.0] * len(dims) if weights is None else weights
    if not dims or min(dims) < 1 or len(weights) != len(dims):
        raise ValueError(f"dims must be at least 1, with as many weights: {dims}, {weights}")
    widest_first = sorted(zip(dims, weights, strict=True), reverse=True)

    def shortened(embeddings: Texts, dim: int) -> Texts:
        width = (embeddings.vectors if isinstance(embeddings, TokenVectors) else embeddings).shape[-1]
        if dim > width:
            raise ValueError(f"embeddings have {width} dimensions, fewer than {dim}")
        if isinstance(embeddings, TokenVectors):
            return embeddings.shortened(dim)
        if dim == width:
            return embeddings
        return F.normalize(embeddings[..., :dim], dim=-1) if normalize else embeddings[..., :dim]

    def sum_over_dims(*embeddings: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        for dim, weight in widest_first:
            value, scalars = loss(*(shortened(z, dim) for z in embeddings))
            total = weight * value if total is None else total + weight * value
            metrics = scalars | metrics | {f"loss_at_{dim}": value.detach()}
        assert total is not None
        return total, metrics

    return sum_over_dims
