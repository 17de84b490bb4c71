"""Embedding by processes that share the documents out by their number, each of them on its own.

Documents are taken in the order of the data, `shard_documents` at a time: those are a shard, of whatever process. The
process `rank` of `world` reads the shards `rank`, `rank + world` and so on, and passes over those that are done: after
its file is whole, a marker says so. No process waits for another, and how many there are may change from run to run.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

from common.errors import UserError
from retrieval.documents.document import Document
from retrieval.documents.storage import Storage
from retrieval.embedding.plan import DOCUMENTS, Plan, read_json, write_complete
from retrieval.embedding.table import import_arrow, schema_of, to_table
from retrieval.index.reading import DocumentReader
from retrieval.index.shards import Record

DONE = "done"
# Bytes of records that are written together, nearly.
GROUP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Marker:
    """What says that a file is whole.

    Args:
        name: of the file.
        size: bytes of the file.
        documents: how many it holds.
        passages: of these documents.
        tokens: token vectors of these documents.
        digest: of the documents, to see whether the data are still the same.
    """

    name: str
    size: int
    documents: int
    passages: int
    tokens: int
    digest: str


def embed_shards(
    output: Storage,
    plan: Plan,
    documents: Iterable[Document],
    reader: DocumentReader,
    rank: int = 0,
    world: int = 1,
    on_shard: Callable[[Marker], None] = lambda _: None,
) -> bool:
    """Embed the share of a process.

    Args:
        output: the folder.
        plan: what is in it.
        documents: all documents, in the same order in each process and each run.
        reader: reads them, with the codec of the plan.
        rank: number of this process, from 0.
        world: number of processes.
        on_shard: is called after each shard.

    Returns:
        Whether all shards are done, of this process and of the others.

    Raises:
        UserError: the documents are others than those of the shards that are done.
    """
    shards = 0
    for number, shard in enumerate(_in_shards(documents, plan.shard_documents)):
        digest = hashlib.blake2b(digest_size=16)
        given = hashed(shard, digest)
        if number % world == rank:
            marker = _read_marker(output, number)
            if marker is None:
                on_shard(_embed_shard(output, plan, number, given, digest, reader))
            else:
                deque(given, maxlen=0)
                if digest.hexdigest() != marker.digest:
                    raise UserError(
                        f"{output.root}: the documents of shard {number} are others than when it was embedded; give "
                        "the same --data in each run, or name another --output_dir"
                    )
        shards += 1
    return _finish(output, shards)


def _in_shards(documents: Iterable[Document], size: int) -> Iterator[Iterator[Document]]:
    given = iter(documents)
    while (first := next(given, None)) is not None:
        shard = chain([first], islice(given, size - 1))
        yield shard
        deque(shard, maxlen=0)  # what the caller has left of it


def hashed(documents: Iterable[Document], digest: Any) -> Iterator[Document]:
    """Yield documents, and add each to a digest of `hashlib`.

    Args:
        documents: the documents.
        digest: what they are added to.
    """
    for document in documents:
        known = [document.id, document.text, sorted(document.metadata.items()), [asdict(m) for m in document.marks]]
        digest.update(json.dumps(known).encode())
        yield document


def _embed_shard(
    output: Storage, plan: Plan, number: int, documents: Iterable[Document], digest: Any, reader: DocumentReader
) -> Marker:
    """Write the file of a shard, and then its marker."""
    arrow = import_arrow()
    schema = schema_of(plan.settings, plan.model["hidden_size"], reader.codec)
    name = f"{number:06}.parquet"
    counts = [0, 0, 0]
    with output.file(f"{DOCUMENTS}/{name}") as path:
        with arrow.parquet.ParquetWriter(path, schema) as file:
            for group in _groups(reader(documents)):
                file.write_table(to_table(group, schema))
                counts[0] += len(group)
                counts[1] += sum(len(record.passages) for record in group)
                counts[2] += sum(len(record.codes) for record in group if record.codes is not None)
        size = path.stat().st_size
    marker = Marker(name, size, counts[0], counts[1], counts[2], digest.hexdigest())
    output.write(f"{DONE}/{number:06}.json", json.dumps(asdict(marker)).encode())
    return marker


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    group: list[Record] = []
    size = 0
    for record in records:
        group.append(record)
        size += record.nbytes
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _read_marker(output: Storage, number: int) -> Marker | None:
    content = read_json(output, f"{DONE}/{number:06}.json")
    return None if content is None else Marker(**content)


def _finish(output: Storage, shards: int) -> bool:
    """Write down which files are the whole, if all shards are done; return whether they are.

    The process that does the last shard finds all markers: each looks for them after it has written its own.
    """
    names = output.sizes(DONE, ".json")
    if len(names) > shards:
        raise UserError(
            f"{output.root} has {len(names)} shards, and there are documents for {shards} only; give the same --data "
            "in each run, or name another --output_dir"
        )
    if not shards or len(names) < shards:
        return False
    markers = [marker for number in range(shards) if (marker := _read_marker(output, number)) is not None]
    write_complete(output, [(marker.name, marker.size, marker.documents) for marker in markers])
    return True
