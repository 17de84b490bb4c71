"""Files of tasks, as tests write them, and texts to fill them with."""

import gzip
import json
from pathlib import Path

import numpy as np

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly brew tea in large kettles".split()  # noqa: SIM905


def write_rows(path: Path, rows) -> None:
    """Rows as JSON lines, gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def words(count: int, seed: int) -> str:
    """A text of `count` words, the same for the same seed."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))
