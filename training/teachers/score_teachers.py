"""Score teachers: scores of the candidates of a query, from a cross-encoder or from a column of the data."""

import hashlib
import json
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

from common.encoders.model_folder import ModelFolder
from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from training.data.pairs.batches import PairBatch
from training.data.sources import Source, check_numbers
from training.engine.processes.distributed import own_share

_ROWS_AT_ONCE = 64  # rows that are scored before they are stored; a killed run loses no more


class ColumnScores:
    """Scores from a column of the data, which holds a list of numbers, the positive's score first.

    Args:
        column: name of the column.
        candidates: number of candidates of a query.

    Attributes:
        width: number of candidates of a query.
        identity: what the scores depend on besides the row.
    """

    def __init__(self, column: str, candidates: int) -> None:
        self.column, self.width, self.identity = column, candidates, f"column {column}"
        self._rows: dict[str, datasets.Dataset] = {}

    def read_all(self, sources: Iterable[Source]) -> None:
        """Check the scores of all rows before the first step; the processes share the rows.

        Args:
            sources: the training and the held-out data.

        Raises:
            UserError: a row does not hold a list of as many numbers as there are candidates.
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
        """Read the scores of a batch by the numbers of its rows: another row may have the same texts and other scores.

        Args:
            batch: a batch that holds its source and row numbers.

        Returns:
            Float32 scores `(n, candidates)`, and True for every row, `(n,)`.
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
    """Scores of a cross-encoder, which reads query and candidate together; the logits, before any activation.

    Scores are cached on disk under a hash of the model, what computes with it, and the texts.

    Args:
        name: a folder or Hub id that sentence-transformers loads as a cross-encoder.
        candidates: number of candidates of a query.
        cache: the file that caches scores.
        batch_tokens: number of tokens of a forward pass.

    Raises:
        UserError: there is no such model, it returns more than one score, or the packages that load it are not
            installed.

    Attributes:
        width: number of candidates of a query.
        identity: the files and settings that the scores depend on besides the texts.
    """

    def __init__(self, name: str, candidates: int, cache: Path, batch_tokens: int) -> None:
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
        self._computed_by = json.dumps(folder.computed_by(__name__, device=self._model.device.type), sort_keys=True)
        self._batch_size = max(1, batch_tokens // length)

    def read_all(self, sources: Iterable[Source]) -> None:
        """Score the rows of all sources that are not cached yet, and free the model; the processes share the rows.

        Args:
            sources: the training and the held-out data.

        Raises:
            UserError: the file is not a cache of vectors, or the disk is full.
        """
        cache = VectorCache(self.cache)
        for source in sources:
            own = own_share(len(source.rows))
            starts = range(own.start, own.stop, _ROWS_AT_ONCE)
            for start in tqdm(starts, desc=f"scores of {source.name}", disable=own.start > 0, leave=False):
                columns = source.texts(list(range(start, min(start + _ROWS_AT_ONCE, own.stop))))
                keys = self._keys(columns)
                cached = cache.get(keys)
                missing = [row for row, key in enumerate(keys) if key not in cached]
                if missing:
                    scores = self.scores_of([[column[row] for row in missing] for column in columns])
                    cache.put({keys[row]: found[None] for row, found in zip(missing, scores, strict=True)})
        self._model = None
        wait_for_everyone()

    def read(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Read the scores of a batch.

        Args:
            batch: a batch that holds its texts.

        Returns:
            Float32 scores `(n, candidates)`, and True for every row, `(n,)`.

        Raises:
            UserError: a score is no longer in the cache.
        """
        assert batch.texts is not None
        scores = torch.from_numpy(VectorCache(self.cache).rows(self._keys(batch.texts)))
        return scores, torch.ones(len(scores), dtype=torch.bool)

    def scores_of(self, columns: list[list[str]]) -> np.ndarray:
        """Score the candidates of n queries.

        Args:
            columns: the n queries, and for each candidate its n texts.

        Returns:
            Float32 `(n, candidates)`.
        """
        pairs = [(query, text) for query, *texts in zip(*columns, strict=True) for text in texts]
        scores = self._model.predict(
            pairs, batch_size=self._batch_size, activation_fn=nn.Identity(), show_progress_bar=False
        )
        return np.asarray(scores, dtype=np.float32).reshape(-1, self.width)

    def _keys(self, columns: list[list[str]]) -> list[bytes]:
        digests = [[hashlib.sha256(text.encode()).digest() for text in column] for column in columns]
        head = hashlib.sha256(f"scores:{self.identity}:{self._computed_by}".encode()).digest()
        return [hashlib.sha256(head + b"".join(row)).digest() for row in zip(*digests, strict=True)]
