"""Files and folders that are whole or absent: written beside, flushed to the disk, renamed."""

import gzip
import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that under its name there is the old content or all of the new, whatever kills the process.

    Args:
        path: the file; missing parent folders are made.
        data: content; a string is written as UTF-8.
    """
    with _atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write JSON lines so that the file is whole or as it was; the same rows give the same bytes.

    Args:
        path: the file, gzipped if its name ends in .gz; missing parent folders are made.
        rows: what goes into one line each; they are never all in memory.
    """
    with _atomic_file(path) as temporary, open(temporary, "wb") as raw:
        # No name and no time in the header of a gzipped file.
        packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if Path(path).suffix == ".gz" else nullcontext(raw)
        with packed as file:
            for row in rows:
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


@contextmanager
def _atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary file's path, which is renamed to `path` after the block, and removed if the block raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)
    _remove_leftovers(path)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill a folder so that under its name there is never a part of the new content, whatever kills the process.

    A folder that is already there is replaced. It is moved aside just before the rename (no system call renames over a
    full folder), so a kill between the two leaves nothing under the name: absent, never half-written.

    Args:
        path: the folder; missing parent folders are made.

    Yields:
        An empty temporary folder beside `path` to write into; removed if the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        replaced = _temporary(path)
        if path.exists():
            os.replace(path, replaced)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    _remove_leftovers(path)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _temporary(path: Path) -> Path:
    """A new name beside `path` (a rename is atomic only inside one file system) that tells who writes there."""
    return path.with_name(f".{path.name}.tmp-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}")


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine left while they wrote `path`; a living writer's stays."""
    prefix = f".{path.name}.tmp-{platform.node()}-"
    for leftover in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        try:
            os.kill(int(leftover.name.removeprefix(prefix).split("-")[0]), 0)
        except ProcessLookupError:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        except PermissionError:
            pass  # alive, and somebody else's


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
