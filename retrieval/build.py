"""Build an index of long documents, to be searched by `retrieval.search`, or add documents to one.

    python -m retrieval.build --model M --data docs/ --index my-index
    python -m retrieval.build --embedded O --index my-index      # what retrieval.embed has read

Documents are files in a folder (.txt, .md, .html, .pdf, .docx), rows of JSON lines or Parquet, or a data set of the
Hub. A killed build goes on where it stopped. docs/guides/documents.md says what to choose.
"""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from common.arguments import parse
from common.conditions import NOT_GIVEN
from common.errors import UserError, run
from retrieval.documents.sources import Columns, Skipped, read_documents
from retrieval.index.index import Index
from retrieval.index.manifest import PARTS

# Options of documents that are read here, and of an index that is new.
READ = {"embedded": NOT_GIVEN}
NEW = {"add": False, **READ}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass
class Arguments:
    """Options of the script."""

    index: str = field(metadata={"help": "folder of the index", "output": "folder"})
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders, files of documents, .jsonl, .jsonl.gz or .parquet files, URLs of these, such as "
            "s3://bucket/folder, or org/name[@config] on the Hub",
            "applies": READ,
        },
    )
    embedded: str | None = field(
        default=None,
        metadata={
            "help": "output folder of retrieval.embed, or its URL: its documents become an index of the settings that "
            "they were embedded with"
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "model of ours, a folder or an id on the Hub; with --add, the one of the index by default",
            "applies": READ,
        },
    )
    add: bool = field(
        default=False,
        metadata={
            "help": "add the documents to an index that exists; they replace those that have the same id",
            "applies": READ,
        },
    )
    segments: str = field(
        default="late:254",
        metadata={
            "help": "passages: late:SIZE (one reading of the document), tokens:SIZE/STRIDE, sentences:SIZE or document",
            "applies": NEW,
        },
    )
    parts: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "ways to score: vector (one a passage), tokens, words (BM25)", "applies": NEW},
    )
    token_precision: str = field(
        default="binary",
        metadata={
            "help": "how token vectors are kept: float32, float16, int8, binary, residual1 or residual2",
            "applies": NEW,
        },
    )
    token_dim: int | None = field(
        default=None,
        metadata={
            "help": "leading dimensions of token vectors to keep",
            "within": "[1, inf)",
            "applies": NEW,
        },
    )
    text_columns: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={
            "help": "columns of rows that are the text, such as title text; a blank line is put between them",
            "applies": READ,
        },
    )
    id_column: str | None = field(
        default=None,
        metadata={"help": "column of rows that names a document; by default id, doc_id or _id", "applies": READ},
    )
    split: str = field(default="train", metadata={"help": "split of a data set on the Hub", "applies": READ})
    vector_search: Literal["lists", "graph"] = field(
        default="lists",
        metadata={
            "help": "search of more than 100,000 vectors of passages: inverted lists, or a graph (HNSW), which answers "
            "faster, is built more slowly, and suits documents that are rarely deleted",
            "applies": {"add": False},
        },
    )
    memory: str | None = field(
        default=None,
        metadata={"help": "memory that vectors of passages may take, such as 4GB; half of the machine's by default"},
    )
    shard_mb: float = field(
        default=256.0, metadata={"help": "MiB of a shard, which is in memory while it is built", "within": "(0, inf)"}
    )
    batch_tokens: int = field(
        default=16384,
        metadata={
            "help": "tokens in one forward pass; lower it if memory runs out",
            "within": "[1, inf)",
            "applies": READ,
        },
    )


def size_in_bytes(size: str) -> int:
    """Return the bytes of a size such as `4GB`.

    Raises:
        UserError: it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", size.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UserError(f"--memory {size}: give a number and KB, MB, GB or TB, such as 4GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def build_index(arguments: Arguments, skipped: list[Skipped]) -> Index:
    """Build the index, or add to it.

    Args:
        arguments: parsed command-line options.
        skipped: a list that documents which cannot be read are added to.

    Returns:
        The index, opened.

    Raises:
        UserError: no model is named, or as `Index.build`, `Index.add`, `Index.merge` and `read_documents`.
    """
    memory = None if arguments.memory is None else size_in_bytes(arguments.memory)
    if arguments.embedded is not None:
        return Index.merge(
            arguments.index,
            arguments.embedded,
            vector_search=arguments.vector_search,
            shard_mb=arguments.shard_mb,
            memory=memory,
        )
    if not arguments.data:
        raise UserError("--data is missing: name documents, or what retrieval.embed has read with --embedded")
    columns = Columns(tuple(arguments.text_columns), arguments.id_column)
    read = read_documents(arguments.data, columns, split=arguments.split, skipped=skipped)
    documents = tqdm(read, unit=" documents", disable=None)
    if arguments.add:
        index = Index.open(arguments.index, arguments.model, arguments.batch_tokens)
        index.add(documents, shard_mb=arguments.shard_mb, memory=memory)
        return index
    if arguments.model is None:
        raise UserError("--model is missing: name the model that the documents are read with")
    return Index.build(
        Path(arguments.index),
        documents,
        arguments.model,
        segments=arguments.segments,
        parts=arguments.parts,
        token_precision=arguments.token_precision,
        token_dim=arguments.token_dim,
        vector_search=arguments.vector_search,
        shard_mb=arguments.shard_mb,
        memory=memory,
        batch_tokens=arguments.batch_tokens,
    )


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of each detail that it has mended
    skipped: list[Skipped] = []
    index = build_index(arguments, skipped)
    print(f"{arguments.index}: {len(index)} documents; {len(skipped)} could not be read and were skipped")
    print(index.vector_search)


if __name__ == "__main__":
    run(main)
