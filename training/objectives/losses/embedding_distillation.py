"""Losses of a student's embeddings against a teacher's: each row against its own, or against all of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding_mse(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error (Reimers and Gurevych 2020, arXiv:2004.09813, equation 1), as a mean over the dimensions.

        L = 1/(N d) sum_i |y_i - t_i|^2

    The paper adds up the terms of a sentence and of its translation; here each is a row, so that L is d and the number
    of columns times smaller.

    Args:
        student: `(N, d)`.
        teacher: `(N, d)`; it gets no gradient.

    Returns:
        The loss, and no metrics.
    """
    student, teacher = _in_full_precision(student, teacher)
    return F.mse_loss(student, teacher), {}


def embedding_cosine(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cosine distance, `L = 1/N sum_i (1 - cos(y_i, t_i))`: lengths do not count.

    Args:
        student: `(N, d)`.
        teacher: `(N, d)`; it gets no gradient.

    Returns:
        The loss, and no metrics.
    """
    student, teacher = _in_full_precision(student, teacher)
    return (1 - F.cosine_similarity(student, teacher, dim=1)).mean(), {}


def max_margin_mse(student: Tensor, teacher: Tensor, *, gamma: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Near the own teacher vector, far from those of the other documents (Burian, Document embedding using
    Transformers, thesis, Charles University).

        L = 1/N sum_i ( mse(y_i, t_i) - gamma mean_{j != i} mse(y_i, t_j) ),    mse a mean over dimensions

    There is no hinge. At gamma = 1 the squares of y cancel and the gradient of row i is 2/(N d) (mean_{j != i} t_j -
    t_i) whatever y is: without a minimum, unless the student's vectors are normalised. Above 1 longer is always better.

    Args:
        student: `(N, d)`.
        teacher: `(N, d)`; it gets no gradient. Documents whose teacher does not count are left out of both, or they
            would be negatives of the others.
        gamma: weight of the others; 0 is `embedding_mse`.

    Returns:
        The loss, without the second term for a single row, and `own_mse` and `other_mse`: its two means.
    """
    student, teacher = _in_full_precision(student, teacher)
    count, dim = student.shape
    with torch.autocast(student.device.type, enabled=False):
        products = student @ teacher.T
    squares = student.square().sum(dim=1, keepdim=True) - 2 * products + teacher.square().sum(dim=1)
    own = squares.diagonal().mean() / dim
    other = (squares.sum() - squares.diagonal().sum()) / (max(1, count * (count - 1)) * dim)
    return own - gamma * other, {"own_mse": own.detach(), "other_mse": other.detach()}


def _in_full_precision(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)
