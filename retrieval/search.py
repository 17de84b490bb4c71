"""Search an index of long documents: the documents that answer a query, and the passages that the answer is in.

    python -m retrieval.search --index my-index "who decided on the remote control's colour?"
    python -m retrieval.search --index my-index --queries queries.jsonl --run_file run.txt

docs/guides/documents.md explains the answers.
"""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from common.arguments import parse
from common.conditions import GIVEN, NOT_GIVEN
from common.errors import UserError, run
from common.files import atomic_write
from common.jsonl import read_jsonl, text_or_id
from retrieval.index.index import Index
from retrieval.ranking import Hit, Passage

ID_COLUMNS = ("id", "qid", "_id", "query_id")


@dataclass
class Arguments:
    """Options of the script."""

    index: str = field(metadata={"help": "folder of the index"})
    query: str | None = field(
        default=None, metadata={"help": "what is searched; --query may be left out", "word": True}
    )
    queries: str | None = field(
        default=None,
        metadata={
            "help": ".jsonl or .jsonl.gz file with a query in the field text of each row, and its name in id or qid",
            "applies": {"query": NOT_GIVEN},
        },
    )
    run_file: str | None = field(
        default=None,
        metadata={
            "help": "write a run file of trec_eval and ranx instead of answers",
            "output": "file",
            "applies": {"queries": GIVEN},
        },
    )
    k: int = field(default=10, metadata={"help": "most documents", "within": "[1, inf)"})
    passages: int = field(
        default=3,
        metadata={"help": "most passages of each document", "within": "[0, inf)", "applies": {"run_file": NOT_GIVEN}},
    )
    candidates: int = field(
        default=100,
        metadata={
            "help": "documents that vectors and BM25 find each, to be compared token by token",
            "within": "[1, inf)",
        },
    )
    weight: float | None = field(
        default=None,
        metadata={"help": "weight of the model beside BM25; by default that of the index", "within": "[0, 1]"},
    )
    parts: list[str] | None = field(
        default=None, metadata={"help": "ways to score: vector, tokens and words, or some of them; by default all"}
    )
    filters: str | None = field(
        default=None,
        metadata={"help": """JSON of what the metadata of documents must be, such as {"year": {">=": 2020}}"""},
    )
    json: bool = field(
        default=False, metadata={"help": "print JSON, one line a query", "applies": {"run_file": NOT_GIVEN}}
    )
    model: str | None = field(
        default=None, metadata={"help": "the model of the index, if it is not where it was when the index was built"}
    )


def read_queries(path: str) -> Iterator[tuple[str, str]]:
    """Read queries from JSON lines.

    Args:
        path: a file with a query in the column `text` of each row. Its name is in `id`, `qid`, `_id` or `query_id`; one
            without a name is called by the number of its row.

    Yields:
        The name and the text of each query.

    Raises:
        UserError: a row cannot be read, has no text, or has the name of another.
    """
    names: set[str] = set()
    for number, row in read_jsonl(path, "text"):
        place = f"{path}, row {number}"
        column = next((column for column in ID_COLUMNS if column in row), None)
        name = str(number) if column is None else text_or_id(row[column], column, place)
        if name in names:
            raise UserError(f"{place}: another query is called {name}; give each a name of its own")
        names.add(name)
        yield name, text_or_id(row["text"], "text", place)


def read_filters(text: str | None) -> dict[str, Any] | None:
    """Return the filters that an option gives as JSON.

    Raises:
        UserError: it is no JSON object.
    """
    if text is None:
        return None
    try:
        filters = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--filters {text[:80]}: is not JSON: {error}") from None
    if not isinstance(filters, dict):
        raise UserError(f'--filters {text[:80]}: give a JSON object, such as {{"year": 2024}}')
    return filters


def answer_json(query: str, hits: list[Hit], name: str | None = None) -> str:
    """Return the answer to a query as a line of JSON.

    Args:
        query: its text.
        hits: the documents, best first.
        name: of a query that has one.
    """
    answer = {"query": query, "hits": [asdict(hit) for hit in hits]}
    return json.dumps(answer if name is None else {"id": name, **answer}, ensure_ascii=False)


def answer_text(hits: list[Hit]) -> str:
    """Return the answer to a query for people: documents, their scores, and the passages."""
    if not hits:
        return "nothing was found"
    lines = []
    for rank, hit in enumerate(hits, start=1):
        title = hit.metadata.get("title", "")
        scores = ", ".join(f"{part} {score:.3f}" for part, score in hit.parts.items())
        lines.append(f"{rank:2}. {_printable(f'{hit.id}  {title}')}  {hit.score:.3f} ({scores})")
        for passage in hit.passages:
            lines.append(f"      {_place(passage)}  {passage.score:.3f}")
            shown = textwrap.shorten(_printable(passage.text), 600, placeholder=" ...")
            lines.append(textwrap.fill(shown, 110, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return "\n".join(lines)


def _place(passage: Passage) -> str:
    page = "" if passage.page is None else f"page {passage.page}, "
    heading = "" if passage.heading is None else f", {_printable(passage.heading)}"
    return f"{page}characters {passage.start} to {passage.end}{heading}"


def _printable(text: str) -> str:
    """Return text in one line without what would move the cursor or colour a terminal."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def run_lines(name: str, hits: list[Hit]) -> Iterator[str]:
    """Yield the lines of a run file for a query: its name, Q0, the document, its rank, its score and who found it.

    Args:
        name: of the query.
        hits: the documents, best first.

    Raises:
        UserError: a name has a blank, which separates the fields of a run file.
    """
    for rank, hit in enumerate(hits, start=1):
        for field_name in (name, hit.id):
            if len(field_name.split()) != 1:
                raise UserError(f"{field_name!r} has a blank, which a run file cannot hold; use --json instead")
        yield f"{name} Q0 {hit.id} {rank} {hit.score!r} longembed\n"


def main() -> None:
    """Run the script.

    Raises:
        UserError: there is no query, or as `Index.search`.
    """
    (arguments,) = parse(Arguments)
    if arguments.query is None and arguments.queries is None:
        raise UserError("there is no query: write it at the end of the command, or give a file with --queries")
    filters = read_filters(arguments.filters)
    queries = list(read_queries(arguments.queries)) if arguments.queries else [("", arguments.query or "")]
    lines: list[str] = []
    with Index.open(arguments.index, arguments.model) as index:
        for name, query in tqdm(queries, unit=" queries", disable=True if arguments.run_file is None else None):
            hits = index.search(
                query,
                arguments.k,
                passages=0 if arguments.run_file else arguments.passages,
                candidates=arguments.candidates,
                weight=arguments.weight,
                parts=arguments.parts,
                filters=filters,
            )
            if arguments.run_file:
                lines += run_lines(name, hits)
            elif arguments.json:
                print(answer_json(query, hits, name or None))
            else:
                print(f"{_printable(query)}\n" if name else "", answer_text(hits), "\n" if name else "", sep="")
    if arguments.run_file:
        atomic_write(Path(arguments.run_file), "".join(lines))
        print(f"{arguments.run_file}: {len(queries)} queries, {len(lines)} documents")


if __name__ == "__main__":
    run(main)
