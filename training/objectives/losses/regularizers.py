"""Regularisers: terms that are added, with a weight, to a loss of embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor


def spread_out(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the global orthogonal regulariser, which spreads embeddings over the unit sphere.

        L = M1^2 + max(0, M2 - 1/d),    M1, M2 the mean of z_i.z_j and of (z_i.z_j)^2 over all i != j

    For points that are uniform on the sphere M1 is 0 and M2 is 1/d. Both are computed from d x d numbers, not N x N.

    Source: Zhang et al. 2017 (arXiv:1708.06320).

    When to use it: as a small addition to a contrastive or distillation loss if embeddings concentrate in a cone. Not
    on queries and documents together: they should be close to each other.

    It is a statistic of the whole batch: every process computes it whole, of gathered embeddings. The backward pass of
    the gather sums over the processes and DDP takes the mean, which results in the gradient of one process.

    Related losses: `vicreg` regularises vectors that are not normalised; `info_nce` spreads embeddings by itself, the
    more the lower its temperature.

    Args:
        embeddings: `(N, d)`, unit length, of documents that do not belong together: queries or documents, not both.

    Returns:
        The term, 0 for one row, and `similarity_mean` and `similarity_second_moment`: M1 and M2.

    Examples:
        >>> import torch
        >>> term, metrics = spread_out(torch.ones(4, 4) / 2)  # all vectors are equal: M1 = M2 = 1
        >>> round(term.item(), 4), metrics["similarity_mean"].item()
        (1.75, 1.0)
        >>> spread_out(torch.eye(4))[0].item()
        0.0
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
    """Compute how much linear information embeddings carry about an attribute that they should not reveal.

        L = || 1/(N - 1) sum_i (z_i - mean z) (a_i - mean a)^T ||_F^2,    a_i the one-hot attribute of document i

    This squared cross-covariance is the Hilbert-Schmidt independence criterion with linear kernels. It is 0 if and only
    if all groups have the same mean, and then no linear classifier of the attribute has a lower convex loss than a
    constant one.

    Source: Gretton et al. 2005 (Hilbert-Schmidt norms); Belrose et al. 2023 (arXiv:2306.03819) for linear
    guardedness.

    When to use it: as an addition to a loss, with a column that names the group of each document. Report the loss of
    retrieval quality with it. Not against classifiers that are not linear, and not with batches that hold one group
    only. For documents that exist twice, with the attribute swapped, minimise the distance of the two instead.

    It is a statistic of the whole batch, to be computed whole on every process, as `spread_out`.

    Related losses: `spread_out`, the other additive term.

    Args:
        embeddings: `(N, d)`.
        attribute: `(N,)` integers from 0 on, the group of each document; -1 where it is not known, which leaves the
            document out.

    Returns:
        The term, 0 if the batch has fewer than two groups, and `groups_in_batch`: the number of its groups.

    Examples:
        >>> import torch
        >>> group = torch.tensor([0, 0, 1, 1])
        >>> round(debias(torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]), group)[0].item(), 4)
        0.8889
        >>> debias(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), group)[0].item()  # equal means
        0.0
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
