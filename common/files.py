"""Atomic writes of files and folders: they are written under a temporary name, flushed to disk, and renamed."""

import errno
import gzip
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from common.errors import UserError


def check_output(path: str | Path, option: str, kind: str = "folder") -> None:
    """Check that a script will be able to write its output, before it works for hours. Nothing is left behind.

    Args:
        path: the folder or file to write.
        option: name of the option that gives it, for the error.
        kind: `folder` or `file`.

    Raises:
        UserError: something else is at that place, or nothing can be written there.
    """
    path = Path(path)
    place = f"--{option} {path}"
    try:
        if kind == "folder" and path.exists() and not path.is_dir():
            raise UserError(f"{place}: is no folder; name another place")
        if kind == "file":
            if path.is_dir():
                raise UserError(f"{place}: is a folder; name a file in it")
            _check_regular(path)
        folder = path if kind == "folder" else path.parent
        existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
        if not existing.is_dir():
            raise UserError(f"{place}: {existing} is no folder; name another place")
        _try_writing(existing)
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror}); name another place") from None


def _try_writing(folder: Path) -> None:
    """Create a file in a folder that no longer exists when this returns or the process is killed.

    Raises:
        OSError: nothing can be written there.
    """
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600))  # a file without a name
    except (AttributeError, OSError) as error:
        # Systems other than Linux and some file systems have no such files.
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        trial = _temporary(folder / "trial")
        trial.mkdir()
        trial.rmdir()


def _check_regular(path: Path) -> None:
    """Raise an error if a rename would put a file in the place of a device, as root is allowed to."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "Is no regular file", str(path))


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file atomically: if the process is killed, the file has all of the old content or all of the new.

    Args:
        path: the file; missing parent folders are created.
        data: the content; a string is written as UTF-8.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write a JSON-lines file atomically; the same rows give the same bytes.

    Args:
        path: the file, compressed with gzip if its name ends in .gz; missing parent folders are created.
        rows: the values of the lines; they are never all in memory.
    """
    with atomic_file(path) as temporary, open(temporary, "wb") as raw:
        # The header of a gzip file gets no name and no time, which would differ between equal files.
        packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if Path(path).suffix == ".gz" else nullcontext(raw)
        with packed as file:
            for row in rows:
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Write a file atomically, as `atomic_write` does, by what needs the path of a file.

    Args:
        path: the file; missing parent folders are created.

    Yields:
        The path of a temporary file, which is renamed to `path` after the block, or removed if the block raises.
    """
    path = Path(path)
    _check_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)  # before writing: after a kill in between, the next run writes and removes again
    temporary = _temporary(path)
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder atomically: if the process is killed, the folder never has only a part of the new content.

    An existing folder is replaced. It is moved aside just before the rename, because no system call renames over a
    folder with files in it: a process that is killed between the two leaves no folder rather than half of one.

    Args:
        path: the folder; missing parent folders are created.

    Yields:
        An empty temporary folder next to `path` to write into; it is removed if the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
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


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# The names that `_temporary` gives.
_TEMPORARY = re.compile(r"\..+\.tmp-(?P<node>.+)-(?P<process>\d+)-(?P<start>\d+)-[0-9a-f]{8}", re.DOTALL)


def _temporary(path: Path) -> Path:
    """Return a new name next to `path` (renames are atomic within one file system only) that names the process."""
    owner = f"{os.getpid()}-{_start_of(os.getpid())}"
    return path.with_name(f".{path.name}.tmp-{platform.node()}-{owner}-{secrets.token_hex(4)}")


def _start_of(process: int) -> str:
    """Return when a process started, in the clock ticks of /proc: its number may be that of an earlier one.

    Raises:
        ProcessLookupError: there is no such process.
    """
    os.kill(process, 0)
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        return "0"


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left while they wrote into a folder, but not what live ones write.

    Every write of this module does so first. A folder that may be complete, so that nothing is written into it again,
    needs a call of its own.
    """
    for leftover in [entry for entry in folder.iterdir() if ".tmp-" in entry.name]:
        match = _TEMPORARY.fullmatch(leftover.name)
        if match is None or match["node"] != platform.node():
            continue
        try:
            alive = _start_of(int(match["process"])) == match["start"]
        except ProcessLookupError:
            alive = False
        except PermissionError:
            alive = True  # it belongs to another user
        if not alive:
            # Another process may remove it at the same time, and what cannot be removed must not stop a write.
            with suppress(OSError):
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
