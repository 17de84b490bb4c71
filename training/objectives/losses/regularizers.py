"""Terms that are added, with a weight, to a loss: what embeddings should be beside right."""

import torch
import torch.nn.functional as F
from torch import Tensor


def spread_out(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Global orthogonal regularisation (Zhang et al. 2017, arXiv:1708.06320): fill the sphere.

        L = M1^2 + max(0, M2 - 1/d),    M1, M2 the mean of z_i.z_j, of (z_i.z_j)^2, over all i != j

    On points that are uniform on the sphere M1 is 0 and M2 is 1/d. Both come from d x d numbers, not N x N.

    A statistic of the whole batch: every process computes it whole, of gathered embeddings. The backward pass of the
    gather sums over the processes and DDP takes the mean, which leaves the gradient of one process.

    Args:
        embeddings: `(N, d)`, unit length, of documents that do not belong together: queries or documents, not both.

    Returns:
        The term, 0 for one row, and `similarity_mean` and `similarity_second_moment`: M1 and M2.
    """
    z = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    count, dim = z.shape
    pairs = max(1, count * (count - 1))
    squares = z.square().sum(dim=1)
    with torch.autocast(z.device.type, enabled=False):
        gram = z.T @ z
    first = (z.sum(dim=0).square().sum() - squares.sum()) / pairs
    second = (gram.square().sum() - squares.square().sum()) / pairs
    metrics = {"similarity_mean": first.detach(), "similarity_second_moment": second.detach()}
    return first.square() + F.relu(second - 1 / dim), metrics


def debias(embeddings: Tensor, attribute: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """How far an encoder's output tells, linearly, an attribute that it should not tell.

        L = || 1/(N - 1) sum_i (z_i - mean z) (a_i - mean a)^T ||_F^2,    a_i the one-hot attribute of document i

    The squared cross-covariance, which is the Hilbert-Schmidt independence criterion with linear kernels (Gretton et
    al. 2005). It is 0 if and only if all groups have the same mean, and then no linear classifier of the attribute is
    better, by a convex loss, than one that does not look (Belrose et al. 2023, arXiv:2306.03819). For documents written
    twice, the attribute swapped, `alignment` of the two is the term instead.

    A statistic of the whole batch, to be computed whole on every process, as `spread_out`.

    Args:
        embeddings: `(N, d)`.
        attribute: `(N,)` integers from 0 on, the group of each document; -1 where it is not known, which leaves the
            document out.

    Returns:
        The term, 0 if the batch has fewer than two groups, and `groups_in_batch`: how many it has.
    """
    known = attribute >= 0
    z = embeddings[known].to(torch.promote_types(embeddings.dtype, torch.float32))
    groups, group = attribute[known].unique(return_inverse=True)
    metrics = {"groups_in_batch": torch.tensor(float(len(groups)), device=z.device)}
    if len(groups) < 2:
        return embeddings.sum() * 0.0, metrics
    membership = F.one_hot(group).to(z.dtype)
    with torch.autocast(z.device.type, enabled=False):
        covariance = (z - z.mean(dim=0)).T @ (membership - membership.mean(dim=0)) / (len(z) - 1)
    return covariance.square().sum(), metrics
