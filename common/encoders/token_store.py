"""Token vectors of documents on disk: a file a document, memory-mapped when it is read.

A document of 32,768 tokens has 25 MB of vectors, and a few hundred of them do not fit in memory.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from common.errors import UserError
from common.files import atomic_write


class TokenStore:
    """A folder that maps a key (bytes) to the token vectors of a document, as they are kept.

    A file is written whole or not at all, so that a process that is killed loses only what it was computing.

    Args:
        folder: the folder; it is created with its first file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, key: bytes) -> Path:
        """Return the file of a key, whether it exists or not; a folder for each first byte keeps listings short."""
        name = key.hex()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def __contains__(self, key: bytes) -> bool:
        return self.path(key).is_file()

    def get(self, key: bytes) -> dict[str, np.ndarray]:
        """Return the arrays of a document.

        Raises:
            UserError: the file is damaged, or has been removed.
        """
        try:
            return load_file(self.path(key))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read {self.path(key)}, the token vectors of a document ({error}); delete it, and the same "
                "command computes it again"
            ) from None

    def put(self, key: bytes, arrays: dict[str, np.ndarray]) -> None:
        """Write the arrays of a document, all of them or none."""
        atomic_write(self.path(key), save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
