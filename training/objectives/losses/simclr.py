"""NT-Xent, the loss of SimCLR: classify the other view of a document among all views of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.objectives.losses.similarity import similarity


def nt_xent(
    first: Tensor, second: Tensor, *, temperature: float | Tensor = 0.1, rows: slice = slice(None)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute NT-Xent, the normalised, temperature-scaled cross entropy of SimCLR.

        L = -1/(2|rows|) sum_a log( exp(z_a.z_b / t) / sum_{c != a} exp(z_a.z_c / t) ),    b the other view of a

    The 2N - 2 views of other documents are negatives on both sides. For one document L = 0.

    Source: Chen et al. 2020 (arXiv:2002.05709, equation 1; temperature 0.1 for large batches).

    When to use it: two views of the same kind, such as two crops of a document, behind a projection head. Not for
    queries and documents, which differ in kind: there other queries are no useful negatives (use `info_nce`). Not for
    batches in which texts repeat: use `sup_con` with the number of the text as label, which is the same loss then.

    Related losses: `info_nce` without the views of the own side; `sup_con` with more than one positive; `vicreg`
    without negatives.

    Args:
        first: `(N, d)`, unit length, one view of each document, after the projection head.
        second: `(N, d)`, unit length, the other view.
        temperature: t; a scalar tensor that requires a gradient is learned.
        rows: the documents whose views the loss is averaged over; the others only serve as columns. A process of a
            distributed run passes its own rows of the gathered batch.

    Returns:
        The loss, and `accuracy`: the share of these views whose other view has the highest score.

    Examples:
        >>> import torch
        >>> views = torch.eye(4)
        >>> loss, metrics = nt_xent(views, views, temperature=1.0)
        >>> round(loss.item(), 4), metrics["accuracy"].item()  # ln(1 + 6 / e)
        (1.1654, 1.0)
    """
    views, count = torch.cat([first, second]), len(first)
    number = torch.arange(2 * count, device=views.device)
    anchor = number.view(2, count)[:, rows].flatten()
    target = (anchor + count) % (2 * count)
    scores = similarity(views[anchor], views, temperature).masked_fill(anchor[:, None] == number, -torch.inf)
    return F.cross_entropy(scores, target), {"accuracy": (scores.argmax(dim=1) == target).float().mean()}
