"""Measure the search of many vectors: memory, time to build, recall and queries a second of each kind of index.

    python experiments/vector_search.py --count 10000000 --output_dir runs/vector-search-10m
    python experiments/vector_search.py --vectors passages.npy --queries queries.npy --output_dir runs/vector-search

The vectors are `(n, d)` arrays of unit length in NumPy files; or, with `--count`, clusters of random vectors, which are
computed when they are read and never stored. Each index is built and searched by what `Index` uses, in a fresh process.
A query is searched as `index.search` does by default: 100 documents are found, here of one passage each, and the ten
best of them are compared with the ten best of all. A killed run goes on with the next index; `results.json` and
`table.md` are written after each.
"""

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from common.memory import resident_memory
from eval.report.markdown import markdown_table
from eval.speed.process import run_module
from retrieval.index.approximate import Kind, build_approximate, choose_kind, nearest
from retrieval.index.vectors import VectorScores

CLUSTERS, TOPICS, DIRECTIONS = 16_384, 256, 16_384
SHARD = 500_000
CANDIDATES, K = 100, 10
FEW_QUERIES = 10  # of those that are compared with all vectors, one by one
KINDS = ("flat", "SQ8", "PQ", "RaBitQ", "HNSW")


@dataclass(kw_only=True)
class Arguments:
    """Options of the script."""

    count: int | None = field(default=None, metadata={"help": "number of random vectors", "within": "[1, inf)"})
    width: int = field(default=384, metadata={"help": "dimensions of random vectors", "within": "[4, inf)"})
    vectors: list[str] = field(default_factory=list, metadata={"help": ".npy files of vectors, instead of --count"})
    queries: str | None = field(default=None, metadata={"help": ".npy file of the vectors of queries for --vectors"})
    most_queries: int = field(default=200, metadata={"help": "number of queries", "within": "[1, inf)"})
    kinds: list[str] = field(
        default_factory=lambda: list(KINDS),
        metadata={
            "help": "flat; SQ8, PQ or RaBitQ, in as many lists as an index makes; HNSW; or a name of faiss such as "
            "IVF100,Flat"
        },
    )
    nprobes: list[int] = field(
        default_factory=list,
        metadata={"help": "numbers of lists to read beside the one that is chosen", "within": "[1, inf)"},
    )
    memory_gb: float = field(default=4, metadata={"help": "memory for the work of building", "within": "(0, inf)"})
    threads: int = field(default=1, metadata={"help": "threads", "within": "[1, inf)"})
    output_dir: str = field(metadata={"help": "folder of the results and of the indexes", "output": "folder"})


class Clusters:
    """Random vectors of unit length in clusters, computed when they are read.

    A vector is the centre of its cluster and two of many random directions, as long together as the centre; which
    ones follows from its number. Centres belong to topics, half of what they are.

    Args:
        count: n, how many.
        width: d.
        first: number of the first among all.
    """

    def __init__(self, count: int, width: int, first: int = 0):
        self.shape, self.first = (count, width), first
        random = np.random.default_rng(0)
        topics, own = _directions(random, TOPICS, width), _directions(random, CLUSTERS, width)
        self.centres = (topics[np.arange(CLUSTERS) % TOPICS] + own) / np.float32(np.sqrt(2))
        self.offsets = [_directions(random, DIRECTIONS, width) / np.float32(np.sqrt(2)) for _ in range(2)]

    def __len__(self) -> int:
        return self.shape[0]

    def part(self, count: int, first: int) -> "Clusters":
        """Return other vectors of the same clusters.

        Args:
            count: how many.
            first: number of the first among all.
        """
        part = object.__new__(Clusters)
        part.__dict__ = self.__dict__ | {"shape": (count, self.shape[1]), "first": first}
        return part

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return some of the vectors, `(n, d)` float32."""
        numbers = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        bits = _mix(numbers.astype(np.uint64) + np.uint64(self.first))
        found = self.centres[bits % np.uint64(CLUSTERS)]
        found += self.offsets[0][(bits >> np.uint64(20)) % np.uint64(DIRECTIONS)]
        found += self.offsets[1][(bits >> np.uint64(40)) % np.uint64(DIRECTIONS)]
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def __matmul__(self, query: np.ndarray) -> np.ndarray:
        """Return the scores of all of the vectors, `(n,)`."""
        return np.concatenate([self[start : start + 16_384] @ query for start in range(0, len(self), 16_384)])

    def queries(self, count: int) -> np.ndarray:
        """Return vectors of the same clusters with directions of their own, `(n, d)` float32.

        Args:
            count: n, how many.
        """
        random = np.random.default_rng(1)
        found = self.centres[random.integers(0, CLUSTERS, count)] + _directions(random, count, self.shape[1])
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def _directions(random: np.random.Generator, count: int, width: int) -> np.ndarray:
    found = random.standard_normal((count, width), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Return 64 random bits for each number (splitmix64, Steele et al. 2014)."""
    bits = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def read_vectors(job: dict[str, Any]) -> tuple[list[Any], np.ndarray]:
    """Return the shards of vectors of a job, and its queries `(q, d)`.

    Args:
        job: the options.
    """
    if job["count"] is not None:
        count, whole = job["count"], Clusters(job["count"], job["width"])
        shards = [whole.part(min(SHARD, count - first), first) for first in range(0, count, SHARD)]
        return shards, whole.queries(job["most_queries"])
    shards = [np.load(path, mmap_mode="r") for path in job["vectors"]]
    queries = np.load(job["queries"]).astype(np.float32)
    queries = queries[np.linspace(0, len(queries) - 1, min(len(queries), job["most_queries"])).astype(int)]
    return shards, queries


@contextmanager
def measuring() -> Iterator[dict[str, float]]:
    """Measure the wall time, the time of the processor, and the peak of the memory that is not of mapped files."""
    found, ended = {"gb": 0.0}, threading.Event()

    def watch() -> None:
        while True:
            found["gb"] = max(found["gb"], resident_memory("RssAnon") / 1e9)
            if ended.wait(0.1):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield found
    finally:
        found["seconds"], found["cpu_seconds"] = time.perf_counter() - wall, time.process_time() - cpu
        ended.set()
        watcher.join()


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Do one part of the work; runs in a fresh process.

    Args:
        job: the options, the `step` (`truth`, `build` or `search`), and for the last two the `name` of the index and
            its number of `lists`.

    Returns:
        What was measured.
    """
    shards, queries = read_vectors(job)
    folder = Path(job["folder"])
    if job["step"] == "truth":
        np.save(folder / "truth.npy", nearest(queries, shards, K))
        return {}
    if job["step"] == "build":
        with measuring() as found:
            kind = Kind(job["name"], job["lists"], "")
            nprobe = build_approximate(folder / "index", shards, kind, int(job["memory_gb"] * 1e9))
        size = sum(path.stat().st_size for path in (folder / "index").iterdir())
        return {**found, "nprobe": nprobe, "bytes": size}
    truth = np.load(folder / "truth.npy")
    ends = [np.arange(len(vectors)) + 1 for vectors in shards]
    every = np.ones(sum(map(len, shards)), bool)
    if job["name"] == "flat":
        few = slice(FEW_QUERIES)
        return {"rows": [_search(VectorScores(shards, ends), queries[few], every, truth[few], 0)]}
    scores = VectorScores(shards, ends, folder / "index", len(shards), job["nprobe"])
    rows = []
    for nprobe in dict.fromkeys([job["nprobe"], *job["nprobes"]]):
        if nprobe <= (job["lists"] or nprobe):
            scores.nprobe = nprobe
            rows.append(_search(scores, queries, every, truth, nprobe))
    return {"rows": rows}


def _search(
    scores: VectorScores, queries: np.ndarray, every: np.ndarray, truth: np.ndarray, nprobe: int
) -> dict[str, float]:
    """Search each query twice, and measure the second time, when files are mapped; return the figures."""
    hits = 0
    for query, expected in zip(queries, truth, strict=True):
        found = scores.best(query, CANDIDATES, every)
        best = found[np.argsort(-scores.of_documents(query, found))[:K]]
        hits += len(np.intersect1d(best, expected))
    with measuring() as measured:
        for query in queries:
            scores.best(query, CANDIDATES, every)
    return {
        "nprobe": nprobe,
        "recall": hits / truth.size,
        "gb": measured["gb"],
        "milliseconds": 1000 * measured["seconds"] / len(queries),
        "cpu_milliseconds": 1000 * measured["cpu_seconds"] / len(queries),
    }


def named(kind: str, count: int, width: int) -> Kind:
    """Return the index that a value of `--kinds` names.

    Args:
        kind: the value.
        count: number of vectors.
        width: d, of a vector.

    Raises:
        UserError: it names none.
    """
    if kind == "flat":
        return Kind("flat", 0, "")
    if kind == "HNSW":
        return Kind("HNSW32,SQ8", 0, "")
    lists = choose_kind(count, width).lists or max(1, round(count**0.5))
    if kind in ("SQ8", "RaBitQ"):
        return Kind(f"IVF{lists},{kind}", lists, "")
    if kind == "PQ":
        return Kind(f"IVF{lists},PQ{width // 4}x4fs", lists, "")
    first = kind.partition(",")[0]
    if not first.startswith("IVF") or not first[3:].isdigit():
        raise UserError(f"--kinds {kind}: give {', '.join(KINDS)}, or a name such as IVF100,Flat")
    return Kind(kind, int(first[3:]), "")


def measure_all(arguments: Arguments) -> list[dict[str, Any]]:
    """Measure each index that has not been measured yet.

    Args:
        arguments: parsed command-line options.

    Returns:
        A record for each index.

    Raises:
        UserError: the options contradict each other, or a measurement failed.
    """
    if (arguments.count is None) == (not arguments.vectors) or bool(arguments.vectors) != bool(arguments.queries):
        raise UserError("give --count, or --vectors with --queries")
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    options = vars(arguments) | {"folder": str(folder.resolve())}
    options |= {"vectors": [str(Path(path).resolve()) for path in arguments.vectors]}
    options |= {"queries": arguments.queries and str(Path(arguments.queries).resolve())}
    shards, queries = read_vectors(options)
    count, width = sum(map(len, shards)), queries.shape[1]
    path = folder / "results.json"
    records: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def step(which: str, **more: Any) -> dict[str, Any]:
        job = options | more | {"step": which}
        label = f"{which} of {more.get('name', 'vectors')}"
        return run_module("experiments.vector_search", job, arguments.threads, label)

    if not (folder / "truth.npy").exists():
        step("truth")
    for kind in (named(value, count, width) for value in arguments.kinds):
        if any(record["name"] == kind.name for record in records):
            continue
        own = {"name": kind.name, "lists": kind.lists}
        record = {**own, "count": count, "width": width, "date": time.strftime("%Y-%m-%d"), "build": None}
        if kind.name != "flat":
            shutil.rmtree(folder / "index", ignore_errors=True)
            (folder / "index").mkdir()
            record["build"] = step("build", **own)
            own["nprobe"] = record["build"]["nprobe"]
        record |= step("search", **own)
        shutil.rmtree(folder / "index", ignore_errors=True)
        records.append(record)
        atomic_write(path, json.dumps(records, indent=1))
        atomic_write(folder / "table.md", as_markdown(records))
    return records


def as_markdown(records: Sequence[dict[str, Any]]) -> str:
    """Format the table: a row for each index and number of lists that are read.

    Args:
        records: what `measure_all` returns.
    """
    lines = []
    for record in records:
        build = record["build"]
        for row in record["rows"]:
            cells = ["", "", "", ""]
            if build is not None and row is record["rows"][0]:
                cells = [
                    f"{build['seconds']:,.0f}",
                    f"{build['cpu_seconds']:,.0f}",
                    f"{build['gb']:.2f}",
                    f"{build['bytes'] / 1e9:.2f}",
                ]
            figures = [
                f"{row['nprobe'] or ''}",
                f"{row['recall']:.3f}",
                f"{1000 / row['milliseconds']:,.1f}",
                f"{1000 / row['cpu_milliseconds']:,.1f}",
                f"{row['gb']:.2f}",
            ]
            lines.append([record["name"], f"{record['count']:,}", *cells, *figures])
    headings = ["index", "vectors", "build s", "of processor s", "build GB", "disk GB"]
    return markdown_table([*headings, "looks at", "recall@10", "queries/s", "a processor s", "search GB"], lines)


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    print(as_markdown(measure_all(arguments)))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    else:
        run(main)
