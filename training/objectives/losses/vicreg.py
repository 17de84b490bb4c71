"""VICReg: two views agree, every dimension varies, and no two dimensions correlate."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError


def vicreg(
    first: Tensor,
    second: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    epsilon: float = 1e-4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute VICReg: variance-invariance-covariance regularisation of two views.

        L = lambda s(Z, Z') + mu (v(Z) + v(Z')) / 2 + nu (c(Z) + c(Z'))
        s = 1/(N d) sum_ij (Z_ij - Z'_ij)^2
        v = 1/d sum_j max(0, 1 - sqrt(Var(Z_j) + epsilon))
        c = 1/d sum_{j != k} Cov(Z)_jk^2,    Var and Cov divided by N - 1

    Source: Bardes et al. 2022 (arXiv:2105.04906), in the form of the authors' code, with which their results and the
    weights 25, 25 and 1 come. In the equations of the paper s has no factor 1/d and v no factor 1/2; to get those, pass
    d times the paper's lambda and twice its mu.

    When to use it: two views without any negatives, behind an expander, in large batches (the authors use 2,048). Not
    for small batches, where the covariance of d dimensions is mostly noise. For retrieval a contrastive loss such as
    `info_nce` is the better first choice.

    The statistics are those of the whole batch, so there are no rows to divide: every process computes the whole loss
    of the gathered views. The backward pass of the gather sums over the processes and DDP takes the mean of the
    parameters' gradients, which results in the gradient of one process.

    Related losses: `nt_xent` keeps views apart by negatives instead; `SoftCCA` decorrelates dimensions with a running
    covariance; `spread_out` is a similar regulariser for unit vectors.

    Args:
        first: `(N, d)`, one view of each document, after the expander. Not normalised: unit vectors cannot have a
            standard deviation of 1 in more than one dimension.
        second: `(N, d)`, the other view.
        invariance_weight: lambda.
        variance_weight: mu. Constant vectors have a term of mu (1 - sqrt(epsilon)), 24.75.
        covariance_weight: nu.
        epsilon: keeps the gradient of the square root finite.

    Returns:
        The loss, and its terms without weights: `invariance`, `variance` (the mean of both views), and `covariance`
        (the sum of both views).

    Raises:
        UserError: there is a single row, which has no variance.

    Examples:
        >>> import torch
        >>> loss, terms = vicreg(torch.ones(8, 4), torch.ones(8, 4))  # collapsed views
        >>> round(loss.item(), 2), {name: round(term.item(), 2) for name, term in terms.items()}
        (24.75, {'invariance': 0.0, 'variance': 0.99, 'covariance': 0.0})
    """
    if len(first) < 2:
        raise UserError("VICReg takes the variance of a batch, and this one has a single pair; give it two or more")
    dtype = torch.promote_types(first.dtype, torch.float32)
    invariance = F.mse_loss(first.to(dtype), second.to(dtype))
    variance, covariance = _variance_and_covariance(first.to(dtype), epsilon)
    other_variance, other_covariance = _variance_and_covariance(second.to(dtype), epsilon)
    variance, covariance = (variance + other_variance) / 2, covariance + other_covariance
    loss = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
    return loss, {name: term.detach() for name, term in terms.items()}


def _variance_and_covariance(z: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the terms v and c of one view."""
    z = z - z.mean(dim=0)
    with torch.autocast(z.device.type, enabled=False):
        covariance = z.T @ z / (len(z) - 1)
    variance = covariance.diagonal()
    shortfall = F.relu(1 - (variance + epsilon).sqrt()).mean()
    return shortfall, (covariance.square().sum() - variance.square().sum()) / z.shape[1]
