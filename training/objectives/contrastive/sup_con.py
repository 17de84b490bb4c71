"""Supervised contrastive learning: texts with the same label are positives of each other."""

import torch.nn.functional as F
from torch import Tensor

from training.data.sources import Columns
from training.objectives.contrastive.blocks import GatheredBatch, Metrics, in_blocks
from training.objectives.contrastive.objective import Objective
from training.objectives.losses.supcon import sup_con


class SupCon(Objective):
    """Pull all texts of a label together; a row may hold more texts of its label in columns `positive...`."""

    columns = Columns(("anchor",), "positive", "labelled texts", classes=("label",))
    default_temperature = 0.07
    smallest_batch = 2

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        """Compute SupCon over all texts of the batch."""
        views = batch.embeddings.shape[1]
        label = batch.classes["label"].repeat_interleave(views)
        rows = slice(*(views * end for end in batch.rows.indices(len(batch.embeddings))[:2]))

        def loss(embeddings: Tensor, rows: slice) -> tuple[Tensor, Metrics]:
            return sup_con(embeddings, label, temperature=self.temperature(), rows=rows)

        return self.over_dims(in_blocks(loss, rows, len(label)), F.normalize(batch.embeddings, dim=-1).flatten(0, 1))
