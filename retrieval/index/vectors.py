"""The similarity of a query to passages: up to 100,000 all are compared, and beyond those that faiss finds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from retrieval.index.approximate import import_faiss, is_graph, oversampling, read_approximate, search_parameters

# Vectors that are found at most for each document that is asked for.
MOST = 256
# Where filters leave so few documents for each one that is asked for, all of them are compared: what is looked at may
# have none of them.
FEW = 20


class VectorScores:
    """The similarity of a query's vector to the passages of documents.

    Documents are numbered over all shards.

    Args:
        vectors: of each shard `(p, d)` float32.
        passage_ends: of each shard where the passages of each document end, `(D,)`.
        approximate: folder of an approximate index; None: there is none.
        covered: number of the first shards whose vectors are in it.
        nprobe: how far a search looks: the number of lists, or, in a graph, of candidates.

    Raises:
        UserError: the approximate index is damaged.
    """

    def __init__(
        self,
        vectors: Sequence[np.ndarray],
        passage_ends: Sequence[np.ndarray],
        approximate: Path | None = None,
        covered: int = 0,
        nprobe: int = 0,
    ):
        self.vectors, self.covered, self.nprobe = vectors, covered, nprobe
        self.counts = [np.diff(ends, prepend=0) for ends in passage_ends]
        self.starts = [ends - counts for ends, counts in zip(passage_ends, self.counts, strict=True)]
        self.first_document = np.cumsum([0, *map(len, self.counts)])
        self.approximate: Any = None
        if approximate is not None:
            self.approximate = read_approximate(approximate)
            self.oversampling = oversampling(self.approximate)
            counts = np.concatenate(self.counts[:covered])
            self.document_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
            self.first_row = np.cumsum([0, *map(len, vectors[:covered])])
            self._selected: tuple[np.ndarray | None, Any] = (None, None)
            if self.approximate.ntotal != len(self.document_of):
                raise UserError(
                    f"{approximate}: it holds other vectors than the shards; copy the index again, or build it"
                )

    def _shard_of(self, document: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.first_document, document, side="right")) - 1
        return shard, document - int(self.first_document[shard])

    def of_passages(self, query: np.ndarray, document: int) -> np.ndarray:
        """Return the scores of the passages of a document, `(p,)`.

        Args:
            query: `(d,)`, unit length.
            document: its number.
        """
        shard, place = self._shard_of(document)
        start = self.starts[shard][place]
        return self.vectors[shard][start : start + self.counts[shard][place]] @ query

    def of_documents(self, query: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Return the score of the best passage of each document, `(n,)` float32; minus infinity if it has none."""
        best = [self.of_passages(query, int(document)).max(initial=-np.inf) for document in documents]
        return np.array(best, np.float32)

    def best(self, query: np.ndarray, count: int, allowed: np.ndarray) -> np.ndarray:
        """Find the documents that have the passages nearest to a query.

        Args:
            query: `(d,)`, unit length.
            count: how many.
            allowed: which documents count, `(D,)` bool.

        Returns:
            Numbers of at most `count` documents, in no order.
        """
        scores = [self._exact(query, shard) for shard in range(self.covered, len(self.vectors))]
        numbers = np.arange(self.first_document[self.covered], len(allowed))
        found = np.concatenate([*scores, np.zeros(0, np.float32)])
        if self.approximate is not None:
            listed, similarity = self._approximately(query, count, allowed)
            numbers, found = np.concatenate([listed, numbers]), np.concatenate([similarity, found])
        usable = allowed[numbers] & np.isfinite(found)
        numbers, found = numbers[usable], found[usable]
        return numbers[np.argpartition(-found, count)[:count]] if len(numbers) > count else numbers

    def _exact(self, query: np.ndarray, shard: int) -> np.ndarray:
        """Return the score of the best passage of each document of a shard; minus infinity if it has none."""
        best = np.full(len(self.counts[shard]), -np.inf, np.float32)
        filled = self.counts[shard] > 0
        if filled.any():
            best[filled] = np.maximum.reduceat(self.vectors[shard] @ query, self.starts[shard][filled])
        return best

    def _approximately(self, query: np.ndarray, count: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find documents with the approximate index.

        Returns:
            Numbers of documents, `count` of them or all that it finds, and the score of the best of their passages that
            it finds.
        """
        covered = allowed[: self.first_document[self.covered]]
        left = int(np.count_nonzero(covered))
        if left <= FEW * count:
            numbers = np.flatnonzero(covered)
            return numbers, self.of_documents(query, numbers)
        selector = self._selector(allowed) if left < len(covered) else None
        wanted = self.oversampling * count
        while True:
            look = self.nprobe
            if is_graph(self.approximate):  # it looks at passages that do not count as well
                look = max(look, wanted) * len(covered) // left
            parameters = search_parameters(self.approximate, look, selector)
            _, found = self.approximate.search(query[None], min(wanted, len(self.document_of)), params=parameters)
            rows = np.sort(found[0][found[0] >= 0])
            documents, first = np.unique(self.document_of[rows], return_index=True)
            # Many passages may be of one document.
            if len(documents) >= count or len(rows) < wanted or wanted >= MOST * count:
                scores = self._of_rows(query, rows)
                return documents, np.maximum.reduceat(scores, first) if len(rows) else scores
            wanted *= 4

    def _selector(self, allowed: np.ndarray) -> Any:
        """Return faiss's selector of the passages of allowed documents; the last is kept, as of what is deleted."""
        if self._selected[0] is not allowed:
            bits = np.packbits(allowed[self.document_of], bitorder="little")
            self._selected = (allowed, import_faiss().IDSelectorBitmap(bits))
        return self._selected[1]

    def _of_rows(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the scores of passages, `(n,)` float32, by their numbers in ascending order."""
        ends = np.searchsorted(rows, self.first_row[1:])
        inside = np.split(rows, ends[:-1])
        parts = zip(self.vectors, self.first_row, inside, strict=False)
        return np.concatenate([vectors[own - first] @ query for vectors, first, own in parts])
