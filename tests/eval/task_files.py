"""Files of tasks, as tests write them."""

import gzip
import json
from pathlib import Path


def write_rows(path: Path, rows) -> None:
    """Rows as JSON lines, gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
