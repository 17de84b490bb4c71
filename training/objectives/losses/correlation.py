"""Canonical correlation of two views: what one view tells of the other through any linear map, not the same vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError


def dcca(
    first: Tensor, second: Tensor, *, regularization: float = 1e-3, components: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Deep CCA (Andrew et al. 2013, Deep Canonical Correlation Analysis, section 3).

        L = - sum of the k largest singular values of S11^(-1/2) S12 S22^(-1/2),    S11, S22 + regularization I

    With Cholesky factors in place of the symmetric roots, L1^-1 S12 L2^-T, the singular values are the same: the two
    differ by rotations. All of it is in float64. (Implementations that take the element-wise root of T^T T, as
    Michaelvll/DeepCCA does, give another number, and NaN in the gradient.)

    A statistic of the whole batch, to be computed whole on every process. In small batches it is large for noise too:
    take many times more rows than dimensions.

    Args:
        first: `(N, d1)`.
        second: `(N, d2)`.
        regularization: added to the variances, r of the paper.
        components: k; all, which is the smaller of the widths, if None.

    Returns:
        The loss, at least -k, and `correlation`: the mean of the k singular values, the canonical correlations.

    Raises:
        UserError: no more rows than dimensions, so that any two views would correlate perfectly; or views whose
            covariance cannot be inverted.
    """
    count, width = len(first), max(first.shape[1], second.shape[1])
    if count <= width:
        raise UserError(
            f"DCCA of {count} documents in {width} dimensions: views of no more documents than dimensions "
            f"correlate perfectly, whatever they are; give batches of many more than {width}, or narrower heads"
        )
    with torch.autocast(first.device.type, enabled=False):
        x, y = (view.double() - view.double().mean(dim=0) for view in (first, second))
        factors = []
        for view in (x, y):
            covariance = view.T @ view / (count - 1)
            covariance = covariance + regularization * torch.eye(len(covariance), device=x.device, dtype=x.dtype)
            factor, failed = torch.linalg.cholesky_ex(covariance)
            if failed.any():
                raise UserError(
                    "DCCA: the covariance of a view cannot be inverted; give a larger --dcca_regularization"
                )
            factors.append(factor)
        whitened = torch.linalg.solve_triangular(factors[0], x.T @ y / (count - 1), upper=False)
        whitened = torch.linalg.solve_triangular(factors[1], whitened.T, upper=False)
        correlations = torch.linalg.svdvals(whitened)[:components]
    return -correlations.sum(), {"correlation": correlations.detach().mean()}


class SoftCCA(nn.Module):
    """Soft CCA (Chang et al. 2018, arXiv:1707.09669): two views agree, and no two dimensions of a view correlate.

        L = 1/(N d) sum_i |z1_i - z2_i|^2 + delta (SDL(Z1) + SDL(Z2))

    Z are the views after a batch norm without parameters. SDL, the stochastic decorrelation loss, is the mean of
    |Phi / c| off the diagonal, with Phi <- beta Phi + Z^T Z / (N - 1) and c <- beta c + 1 (section 3.2); the earlier
    Phi has no gradient. They are buffers, which a checkpoint holds; in evaluation mode they stay as they are.

    The paper sums over the pairs of dimensions; the mean, of d (d - 1) of them, is that of
    dburian/transformer_document_embedding, with which the delta of about 0.03 comes. The gradient of SDL is 1/c of that
    of the batch alone: delta does not mean the same at another beta.
    """

    covariances: Tensor
    normalizer: Tensor

    def __init__(self, width: int, *, momentum: float = 0.95, sdl_weight: float = 0.03) -> None:
        """Args:
        width: d, of both views.
        momentum: beta.
        sdl_weight: delta.
        """
        super().__init__()
        self.momentum, self.sdl_weight = momentum, sdl_weight
        self.register_buffer("covariances", torch.zeros(2, width, width))
        self.register_buffer("normalizer", torch.tensor(0.0))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `(N, d)` and `(N, d)`, to be computed whole on every process, and its parts without weights:
        `view_distance` and `decorrelation`.

        Raises:
            UserError: one row, of which there is no variance.
        """
        if len(first) < 2:
            raise UserError(
                "soft CCA takes the variances of a batch, and this one has a single row; give it two or more"
            )
        dtype = torch.promote_types(first.dtype, torch.float32)
        views = [F.batch_norm(view.to(dtype), None, None, training=True) for view in (first, second)]
        distance = F.mse_loss(views[0], views[1])
        with torch.autocast(first.device.type, enabled=False):
            own = torch.stack([view.T @ view / (len(view) - 1) for view in views])
        covariances = self.momentum * self.covariances.to(dtype) + own
        normalizer = self.momentum * self.normalizer + 1
        if self.training:
            with torch.no_grad():
                self.covariances.copy_(covariances)
                self.normalizer.copy_(normalizer)
        width = own.shape[-1]
        off_diagonal = covariances.abs().sum() - covariances.diagonal(dim1=1, dim2=2).abs().sum()
        decorrelation = off_diagonal / (normalizer * max(1, width * (width - 1)))
        metrics = {"view_distance": distance.detach(), "decorrelation": decorrelation.detach()}
        return distance + self.sdl_weight * decorrelation, metrics
