"""Approximate indexes of many vectors, by faiss: inverted files, and a graph (HNSW).

The metric is the inner product of unit vectors. Vectors are read shard by shard, so that those of all shards are never
in memory together: an inverted file is trained with a sample, filled with one block after the other, and merged on
disk. What an approximate index finds is compared again with the vectors themselves.
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
WAYS = ("lists", "graph")
# Vectors for each list with which the lists are trained; faiss asks for 39 to 256, and the time grows with them.
TRAINING_VECTORS = 64
# Vectors with which the codes are trained.
CODE_VECTORS = 65_536
# Rounds of k-means.
ROUNDS = 10
# Groups of lists that are looked into for the list of a vector; 4 find the nearest list of 98%.
GROUPS = 4
# Neighbours of a vector in the graph.
NEIGHBOURS = 32
# Searches by which `nprobe` is chosen: their recall of the 10 nearest must be at least this, unless twice as many
# lists find hardly more.
TRIALS, TRIAL_K, LEAST_RECALL, LEAST_GAIN = 64, 10, 0.97, 0.005
# Of a trial and the vector it is made of: as far as few questions are from their answers, so that those are found too.
TRIAL_COSINE = 0.4
INDEX, LISTS_DATA = "lists.faiss", "lists.data"


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
            f"token vectors of one bit a dimension, and more than {EXACT_LIMIT:,} passages, need faiss; install the "
            "extra 'search': pip install -e '.[search]'"
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
        lists: number of lists; 0 for `exact` and for a graph.
        reason: why, in a sentence.
    """

    name: str
    lists: int
    reason: str

    @property
    def in_memory(self) -> bool:
        """Whether a search has the whole index in memory; else its lists are memory-mapped."""
        return self.name.endswith("fs") or self.name.startswith("HNSW")


def choose_kind(count: int, width: int, memory: int | None = None, way: str = "lists") -> Kind:
    """Choose how vectors are searched, by their number and by the memory.

    Args:
        count: number of vectors.
        width: d, of a vector.
        memory: bytes that the approximate index may take; None: half of the machine's.
        way: `lists`; or `graph`, which is faster to search, and slow to build and to rebuild.

    Returns:
        The kind, with the reason in a sentence.
    """
    budget = machine_memory() // 2 if memory is None else memory
    vectors = f"{count:,} vectors of {width} dimensions"
    if count <= EXACT_LIMIT:
        return Kind("exact", 0, f"all of the {vectors} are compared, because they are at most {EXACT_LIMIT:,}")
    of_memory = f"the {_gigabytes(budget)} of memory"
    graph = count * (width + 2 * NEIGHBOURS * 4 + 16)
    without = ""
    if way == "graph":
        if graph <= budget:
            reason = f"{vectors} in a graph with 8 bits a dimension take {_gigabytes(graph)} of {of_memory}"
            return Kind(f"HNSW{NEIGHBOURS},SQ8", 0, reason)
        without = f", a graph would take {_gigabytes(graph)}"
    # Between 4 and 16 times the square root, says faiss; the fewer, the faster they are made.
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    # Product quantisation gives 4 bits to 4 dimensions, and RaBitQ 1 bit to each and 8 bytes to the vector.
    bits = -(-width // 8)
    fast = {f"PQ{width // 4}x4fs": bits} if width % 4 == 0 else {"RaBitQfs": bits + 8}
    bytes_of_vector = {"SQ8": width, **fast, "RaBitQ": bits + 8}
    sizes = {name: count * (own + 8) + 4 * width * lists for name, own in bytes_of_vector.items()}
    name = next((name for name, size in sizes.items() if size <= budget), "RaBitQ")
    what = "8 bits a dimension" if name == "SQ8" else "1 bit a dimension"
    fits = f"take {_gigabytes(sizes[name])} of {of_memory}"
    if name != "SQ8":
        fits += f", and 8 bits would take {_gigabytes(sizes['SQ8'])}"
    if sizes[name] > budget:
        fits = f"take {_gigabytes(sizes[name])}, more than {of_memory}, and are read from the disk"
    return Kind(f"IVF{lists},{name}", lists, f"{vectors} in {lists} lists with {what} {fits}{without}")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def build_approximate(folder: Path, shards: Sequence[np.ndarray], kind: Kind, memory: int | None = None) -> int:
    """Write an approximate index of the vectors of some shards.

    Args:
        folder: an empty folder.
        shards: `(n, d)` float32 of each, which may be memory-mapped.
        kind: what `choose_kind` chose.
        memory: bytes that the work may take beside an index that is in memory; None: half of the machine's.

    Returns:
        How far a search must look: the number of lists, or, in a graph, of candidates.
    """
    faiss = import_faiss()
    budget = machine_memory() // 2 if memory is None else memory
    width, count = shards[0].shape[1], sum(map(len, shards))
    rows = max(10_000, budget // (16 * width))  # float32, a quarter of the memory
    random = np.random.default_rng(0)
    index = faiss.index_factory(width, kind.name, faiss.METRIC_INNER_PRODUCT)
    wanted = min(count, rows, max(CODE_VECTORS, TRAINING_VECTORS * kind.lists))
    sample = _take(shards, np.sort(random.choice(count, wanted, replace=False)))
    if kind.lists:
        index.quantizer.add(_train_lists(sample, kind.lists))
    index.train(sample[:: math.ceil(wanted / CODE_VECTORS)])
    del sample
    _fill(index, folder, shards, kind, rows)
    faiss.write_index(index, str(folder / INDEX))
    return _choose_nprobe(index, shards, kind, random)


def _train_lists(sample: np.ndarray, lists: int) -> np.ndarray:
    """Return the centres of the lists, `(lists, d)`, of unit length: a longer one would attract more than its own.

    k-means has two levels: first as many clusters as the root of their number, then the clusters within each. For
    4,096 lists that is a thirtieth of the work of one level, and hardly worse.
    """
    clusters = _k_means(sample, max(1, math.isqrt(lists)))
    nearest_cluster = clusters.assign(sample)[1]
    ends = np.cumsum(np.bincount(nearest_cluster, minlength=clusters.k)) * lists // len(sample)
    shares = np.diff(ends, prepend=0)  # of each cluster, by its size: at most one list a vector
    centres = [
        _k_means(sample[nearest_cluster == cluster], int(share)).centroids
        for cluster, share in enumerate(shares)
        if share
    ]
    return np.concatenate(centres)


def _k_means(vectors: np.ndarray, count: int) -> Any:
    """Return faiss's k-means of vectors of unit length, with centres of unit length."""
    faiss = import_faiss()
    found = faiss.Kmeans(vectors.shape[1], count, niter=ROUNDS, spherical=True, min_points_per_centroid=1)
    found.train(vectors)
    return found


def _fill(index: Any, folder: Path, shards: Sequence[np.ndarray], kind: Kind, rows: int) -> None:
    """Add the vectors of all shards to a trained index, so many rows at a time.

    The lists of each block are written, and merged on disk, unless a search has them in memory.
    """
    faiss = import_faiss()
    blocks: list[str] = []
    groups = _groups_of_lists(index) if kind.lists else None
    first = 0
    for vectors in shards:
        for start in range(0, len(vectors), rows):
            block = np.ascontiguousarray(vectors[start : start + rows])
            if groups is None:
                index.add(block)  # a graph numbers its vectors itself
            else:
                every, index.quantizer = index.quantizer, groups
                try:
                    index.add_with_ids(block, np.arange(first, first + len(block)))
                finally:
                    index.quantizer = every
            first += len(block)
            if not kind.in_memory:
                blocks.append(str(folder / f"block-{len(blocks)}"))
                faiss.write_index(index, blocks[-1])
                index.reset()
    if not kind.in_memory:
        with printing_to_stderr():
            faiss.contrib.ondisk.merge_ondisk(index, blocks, str(folder / LISTS_DATA))
        for path in blocks:
            Path(path).unlink()


def _groups_of_lists(index: Any) -> Any:
    """Return what finds the list of a vector among the nearest groups of lists instead of among all lists.

    It is several times as fast, and a vector whose list is not quite the nearest is found nearly as well. A search
    compares a query with all lists.
    """
    faiss = import_faiss()
    centres = index.quantizer.reconstruct_n(0, index.nlist)
    count = max(1, math.isqrt(len(centres)))
    groups = faiss.index_factory(index.d, f"IVF{count},Flat", faiss.METRIC_INNER_PRODUCT)
    groups.cp.min_points_per_centroid = 1
    groups.train(centres)
    groups.add(centres)
    groups.make_direct_map()  # by which codes of differences find the centre of a list
    groups.nprobe = GROUPS
    return groups


def _take(shards: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Return some rows, in ascending order, of the vectors of all shards."""
    first, taken = 0, []
    for vectors in shards:
        inside = rows[(rows >= first) & (rows < first + len(vectors))]
        taken.append(vectors[inside - first])
        first += len(vectors)
    return np.concatenate(taken)


def nearest(queries: np.ndarray, shards: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Compare queries with all vectors.

    Args:
        queries: `(n, d)`, unit length.
        shards: vectors `(m, d)` of each.
        count: how many vectors are wanted.

    Returns:
        Numbers of the vectors nearest to each query over all shards, `(n, count)`, best first.
    """
    best = np.full((len(queries), 0), -np.inf, np.float32)
    numbers = np.zeros((len(queries), 0), np.int64)
    first = 0
    for vectors in shards:
        for start in range(0, len(vectors), 1 << 14):
            scores = queries @ vectors[start : start + (1 << 14)].T
            if scores.shape[1] > count:
                places = np.argpartition(-scores, count, axis=1)[:, :count]
            else:
                places = np.tile(np.arange(scores.shape[1]), (len(queries), 1))
            best = np.concatenate([best, np.take_along_axis(scores, places, 1)], 1)
            numbers = np.concatenate([numbers, places + first + start], 1)
            order = np.argsort(-best, axis=1)[:, :count]
            best, numbers = np.take_along_axis(best, order, 1), np.take_along_axis(numbers, order, 1)
        first += len(vectors)
    return numbers


def _choose_nprobe(index: Any, shards: Sequence[np.ndarray], kind: Kind, random: np.random.Generator) -> int:
    """Return the smallest power of two at which the index finds nearly all of the nearest vectors.

    The trials are vectors of the index, each moved so far in a random direction that its cosine to the vector is
    `TRIAL_COSINE`.
    """
    count = sum(map(len, shards))
    trials = _take(shards, np.sort(random.choice(count, min(count, TRIALS), replace=False)))
    noise = random.standard_normal(trials.shape).astype(np.float32)
    noise *= math.sqrt(1 / TRIAL_COSINE**2 - 1) / np.linalg.norm(noise, axis=1, keepdims=True)
    trials = trials + noise
    trials /= np.linalg.norm(trials, axis=1, keepdims=True)
    expected = nearest(trials, shards, TRIAL_K)
    wanted = oversampling(index) * TRIAL_K
    # A graph has at least as many candidates as are wanted.
    most, nprobe = (kind.lists, 1) if kind.lists else (count, 2 ** math.ceil(math.log2(wanted)))
    before = 0.0
    while nprobe < most:
        # As a search does, which compares what it finds again with the vectors themselves.
        _, found = index.search(trials, wanted, params=search_parameters(index, nprobe))
        recall = sum(len(np.intersect1d(a, b)) for a, b in zip(found, expected, strict=True)) / expected.size
        if recall >= LEAST_RECALL:
            break
        if 0 < recall <= before + LEAST_GAIN:
            return nprobe // 2
        nprobe, before = 2 * nprobe, recall
    return min(nprobe, most)


def is_graph(index: Any) -> bool:
    """Return whether an index is a graph (HNSW) instead of an inverted file."""
    return isinstance(index, import_faiss().IndexHNSW)


def oversampling(index: Any) -> int:
    """Return how many vectors must be found for each one that is asked for: short codes mistake more of them."""
    faiss = import_faiss()
    return 16 if isinstance(index, (faiss.IndexIVFRaBitQ, faiss.IndexIVFFastScan)) else 4


def search_parameters(index: Any, nprobe: int, selector: Any = None) -> Any:
    """Return faiss's parameters of a search.

    Args:
        index: an inverted file or a graph.
        nprobe: how far a search looks.
        selector: of the vectors that count; None: all.
    """
    faiss = import_faiss()
    options = {} if selector is None else {"sel": selector}
    if is_graph(index):
        return faiss.SearchParametersHNSW(efSearch=nprobe, **options)
    return faiss.SearchParametersIVF(nprobe=nprobe, **options)


def read_approximate(folder: Path) -> Any:
    """Read an approximate index; what it holds of a vector stays on disk, memory-mapped, unless it is of fast scan.

    Raises:
        UserError: it is damaged.
    """
    faiss = import_faiss()
    path = folder / INDEX
    flags = faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR
    with reading(f"{folder}", folder), printing_to_stderr():
        if not (folder / LISTS_DATA).exists():
            flags |= faiss.IO_FLAG_MMAP_IFC
        return faiss.read_index(str(path), flags)
