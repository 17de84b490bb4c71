"""Vectors of passages: all are compared up to 100,000, and beyond that some lists of an inverted file of faiss (IVF).

The metric is the inner product of unit vectors. The lists are on disk and memory-mapped: they are trained with a
sample, filled shard by shard, and merged on disk, so that the memory of all vectors is never needed. What they find is
compared again with the vectors themselves, which the shards hold.
"""

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, reading
from common.memory import machine_memory

# Vectors that are compared with a query one by one, in some 10 ms.
EXACT_LIMIT = 100_000
# Vectors for each list with which the lists are trained; faiss asks for 39 to 256, and the time grows with them.
TRAINING_VECTORS = 64
# Searches by which `nprobe` is chosen: their recall of the 10 nearest must be at least this.
TRIALS, TRIAL_K, LEAST_RECALL = 64, 10, 0.97
# Vectors that are found for each document that is asked for, at first and at most.
FEWEST, MOST = 4, 256
# Where filters leave so few documents for each one that is asked for, all of them are compared: the lists that a search
# reads may have none of them.
FEW = 20
LISTS = "lists.faiss"


def import_faiss() -> Any:
    """Import faiss.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
        import faiss.contrib.ondisk
    except ImportError:
        raise UserError(
            f"an index of more than {EXACT_LIMIT} passages needs faiss; install the extra 'search': pip install "
            "-e '.[search]'"
        ) from None
    return faiss


@contextmanager
def printing_to_stderr() -> Iterator[None]:
    """Send what C code prints in the block to stderr: faiss says where its files are, among what a script answers."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


@dataclass(frozen=True)
class Kind:
    """How vectors are searched.

    Args:
        name: `exact`, or faiss's name of the index.
        lists: number of lists; 0 for `exact`.
        reason: why, in a sentence.
    """

    name: str
    lists: int
    reason: str


def choose_kind(count: int, width: int, memory: int | None = None) -> Kind:
    """Choose how vectors are searched, by their number and by the memory.

    Args:
        count: number of vectors.
        width: d, of a vector.
        memory: bytes that the vectors of the lists may take; None: half of the machine's.

    Returns:
        The kind, with the reason in a sentence.
    """
    budget = machine_memory() // 2 if memory is None else memory
    vectors = f"{count:,} vectors of {width} dimensions"
    if count <= EXACT_LIMIT:
        return Kind("exact", 0, f"all of the {vectors} are compared, because they are at most {EXACT_LIMIT:,}")
    # Between 4 and 16 times the square root, says faiss; the fewer, the faster they are made.
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    sizes = {
        name: count * (bytes_of_vector + 8) + 4 * width * lists
        for name, bytes_of_vector in (("SQ8", width), ("RaBitQ", width // 8 + 8))
    }
    name = "SQ8" if sizes["SQ8"] <= budget else "RaBitQ"
    what = {"SQ8": "8 bits a dimension", "RaBitQ": "1 bit a dimension"}
    of_memory = f"the {_gigabytes(budget)} of memory"
    fits = f"take {_gigabytes(sizes[name])} of {of_memory}"
    if name == "RaBitQ":
        fits += f", and 8 bits would take {_gigabytes(sizes['SQ8'])}"
    if sizes[name] > budget:
        fits = f"take {_gigabytes(sizes[name])}, more than {of_memory}, and are read from the disk"
    return Kind(f"IVF{lists},{name}", lists, f"{vectors} in {lists} lists with {what[name]} {fits}")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def build_lists(folder: Path, shards: Sequence[np.ndarray], kind: Kind, memory: int | None = None) -> int:
    """Write an inverted file of the vectors of some shards.

    Args:
        folder: an empty folder.
        shards: `(n, d)` float32 of each, which may be memory-mapped.
        kind: what `choose_kind` chose.
        memory: bytes that the work may take beside the lists; None: half of the machine's.

    Returns:
        The number of lists that a search must read.
    """
    faiss = import_faiss()
    budget = machine_memory() // 2 if memory is None else memory
    width, count = shards[0].shape[1], sum(map(len, shards))
    rows = max(10_000, budget // (16 * width))  # float32, a quarter of the memory
    random = np.random.default_rng(0)
    index = faiss.index_factory(width, kind.name, faiss.METRIC_INNER_PRODUCT)
    sample = _take(
        shards, np.sort(random.choice(count, min(count, rows, TRAINING_VECTORS * kind.lists), replace=False))
    )
    index.train(sample)
    blocks: list[str] = []
    first = 0
    for vectors in shards:
        for start in range(0, len(vectors), rows):
            block = np.ascontiguousarray(vectors[start : start + rows])
            index.add_with_ids(block, np.arange(first, first + len(block)))
            first += len(block)
            blocks.append(str(folder / f"block-{len(blocks)}"))
            faiss.write_index(index, blocks[-1])
            index.reset()
    with printing_to_stderr():
        faiss.contrib.ondisk.merge_ondisk(index, blocks, str(folder / "lists.data"))
    for path in blocks:
        Path(path).unlink()
    faiss.write_index(index, str(folder / LISTS))
    return _choose_nprobe(index, shards, kind.lists, random)


def _take(shards: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Return some rows, in ascending order, of the vectors of all shards."""
    first, taken = 0, []
    for vectors in shards:
        inside = rows[(rows >= first) & (rows < first + len(vectors))]
        taken.append(vectors[inside - first])
        first += len(vectors)
    return np.concatenate(taken)


def _choose_nprobe(index: Any, shards: Sequence[np.ndarray], lists: int, random: np.random.Generator) -> int:
    """Return the smallest power of two at which the lists find nearly all of the nearest vectors.

    The trials are vectors of the index, each moved so far in a random direction that its cosine to the vector is 0.7,
    about as near as a question is to its answer.
    """
    faiss = import_faiss()
    count = sum(map(len, shards))
    trials = _take(shards, np.sort(random.choice(count, min(count, TRIALS), replace=False)))
    noise = random.standard_normal(trials.shape).astype(np.float32)
    trials = trials + noise / np.linalg.norm(noise, axis=1, keepdims=True)
    trials /= np.linalg.norm(trials, axis=1, keepdims=True)
    best = np.full((len(trials), 0), -np.inf, np.float32)
    numbers = np.zeros((len(trials), 0), np.int64)
    first = 0
    for vectors in shards:
        for start in range(0, len(vectors), 1 << 16):
            scores = trials @ vectors[start : start + (1 << 16)].T
            places = np.argsort(-scores, axis=1)[:, :TRIAL_K]
            best = np.concatenate([best, np.take_along_axis(scores, places, 1)], 1)
            numbers = np.concatenate([numbers, places + first + start], 1)
            order = np.argsort(-best, axis=1)[:, :TRIAL_K]
            best, numbers = np.take_along_axis(best, order, 1), np.take_along_axis(numbers, order, 1)
        first += len(vectors)
    nprobe = 1
    while nprobe < lists:
        # As a search does, which compares what it finds again with the vectors themselves.
        _, found = index.search(trials, FEWEST * TRIAL_K, params=faiss.SearchParametersIVF(nprobe=nprobe))
        hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found, numbers, strict=True))
        if hits >= LEAST_RECALL * numbers.size:
            break
        nprobe *= 2
    return min(nprobe, lists)


class VectorScores:
    """The similarity of a query's vector to the passages of documents.

    Documents are numbered over all shards.

    Args:
        vectors: of each shard `(p, d)` float32.
        passage_ends: of each shard where the passages of each document end, `(D,)`.
        lists: folder of an inverted file; None: there is none.
        covered: number of the first shards whose vectors are in it.
        nprobe: number of lists that a search reads.

    Raises:
        UserError: the inverted file is damaged.
    """

    def __init__(
        self,
        vectors: Sequence[np.ndarray],
        passage_ends: Sequence[np.ndarray],
        lists: Path | None = None,
        covered: int = 0,
        nprobe: int = 0,
    ):
        self.vectors, self.covered, self.nprobe = vectors, covered, nprobe
        self.counts = [np.diff(ends, prepend=0) for ends in passage_ends]
        self.starts = [ends - counts for ends, counts in zip(passage_ends, self.counts, strict=True)]
        self.first_document = np.cumsum([0, *map(len, self.counts)])
        self.lists: Any = None
        if lists is not None:
            faiss = import_faiss()
            with reading(f"{lists}", lists), printing_to_stderr():
                flags = faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR
                self.lists = faiss.read_index(str(lists / LISTS), flags)
            counts = np.concatenate(self.counts[:covered])
            self.document_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
            if self.lists.ntotal != len(self.document_of):
                raise UserError(f"{lists}: it holds other vectors than the shards; copy the index again, or build it")

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
        if self.lists is not None:
            listed = self._in_lists(query, count, allowed)
            numbers = np.concatenate([listed, numbers])
            found = np.concatenate([self.of_documents(query, listed), found])
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

    def _in_lists(self, query: np.ndarray, count: int, allowed: np.ndarray) -> np.ndarray:
        """Return the numbers of documents whose passages the lists find: `count` of them, or all that they find."""
        faiss = import_faiss()
        options = {}
        left = np.flatnonzero(allowed[: self.first_document[self.covered]])
        if len(left) <= FEW * count:
            return left
        if len(left) < self.first_document[self.covered]:
            bits = np.packbits(allowed[self.document_of], bitorder="little")
            options["sel"] = faiss.IDSelectorBitmap(bits)
        parameters = faiss.SearchParametersIVF(nprobe=self.nprobe, **options)
        passages = FEWEST * count
        while True:
            _, rows = self.lists.search(query[None], min(passages, len(self.document_of)), params=parameters)
            rows = rows[0][rows[0] >= 0]
            # In the order of their best passages, of which some documents have many.
            documents, first = np.unique(self.document_of[rows], return_index=True)
            if len(documents) >= count or len(rows) < passages or passages >= MOST * count:
                return documents[np.argsort(first)]
            passages *= 4
