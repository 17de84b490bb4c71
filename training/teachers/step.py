"""Distillation of embeddings and scores, as the loop uses it: the gradient of a batch, and the evaluation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from training.data.packing import PackedTexts
from training.data.pairs.batches import PairBatch, PairBatches, PairTokenizer, collate_pairs
from training.data.sources import Source
from training.engine.gradient_cache import cached_backward
from training.engine.processes.distributed import gather_rows, gather_uneven_rows, own_share
from training.engine.training import AccumulateGradient
from training.objectives.contrastive.blocks import Metrics
from training.objectives.embed import outputs, outputs_with_chunks, with_queries
from training.objectives.losses.token_vectors import TokenVectors
from training.objectives.pair_step import by_row, gather_tokens
from training.teachers.late_chunks import LateChunks
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


Teachers = Mapping[str, TextTeacher]  # by role: `structural` and `contextual`, maybe `chunk`, or `score`


class TaughtBatches(PairBatches):
    """Batches of texts that the teachers have read.

    Args:
        sources, tokenize, options: as of `PairBatches`.
        late_chunks: cuts the texts of the first column into chunks that a teacher has read too.
    """

    def __init__(
        self,
        sources: list[Source],
        tokenize: PairTokenizer,
        *,
        late_chunks: LateChunks | None = None,
        **options: Any,
    ) -> None:
        super().__init__(sources, tokenize, keep_texts=True, **options)
        self.late_chunks = late_chunks

    def __getitem__(self, index: int) -> PairBatch:
        return _with_chunks(super().__getitem__(index), self.late_chunks)

    def heaviest(self) -> PairBatch:
        """Return the heaviest batch, with the texts of the source's first rows for the teachers.

        The longest texts of the columns, which make up the batch, come from different rows, which no teacher has
        scored. For the same reason, and because they are cut off, one chunk stands for all.
        """
        batch = super().heaviest()
        source = next(source for source in self.sources if source.name == batch.source)
        batch = replace(batch, texts=source.texts(list(range(batch.pairs))))
        if self.late_chunks is None:
            return batch
        known = chain.from_iterable(_with_chunks(batch, self.late_chunks).chunk_texts or ())
        lengths = torch.cat([chunk.cu_seq_lens_q.diff() for chunk in batch.chunks])[: batch.pairs]
        text = next(filter(None, known), "")
        return replace(batch, chunk_texts=[[text] * -(-length // self.late_chunks.size) for length in lengths.tolist()])


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
            role: (gather_uneven_rows(vectors)[0], gather_uneven_rows(inside.float())[0].bool())
            for role, (vectors, inside) in _read_targets(batch, teachers, device).items()
        }

        def loss(*read: Tensor) -> tuple[Tensor, Metrics]:
            rows, chunks = _rows(read, batch, objective)
            rows = gather_tokens(rows) if isinstance(rows, TokenVectors) else gather_rows(rows)
            if chunks is not None:
                chunks, _ = gather_uneven_rows(chunks)
            value, metrics = objective(rows, targets, chunks)
            return value * scale, metrics

        metrics = cached_backward(
            model,
            list(with_queries(batch.chunks, batch.pairs)),
            lambda part: _outputs(model, *part, objective),
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
        late_chunks: cuts the texts of the first column into chunks that a teacher has read too.
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
        late_chunks: LateChunks | None = None,
    ) -> None:
        self.late_chunks = late_chunks
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
            batch = _with_chunks(batch, self.late_chunks)
            chunks = with_queries([chunk.to(device) for chunk in batch.chunks], batch.pairs)
            parts = [_outputs(model, *part, self.objective) for part in chunks]
            student = _rows([torch.cat(column) for column in zip(*parts, strict=True)], batch, self.objective)
            _, metrics = self.objective(student[0], _read_targets(batch, self.teachers, device), student[1])
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in metrics.items()}
        self.objective.train()
        shares = gather_object([sums])
        names = next(share for share in shares if share)
        return {f"eval_{name}": sum(share.get(name, 0.0) for share in shares) / len(self.batches) for name in names}


def _with_chunks(batch: PairBatch, late_chunks: LateChunks | None) -> PairBatch:
    """Return a batch with the texts of its late chunks, if there are any."""
    if late_chunks is None:
        return batch
    assert batch.texts is not None
    return replace(batch, chunk_texts=late_chunks(batch.texts[0]))


def _outputs(model: nn.Module, chunk: PackedTexts, is_first: Tensor, objective: Teaching) -> tuple[Tensor, ...]:
    """Return what the objective reads of packed texts; `is_first` are those of the first column."""
    size = objective.arguments.late_chunk_tokens
    if size is not None:
        return outputs_with_chunks(model, chunk, is_first, size, objective.pooling)
    return outputs(model, chunk, is_first, objective.arguments.by_tokens)


def _rows(read: Sequence[Tensor], batch: PairBatch, objective: Teaching) -> tuple[Tensor | TokenVectors, Tensor | None]:
    """Return the texts of one process as the objective reads them.

    Args:
        read: what `_outputs` returns, of all texts.
        batch: the texts.
        objective: the losses against the teachers.

    Returns:
        `(pairs, columns, d)` or token vectors, and the late chunks that have a text, `(chunks, d)`, if there are any.
    """
    pooled, *more = read
    if objective.arguments.late_chunk_tokens is not None:
        assert batch.chunk_texts is not None
        has_text = [bool(text) for text in chain.from_iterable(batch.chunk_texts)]
        return by_row(pooled, batch.pairs), more[0][torch.tensor(has_text, device=pooled.device)]
    if more:
        vectors, counts = more
        return objective.arguments.for_scoring(vectors, counts, batch.pairs).by_row(batch.pairs), None
    return by_row(pooled, batch.pairs), None


def _read_targets(batch: PairBatch, teachers: Teachers, device: torch.device) -> Targets:
    """Read the targets of a batch from all teachers, and move them to a device."""
    found = {role: teacher.read(batch) for role, teacher in teachers.items()}
    return {role: (target.to(device), inside.to(device)) for role, (target, inside) in found.items()}
