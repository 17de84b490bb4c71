"""Scores of the candidates of a query as targets: by a cross-encoder, or from a column of the data."""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import wait_for_everyone
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError
from common.vector_cache import VectorCache
from training.data import Source
from training.distributed import own_share

_ROWS_AT_ONCE = 64  # of a put: what a kill loses


class ScoreTeacher:
    """Scores of rows of a query and its candidates, kept in the cache by what they depend on: who gives them, and the
    texts.
    """

    identity: str

    def __init__(self, cache: Path) -> None:
        """Args:
        cache: the file of the scores.
        """
        self.cache = cache

    def read_all(self, sources: Iterable[Source]) -> None:
        """Bring the scores of all rows into the cache, each process those of its share.

        Raises:
            UserError: a row without scores as they should be, or a cache that cannot be written.
        """
        cache = VectorCache(self.cache)
        for source in sources:
            own = own_share(len(source.rows))
            starts = range(own.start, own.stop, _ROWS_AT_ONCE)
            for start in tqdm(starts, desc=f"scores of {source.name}", disable=own.start > 0, leave=False):
                rows = list(range(start, min(start + _ROWS_AT_ONCE, own.stop)))
                columns = source.texts(rows)
                keys = self._keys(columns)
                there = cache.get(keys)
                missing = [place for place, key in enumerate(keys) if key not in there]
                if missing:
                    scores = self.scores_of(source, [rows[place] for place in missing], _chosen(columns, missing))
                    cache.put({keys[place]: row[None] for place, row in zip(missing, scores, strict=True)})
        self.let_go()
        wait_for_everyone()

    def __call__(self, columns: list[list[str]]) -> tuple[Tensor, Tensor]:
        """Scores that the cache holds, float32 `(n, candidates)`, and that all count, `(n,)`.

        Args:
            columns: the texts, one list a column, queries first.

        Raises:
            UserError: the cache does not hold them: somebody has removed it.
        """
        keys = self._keys(columns)
        found = VectorCache(self.cache).get(keys)
        try:
            scores = torch.from_numpy(np.concatenate([found[key] for key in keys]))
        except KeyError:
            raise UserError(f"{self.cache}: scores are gone; start the same command again") from None
        return scores, torch.ones(len(scores), dtype=torch.bool)

    def scores_of(self, source: Source, rows: list[int], columns: list[list[str]]) -> np.ndarray:
        """Float32 `(n, candidates)` of rows of a source, whose texts are `columns`."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Free what only `scores_of` needs."""

    def _keys(self, columns: list[list[str]]) -> list[bytes]:
        digests = [[hashlib.sha256(text.encode()).digest() for text in column] for column in columns]
        head = f"scores:{self.identity}:".encode()
        return [hashlib.sha256(head + b"".join(row)).digest() for row in zip(*digests, strict=True)]


class ColumnScores(ScoreTeacher):
    """Scores that a column of the data holds: a list of numbers, the positive's first."""

    def __init__(self, column: str, cache: Path, data: list[str]) -> None:
        """Args:
        column: its name.
        cache: the file of the scores.
        data: what names the data: another file may have other scores for the same texts.
        """
        super().__init__(cache)
        self.column, self.identity = column, f"column {column} of {' '.join(data)}"

    def read_all(self, sources: Iterable[Source]) -> None:
        """As `ScoreTeacher.read_all`; what the cache holds of an earlier run is written anew, as the file may be."""
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        cache = VectorCache(self.cache)
        for source in sources:
            own = own_share(len(source.rows))
            for start in range(own.start, own.stop, 1000):
                rows = list(range(start, min(start + 1000, own.stop)))
                columns = source.texts(rows)
                cache.put(dict(zip(self._keys(columns), self.scores_of(source, rows, columns)[:, None], strict=True)))
        wait_for_everyone()

    def scores_of(self, source: Source, rows: list[int], columns: list[list[str]]) -> np.ndarray:
        candidates = len(columns) - 1
        values = source.rows.select_columns([self.column])[rows][self.column]
        for number, value in zip(source.numbers(rows), values, strict=True):
            whole = value is not None and len(value) == candidates
            if not whole or not all(score is not None and math.isfinite(score) for score in value):
                raise UserError(
                    f"{source.name}, row {number}: {self.column} must hold {candidates} numbers, one for each of "
                    f"{', '.join(source.columns[1:])}"
                )
        return np.array(values, dtype=np.float32)


class CrossEncoderScores(ScoreTeacher):
    """Scores of a model that reads query and candidate together, before any activation.

    Args:
        name: a folder or Hub id that sentence-transformers loads as a cross-encoder.
        cache: the file of the scores.
        batch_tokens: token budget of a forward pass.

    Raises:
        UserError: there is no such model, or it gives more than one score.
    """

    def __init__(self, name: str, cache: Path, batch_tokens: int) -> None:
        super().__init__(cache)
        try:
            from sentence_transformers import CrossEncoder

            from common.encoders import ModelFolder
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
        self.identity = f"{folder.revision}:{length}"
        self._batch_size = max(1, batch_tokens // length)

    def scores_of(self, source: Source, rows: list[int], columns: list[list[str]]) -> np.ndarray:
        pairs = [(query, text) for query, *texts in zip(*columns, strict=True) for text in texts]
        scores = self._model.predict(
            pairs, batch_size=self._batch_size, activation_fn=nn.Identity(), show_progress_bar=False
        )
        return np.asarray(scores, dtype=np.float32).reshape(len(rows), -1)

    def let_go(self) -> None:
        self._model = None


def _chosen(columns: list[list[str]], places: list[int]) -> list[list[str]]:
    return [[column[place] for place in places] for column in columns]
