"""Heads between the embedding and the loss, in training only.

They are SimCLR's projection head, VICReg's expander, and the projection from a student's width to its teacher's.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Linear layers with batch norm and ReLU between them; the last layer is linear without a bias.

    This is the head of SimCLR (Chen et al. 2020, arXiv:2002.05709, section 4.2: the layer before the head is the better
    representation) and the expander of VICReg (Bardes et al. 2022, arXiv:2105.04906, section 4.2), as in the code of
    VICReg's authors.

    The batch norm uses the statistics of its input in training and evaluation. Given the gathered rows of all
    processes, two processes compute the same as one.

    Args:
        width: width of an embedding.
        dims: widths of the layers; the last one is that of the output.
    """

    def __init__(self, width: int, dims: Sequence[int]) -> None:
        super().__init__()
        self.width = width
        layers: list[nn.Module] = []
        for dim_in, dim_out in zip((width, *dims[:-2]), dims[:-1], strict=False):
            layers += [nn.Linear(dim_in, dim_out), nn.BatchNorm1d(dim_out, track_running_stats=False), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear((width, *dims)[-2], dims[-1], bias=False))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Project embeddings, which may be shortened ones.

        Shortened embeddings are multiplied by the first columns of the first layer (the tied form of Matryoshka, MRL-E:
        Kusupati et al. 2022, arXiv:2205.13147, section 3).

        Args:
            embeddings: `(n, m)`, m at most `width`.

        Returns:
            `(n, dims[-1])`.
        """
        return self.layers(F.pad(embeddings, (0, self.width - embeddings.shape[1])))


def projection(width: int, hidden: Sequence[int], out: int) -> nn.Module:
    """Build linear layers with ReLU between them, or the identity if the width does not change and no layer is hidden.

    Args:
        width: width of the input.
        hidden: widths of the hidden layers.
        out: width of the output.

    Returns:
        The module.
    """
    if not hidden and width == out:
        return nn.Identity()
    layers: list[nn.Module] = []
    for dim_in, dim_out in zip((width, *hidden[:-1]), hidden, strict=False):
        layers += [nn.Linear(dim_in, dim_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear((width, *hidden)[-1], out))
