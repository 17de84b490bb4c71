"""The base class of contrastive objectives.

An objective takes embeddings, not texts. `pair_step.py` gathers the embeddings of all processes and caches their
gradient; the formulas are pure functions in `losses/`. The parameters and buffers of an objective (a temperature, a
projection head, a queue) are in the checkpoints of a run and never in the saved model.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from training.data.packing import PackedTexts
from training.data.pairs.batches import PairBatch
from training.data.sources import PAIRS, Columns
from training.objectives.contrastive.arguments import GROUP_COLUMN, ObjectiveArguments
from training.objectives.contrastive.blocks import GatheredBatch, Loss, Metrics
from training.objectives.contrastive.teaching import teach_vector
from training.objectives.losses.matryoshka import matryoshka
from training.objectives.losses.regularizers import debias, spread_out
from training.objectives.losses.similarity import Texts


class Objective(nn.Module):
    """A loss of embeddings, with the parameters and buffers that it needs.

    Every process computes the objective of the same gathered rows: the mean over its own rows, or the whole loss where
    that is a statistic of the batch. In both cases the mean of the processes' gradients equals the gradient of one
    process with the whole batch. For the encoder, the backward pass of the gather sums over the processes and DDP takes
    the mean; for the objective's own parameters the loop takes the mean (`average_gradients`).

    In evaluation mode an objective computes the same loss, but does not update its buffers.

    Args:
        arguments: parsed command-line options.
        model: the encoder; its trainable parameters have been selected already.

    Raises:
        UserError: the model is narrower than a Matryoshka dimension, or cannot be trained with the objective.

    Attributes:
        columns: the columns of the data that the objective reads.
        default_temperature: the temperature of the paper.
        smallest_batch: the smallest number of rows, over all processes, that can be compared.
    """

    columns: ClassVar[Columns] = PAIRS
    default_temperature: ClassVar[float] = 0.05
    smallest_batch: ClassVar[int] = 1

    def __init__(self, arguments: ObjectiveArguments, model: nn.Module) -> None:
        super().__init__()
        self.arguments = arguments
        config: Any = model.config
        self.width: int = config.hidden_size
        too_wide = [dim for dim in arguments.matryoshka_dims if not 0 < dim <= self.width]
        if too_wide:
            raise UserError(f"--matryoshka_dims {too_wide[0]}: must be from 1 to {self.width}, the width of the model")
        arguments.check_model(model)
        default = 1.0 if arguments.similarity == "maxsim" else self.default_temperature
        temperature = arguments.temperature or default
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if arguments.learnable_temperature else None
        self.fixed_temperature = temperature

    def temperature(self) -> float | Tensor:
        """Return the temperature, as a scalar tensor if it is trained.

        The trained parameter is log(1 / t) (CLIP, Radford et al. 2021, arXiv:2103.00020, section 2.4; cpt, Neelakantan
        et al. 2022, arXiv:2201.10005).
        """
        return self.fixed_temperature if self.log_scale is None else (-self.log_scale).exp()

    def trained_chunks(self, batch: PairBatch) -> list[PackedTexts]:
        """Return the packed texts that the encoder embeds with a gradient: the first columns, or all of them."""
        return batch.chunks

    def keys(self, encoder: nn.Module, batch: PairBatch) -> Tensor | None:
        """Return this process's keys from a momentum encoder, `(n, d)`; None if the objective has no such encoder."""
        return None

    def remember(self, key: Tensor, key_id: Tensor) -> None:
        """Store the gathered keys of a batch for later batches; called after the backward pass."""

    def forward(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        """Compute the loss of a batch, auxiliary terms included.

        Returns:
            The loss, and detached scalars for the log; the metric `loss` is the loss without auxiliary terms.
        """
        if self.log_scale is not None and self.training:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(100.0))  # as in CLIP: beyond it training becomes unstable
        loss, metrics = self.loss(batch)
        metrics |= {"loss": loss.detach()}
        if self.log_scale is not None:
            metrics |= {"temperature": torch.as_tensor(self.temperature()).detach()}
        unit = F.normalize(batch.embeddings[:, :2], dim=-1)
        if self.arguments.spread_out_weight:
            terms = [spread_out(column)[0] for column in unit.unbind(1)]
            term = torch.stack(terms).mean()
            loss, metrics = loss + self.arguments.spread_out_weight * term, metrics | {"spread_out": term.detach()}
        if self.arguments.debias_weight:
            term, measures = debias(unit[:, -1], batch.classes[GROUP_COLUMN])
            loss = loss + self.arguments.debias_weight * term
            metrics |= measures | {"debias": term.detach()}
        if self.arguments.teach_vector_by:
            term, measures = teach_vector(batch, self.arguments)
            loss = self.arguments.objective_weight * loss + self.arguments.teach_weight * term
            metrics |= {"teach": term.detach(), "teach_agreement": measures["agreement"]}
        return loss, metrics

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        """Compute the objective itself, without auxiliary terms."""
        raise NotImplementedError

    def over_dims(self, loss: Loss, *embeddings: Texts, normalize: bool = True) -> tuple[Tensor, Metrics]:
        """Apply `loss` to embeddings; with `--matryoshka_dims` or `--token_dims` sum it over their first dimensions."""
        dims = self.arguments.matryoshka_dims or self.arguments.token_dims
        weights = self.arguments.matryoshka_weights
        return (matryoshka(loss, dims, weights or None, normalize) if dims else loss)(*embeddings)
