"""Which documents are near a query, by any encoder or by BM25: what hard negatives are mined with."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from common.bm25 import BM25Index
from common.encoders import Encoder
from common.errors import UserError
from common.model_spec import ModelSpec
from common.text_vectors import stream, vectors_of
from common.vector_cache import VectorCache

_QUERIES_AT_ONCE = 1024


class Ranker(Protocol):
    """Scores of documents for queries, both named by their place in the sequences that the ranker was made of."""

    def nearest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest documents of each query, the nearest first.

        Returns:
            Scores, float32, and documents, int64, both `(queries, k)`; -inf and -1 where there are no more.
        """

    def scores(self, query: int, documents: np.ndarray) -> np.ndarray:
        """The scores of `n` documents for one query, float32 `(n,)`."""


def load_ranker(
    spec: ModelSpec,
    queries: Sequence[str],
    documents: Sequence[str],
    cache: VectorCache,
    *,
    batch_tokens: int = 16384,
    trust_remote_code: bool = False,
    index: str = "flat",
) -> Ranker:
    """Read all texts with a model, or count their words.

    Args:
        spec: the model.
        queries, documents: the texts, at least one each; any sequences, also columns of a table on disk.
        cache: where vectors are and go; a killed run goes on there.
        batch_tokens: token budget of a forward pass.
        trust_remote_code: run code that the model's folder brings.
        index: as of `VectorRanker`.

    Raises:
        UserError: faiss is not installed, the model does not load, or gives vectors that are not finite.
    """
    if spec.kind == "bm25":
        return WordRanker(queries, documents)
    _faiss()  # that it is missing is told before the texts are read, not after
    encoder = spec.load_encoder(batch_tokens, trust_remote_code)
    return VectorRanker(encoder, queries, documents, cache, every_row=spec.kind == "chunk-max", index=index)


class VectorRanker:
    """By cosine; by dot product where a model says that it was trained for it.

    Args:
        encoder: what makes vectors.
        queries, documents: the texts.
        cache: where vectors are and go.
        every_row: a document is as near as the nearest of its rows (MaxP, Dai and Callan 2019, arXiv:1905.09217); if
            not, it has one vector, the sum of its rows.
        index: `flat` is exact; `hnsw` is approximate, and faster from some 100,000 vectors on (Malkov and Yashunin
            2018, arXiv:1603.09320).

    Raises:
        UserError: vectors that are not finite.
    """

    def __init__(
        self,
        encoder: Encoder,
        queries: Sequence[str],
        documents: Sequence[str],
        cache: VectorCache,
        *,
        every_row: bool = False,
        index: str = "flat",
    ):
        # The length of a row of a chunk is its number of tokens, and says nothing: `every_row` is always by cosine.
        self._by_dot = encoder.model.similarity_fn_name == "dot" and not every_row
        self._queries = self._prepared(vectors_of(queries, encoder, "query", cache))
        self._index = _new_index(index, encoder.dimension)
        self._rows = np.empty((len(documents), 2), np.int64)  # first row of each document, and how many it has
        owners: list[np.ndarray] = []
        for window, matrices in stream(documents, encoder, "document", cache, "documents"):
            if not every_row:
                matrices = [matrix.sum(0, keepdims=True) for matrix in matrices]
            counts = np.array([len(matrix) for matrix in matrices])
            self._rows[window] = np.stack([self._index.ntotal + np.cumsum(counts) - counts, counts], axis=1)
            self._index.add(self._prepared(np.concatenate(matrices)))
            owners.append(np.repeat(window, counts))
        self._owners = np.concatenate(owners)

    def nearest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Ranker.nearest`."""
        scores = np.full((len(self._queries), k), -np.inf, np.float32)
        documents = np.full((len(self._queries), k), -1, np.int64)
        for start in range(0, len(self._queries), _QUERIES_AT_ONCE):
            found = self._nearest(self._queries[start : start + _QUERIES_AT_ONCE], k)
            for query, (near, owners) in enumerate(found, start=start):
                scores[query, : len(near)], documents[query, : len(near)] = near, owners
        return scores, documents

    def scores(self, query: int, documents: np.ndarray) -> np.ndarray:
        """As `Ranker.scores`."""
        first, counts = self._rows[documents].T
        ends = np.cumsum(counts)
        rows = np.arange(ends[-1]) + np.repeat(first - (ends - counts), counts)
        return np.maximum.reduceat(self._index.reconstruct_batch(rows) @ self._queries[query], ends - counts)

    def _nearest(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores and documents of each query, `k` or as many as there are."""
        depth = min(k, self._index.ntotal)
        while True:
            found = []
            for scores, rows in zip(*self._index.search(queries, depth), strict=True):
                owners = self._owners[rows[rows >= 0]]  # HNSW gives -1 where it finds nothing more
                best = np.sort(np.unique(owners, return_index=True)[1])[:k]  # the nearest row of each document
                found.append((scores[best], owners[best]))
            if depth == self._index.ntotal or all(len(owners) == k for _, owners in found):
                return found
            depth = min(2 * depth, self._index.ntotal)  # rows of the same documents filled it

    def _prepared(self, vectors: np.ndarray) -> np.ndarray:
        vectors = np.ascontiguousarray(vectors, np.float32)
        if not np.isfinite(vectors).all():
            raise UserError("the model gives vectors that are NaN or infinite; in float32 (--precision) it may not")
        if self._by_dot:
            return vectors
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)


class WordRanker:
    """By BM25."""

    def __init__(self, queries: Sequence[str], documents: Sequence[str]):
        self._queries, self._documents = queries, len(documents)
        self._index = BM25Index(documents)

    def nearest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Ranker.nearest`."""
        scores, documents = self._index.search(list(self._queries), k)
        missing = ((0, 0), (0, k - scores.shape[1]))
        return np.pad(scores, missing, constant_values=-np.inf), np.pad(documents, missing, constant_values=-1)

    def scores(self, query: int, documents: np.ndarray) -> np.ndarray:
        """As `Ranker.scores`."""
        return self._index.scores(self._queries[query])[documents]


def _new_index(kind: str, dimension: int) -> Any:
    faiss = _faiss()
    if kind == "flat":
        return faiss.IndexFlatIP(dimension)
    # The metric is given: faiss's default is the Euclidean distance, whose neighbours of vectors that are not of one
    # length are others.
    index = faiss.IndexHNSWFlat(dimension, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 200, 256
    return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("mining needs faiss, which is not installed: pip install -e .[search]") from None
    return faiss
