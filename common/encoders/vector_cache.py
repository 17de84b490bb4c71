"""A cache of vectors on disk, so that no text is encoded twice, even if the process is killed in between."""

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError

_DELETE = "delete it, and the same command fills it again"
_KEYS_PER_QUERY = 500  # SQLite takes at most 999 parameters in its oldest builds


class VectorCache:
    """A SQLite file that maps a key (bytes) to the k vectors of a text, a float32 matrix `(k, d)`; `(0, 0)` for k = 0.

    With SQLite a `put` is stored whole or not at all if the process is killed, several processes may share the file,
    and only the rows that are read are in memory.

    Args:
        path: the file; it and its folder are created if they are missing.

    Raises:
        UserError: the file exists and is not such a cache, or cannot be created.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make {self.path.parent}, the folder of the cache of vectors ({error.strerror}); name another"
            ) from None
        try:
            self._connection = sqlite3.connect(self.path, timeout=60)
            with self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, k INTEGER NOT NULL, data BLOB NOT NULL)"
                )
        except sqlite3.Error as error:
            remedy = _remedy(error, "make room, or name another place")
            raise UserError(f"cannot use {self.path} as the cache of vectors ({error}); {remedy}") from None

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Return the matrices of those keys that are in the cache, each float32 `(k, d)`.

        Raises:
            UserError: the file is damaged.
        """
        found: dict[bytes, np.ndarray] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(part))
            try:
                rows = self._connection.execute(f"SELECT * FROM vectors WHERE key IN ({marks})", part).fetchall()
            except sqlite3.Error as error:
                remedy = _remedy(error, _DELETE)
                raise UserError(f"cannot read {self.path}, the cache of vectors ({error}); {remedy}") from None
            found |= {key: np.frombuffer(data, np.float32).reshape(k, -1 if k else 0) for key, k, data in rows}
        return found

    def rows(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the matrices of all keys, concatenated in the order of `keys`: float32 `(sum of k, d)`.

        Raises:
            UserError: the file is damaged, or a key is missing: the file has been removed since it was filled.
        """
        found = self.get(keys)
        if missing := len(set(keys) - found.keys()):
            raise UserError(f"{self.path}: {missing} vectors or scores are gone; start the same command again")
        return np.concatenate([found[key] for key in keys])

    def put(self, matrices: Mapping[bytes, np.ndarray]) -> None:
        """Store matrices `(k, d)` by their keys, all of them or none.

        Raises:
            UserError: the disk is full or cannot be written to; what was stored before is kept.
        """
        rows = [(key, len(m), np.ascontiguousarray(m, dtype=np.float32).tobytes()) for key, m in matrices.items()]
        try:
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            remedy = _remedy(error, "what it holds is kept: make room, and the same command goes on from there")
            raise UserError(f"cannot write to {self.path}, the cache of vectors ({error}); {remedy}") from None


def _remedy(error: sqlite3.Error, of_the_place: str) -> str:
    """Return what to do about an error, which SQLite calls operational if the place or another process is at fault."""
    if "locked" in str(error):
        return "another process is writing; start again when it has ended"
    return of_the_place if isinstance(error, sqlite3.OperationalError) else _DELETE
