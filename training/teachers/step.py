"""Distillation of embeddings and scores, as the loop uses it: the gradient of a batch, and the evaluation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from training.data.pairs.batches import PairBatch, PairBatches, PairTokenizer, collate_pairs
from training.data.sources import Source
from training.engine.distributed import gather_rows, own_share
from training.engine.gradient_cache import cached_backward
from training.engine.training import AccumulateGradient
from training.objectives.contrastive.blocks import Metrics
from training.objectives.embed import outputs, with_queries
from training.objectives.losses.token_vectors import TokenVectors
from training.objectives.pair_step import by_row, gather_tokens
from training.teachers.objective import Targets, Teaching


class TextTeacher(Protocol):
    """A teacher that has a target, a vector or scores, for every row of the data.

    Attributes:
        width: width of a vector, or number of candidates of a query.
        identity: what the targets depend on besides the data.
    """

    width: int
    identity: str

    def read_all(self, sources: Iterable[Source]) -> None:
        """Prepare the targets of all rows of the sources; the processes share the rows."""

    def read(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return the targets of a batch, float32 `(n, width)`, and which texts fit into the window, `(n,)`."""


Teachers = Mapping[str, TextTeacher]  # by role: `structural` and `contextual`, or `score`


class TaughtBatches(PairBatches):
    """Batches of texts that the teachers have read."""

    def heaviest(self) -> PairBatch:
        """Return the heaviest batch, with the texts of the source's first rows for the teachers.

        The longest texts of the columns, which make up the batch, come from different rows, which no teacher has
        scored.
        """
        batch = super().heaviest()
        source = next(source for source in self.sources if source.name == batch.source)
        return replace(batch, texts=source.texts(list(range(batch.pairs))))


def teaching_gradient(objective: Teaching, teachers: Teachers) -> AccumulateGradient:
    """Build the gradient of an objective over the batches of all processes.

    Args:
        objective: the losses against the teachers.
        teachers: the teachers by role; their targets have been prepared.

    Returns:
        The function that the loop calls for each batch, which must hold its texts.
    """

    def accumulate_gradient(model: nn.Module, batch: PairBatch, scale: float, synchronize: bool) -> Metrics:
        device = batch.text_ids.device
        targets = {
            role: (gather_rows(vectors), gather_rows(inside.float()).bool())
            for role, (vectors, inside) in _read_targets(batch, teachers, device).items()
        }

        def loss(*read: Tensor) -> tuple[Tensor, Metrics]:
            rows = _rows(read, batch.pairs, objective)
            rows = gather_tokens(rows) if isinstance(rows, TokenVectors) else gather_rows(rows)
            value, metrics = objective(rows, targets)
            return value * scale, metrics

        metrics = cached_backward(
            model,
            list(with_queries(batch.chunks, batch.pairs)),
            lambda part: outputs(model, *part, objective.arguments.by_tokens),
            loss,
            synchronize=synchronize,
        )
        return metrics | batch.measures()

    return accumulate_gradient


class TeachingEvaluation:
    """The objective on the held-out texts of one source, in batches as large as those of training.

    Args:
        source: the held-out texts.
        tokenize: the student's tokenizer.
        objective: the losses against the teachers.
        teachers: the teachers by role; their targets have been prepared.
        batch_size: smallest number of rows of a batch, if the source has as many; the remainder is spread over the
            batches.
        batch_tokens: number of tokens of one packed chunk.
    """

    def __init__(
        self,
        source: Source,
        tokenize: PairTokenizer,
        objective: Teaching,
        teachers: Teachers,
        *,
        batch_size: int,
        batch_tokens: int,
    ) -> None:
        self.source, self.tokenize, self.objective, self.teachers = source, tokenize, objective, teachers
        rows = np.arange(len(source.rows))
        self.batches = np.array_split(rows, max(1, len(rows) // batch_size))
        self.batch_tokens = batch_tokens

    @torch.no_grad()
    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Evaluate a model; the processes share the batches.

        Args:
            model: the student, in evaluation mode.
            device: the model's device.

        Returns:
            The metrics of the objective as `eval_...`, means over the batches.
        """
        sums: dict[str, float] = {}
        self.objective.eval()
        for number in own_share(len(self.batches)):
            rows = self.batches[number].tolist()
            texts = self.source.texts(rows)
            batch = collate_pairs(texts, self.tokenize, self.batch_tokens, anchor_kind=self.source.anchor_kind)
            batch = replace(batch, texts=texts, source=self.source.name, rows=self.source.numbers(rows))
            chunks = with_queries([chunk.to(device) for chunk in batch.chunks], batch.pairs)
            parts = [outputs(model, *part, self.objective.arguments.by_tokens) for part in chunks]
            student = _rows([torch.cat(column) for column in zip(*parts, strict=True)], batch.pairs, self.objective)
            _, metrics = self.objective(student, _read_targets(batch, self.teachers, device))
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in metrics.items()}
        self.objective.train()
        shares = gather_object([sums])
        names = next(share for share in shares if share)
        return {f"eval_{name}": sum(share.get(name, 0.0) for share in shares) / len(self.batches) for name in names}


def _rows(read: Sequence[Tensor], pairs: int, objective: Teaching) -> Tensor | TokenVectors:
    """Return the texts of one process as the objective reads them, `(pairs, columns, d)` or token vectors."""
    pooled, *of_tokens = read
    if of_tokens:
        vectors, counts = of_tokens
        return objective.arguments.for_scoring(vectors, counts, pairs).by_row(pairs)
    return by_row(pooled, pairs)


def _read_targets(batch: PairBatch, teachers: Teachers, device: torch.device) -> Targets:
    """Read the targets of a batch from all teachers, and move them to a device."""
    found = {role: teacher.read(batch) for role, teacher in teachers.items()}
    return {role: (target.to(device), inside.to(device)) for role, (target, inside) in found.items()}
