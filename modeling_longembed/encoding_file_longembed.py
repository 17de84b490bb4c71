"""Vectors in a file of NumPy's format that grows while they are computed, and that is read memory-mapped.

The format is written here because the files of this folder import only torch, transformers and the standard library.
"""

import os
import secrets
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

HEADER_BYTES = 128  # room for any number of rows, and a multiple of the size of a number


class VectorFile:
    """Write vectors to a file as they come. It appears under its name when the block ends, whole or not at all.

    Args:
        path: the file, in NumPy's format (version 1.0): float32 `(count, width)`.
        width: the width d of a vector.
    """

    def __init__(self, path: str | PathLike, width: int) -> None:
        self.path, self.width, self.count = Path(path), width, 0
        self.temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.tmp")

    def __enter__(self) -> "VectorFile":
        self.file: BinaryIO = open(self.temporary, "xb")  # closed in __exit__
        self.file.write(self._header())
        return self

    def write(self, vectors: Tensor) -> None:
        """Append vectors `(n, d)`, float32."""
        self.file.write(vectors.contiguous().numpy().tobytes())
        self.count += len(vectors)

    def __exit__(self, kind: type | None, *error: object) -> None:
        try:
            with self.file:  # closing it writes what is buffered, which fails on a full disk
                if kind is None:
                    self.file.seek(0)
                    self.file.write(self._header())
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if kind is None:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)

    def _header(self) -> bytes:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self.count}, {self.width}), }}"
        size = HEADER_BYTES - 10  # after the magic string, the version and the size itself
        return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.ljust(size - 1).encode() + b"\n"


def map_vectors(path: str | PathLike, count: int, width: int) -> Tensor:
    """Return the vectors `(count, width)` of a `VectorFile`, read from the file when they are used.

    Changes to the tensor stay in memory.

    Args:
        path: the file.
        count: number of vectors.
        width: the width d of a vector.
    """
    header = HEADER_BYTES // 4
    numbers = torch.from_file(os.fspath(path), shared=False, size=header + count * width, dtype=torch.float32)
    return numbers[header:].view(count, width)
