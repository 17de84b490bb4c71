"""Measure how fast an index is searched, and what is lost by comparing bits: the figures of docs/guides/search.md.

    OMP_NUM_THREADS=2 python experiments/search_speed.py --output runs/search-speed.md

The documents are random, and no model reads them or the queries: their token vectors are scattered around those of
5,000 words. The rows take turns, so that other load on the machine affects all alike.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.arguments import parse
from common.errors import run
from common.files import atomic_write
from eval.report.markdown import markdown_table
from eval.speed.process import describe_environment
from modeling_longembed.output_maxsim_longembed import maxsim
from modeling_longembed.output_token_codes_longembed import TokenCodec
from retrieval import Document, Index
from retrieval.index.index import PARTS
from retrieval.index.manifest import Manifest, Settings, only_writer
from retrieval.index.shards import Record
from retrieval.index.tokens import TOKENS_AT_A_TIME, TokenScores
from retrieval.index.writing import Writer
from retrieval.ranking import Query, score_candidates

VOCABULARY, PASSAGE, HIDDEN_SIZE = 5_000, 254, 384


@dataclass
class Arguments:
    """The options of the script."""

    documents: int = field(default=100, metadata={"help": "number of documents, all candidates", "within": "[1, inf)"})
    tokens: int = field(default=10_000, metadata={"help": "tokens of a document", "within": "[1, inf)"})
    token_dim: int = field(default=256, metadata={"help": "dimensions of a token vector", "within": "[8, inf)"})
    query_tokens: list[int] = field(
        default_factory=lambda: [16, 32], metadata={"help": "numbers of tokens of a query", "within": "[1, inf)"}
    )
    repeats: int = field(default=9, metadata={"help": "how often each row is measured", "within": "[1, inf)"})
    output: str | None = field(default=None, metadata={"help": "file for the table, in Markdown", "output": "file"})


class Words:
    """Random vectors of words, which stand in the place of a model.

    Args:
        dim: width of the vectors.
    """

    def __init__(self, dim: int):
        self.model = SimpleNamespace(config=SimpleNamespace(token_dim=dim, hidden_size=HIDDEN_SIZE))
        self.settings = Settings(f"late:{PASSAGE}", PARTS, "binary", None)
        self.codec = TokenCodec("float32")  # until one is fitted
        self.random = torch.Generator().manual_seed(0)
        self.vectors = torch.randn(VOCABULARY, dim, generator=self.random)

    def tokens(self, text: str) -> Tensor:
        """Return a vector for each word of a text, near that of the word, `(n, dim)`."""
        centres = self.vectors[[int(word.removeprefix("word")) for word in text.split()]]
        return normalize(centres + 0.7 * torch.randn(centres.shape, generator=self.random), dim=1)

    def __call__(self, documents: Iterable[Document]) -> Iterator[Record]:
        """Yield what is kept of documents, as `DocumentReader` does."""
        for document in documents:
            ends = np.cumsum([len(word) + 1 for word in document.text.split()])
            first = np.arange(0, len(ends), PASSAGE)
            last = np.minimum(first + PASSAGE, len(ends))
            spans = np.stack([ends[first] - ends[0], ends[last - 1] - 1], axis=1)
            vectors = normalize(torch.randn(len(spans), HIDDEN_SIZE, generator=self.random), dim=1).numpy()
            codes = self.codec.encode(self.tokens(document.text)).numpy()
            yield Record(document, spans, np.stack([first, last], axis=1), vectors, codes)

    def query(self, text: str) -> Query:
        """Return a query as it is after reading."""
        vector = normalize(torch.randn(HIDDEN_SIZE, generator=self.random), dim=0)
        return Query(text, vector.numpy(), self.tokens(text))


def build(folder: Path, words: Words, count: int, tokens: int) -> Index:
    """Build an index of random documents.

    Args:
        folder: of the index.
        words: gives the token vectors.
        count: number of documents.
        tokens: of each.

    Returns:
        The index, opened.
    """
    draw = random.Random(0)
    documents = (Document(f"d{number}", random_text(draw, tokens)) for number in range(count))
    with only_writer(folder):
        manifest = Manifest(words.settings, {"hidden_size": HIDDEN_SIZE})
        Writer(folder).add(manifest, documents, words).write(folder)  # type: ignore[arg-type]
    return Index(folder)


def random_text(draw: random.Random, count: int) -> str:
    """Return a text of so many random words, all of one length."""
    return " ".join(f"word{number:04}" for number in draw.choices(range(VOCABULARY), k=count))


def unpacked(scores: TokenScores, documents: Sequence[Tensor]) -> np.ndarray:
    """Return the MaxSim of a query with documents whose codes are decoded some documents at a time, `(D,)`."""
    at_a_time, found = max(1, TOKENS_AT_A_TIME // len(documents[0])), []
    for start in range(0, len(documents), at_a_time):
        some = documents[start : start + at_a_time]
        numbers = scores.codec.numbers(torch.cat(list(some)))
        ends = torch.tensor([0, *map(len, some)]).cumsum(0)
        found.append(maxsim(scores.query, torch.tensor([0, len(scores.query)]), numbers, ends)[0])
    return (torch.cat(found) + scores.constants.sum()).numpy()


def measure(index: Index, words: Words, count: int, repeats: int) -> tuple[list[list[str]], str]:
    """Measure the rows for queries of one length.

    Args:
        index: that is searched.
        words: makes the queries.
        count: tokens of a query.
        repeats: how often each row is measured, each time with another query.

    Returns:
        The rows, and what MaxSim of bits loses, in a sentence.
    """
    draw, snapshot, documents = random.Random(count), index.snapshot, len(index)
    codec = snapshot.codec
    assert codec is not None
    bits = [snapshot.tokens(number) for number in range(documents)]
    codes = [torch.from_numpy(shard.codes(place)) for shard in snapshot.shards for place in range(len(shard))]
    queries = [words.query(random_text(draw, count)) for _ in range(repeats + 1)]
    found: dict[str, list[np.ndarray]] = {"bits": [], "unpacked": []}

    def keep(name: str, scores: np.ndarray) -> None:
        found[name].append(scores)

    def scores_of(query: Query) -> TokenScores:
        assert query.tokens is not None
        return TokenScores(codec, query.tokens)

    rows: dict[str, Callable[[Query], object]] = {
        f"MaxSim with all {documents}, codes unpacked": lambda query: keep(
            "unpacked", unpacked(scores_of(query), codes)
        ),
        f"MaxSim with all {documents}, codes looked up": lambda query: keep(
            "bits", scores_of(query).of_documents(bits)
        ),
        "candidates and all scores": lambda query: score_candidates(snapshot, query, PARTS, documents),
        "search, 10 documents without passages": lambda query: index.search(query, passages=0, candidates=documents),
        "search, 10 documents with 3 passages": lambda query: index.search(query, candidates=documents),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for query in queries:
        for name, call in rows.items():
            start = time.perf_counter(), time.process_time()
            call(query)
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    table = []
    for name, measured in times.items():
        passed, computed = zip(*measured[1:], strict=True)  # the first one warms up
        numbers = (statistics.median(passed), min(passed), statistics.median(computed))
        table.append([name, str(count), *(f"{1000 * number:,.0f}" for number in numbers)])
    exact, near = np.stack(found["unpacked"]), np.stack(found["bits"])
    loss = exact - near
    return table, (
        f"{count} tokens: of {loss.size:,} scores of bits {np.mean(loss > 1e-4):.2%} are too small, at most by "
        f"{max(0.0, float(loss.max())):.1e}; the scores of the documents of a query differ by "
        f"{float(np.ptp(exact, axis=1).mean()):.1e}"
    )


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    words = Words(arguments.token_dim)
    with tempfile.TemporaryDirectory() as folder:
        index = build(Path(folder) / "index", words, arguments.documents, arguments.tokens)
        results = [measure(index, words, count, arguments.repeats) for count in arguments.query_tokens]
    table = markdown_table(
        ["what", "tokens of the query", "median ms", "fastest ms", "median ms of all threads"],
        [row for rows, _ in results for row in rows],
    )
    lines = [
        table,
        *(f"- {loss}." for _, loss in results),
        f"\n{arguments.documents} documents of {arguments.tokens:,} tokens, {arguments.token_dim} dimensions, "
        f"{torch.get_num_threads()} threads, {describe_environment('cpu')}.",
    ]
    print(text := "\n".join(lines) + "\n")
    if arguments.output is not None:
        atomic_write(arguments.output, text)


if __name__ == "__main__":
    run(main)
