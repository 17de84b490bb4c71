"""What stands between embedding and loss in training alone: SimCLR's projection head, VICReg's expander, a
student's way to its teacher's width."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Linear layers with batch norm and ReLU between them; the last one is linear alone, without bias.

    Chen et al. 2020 (arXiv:2002.05709, section 4.2: the layer before the head is the better representation) and Bardes
    et al. 2022 (arXiv:2105.04906, section 4.2), as in the authors' code of VICReg.

    The statistics of the batch norm are those of the rows that it is given, in training and evaluation alike: give it
    the gathered rows of all processes, and two of them compute what one does.
    """

    def __init__(self, width: int, dims: Sequence[int]) -> None:
        """Args:
        width: of an embedding.
        dims: of the layers, the last one that of the result.
        """
        super().__init__()
        self.width = width
        layers: list[nn.Module] = []
        for dim_in, dim_out in zip((width, *dims[:-2]), dims[:-1], strict=False):
            layers += [nn.Linear(dim_in, dim_out), nn.BatchNorm1d(dim_out, track_running_stats=False), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear((width, *dims)[-2], dims[-1], bias=False))

    def forward(self, embeddings: Tensor) -> Tensor:
        """`(n, m)` to `(n, dims[-1])`, m at most `width`.

        Shortened embeddings are read by the first columns of the first layer (the tied form of Matryoshka, MRL-E:
        Kusupati et al. 2022, arXiv:2205.13147, section 3).
        """
        return self.layers(F.pad(embeddings, (0, self.width - embeddings.shape[1])))


def projection(width: int, hidden: Sequence[int], out: int) -> nn.Module:
    """Linear layers with ReLU between them, from `width` over `hidden` to `out`; nothing if nothing is to be done."""
    if not hidden and width == out:
        return nn.Identity()
    layers: list[nn.Module] = []
    for dim_in, dim_out in zip((width, *hidden[:-1]), hidden, strict=False):
        layers += [nn.Linear(dim_in, dim_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear((width, *hidden)[-1], out))
