"""Documents as the vectors of their tokens, made smaller as the settings say, and kept on disk."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from common.encoders.text_vectors import CHARACTERS_PER_TOKEN, TextEncoder, cache_keys, stream
from common.encoders.token_settings import TokenSettings
from common.encoders.token_store import TokenStore
from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from common.provenance import code_hash
from modeling_longembed.encoding_longembed import budget_batches
from modeling_longembed.output_token_codes_longembed import TokenCodec
from modeling_longembed.output_token_pooling_longembed import pool_tokens
from modeling_longembed.output_tokens_longembed import truncate_tokens

ALL = TokenSettings()  # the vectors that all other settings are derived from: every token in float16
# What codes are fitted to: at most so many vectors of each of so many documents, at equal distances.
SAMPLE_DOCUMENTS, SAMPLE_VECTORS = 32, 1024
UNFITTED = ("float32", "float16")  # precisions whose codes do not depend on other documents
_CODE = ("common.encoders.kept_tokens", "modeling_longembed.output_tokens_longembed")
_SMALLER = ("modeling_longembed.output_token_pooling_longembed", "modeling_longembed.output_token_codes_longembed")
# The code that decides the scores of token vectors, beside the encoder's.
SCORES_CODE = (
    *_CODE,
    *_SMALLER,
    "common.encoders.token_settings",
    "common.encoders.token_store",
    "modeling_longembed.encoding_longembed",
    "modeling_longembed.output_maxsim_longembed",
)


class TokenEncoder(TextEncoder, Protocol):
    """The interface of everything that turns texts into a vector a token."""

    @property
    def similarity_fn_name(self) -> str:
        """`maxsim`, or `meanmaxsim`, which is divided by the number of tokens of the query."""

    @property
    def is_ordered(self) -> bool:
        """Whether the dimensions of a vector are in the order of their importance."""

    def check_dim(self, dim: int) -> None:
        """Raise a `UserError` if the first `dim` dimensions of a vector cannot stand for all of them."""


class KeptTokens:
    """Compute the vectors of documents where they are missing in a store, and read them from there.

    Everything is made of the vectors of all tokens in float16, so that it does not matter what was in the store before.
    Codes that need it are fitted to the documents themselves, as an index of them would be.

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
        # Dimensions in the order of their importance vary the less the later they come; rotated, all vary alike.
        rotate = settings.precision == "binary" and encoder.is_ordered
        self.codec = TokenCodec(settings.precision, rotate=rotate, dim=settings.dim or encoder.dimension)

    def windows(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[bytes]]]:
        """Compute what is missing, window by window, longest texts first.

        Args:
            texts: any sequence, also a column of a table on disk.

        Yields:
            Indices into `texts`, and their keys, which are now in the store; each text comes once.
        """
        fitted = self._fit(texts)
        first, sizes = self._keys(texts, ALL), [len(text) for text in texts]
        keys = first if self.settings.storage == ALL.storage else self._keys(texts, self.settings, fitted)
        with tqdm(total=sum(sizes), desc="documents", unit="char", unit_scale=True) as progress:
            for window in budget_batches(sizes, CHARACTERS_PER_TOKEN * self.encoder.batch_tokens):
                missing = {keys[i]: i for i in window if keys[i] not in self.store}
                unread = [i for i in missing.values() if not self._is_derived(first[i])]
                new = self.encoder([texts[i] for i in unread], "document") if unread else []
                matrices = dict(zip(unread, new, strict=True))
                for key, i in missing.items():
                    found = matrices.pop(i) if i in matrices else self.store.get(first[i])["codes"]
                    self.store.put(key, {"codes": self.codec.encode(self._smaller(found)).numpy()})
                yield window, [keys[i] for i in window]
                progress.update(sum(sizes[i] for i in window))

    def vectors(self, key: bytes) -> np.ndarray:
        """Return the vectors of a document from the store, float32 `(vectors, k)`."""
        return self.codec.decode(torch.from_numpy(self.store.get(key)["codes"])).numpy()

    @property
    def bytes_per_vector(self) -> int:
        """The bytes that a vector of a document takes."""
        return self.codec.bytes_per_vector

    def _keys(self, texts: Sequence[str], settings: TokenSettings, fitted: str = "") -> list[bytes]:
        """Return the key of each text: a hash of all that its kept vectors depend on."""
        code = _CODE if settings.storage == ALL.storage else (*_CODE, *_SMALLER)
        return cache_keys(texts, self.encoder, "document", f"{settings.storage}:{fitted}:{code_hash(*code)}")

    def _is_derived(self, first_key: bytes) -> bool:
        return self.settings.precision != "float32" and first_key in self.store

    def _smaller(self, vectors: np.ndarray) -> torch.Tensor:
        """Return float32 vectors with fewer dimensions, and fewer of them, as the settings say."""
        if self.settings.precision != "float32":
            vectors = vectors.astype(np.float16)
        smaller = torch.from_numpy(truncated(vectors.astype(np.float32), self.settings.dim))
        return pool_tokens(smaller, self.settings.pool)[0]

    def _fit(self, texts: Sequence[str]) -> str:
        """Fit the codec, if its codes depend on the documents, to a sample, which is put into the store.

        What it has learned is in the store too, so that codes are always read with what they were made with.

        Returns:
            A hash of what it was fitted to; empty if it was not.

        Raises:
            UserError: no document of the sample has a token.
        """
        if self.settings.precision in UNFITTED:
            return ""
        count = min(SAMPLE_DOCUMENTS, len(texts))
        places = [place * len(texts) // count for place in range(count)]
        keys = dict(zip(self._keys([texts[place] for place in places], ALL), places, strict=True))
        fitted = hashlib.sha256(b"".join(keys)).hexdigest()  # centroids depend on the order of the sample
        (tables_key,) = self._keys([""], self.settings, f"tables of {fitted}")
        if tables_key not in self.store:
            self.store.put(tables_key, {name: table.numpy() for name, table in self._tables(texts, keys).items()})
        tables = {name: torch.from_numpy(table) for name, table in self.store.get(tables_key).items()}
        self.codec = TokenCodec.from_state({"kind": self.codec.kind, "dim": self.codec.dim, **tables})
        return fitted

    def _tables(self, texts: Sequence[str], keys: Mapping[bytes, int]) -> dict[str, torch.Tensor]:
        """Return the tables of the codec, fitted to the documents with these keys at these places."""
        sample = []
        for key, place in tqdm(keys.items(), desc=f"sample for {self.settings.precision}", unit="text"):
            if key not in self.store:
                (vectors,) = self.encoder([texts[place]], "document")
                self.store.put(key, {"codes": vectors.astype(np.float16)})
            smaller = self._smaller(self.store.get(key)["codes"])
            sample.append(smaller[:: max(1, -(-len(smaller) // SAMPLE_VECTORS))])
        if not any(map(len, sample)):
            raise UserError(
                f"precision={self.settings.precision} is fitted to {len(sample)} of the documents, and none of them "
                "has a token; use float16"
            )
        return self.codec.fit(torch.cat(sample)).tables


def query_vectors(
    queries: Sequence[str], encoder: TokenEncoder, settings: TokenSettings, cache: VectorCache
) -> list[np.ndarray]:
    """Return the vectors of each query as the settings say, float32 `(tokens, k)`, from the cache where they are there.

    Args:
        queries: any sequence of texts.
        encoder: gives a matrix `(tokens, k)` for each text.
        settings: the number of dimensions, and whether tokens are weighted.
        cache: where the encoder's vectors are read and stored.
    """
    found: list[np.ndarray] = [np.empty(0)] * len(queries)
    for window, matrices in stream(queries, encoder, "query", cache, "queries"):
        for query, matrix in zip(window, matrices, strict=True):
            if not len(matrix):  # the cache does not know the width of a matrix without rows
                matrix = np.empty((0, encoder.dimension), np.float32)
            vectors = truncated(matrix, settings.dim)
            if not settings.weights:
                vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
            found[query] = vectors
    return found


def packed(matrices: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matrices `(n, k)` below one another, `(sum of n, k)`, and their cumulative lengths."""
    return torch.from_numpy(np.concatenate(matrices)), torch.tensor([0, *map(len, matrices)]).cumsum(0)


def truncated(vectors: np.ndarray, dim: int | None) -> np.ndarray:
    """Return the first `dim` dimensions of token vectors `(n, k)`, with the lengths that the vectors had; None: all."""
    # A copy, because those of a cache cannot be written to, which torch warns of.
    return vectors if dim is None else truncate_tokens(torch.tensor(vectors), dim).numpy()
