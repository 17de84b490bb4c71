"""Scores of the candidates of a query as targets: by a cross-encoder, or from a column of the data."""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import wait_for_everyone
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError
from common.model_folder import ModelFolder
from common.vector_cache import VectorCache
from training.data.pair_batches import PairBatch
from training.data.sources import Source, check_numbers
from training.engine.distributed import own_share

_ROWS_AT_ONCE = 64  # of a put: what a kill loses


class ColumnScores:
    """Scores that a column of the data holds: a list of numbers, the positive's first.

    Attributes:
        width: candidates of a query.
        identity: what the scores depend on beside the row.
    """

    def __init__(self, column: str, candidates: int) -> None:
        """Args:
        column: its name.
        candidates: of a query.
        """
        self.column, self.width, self.identity = column, candidates, f"column {column}"
        self._rows: dict[str, datasets.Dataset] = {}

    def read_all(self, sources: Iterable[Source]) -> None:
        """Look at the scores of all rows, each process at those of its share, before the first step needs them.

        Raises:
            UserError: a row without scores as they should be.
        """
        for source in sources:
            self._rows[source.name] = source.rows.select_columns([self.column])
            own = own_share(len(source.rows))
            for start in range(own.start, own.stop, 1000):
                rows = list(range(start, min(start + 1000, own.stop)))
                values = self._rows[source.name][rows][self.column]
                for number, value in zip(source.numbers(rows), values, strict=True):
                    self._check(source, number, value)
        wait_for_everyone()

    def read(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Scores of the rows of a batch, float32 `(n, candidates)`, and that all count, `(n,)`: by the row, because
        another one may have the same texts and other scores.
        """
        values = self._rows[batch.source][[number - 1 for number in batch.rows]][self.column]
        return torch.tensor(values, dtype=torch.float32), torch.ones(len(values), dtype=torch.bool)

    def _check(self, source: Source, number: int, value: object) -> None:
        check_numbers(source.name, number, self.column, value)
        assert isinstance(value, list)
        if len(value) != self.width or not all(map(math.isfinite, value)):
            raise UserError(
                f"{source.name}, row {number}: {self.column} must hold {self.width} numbers, one for each of "
                f"{', '.join(source.columns[1:])}"
            )


class CrossEncoderScores:
    """Scores of a model that reads query and candidate together, before any activation; kept in the cache by what they
    depend on: the model, and the texts.

    Attributes:
        width: candidates of a query.
        identity: what the scores depend on beside the texts.
    """

    def __init__(self, name: str, candidates: int, cache: Path, batch_tokens: int) -> None:
        """Args:
        name: a folder or Hub id that sentence-transformers loads as a cross-encoder.
        candidates: of a query.
        cache: the file of the scores.
        batch_tokens: token budget of a forward pass.

        Raises:
            UserError: there is no such model, or it gives more than one score.
        """
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise UserError(f"--score_teacher needs the extra 'eval' ({error.name} is missing)") from None
        try:
            folder = ModelFolder.find(name)
            self._model: Any = CrossEncoder(str(folder.path))
        except (UserError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"--score_teacher {name}: {' '.join(str(error).split())[:200]}") from None
        if self._model.num_labels != 1:
            raise UserError(
                f"--score_teacher {name}: gives {self._model.num_labels} scores a pair; give a model of one"
            )
        length = self._model.max_seq_length or 512
        self.width, self.cache, self.identity = candidates, cache, f"{folder.revision}:{length}"
        self._batch_size = max(1, batch_tokens // length)

    def read_all(self, sources: Iterable[Source]) -> None:
        """Bring the scores of all rows into the cache, each process those of its share, and let go of the model.

        Raises:
            UserError: a cache that cannot be written.
        """
        cache = VectorCache(self.cache)
        for source in sources:
            own = own_share(len(source.rows))
            starts = range(own.start, own.stop, _ROWS_AT_ONCE)
            for start in tqdm(starts, desc=f"scores of {source.name}", disable=own.start > 0, leave=False):
                columns = source.texts(list(range(start, min(start + _ROWS_AT_ONCE, own.stop))))
                keys = self._keys(columns)
                there = cache.get(keys)
                missing = [place for place, key in enumerate(keys) if key not in there]
                if missing:
                    scores = self.scores_of([[column[place] for place in missing] for column in columns])
                    cache.put({keys[place]: row[None] for place, row in zip(missing, scores, strict=True)})
        self._model = None
        wait_for_everyone()

    def read(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Scores of the texts of a batch, float32 `(n, candidates)`, and that all count, `(n,)`.

        Raises:
            UserError: the cache does not hold them: somebody has removed it.
        """
        assert batch.texts is not None
        scores = torch.from_numpy(VectorCache(self.cache).rows(self._keys(batch.texts)))
        return scores, torch.ones(len(scores), dtype=torch.bool)

    def scores_of(self, columns: list[list[str]]) -> np.ndarray:
        """Float32 `(n, candidates)` of n queries, the first column, and their candidates."""
        pairs = [(query, text) for query, *texts in zip(*columns, strict=True) for text in texts]
        scores = self._model.predict(
            pairs, batch_size=self._batch_size, activation_fn=nn.Identity(), show_progress_bar=False
        )
        return np.asarray(scores, dtype=np.float32).reshape(-1, self.width)

    def _keys(self, columns: list[list[str]]) -> list[bytes]:
        digests = [[hashlib.sha256(text.encode()).digest() for text in column] for column in columns]
        head = f"scores:{self.identity}:".encode()
        return [hashlib.sha256(head + b"".join(row)).digest() for row in zip(*digests, strict=True)]
