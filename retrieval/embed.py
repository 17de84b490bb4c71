"""Embed documents on one machine or many, for an index or for other programs.

    python -m retrieval.embed --model M --data docs/ --output_dir embedded
    accelerate launch --num_processes 8 -m retrieval.embed --engine accelerate --model M --data docs/ --output_dir O
    python -m retrieval.embed --engine ray --model M --data s3://bucket/docs --output_dir s3://bucket/embedded
    python -m retrieval.build --embedded embedded --index my-index

Each document has one row in the Parquet files of the output, whatever was killed: the same command goes on where it
stopped. docs/guides/scale.md says what to choose, and what millions of passages cost.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from tqdm.auto import tqdm

from common.arguments import parse
from common.errors import UserError, run
from retrieval.documents.document import Document
from retrieval.documents.sources import Columns, Skipped, read_documents
from retrieval.documents.storage import Storage
from retrieval.embedding.embedded import Embedded
from retrieval.embedding.plan import begin
from retrieval.embedding.ray_actors import Work, embed_with_ray
from retrieval.embedding.shards import embed_shards
from retrieval.index.identity import load_model
from retrieval.index.manifest import Settings, checked_parts
from retrieval.index.reading import document_reader


@dataclass
class Arguments:
    """Options of the script."""

    model: str = field(metadata={"help": "model of ours, a folder or an id on the Hub"})
    data: list[str] = field(
        metadata={
            "help": "what retrieval.build reads, also URLs such as s3://bucket/folder; with --engine ray, "
            "Parquet files and folders of them"
        }
    )
    output_dir: str = field(
        metadata={"help": "folder of the Parquet files, or its URL; all processes must see it", "output": "folder"}
    )
    engine: Literal["local", "accelerate", "ray"] = field(
        default="local",
        metadata={"help": "this process; the processes of accelerate launch; or actors of a Ray cluster (extra ray)"},
    )
    segments: str = field(
        default="late:254",
        metadata={
            "help": "passages: late:SIZE (one reading of the document), tokens:SIZE/STRIDE, sentences:SIZE or document"
        },
    )
    parts: list[str] = field(
        default_factory=lambda: ["vector", "words"],
        metadata={
            "help": "what the index will score by: vector (one a passage), tokens, words (BM25; the index counts them)"
        },
    )
    token_precision: str = field(
        default="binary",
        metadata={"help": "how token vectors are kept: float32, float16, int8, binary, residual1 or residual2"},
    )
    token_dim: int | None = field(
        default=None, metadata={"help": "leading dimensions of token vectors to keep", "within": "[1, inf)"}
    )
    text_columns: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "columns of rows that are the text, such as title text; a blank line is put between them"},
    )
    id_column: str | None = field(
        default=None, metadata={"help": "column of rows that names a document; by default id, doc_id or _id"}
    )
    split: str = field(
        default="train",
        metadata={"help": "split of a data set on the Hub", "applies": {"engine": ("local", "accelerate")}},
    )
    actors: int | None = field(
        default=None,
        metadata={
            "help": "actors that hold the model; by default one for each GPU of the cluster, or nearly for each CPU",
            "within": "[1, inf)",
            "applies": {"engine": "ray"},
        },
    )
    ray_address: str | None = field(
        default=None,
        metadata={
            "help": "address of the Ray cluster; by default that of RAY_ADDRESS, or this machine alone",
            "applies": {"engine": "ray"},
        },
    )
    shard_documents: int = field(
        default=1000, metadata={"help": "documents in a file, which is begun anew after a kill", "within": "[1, inf)"}
    )
    batch_tokens: int = field(
        default=16384,
        metadata={"help": "tokens in one forward pass; lower it if memory runs out", "within": "[1, inf)"},
    )


def embed(arguments: Arguments, skipped: list[Skipped]) -> bool:
    """Embed the share of this process.

    Args:
        arguments: parsed command-line options.
        skipped: a list that documents which cannot be read are added to.

    Returns:
        Whether all documents are embedded, those of other processes too.

    Raises:
        UserError: as `read_documents`, or the output is of something else.
    """
    settings = Settings(
        arguments.segments, checked_parts(arguments.parts), arguments.token_precision, arguments.token_dim
    ).checked()
    columns = Columns(tuple(arguments.text_columns), arguments.id_column)
    output = Storage(arguments.output_dir)
    state = _state_of_launch(arguments.engine)
    model = load_model(arguments.model)
    reader = document_reader(model, settings, arguments.batch_tokens)

    def documents(log: list[Skipped]) -> Iterator[Document]:
        return read_documents(arguments.data, columns, split=arguments.split, skipped=log)

    order = "any" if arguments.engine == "ray" else "given"
    with nullcontext() if state is None else state.main_process_first():
        plan = begin(output, model, reader, documents([]), arguments.shard_documents, order)
    if arguments.engine == "ray":
        work = Work(arguments.model, plan, arguments.output_dir, columns, arguments.batch_tokens)
        return embed_with_ray(arguments.data, work, arguments.actors, arguments.ray_address)
    rank, world = (0, 1) if state is None else (state.process_index, state.num_processes)
    given = tqdm(documents(skipped), unit=" documents", disable=None if rank == 0 else True)
    before, start = reader.tokens_read, time.perf_counter()
    whole = embed_shards(output, plan, given, reader, rank, world)
    tokens, seconds = reader.tokens_read - before, time.perf_counter() - start
    if tokens:
        print(f"process {rank} of {world} has read {tokens:,} tokens, {tokens / seconds:,.0f} a second")
    return whole


def _state_of_launch(engine: str) -> Any:
    """Return the state of a process of `accelerate launch`, on its own device; None for other engines."""
    if engine != "accelerate":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"--engine {engine} is one process, and a launcher has started several: --engine accelerate"
            )
        return None
    try:
        from accelerate import PartialState
    except ImportError:
        raise UserError("--engine accelerate needs the extra 'train': pip install -e '.[train]'") from None
    return PartialState()


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of each detail that it has mended
    skipped: list[Skipped] = []
    if embed(arguments, skipped):
        documents = len(Embedded(arguments.output_dir))
        print(f"{arguments.output_dir}: {documents} documents; {len(skipped)} could not be read and were skipped")
    else:
        print(f"{arguments.output_dir}: this process is done, and others are not; what was killed goes on when started")


if __name__ == "__main__":
    run(main)
