"""SupCon: everything of the same class is a positive."""

import torch
from torch import Tensor

from training.objectives.losses.similarity import similarity


def sup_con(
    embeddings: Tensor, label: Tensor, *, temperature: float | Tensor = 0.07, rows: slice = slice(None)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362, equation 2).

        L = mean_a -1/|P(a)| sum_{p in P(a)} log( exp(z_a.z_p / t) / sum_{c != a} exp(z_a.z_c / t) )

    P(a) is all else that has a's label. The mean is over the anchors that have a positive in the batch; the others are
    in the denominators alone. Two views each of documents with labels of their own make it NT-Xent.

    Args:
        embeddings: `(N, d)`, unit length.
        label: `(N,)` integers.
        temperature: t; a scalar tensor that requires a gradient is learned.
        rows: the anchors of this process, an equal share of the gathered batch. The mean of the processes' losses is
            the mean over all anchors that have a positive, however they are spread.

    Returns:
        The loss, 0 if no anchor has a positive, and `without_positive_share`: of the anchors in `rows`.
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
