"""NT-Xent, the loss of SimCLR: recognise the other view of the same document among all views of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.objectives.losses.similarity import similarity


def nt_xent(
    first: Tensor, second: Tensor, *, temperature: float | Tensor = 0.1, rows: slice = slice(None)
) -> tuple[Tensor, dict[str, Tensor]]:
    """The normalised, temperature-scaled cross entropy (Chen et al. 2020, arXiv:2002.05709, equation 1).

        L = -1/(2|rows|) sum_a log( exp(z_a.z_b / t) / sum_{c != a} exp(z_a.z_c / t) ),    b the other view of a

    Unlike in InfoNCE the 2N - 2 views of other documents are negatives on both sides. One document has L = 0.
    `sup_con` with the number of the text as label is the same loss for batches in which texts repeat.

    Args:
        first: `(N, d)`, unit length, one view of each document, after the projection head.
        second: `(N, d)`, unit length, the other view.
        temperature: t; a scalar tensor that requires a gradient is learned.
        rows: the documents whose views the loss is averaged over; the others only serve as columns. A process of a
            distributed run passes its own rows of the gathered batch.

    Returns:
        The loss, and `accuracy`: the share of these views whose other view has the highest score.
    """
    views, count = torch.cat([first, second]), len(first)
    number = torch.arange(2 * count, device=views.device)
    anchor = number.view(2, count)[:, rows].flatten()
    target = (anchor + count) % (2 * count)
    scores = similarity(views[anchor], views, temperature).masked_fill(anchor[:, None] == number, -torch.inf)
    return F.cross_entropy(scores, target), {"accuracy": (scores.argmax(dim=1) == target).float().mean()}
