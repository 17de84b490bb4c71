"""SupCon: contrast with several positives, all texts of the same class."""

import torch
from torch import Tensor

from training.objectives.losses.similarity import similarity


def sup_con(
    embeddings: Tensor, label: Tensor, *, temperature: float | Tensor = 0.07, rows: slice = slice(None)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the supervised contrastive loss: all texts of a label are positives of each other.

        L = mean_a -1/|P(a)| sum_{p in P(a)} log( exp(z_a.z_p / t) / sum_{c != a} exp(z_a.z_c / t) )

    P(a) holds all other rows with a's label. The mean is over the anchors that have a positive in the batch; the others
    only take part in the denominators.

    Source: Khosla et al. 2020 (arXiv:2004.11362, equation 2, L_out; 0.07 is the temperature in the authors' code).

    When to use it: texts with class labels, several of each class in a batch. Not for labels that nearly every row
    has alone, where most anchors drop out, and not if texts of one class should keep apart: they are pulled to one
    point.

    Related losses: with two views of each document and a label for each document it equals `nt_xent`. It is also the
    loss of the second modality (`second_modality.py`).

    Args:
        embeddings: `(N, d)`, unit length.
        label: `(N,)` integers.
        temperature: t; a scalar tensor that requires a gradient is learned.
        rows: the anchors of this process, an equal share of the gathered batch. The mean of the processes' losses is
            the mean over all anchors that have a positive, however these are distributed.

    Returns:
        The loss, 0 if no anchor has a positive, and `without_positive_share`: the share of `rows` without a positive.

    Examples:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> loss, metrics = sup_con(embeddings, torch.tensor([7, 7, 8]), temperature=1.0)
        >>> round(loss.item(), 4), round(metrics["without_positive_share"].item(), 4)  # ln(1 + 1 / e)
        (0.3133, 0.3333)
    """
    number = torch.arange(len(embeddings), device=embeddings.device)
    itself = number[rows, None] == number
    positive = (label[rows, None] == label) & ~itself
    scores = similarity(embeddings[rows], embeddings, temperature).masked_fill(itself, -torch.inf)
    log_share = scores.log_softmax(dim=1).masked_fill(~positive, 0.0)  # no 0 * -inf
    positives = positive.sum(dim=1)
    _, number_of_class, sizes = label.unique(return_inverse=True, return_counts=True)
    has_positive = sizes[number_of_class] > 1
    # By what all processes have, not by what this one has: the mean of means over unequal numbers is another mean.
    anchors = has_positive.sum().clamp(min=1) * (len(positives) / len(embeddings))
    loss = -(log_share.sum(dim=1) / positives.clamp(min=1)).sum() / anchors
    return loss, {"without_positive_share": (positives == 0).float().mean()}
