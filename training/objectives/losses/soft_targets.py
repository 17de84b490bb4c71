"""Losses against a teacher's distribution over classes or its scores of candidates."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(
    student: Tensor, teachers: Tensor | Sequence[Tensor], *, temperature: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of knowledge distillation: the divergence from a teacher's distribution.

        L = T^2 / N sum_i KL( p_i || softmax(z_i / T) ),    p the mean over the teachers of softmax(t_i / T)

    T^2 keeps the size of the gradient when T changes. For a high T the gradient is that of half the squared distance of
    the centred logits, divided by N and the number of classes.

    Source: Hinton et al. 2015 (arXiv:1503.02531, section 2); over scores of candidates it is the usual distillation of
    rankers.

    When to use it: teacher and student give logits over the same classes, or scores of the same candidates, and the
    scores mean the same on both sides up to the temperature. Not if the scales differ: use `margin_mse`, or fit the
    scale of the student's scores.

    Related losses: `margin_mse` for scores; `info_nce` for a single positive without a teacher.

    Args:
        student: `(N, classes)` logits.
        teachers: the logits of a teacher, `(N, classes)`, or of each of an ensemble; they get no gradient.
        temperature: T.

    Returns:
        The loss, 0 for one teacher if and only if the logits of each row agree up to a constant, and `agreement`: the
        share of rows in which student and teachers have the same most likely class.

    Examples:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> loss, metrics = soft_targets(torch.zeros(2, 2), teacher, temperature=2.0)
        >>> round(loss.item(), 4), metrics["agreement"].item()
        (0.2825, 0.5)
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    ensemble = [teachers] if isinstance(teachers, Tensor) else list(teachers)
    log_shares = torch.stack([(logits.detach().to(dtype) / temperature).log_softmax(dim=-1) for logits in ensemble])
    target = log_shares.logsumexp(dim=0) - math.log(len(ensemble))
    predicted = (student.to(dtype) / temperature).log_softmax(dim=-1)
    loss = F.kl_div(predicted, target, reduction="batchmean", log_target=True) * temperature**2
    return loss, {"agreement": (predicted.argmax(dim=-1) == target.argmax(dim=-1)).float().mean()}


def margin_mse(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute Margin-MSE: the squared error of how much better the positive is than each negative.

        L = mean_ij ( (s_i0 - s_ij) - (t_i0 - t_ij) )^2,    j from 1

    Source: Hofstaetter et al. 2020 (arXiv:2010.02666, equation 6).

    When to use it: scores of a cross-encoder whose offset differs from the student's. The student's margins must be
    able to reach the teacher's: scale its cosines. Not if only the order of the candidates matters (use
    `soft_targets`).

    Related losses: `soft_targets` compares distributions over the candidates.

    Args:
        student: `(N, 1 + negatives)` scores, the positive's first.
        teacher: `(N, 1 + negatives)` scores; they get no gradient.

    Returns:
        The loss, and no metrics.

    Examples:
        >>> import torch
        >>> margin_mse(torch.tensor([[3.0, 1.0]]), torch.tensor([[9.0, 8.0]]))
        (tensor(1.), {})
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    margins = [scores[:, :1] - scores[:, 1:] for scores in (student.to(dtype), teacher.detach().to(dtype))]
    return F.mse_loss(margins[0], margins[1]), {}
