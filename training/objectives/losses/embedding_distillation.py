"""Losses of a student's embeddings against a teacher's: each row against its own, or against the whole batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding_mse(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the mean squared error between a student's and a teacher's embeddings.

        L = 1/(N d) sum_i |y_i - t_i|^2

    Source: Reimers and Gurevych 2020 (arXiv:2004.09813, equation 1), as a mean over the dimensions. The paper adds up
    the terms of a sentence and of its translation; here each is a row, so L is smaller by a factor of d times the
    number of columns.

    When to use it: the student should be a drop-in replacement of the teacher, in its vector space; with unit vectors
    on both sides it is a multiple of the cosine distance. Not across different widths without a projection, and not if
    teacher vectors are long and the student's are normalised.

    Related losses: `embedding_cosine` ignores lengths; `max_margin_mse` adds negatives; `dcca` and `SoftCCA` compare up
    to a projection.

    Args:
        student: `(N, d)`.
        teacher: `(N, d)`; it gets no gradient.

    Returns:
        The loss, and no metrics.

    Examples:
        >>> import torch
        >>> embedding_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
        (tensor(2.), {})
    """
    student, teacher = _promote_pair(student, teacher)
    return F.mse_loss(student, teacher), {}


def embedding_cosine(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the cosine distance between a student's and a teacher's embeddings.

        L = 1/N sum_i (1 - cos(y_i, t_i))

    Source: the cosine loss of DistilBERT (Sanh et al. 2019, arXiv:1910.01108, section 3), on embeddings.

    When to use it: only the direction of the vectors is used later, as in retrieval by cosine. Not if dot products are
    compared: the student's lengths do not train.

    Related losses: `embedding_mse` is twice this loss divided by d if both sides are unit vectors.

    Args:
        student: `(N, d)`.
        teacher: `(N, d)`; it gets no gradient.

    Returns:
        The loss, and no metrics.

    Examples:
        >>> import torch
        >>> embedding_cosine(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        (tensor(0.5000), {})
    """
    student, teacher = _promote_pair(student, teacher)
    return (1 - F.cosine_similarity(student, teacher, dim=1)).mean(), {}


def max_margin_mse(student: Tensor, teacher: Tensor, *, gamma: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute max-margin MSE: close to the own teacher vector, far from those of the other documents.

        L = 1/N sum_i ( mse(y_i, t_i) - gamma mean_{j != i} mse(y_i, t_j) ),    mse a mean over dimensions

    There is no hinge. At gamma = 1 the squares of y cancel, and the gradient of row i is 2/(N d) (mean_{j != i} t_j -
    t_i) whatever y is: the loss has no minimum unless the student's vectors are normalised. Above 1 longer vectors are
    always better.

    Source: Burian, Document embedding using Transformers (thesis, Charles University), whose best student was trained
    with it at gamma = 1.

    When to use it: instead of `embedding_mse`, if the student's vectors of different documents stay too similar. Not
    without unit length at gamma of 1 or more, and not with many rows left out: their vectors are no negatives then.

    Related losses: gamma = 0 is `embedding_mse`; `info_nce` contrasts by a softmax instead.

    Args:
        student: `(N, d)`.
        teacher: `(N, d)`; it gets no gradient. Leave documents that do not count out of both arguments, or they would
            be negatives of the others.
        gamma: weight of the other documents.

    Returns:
        The loss, without the second term for a single row, and `own_mse` and `other_mse`: its two means.

    Examples:
        >>> import torch
        >>> loss, metrics = max_margin_mse(torch.eye(2), torch.eye(2), gamma=0.5)
        >>> loss.item(), metrics["own_mse"].item(), metrics["other_mse"].item()
        (-0.5, 0.0, 1.0)
    """
    student, teacher = _promote_pair(student, teacher)
    count, dim = student.shape
    with torch.autocast(student.device.type, enabled=False):
        products = student @ teacher.T
    squares = student.square().sum(dim=1, keepdim=True) - 2 * products + teacher.square().sum(dim=1)
    own = squares.diagonal().mean() / dim
    other = (squares.sum() - squares.diagonal().sum()) / (max(1, count * (count - 1)) * dim)
    return own - gamma * other, {"own_mse": own.detach(), "other_mse": other.detach()}


def _promote_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float32 or better, the teacher without gradient."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)
