"""Vectors of many texts, streamed through a cache on disk, so that an interrupted run continues where it stopped."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from tqdm.auto import tqdm

from common.encoders.vector_cache import VectorCache
from modeling_longembed.encoding_longembed import budget_batches

PromptType = Literal["query", "document"]  # the values of MTEB's enum of this name
# Characters in a window of texts per token of a batch: four times those of a token, so that a window holds batches.
CHARACTERS_PER_TOKEN = 16


class TextEncoder(Protocol):
    """The interface of everything that turns texts into vectors."""

    @property
    def identity(self) -> str:
        """A string of the files and settings that the vectors depend on besides the text, its type and the prompts."""

    @property
    def computed_by(self) -> dict[str, str]:
        """What computes the vectors; see `common.provenance`."""

    @property
    def dimension(self) -> int:
        """The width d of a vector."""

    @property
    def prompts(self) -> dict[str, str | None]:
        """The prompts that the model puts in front of texts, by their name."""

    @property
    def batch_tokens(self) -> int:
        """The token budget of a forward pass."""

    def __call__(self, texts: list[str], prompt_type: PromptType | None) -> list[np.ndarray]: ...


def cache_keys(
    texts: Iterable[str], encoder: TextEncoder, prompt_type: PromptType | None, kept: str | None = None
) -> list[bytes]:
    """Return the key in a `VectorCache` of each text: a hash of all that its vectors depend on.

    Args:
        texts: any strings.
        encoder: the encoder that computes the vectors.
        prompt_type: whether the texts are queries or documents; None if they are neither.
        kept: what is made of the vectors before they are stored; None: nothing.
    """
    parts: tuple[Any, ...] = (encoder.identity, encoder.computed_by, prompt_type, encoder.prompts)
    if kept is not None:
        parts += (kept,)
    head = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
    return [hashlib.sha256(head + text.encode()).digest() for text in texts]


def stream(
    texts: Sequence[str], encoder: TextEncoder, prompt_type: PromptType | None, cache: VectorCache, label: str
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Encode texts window by window, longest texts first, so that what does not fit in memory fails at once.

    Args:
        texts: any sequence, also a column of a table on disk: only one window of texts and matrices is in memory.
        encoder: what is called for texts that are not in the cache.
        prompt_type: whether the texts are queries or documents; None if they are neither.
        cache: where finished matrices are read and stored.
        label: the description of the progress bar.

    Yields:
        Indices into `texts` and their matrices, float32 `(k, d)`; each text comes once.
    """
    keys, sizes = cache_keys(texts, encoder, prompt_type), [len(text) for text in texts]
    with tqdm(total=sum(sizes), desc=label, unit="char", unit_scale=True) as progress:
        for window in budget_batches(sizes, CHARACTERS_PER_TOKEN * encoder.batch_tokens):
            matrices = cache.get([keys[i] for i in window])
            missing = {keys[i]: texts[i] for i in window if keys[i] not in matrices}
            if missing:
                new = dict(zip(missing, encoder(list(missing.values()), prompt_type), strict=True))
                cache.put(new)
                matrices |= new
            yield window, [matrices[keys[i]] for i in window]
            progress.update(sum(sizes[i] for i in window))


def vectors_of(
    texts: Sequence[str], encoder: TextEncoder, prompt_type: PromptType | None, cache: VectorCache
) -> np.ndarray:
    """Return one vector per text: the sum of the rows of its matrix, of which only the direction counts.

    Args:
        texts: n texts, as in `stream`.
        encoder: what is called for texts that are not in the cache.
        prompt_type: whether the texts are queries or documents; None if they are neither.
        cache: where finished matrices are read and stored.

    Returns:
        float32 `(n, d)`, in the order of `texts`.
    """
    vectors = np.empty((len(texts), encoder.dimension), np.float32)
    label = "queries" if prompt_type == "query" else "documents"
    for window, matrices in stream(texts, encoder, prompt_type, cache, label):
        vectors[window] = [matrix.sum(0) for matrix in matrices]
    return vectors


def keep(texts: Sequence[str], vectors: np.ndarray, encoder: TextEncoder, cache: VectorCache) -> None:
    """Store one vector of each document as if the encoder had computed it; vectors that are there stay.

    Args:
        texts: n documents.
        vectors: `(n, d)`.
        encoder: whose vectors they are.
        cache: where they are stored.
    """
    keys = cache_keys(texts, encoder, "document")
    known = cache.get(keys)
    cache.put({key: vector[None] for key, vector in zip(keys, vectors, strict=True) if key not in known})
