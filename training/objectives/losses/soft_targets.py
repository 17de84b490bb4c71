"""Distributions and scores of a teacher as targets: logits over classes, or scores of candidates."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(
    student: Tensor, teachers: Tensor | Sequence[Tensor], *, temperature: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531, section 2).

        L = T^2 / N sum_i KL( p_i || softmax(z_i / T) ),    p the mean over the teachers of softmax(t_i / T)

    T^2 keeps the size of the gradient where T changes: for a high T it is that of half the squared distance of the
    centred logits, divided by N and the number of classes. The logits may be scores of candidates (the contrastive
    distillation of rankers), with T as the temperature of both sides.

    Args:
        student: `(N, classes)` logits.
        teachers: the same of a teacher, or of each of an ensemble; they get no gradient.
        temperature: T.

    Returns:
        The loss, 0 for one teacher if and only if the logits of each row agree up to a constant, and `agreement`: the
        share of rows whose likeliest class is the teachers'.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    ensemble = [teachers] if isinstance(teachers, Tensor) else list(teachers)
    log_shares = torch.stack([(logits.detach().to(dtype) / temperature).log_softmax(dim=-1) for logits in ensemble])
    target = log_shares.logsumexp(dim=0) - math.log(len(ensemble))
    predicted = (student.to(dtype) / temperature).log_softmax(dim=-1)
    loss = F.kl_div(predicted, target, reduction="batchmean", log_target=True) * temperature**2
    return loss, {"agreement": (predicted.argmax(dim=-1) == target.argmax(dim=-1)).float().mean()}


def margin_mse(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Margin-MSE (Hofstaetter et al. 2020, arXiv:2010.02666, equation 6): how much better the positive is.

        L = mean_ij ( (s_i0 - s_ij) - (t_i0 - t_ij) )^2,    j from 1

    Args:
        student: `(N, 1 + negatives)` scores, the positive's first.
        teacher: the same; it gets no gradient.

    Returns:
        The loss, and no metrics.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    margins = [scores[:, :1] - scores[:, 1:] for scores in (student.to(dtype), teacher.detach().to(dtype))]
    return F.mse_loss(margins[0], margins[1]), {}
