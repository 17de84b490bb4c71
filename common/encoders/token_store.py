"""Token vectors of documents on disk: a file a document, memory-mapped when it is read.

A document of 32,768 tokens has 25 MB of vectors, and a few hundred of them do not fit in memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm.auto import tqdm

from common.encoders.text_vectors import CHARACTERS_PER_TOKEN, TextEncoder, cache_keys
from common.encoders.token_settings import TokenSettings
from common.errors import UserError
from common.files import atomic_write
from common.provenance import code_hash
from modeling_longembed.encoding_longembed import budget_batches
from modeling_longembed.output_tokens_longembed import truncate_tokens

_FIRST = TokenSettings()  # of the vectors that other settings are derived from


class TokenEncoder(TextEncoder, Protocol):
    """The interface of everything that turns texts into a vector a token."""

    @property
    def similarity_fn_name(self) -> str:
        """`maxsim`, or `meanmaxsim`, which is divided by the number of tokens of the query."""

    def check_dim(self, dim: int) -> None:
        """Raise a `UserError` if the first `dim` dimensions of a vector cannot stand for all of them."""


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


class KeptTokens:
    """Documents as the vectors of their tokens in a store: computed where they are missing, read one window at a time.

    Args:
        encoder: gives a matrix `(tokens, k)` for each text.
        settings: what is kept of it.
        store: where it is kept.

    Raises:
        UserError: the encoder's vectors cannot be truncated to the dimensions that the settings ask for.
    """

    def __init__(self, encoder: TokenEncoder, settings: TokenSettings, store: TokenStore):
        if settings.dim is not None:
            encoder.check_dim(settings.dim)
        self.encoder, self.settings, self.store = encoder, settings, store

    def keys(self, texts: Sequence[str], settings: TokenSettings | None = None) -> list[bytes]:
        """Return the key of each text: a hash of all that its kept vectors depend on."""
        settings = settings or self.settings
        kept = f"{settings.dim}:{settings.precision}:{code_hash('common.encoders.token_store')}"
        return cache_keys(texts, self.encoder, "document", kept)

    def windows(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[bytes]]]:
        """Compute what is missing, window by window, longest texts first.

        Args:
            texts: any sequence, also a column of a table on disk.

        Yields:
            Indices into `texts`, and their keys, which are now in the store; each text comes once.
        """
        keys, sizes = self.keys(texts), [len(text) for text in texts]
        first_keys = self.keys(texts, _FIRST)
        with tqdm(total=sum(sizes), desc="documents", unit="char", unit_scale=True) as progress:
            for window in budget_batches(sizes, CHARACTERS_PER_TOKEN * self.encoder.batch_tokens):
                missing = {keys[i]: i for i in window if keys[i] not in self.store}
                computed = {i: first_keys[i] for i in missing.values() if not self._derivable(first_keys[i])}
                new = self.encoder([texts[i] for i in computed], "document") if computed else []
                matrices = dict(zip(computed, new, strict=True))
                for key, i in missing.items():
                    found = matrices.pop(i) if i in matrices else self.store.get(first_keys[i])["vectors"]
                    self.store.put(key, self._kept(found))
                yield window, [keys[i] for i in window]
                progress.update(sum(sizes[i] for i in window))

    def _derivable(self, first_key: bytes) -> bool:
        return self.settings.precision != "float32" and first_key in self.store

    def _kept(self, vectors: np.ndarray) -> dict[str, np.ndarray]:
        """Return what is kept of token vectors `(n, k)`.

        All settings but float32 begin with float16, so that it does not matter what was in the store before.
        """
        if self.settings.precision != "float32":
            vectors = vectors.astype(np.float16).astype(np.float32)
        return {"vectors": truncated(vectors, self.settings.dim).astype(self.settings.precision)}

    def vectors(self, key: bytes) -> np.ndarray:
        """Return the vectors of a document from the store, float32 `(tokens, k)`."""
        return self.store.get(key)["vectors"].astype(np.float32)

    def bytes(self, key: bytes) -> int:
        """Return how many bytes a document's vectors take."""
        return sum(array.nbytes for array in self.store.get(key).values())


def truncated(vectors: np.ndarray, dim: int | None) -> np.ndarray:
    """Return the first `dim` dimensions of token vectors `(n, k)`, with the lengths that the vectors had; None: all."""
    # A copy, because those of a cache cannot be written to, which torch warns of.
    return vectors if dim is None else truncate_tokens(torch.tensor(vectors), dim).numpy()
