"""Rank documents for queries with any encoder, by MaxSim or with BM25, to mine hard negatives."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from common.bm25 import BM25Index
from common.encoders.encoder import Encoder
from common.encoders.kept_tokens import KeptTokens, TokenEncoder, packed, query_vectors
from common.encoders.model_spec import ModelSpec
from common.encoders.text_vectors import stream, vectors_of
from common.encoders.token_settings import TokenSettings
from common.encoders.token_store import TokenStore
from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from common.provenance import device_kind
from modeling_longembed.output_maxsim_longembed import maxsim

NOT_FINITE = "the model gives vectors that are NaN or infinite; in float32 (--precision) it may not"
_QUERIES_AT_ONCE = 1024


class Ranker(Protocol):
    """Scores of documents for queries; both are given by their places in what the ranker was built from."""

    def nearest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest documents of each query.

        Args:
            k: number of documents per query.

        Returns:
            Scores, float32, and documents, int64, both `(queries, k)`, the nearest first; -inf and -1 where there are
            no more.
        """

    def scores(self, query: int, documents: np.ndarray) -> np.ndarray:
        """Return the scores of `n` documents for one query, float32 `(n,)`."""


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
    """Build a ranker: encode all texts with a model, or index their words.

    Args:
        spec: the model.
        queries: at least one text; any sequence, also a column of a table on disk.
        documents: the same for the texts to rank.
        cache: where vectors are read and stored, so that an interrupted run continues there.
        batch_tokens: token budget of a forward pass.
        trust_remote_code: run code from the folder of the model.
        index: see `VectorRanker`.

    Returns:
        The ranker.

    Raises:
        UserError: faiss is not installed, the model does not load, its vectors are not finite, or nothing is mined with
            this kind of scores.
    """
    if spec.hybrid is not None:
        raise UserError(
            "hybrid:MODEL:W: a margin between scores that are scaled for each query means nothing; give the model "
            "alone, and --add_bm25 with --sampling random for the documents that BM25 finds"
        )
    if spec.kind == "chunks":
        raise UserError("@chunks:N mines no negatives; give the model alone, chunk-max:PATH:N or PATH@tokens")
    if spec.kind == "bm25":
        return WordRanker(queries, documents)
    if spec.kind == "tokens":
        assert spec.token_settings is not None
        tokens = spec.load_token_encoder(batch_tokens, trust_remote_code)
        store = TokenStore(f"{cache.path}.tokens")
        return TokenRanker(tokens, spec.token_settings, queries, documents, cache, store)
    _faiss()  # a missing faiss is an error before the texts are encoded, not after
    encoder = spec.load_encoder(batch_tokens, trust_remote_code)
    return VectorRanker(encoder, queries, documents, cache, every_row=spec.kind == "chunk-max", index=index)


class VectorRanker:
    """Rank by cosine, or by dot product if the model was trained for that.

    Args:
        encoder: the model.
        queries: the queries.
        documents: the texts to rank.
        cache: where vectors are read and stored.
        every_row: the score of a document is that of its best row (MaxP, Dai and Callan 2019, arXiv:1905.09217);
            otherwise it has one vector, the sum of its rows.
        index: `flat` is exact; `hnsw` is approximate, and faster from some 100,000 vectors on (Malkov and Yashunin
            2018, arXiv:1603.09320).

    Raises:
        UserError: the vectors are not finite.
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
        # The length of a chunk's row is its number of tokens and has no meaning: `every_row` always ranks by cosine.
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
        """Find the nearest documents of each query; see `Ranker`."""
        scores = np.full((len(self._queries), k), -np.inf, np.float32)
        documents = np.full((len(self._queries), k), -1, np.int64)
        for start in range(0, len(self._queries), _QUERIES_AT_ONCE):
            found = self._nearest(self._queries[start : start + _QUERIES_AT_ONCE], k)
            for query, (near, owners) in enumerate(found, start=start):
                scores[query, : len(near)], documents[query, : len(near)] = near, owners
        return scores, documents

    def scores(self, query: int, documents: np.ndarray) -> np.ndarray:
        """Return the scores of documents for one query; see `Ranker`."""
        first, counts = self._rows[documents].T
        ends = np.cumsum(counts)
        rows = np.arange(ends[-1]) + np.repeat(first - (ends - counts), counts)
        return np.maximum.reduceat(self._index.reconstruct_batch(rows) @ self._queries[query], ends - counts)

    def _nearest(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return scores and documents of each query, `k` or as many as there are."""
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
            raise UserError(NOT_FINITE)
        if self._by_dot:
            return vectors
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)


class WordRanker:
    """Rank by BM25.

    Args:
        queries: the queries.
        documents: the texts to rank.
    """

    def __init__(self, queries: Sequence[str], documents: Sequence[str]):
        self._queries, self._documents = queries, len(documents)
        self._index = BM25Index(documents)

    def nearest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest documents of each query; see `Ranker`."""
        scores, documents = self._index.search(list(self._queries), k)
        missing = ((0, 0), (0, k - scores.shape[1]))
        return np.pad(scores, missing, constant_values=-np.inf), np.pad(documents, missing, constant_values=-1)

    def scores(self, query: int, documents: np.ndarray) -> np.ndarray:
        """Return the scores of documents for one query; see `Ranker`."""
        return self._index.scores(self._queries[query])[documents]


class TokenRanker:
    """Rank by MaxSim of token vectors (Khattab and Zaharia 2020, arXiv:2004.12832).

    The token vectors of the documents are on disk, and a window of them at a time in memory; those of the queries are
    in memory.

    Args:
        encoder: gives one row for each token.
        settings: what is kept of documents, and whether queries are weighted.
        queries: the queries.
        documents: the texts to rank.
        cache: where the vectors of queries are read and stored.
        store: the same of documents.

    Raises:
        UserError: the encoder's vectors have fewer dimensions than the settings ask for; when it ranks, they are not
            finite.
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        settings: TokenSettings,
        queries: Sequence[str],
        documents: Sequence[str],
        cache: VectorCache,
        store: TokenStore,
    ):
        self._kept = KeptTokens(encoder, settings, store)
        self._mean = encoder.similarity_fn_name == "meanmaxsim"
        self._queries = query_vectors(queries, encoder, settings, cache)
        self._windows: list[list[int]] = []
        self._keys = [b""] * len(documents)
        for window, keys in self._kept.windows(documents):
            self._windows.append(window)
            for document, key in zip(window, keys, strict=True):
                self._keys[document] = key

    def nearest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest documents of each query; see `Ranker`."""
        best = torch.full((len(self._queries), k), -torch.inf)
        found = torch.full((len(self._queries), k), -1)
        queries = self._to_device(self._queries)
        for window in self._windows:
            scores = torch.cat([best, self._scores(queries, window)], dim=1)
            numbers = torch.cat([found, torch.tensor(window).expand(len(scores), -1)], dim=1)
            best, order = scores.topk(k, dim=1)
            found = numbers.gather(1, order)
        return best.numpy(), found.numpy()

    def scores(self, query: int, documents: np.ndarray) -> np.ndarray:
        """Return the scores of documents for one query; see `Ranker`."""
        queries = self._to_device([self._queries[query]])
        rows = [self._scores(queries, [document]) for document in documents.tolist()]
        return torch.cat(rows, dim=1)[0].numpy()

    def _scores(self, queries: tuple[torch.Tensor, torch.Tensor], documents: Sequence[int]) -> torch.Tensor:
        """Return the scores of packed queries and documents, given by their places."""
        vectors = self._to_device([self._kept.vectors(self._keys[document]) for document in documents])
        if not all(side[0].isfinite().all() for side in (queries, vectors)):  # the nearest would be any
            raise UserError(NOT_FINITE)
        return maxsim(*queries, *vectors, mean=self._mean).cpu()

    def _to_device(self, matrices: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return matrices `(n, k)` below one another, and their cumulative lengths, where MaxSim is computed."""
        vectors, ends = packed(matrices)
        return vectors.to(device_kind()), ends.to(device_kind())


class RankerWithWords:
    """Find the nearest documents of another ranker and those of BM25 by turns, in the order of the other's scores.

    Args:
        ranker: gives the scores.
        words: BM25 over the same texts.
        own: for each query the documents that are no candidates; the others are taken by turns.
        candidates: how many others of each query are found.
    """

    def __init__(self, ranker: Ranker, words: Ranker, own: Sequence[Collection[int]], candidates: int):
        self._ranker, self._words, self._own, self._candidates = ranker, words, own, candidates

    def nearest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest documents of each query; see `Ranker`.

        Args:
            k: number of documents per query of each of the two, at least that of `candidates` and all of `own`.

        Returns:
            See `Ranker`: the `candidates`, and of `own` those that one of the two has found.
        """
        of_ranker, of_words = self._ranker.nearest(k), self._words.nearest(k)[1]
        scores, documents = np.full(of_words.shape, -np.inf, np.float32), np.full(of_words.shape, -1, np.int64)
        for query, (known, by_ranker, by_words) in enumerate(zip(*of_ranker, of_words, strict=True)):
            by_turns = np.stack([by_ranker, by_words], axis=1).ravel()
            found = np.array(list(dict.fromkeys(by_turns[by_turns >= 0].tolist())), np.int64)
            is_other = ~np.isin(found, list(self._own[query]))
            found = found[~is_other | (is_other.cumsum() <= self._candidates)]
            score_of = dict(zip(by_ranker.tolist(), known, strict=True))
            unknown = np.array([document for document in found.tolist() if document not in score_of], np.int64)
            if len(unknown):
                score_of |= zip(unknown.tolist(), self._ranker.scores(query, unknown), strict=True)
            near = np.array([score_of[document] for document in found.tolist()], np.float32)
            order = np.argsort(-near, kind="stable")
            scores[query, : len(found)], documents[query, : len(found)] = near[order], found[order]
        return scores, documents

    def scores(self, query: int, documents: np.ndarray) -> np.ndarray:
        """Return the scores of documents for one query; see `Ranker`."""
        return self._ranker.scores(query, documents)


def _new_index(kind: str, dimension: int) -> Any:
    faiss = _faiss()
    if kind == "flat":
        return faiss.IndexFlatIP(dimension)
    # The metric has to be given: faiss's default is the Euclidean distance, which ranks vectors of unequal lengths
    # differently.
    index = faiss.IndexHNSWFlat(dimension, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 200, 256
    return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("mining needs faiss, which is not installed: pip install -e '.[search]'") from None
    return faiss
