"""InfoNCE over labelled pairs, and unsupervised SimCSE: classify the positive among the documents of the batch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from training.data.sources import Columns
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.blocks import GatheredBatch, Metrics, in_blocks
from training.objectives.contrastive.objective import Objective
from training.objectives.losses.contrastive import info_nce
from training.objectives.losses.similarity import Texts, in_one


class InfoNCE(Objective):
    """Classify the positive of a query among all positives and hard negatives of the batch."""

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        """Compute InfoNCE without duplicate texts and, if asked for, without detected false negatives."""
        arguments, count = self.arguments, len(batch.embeddings)
        query_id, positive_id, negative_id = _pair_columns(batch.text_ids)
        margin = arguments.false_negative_margin

        def loss(texts: Texts, rows: slice) -> tuple[Tensor, Metrics]:
            columns = _pair_columns(texts)
            guide: Any = None
            if batch.guide is not None:
                guide = _pair_columns(batch.guide)
            elif margin is not None:
                guide = columns
            return info_nce(
                *columns,
                temperature=self.temperature(),
                symmetric=arguments.symmetric,
                negative_weight=arguments.negative_weight,
                negative_row=None if negative_id is None else _row_of(negative_id, count),
                query_id=query_id,
                positive_id=positive_id,
                negative_id=negative_id,
                guide=guide,
                guide_margin=-(margin or 0.0),
                guide_relative=arguments.false_negative_relative,
                rows=rows,
            )

        texts: Any = batch.tokens if arguments.by_tokens else F.normalize(batch.embeddings, dim=-1)
        # All texts in one: the columns of token vectors share them, and a size of --token_dims is computed once.
        return self.over_dims(in_blocks(loss, batch.rows, count), texts)


class SimCSE(InfoNCE):
    """Unsupervised SimCSE (Gao et al. 2021, arXiv:2104.08821, equation 4): the positive is the same text again.

    The text and its copy are embedded in one forward pass, under different dropout masks.

    Args:
        arguments: parsed command-line options.
        model: the encoder.

    Raises:
        UserError: the model has no dropout, so both views of a text would be the same vector.
    """

    columns = Columns(("anchor",), None, "texts")

    def __init__(self, arguments: ObjectiveArguments, model: nn.Module) -> None:
        super().__init__(arguments, model)
        config: Any = model.config
        if not (config.hidden_dropout_prob or config.attention_dropout):
            raise UserError(
                "--objective simcse: this model has no dropout, so that a text and its twin are one vector and there "
                "is nothing to learn; give --dropout 0.1"
            )


def _pair_columns(rows: Texts) -> tuple[Texts, Texts, Texts | None]:
    """Split `(N, columns, ...)` into queries, positives and negatives, one column of negatives after the other."""
    negatives = [rows[:, column] for column in range(2, rows.shape[1])]
    return rows[:, 0], rows[:, 1], in_one(negatives) if negatives else None


def _row_of(negatives: Tensor, rows: int) -> Tensor:
    """Return the row that each of the negatives of `_pair_columns` belongs to."""
    return torch.arange(len(negatives), device=negatives.device) % rows
