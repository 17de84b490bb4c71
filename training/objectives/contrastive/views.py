"""Objectives of two views of a document behind a projection head: SimCLR's NT-Xent, and VICReg."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from training.data.sources import Columns
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.blocks import GatheredBatch, Metrics, in_blocks
from training.objectives.contrastive.objective import Objective
from training.objectives.heads import ProjectionHead
from training.objectives.losses.simclr import nt_xent
from training.objectives.losses.vicreg import vicreg

TWO_VIEWS = Columns(("anchor", "positive"), None, "pairs")


class NTXent(Objective):
    """SimCLR: classify the other view of a document among all views of the batch, behind a projection head."""

    columns = TWO_VIEWS
    default_temperature = 0.1
    smallest_batch = 2

    def __init__(self, arguments: ObjectiveArguments, model: nn.Module) -> None:
        super().__init__(arguments, model)
        self.head = _head(arguments.head_dims or [self.width, 128], self.width)

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        """Compute NT-Xent of the projected views."""

        def loss_of_rows(first: Tensor, second: Tensor, rows: slice) -> tuple[Tensor, Metrics]:
            return nt_xent(first, second, temperature=self.temperature(), rows=rows)

        def loss(views: Tensor) -> tuple[Tensor, Metrics]:
            # Both views pass the head together: SimCLR's batch norm is over all of them.
            first, second = F.normalize(self.head(views), dim=-1).chunk(2)
            return in_blocks(loss_of_rows, batch.rows, len(first))(first, second)

        return self.over_dims(loss, torch.cat([*batch.embeddings[:, :2].unbind(1)]), normalize=False)


class VICReg(Objective):
    """VICReg: the views agree, every dimension varies, and no two dimensions correlate, behind an expander."""

    columns = TWO_VIEWS
    smallest_batch = 2

    def __init__(self, arguments: ObjectiveArguments, model: nn.Module) -> None:
        super().__init__(arguments, model)
        self.head = _head(arguments.head_dims or [8192, 8192, 8192], self.width)

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        """Compute VICReg of the expanded views, over the whole batch on every process."""

        def loss(first: Tensor, second: Tensor) -> tuple[Tensor, Metrics]:
            return vicreg(
                self.head(first),
                self.head(second),
                invariance_weight=self.arguments.vicreg_invariance_weight,
                variance_weight=self.arguments.vicreg_variance_weight,
                covariance_weight=self.arguments.vicreg_covariance_weight,
            )

        return self.over_dims(loss, *batch.embeddings[:, :2].unbind(1), normalize=False)


def _head(dims: list[int], width: int) -> nn.Module:
    """Build the head of `--head_dims`; `[0]` means no head."""
    if dims == [0]:
        return nn.Identity()
    if min(dims) < 1:
        raise UserError(f"--head_dims {' '.join(map(str, dims))}: each must be at least 1, or 0 alone for no head")
    return ProjectionHead(width, dims)
