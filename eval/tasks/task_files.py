"""The files of a local retrieval task, which eval/tasks/retrieval.py reads."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from common.files import write_jsonl


def write_task_files(
    folder: Path, documents: Mapping[str, str], queries: Mapping[str, str], relevant: Iterable[tuple[str, str]]
) -> None:
    """Write `corpus.jsonl.gz`, `queries.jsonl.gz` and `qrels.jsonl.gz`; the same task gives the same bytes.

    Call it within `common.files.atomic_folder`, so that a killed process leaves no incomplete task.

    Args:
        folder: of the task, or of one of its splits; made if it is missing.
        documents: id -> text.
        queries: id -> text.
        relevant: pairs (id of a query, id of a relevant document).
    """
    write_jsonl(folder / "corpus.jsonl.gz", ({"doc_id": key, "text": text} for key, text in documents.items()))
    write_jsonl(folder / "queries.jsonl.gz", ({"qid": key, "text": text} for key, text in queries.items()))
    write_jsonl(folder / "qrels.jsonl.gz", ({"qid": query, "doc_id": document} for query, document in relevant))
