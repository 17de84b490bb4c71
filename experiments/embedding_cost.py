"""Compute what it takes to embed millions of passages, from measured rates: hours of devices, files, the index.

    python experiments/embedding_cost.py --devices H100 --tokens_per_second 1350000 --embedded embedded --data docs/

Nothing is assumed about a device but its rate: measure it with `retrieval.embed` on a thousand of your documents, since
their lengths decide. `--embedded` takes the bytes of a passage from what `retrieval.embed` has written, and `--data`
measures how fast one process reads and passes over documents, which limits the number of processes.
docs/guides/scale.md explains the tables.
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common.arguments import parse
from common.errors import UserError, run
from eval.report.markdown import markdown_table
from retrieval.build import size_in_bytes
from retrieval.documents.document import Document
from retrieval.documents.sources import read_documents
from retrieval.embedding.embedded import Embedded
from retrieval.embedding.shards import hashed
from retrieval.index.approximate import choose_kind

COUNTS = (1, 8, 64)  # of devices
# Characters of the documents by which reading is measured.
READ_CHARACTERS = 50_000_000


@dataclass
class Arguments:
    """Options of the script."""

    devices: list[str] = field(metadata={"help": "names of devices"})
    tokens_per_second: list[float] = field(metadata={"help": "measured rate of each", "within": "(0, inf)"})
    segments: list[int] = field(
        default_factory=lambda: [10_000_000, 1_000_000_000],
        metadata={"help": "numbers of passages", "within": "[1, inf)"},
    )
    segment_tokens: int = field(
        default=254,
        metadata={"help": "tokens that are read for a passage; 288 * 4.5 for windows of 288/64", "within": "[1, inf)"},
    )
    dim: int = field(default=384, metadata={"help": "width of a vector", "within": "[1, inf)"})
    memory: str = field(default="64GB", metadata={"help": "memory for the search of vectors"})
    embedded: str | None = field(
        default=None, metadata={"help": "output folder of retrieval.embed, for the bytes of a passage"}
    )
    shard_documents: int = field(
        default=1000, metadata={"help": "documents in a file, as in retrieval.embed", "within": "[1, inf)"}
    )
    data: list[str] = field(
        default_factory=list, metadata={"help": "documents, as in retrieval.embed, to measure how fast they are read"}
    )


def device_hours(segments: int, segment_tokens: int, tokens_per_second: float) -> float:
    """Return the hours that one device takes to read passages.

    Args:
        segments: number of passages.
        segment_tokens: tokens that are read for each.
        tokens_per_second: measured rate of the device.
    """
    return segments * segment_tokens / tokens_per_second / 3600


def duration(hours: float) -> str:
    """Return a time in the unit that suits it, such as `31 min`."""
    for unit, size in (("years", 24 * 365.25), ("days", 24.0), ("h", 1.0)):
        if hours >= (2 if unit != "h" else 1) * size:
            return f"{hours / size:,.1f} {unit}"
    return f"{hours * 60:.0f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"


def time_table(
    segments: Sequence[int], segment_tokens: int, rates: Sequence[tuple[str, float]], counts: Sequence[int] = COUNTS
) -> str:
    """Return a table in Markdown of the time that devices take.

    Args:
        segments: numbers of passages.
        segment_tokens: tokens that are read for each.
        rates: name and tokens a second of each device.
        counts: numbers of devices that work at a time.
    """
    rows = [
        [f"{count:,}", name, f"{rate:,.0f}", f"{hours:,.1f}", *(duration(hours / devices) for devices in counts)]
        for count in segments
        for name, rate in rates
        for hours in [device_hours(count, segment_tokens, rate)]
    ]
    header = ["passages", "device", "tokens/s", "device hours", *(f"time on {devices}" for devices in counts)]
    return markdown_table(header, rows)


def size_table(segments: Sequence[int], dim: int, memory: int, embedded: Embedded | None, shard_documents: int) -> str:
    """Return a table in Markdown of the files and of the index.

    Args:
        segments: numbers of passages.
        dim: width of a vector.
        memory: bytes that the search of vectors may take.
        embedded: what the bytes of a passage are taken from; None: those of its vector alone are known.
        shard_documents: number of documents in a file.
    """
    passage_bytes, documents = 4.0 * dim, None
    if embedded is not None:
        passages = sum(len(record.passages) for record in embedded.records())
        passage_bytes = sum(file["size"] for file in embedded.files) / passages
        documents = len(embedded) / passages
    rows = [
        [
            f"{count:,}",
            f"{count * 4 * dim / 1e9:,.0f} GB",
            "" if documents is None else f"{count * passage_bytes / 1e9:,.0f} GB",
            "" if documents is None else f"{-(-count * documents // shard_documents):,.0f}",
            choose_kind(count, dim, memory).name,
        ]
        for count in segments
    ]
    return markdown_table(["passages", "vectors", "Parquet", "files", "search of vectors"], rows)


def reading_rate(data: Sequence[str]) -> float:
    """Return the characters that one process reads and passes over in a second of its processor's time.

    Args:
        data: documents, as `read_documents` takes them.

    Raises:
        UserError: there is no document.
    """
    characters = 0

    def counted() -> Iterator[Document]:
        nonlocal characters
        for document in read_documents(data):
            characters += len(document.text)
            yield document
            if characters >= READ_CHARACTERS:
                return

    start = time.process_time()
    deque(hashed(counted(), hashlib.blake2b()), maxlen=0)
    if not characters:
        raise UserError("--data has no document; name others")
    return characters / (time.process_time() - start)


def main() -> None:
    """Run the script.

    Raises:
        UserError: there is not one rate for each device, or the embedded documents or the data cannot be read.
    """
    (arguments,) = parse(Arguments)
    if len(arguments.devices) != len(arguments.tokens_per_second):
        raise UserError(
            f"--devices are {len(arguments.devices)} and --tokens_per_second {len(arguments.tokens_per_second)}; give "
            "one rate for each device"
        )
    rates = list(zip(arguments.devices, arguments.tokens_per_second, strict=True))
    embedded = None if arguments.embedded is None else Embedded(arguments.embedded)
    memory = size_in_bytes(arguments.memory)
    print(time_table(arguments.segments, arguments.segment_tokens, rates))
    print(size_table(arguments.segments, arguments.dim, memory, embedded, arguments.shard_documents))
    for count in arguments.segments:
        print(choose_kind(count, arguments.dim, memory).reason)
    if arguments.data:
        print(f"one process reads and passes over {reading_rate(arguments.data):,.0f} characters a second")


if __name__ == "__main__":
    run(main)
