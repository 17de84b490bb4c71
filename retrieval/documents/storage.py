"""Folders of files on this machine or, by a URL that fsspec knows, elsewhere: `s3://bucket/folder`."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError, one_line
from common.files import atomic_file


def is_url(name: str | Path) -> bool:
    """Return whether a name is a URL rather than a path."""
    return "://" in str(name)


class Storage:
    """A folder that files are read from and written to, each of them whole or not at all.

    On this machine a file is written beside, flushed to disk and renamed. Elsewhere it is made on this machine first
    and then sent: object stores show an object when all of it is there; of other places the reader must check the size.

    Args:
        root: path of the folder, or its URL.

    Raises:
        UserError: fsspec does not know such URLs, or a package that it needs for them is missing.
    """

    def __init__(self, root: str | Path):
        self.root = str(root)
        try:
            from fsspec.core import url_to_fs
            from fsspec.implementations.local import LocalFileSystem
        except ImportError:
            raise UserError(f"{root}: needs the package fsspec: pip install fsspec") from None
        try:
            self.system, self.path = url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise UserError(f"{root}: {one_line(error)}; give a path, or a URL that fsspec can open") from None
        self.is_local = isinstance(self.system, LocalFileSystem)

    def _join(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Turn errors of other machines into a sentence; those of this one tell enough."""
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # each file system has errors of its own
            if self.is_local:
                raise
            raise UserError(f"{self.root}: {name or 'the folder'} cannot be used: {one_line(error)}") from error

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none.

        Args:
            name: relative to the folder.

        Raises:
            UserError: the place cannot be reached.
        """
        try:
            with self.open(name) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading.

        Args:
            name: relative to the folder; empty if the root is a file itself.

        Raises:
            FileNotFoundError: there is none.
            UserError: the place cannot be reached.
        """
        with self._asking(name):
            self.system.invalidate_cache()  # another process may have written it since the folder was listed
            opened: Any = self.system.open(self._join(name), "rb")
            return opened

    def write(self, name: str, data: bytes) -> None:
        """Write a file.

        Args:
            name: relative to the folder.
            data: the content.

        Raises:
            UserError: the place cannot be reached.
        """
        with self.file(name) as temporary:
            temporary.write_bytes(data)

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Write a file by what needs the path of a file.

        Args:
            name: relative to the folder.

        Yields:
            The path of a temporary file on this machine, which is put in its place after the block.

        Raises:
            UserError: the place cannot be reached.
        """
        if self.is_local:
            with atomic_file(self._join(name)) as temporary:
                yield temporary
            return
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, "file")
            yield temporary
            with self._asking(name):
                self.system.makedirs(os.path.dirname(self._join(name)), exist_ok=True)
                self.system.put_file(str(temporary), self._join(name))

    def sizes(self, folder: str = "", ending: str = "") -> dict[str, int]:
        """Return the bytes of the files in a folder and in those below it, but not of hidden ones.

        Args:
            folder: relative to the root; empty: the root, which may be a file itself.
            ending: of the names.

        Returns:
            Sizes by name relative to `folder`, in the order of the names; the name of the root itself is empty.

        Raises:
            UserError: the place cannot be reached.
        """
        top = self._join(folder)
        with self._asking(folder):
            self.system.invalidate_cache()
            found: dict[str, Any] = self.system.find(top, detail=True)
        names = {path[len(top.rstrip("/")) :].lstrip("/"): about["size"] for path, about in found.items()}
        return {
            name: names[name]
            for name in sorted(names)
            if (name or top).endswith(ending) and not any(part.startswith(".") for part in name.split("/"))
        }
