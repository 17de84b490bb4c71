"""Canonical correlation analysis: two views agree up to linear maps, not as vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError


def dcca(
    first: Tensor, second: Tensor, *, regularization: float = 1e-3, components: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of deep CCA: minus the sum of the canonical correlations of two views.

        L = - sum of the k largest singular values of S11^(-1/2) S12 S22^(-1/2),    S11, S22 + regularization I

    S are the covariances of the views. With Cholesky factors in place of the symmetric roots, L1^-1 S12 L2^-T, the
    singular values are the same, because the two matrices differ by rotations. Everything is computed in float64. Some
    implementations, such as Michaelvll/DeepCCA, take the element-wise root of T^T T; this is another number, and its
    gradient contains NaN.

    Source: Andrew et al. 2013 (Deep Canonical Correlation Analysis, ICML, section 3).

    When to use it: the student should carry the information of the teacher in any basis, and batches have many times
    more rows than dimensions. Not for small batches: the correlations of pure noise are large there.

    It is a statistic of the whole batch, to be computed whole on every process.

    Related losses: `SoftCCA` is a cheap approximation that needs no inverse and works with small batches;
    `embedding_mse` compares the vectors themselves.

    Args:
        first: `(N, d1)`.
        second: `(N, d2)`.
        regularization: r of the paper, added to the variances.
        components: k; None: all, which is the smaller of the widths.

    Returns:
        The loss, at least -k, and `correlation`: the mean of the k singular values, the canonical correlations.

    Raises:
        UserError: there are no more rows than dimensions, so that any two views would correlate perfectly, or the
            covariance of a view cannot be inverted.

    Examples:
        >>> import torch
        >>> view = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> loss, metrics = dcca(view, view @ torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), regularization=0.0)
        >>> round(loss.item(), 4), round(metrics["correlation"].item(), 4)  # a linear map of a view tells nothing new
        (-2.0, 1.0)
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
    """Soft CCA: two views agree, and the dimensions of each view do not correlate.

        L = 1/(N d) sum_i |z1_i - z2_i|^2 + delta (SDL(Z1) + SDL(Z2))

    Z are the views after a batch norm without parameters. SDL, the stochastic decorrelation loss, is the mean of
    |Phi / c| off the diagonal, with running Phi <- beta Phi + Z^T Z / (N - 1) and c <- beta c + 1; the earlier Phi has
    no gradient. Phi and c are buffers, which a checkpoint holds; in evaluation mode they are not updated.

    Source: Chang et al. 2018 (arXiv:1707.09669, section 3.2). The paper sums SDL over the pairs of dimensions; the
    mean over all d (d - 1) of them is that of dburian/transformer_document_embedding, with which the value of about
    0.03 for delta comes. The gradient of SDL is 1/c of that of the batch alone, so delta has another effect at another
    beta.

    When to use it: instead of `dcca`, with batches that are too small for an inverse covariance. Behind a projection on
    each side if the widths differ. Not with a very large projection of the student, which learns the task alone.

    It is a statistic of the whole batch, to be computed whole on every process.

    Related losses: `dcca`, which it approximates; `vicreg`, with a hinge on variances in place of the batch norm.

    Args:
        width: d, of both views.
        momentum: beta.
        sdl_weight: delta.

    Examples:
        >>> import torch
        >>> whitened = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> loss, metrics = SoftCCA(width=2)(whitened, whitened)
        >>> round(loss.item(), 4), sorted(metrics)
        (0.0, ['decorrelation', 'view_distance'])
    """

    covariances: Tensor
    normalizer: Tensor

    def __init__(self, width: int, *, momentum: float = 0.95, sdl_weight: float = 0.03) -> None:
        super().__init__()
        self.momentum, self.sdl_weight = momentum, sdl_weight
        self.register_buffer("covariances", torch.zeros(2, width, width))
        self.register_buffer("normalizer", torch.tensor(0.0))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of two views, whole on every process.

        Args:
            first: `(N, width)`.
            second: `(N, width)`.

        Returns:
            The loss, and its parts without weights: `view_distance` and `decorrelation`.

        Raises:
            UserError: there is a single row, which has no variance.
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
