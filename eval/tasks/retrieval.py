"""Retrieval tasks: MTEB's own, and any folder of JSON lines as a task that MTEB can run.

A local task is a folder `<task>/` with `corpus.jsonl` {doc_id, text}, `queries.jsonl` {qid, text} and `qrels.jsonl`
{qid, doc_id}, each plain or as `.jsonl.gz`. It has one split, and its main score is nDCG@10. Or it holds one such
folder for each context length, `<task>/test_256/` and so on, as LongEmbed's synthetic tasks do. Then each is a split,
and the main score is nDCG@1.

Two more fields are read as BEIR reads them (Thakur et al. 2021, arXiv:2104.08663). A document may have a `title`: what
is encoded is the title, a space and the text. A judgement may have a `score`, a whole number, 1 if there is none: a
document is relevant if it is positive, and it is the gain in nDCG.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mteb
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from common.errors import UserError
from common.jsonl import read_jsonl, text_or_id

LONGEMBED = (
    "LEMBNarrativeQARetrieval",
    "LEMBQMSumRetrieval",
    "LEMBWikimQARetrieval",
    "LEMBSummScreenFDRetrieval",
    "LEMBNeedleRetrieval",
    "LEMBPasskeyRetrieval",
)
GRADES = ("grade", "label", "rel", "relevance")  # other names of the score of a judgement


def get_tasks(names: list[str], data_dir: str | None) -> list[AbsTaskRetrieval]:
    """Return the tasks of these names, checked but not yet loaded.

    Args:
        names: MTEB's names (`data_dir` None) or sub-folders of `data_dir`; empty: the six of LongEmbed, or every task
            folder of `data_dir`.
        data_dir: the folder with one sub-folder for each task; None: MTEB's tasks on data from the Hub.

    Raises:
        UserError: there is no such task, or local data is malformed (file and line are named).
    """
    if data_dir is None:
        return [_hub_task(name) for name in names or LONGEMBED]
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"--data_dir {data_dir} is not a folder; give the folder with one sub-folder for each task")
    there = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and _split_folders(folder))
    for name in names:
        if name not in there:
            raise UserError(f"{root / name} holds no task (corpus.jsonl); {data_dir} has {', '.join(there) or 'none'}")
    if not there:
        raise UserError(f"--data_dir {data_dir} holds no task: no sub-folder has a corpus.jsonl or corpus.jsonl.gz")
    return [local_task(root / name) for name in names or there]


def local_task(folder: Path) -> AbsTaskRetrieval:
    """Return a folder of JSON lines as an MTEB task; everything is read and checked once, and nothing is kept.

    A folder with the name of one of MTEB's tasks takes that task's metadata. In any case the path of its data starts
    with `local/` and the revision is the hash of the data, so that its results are not mistaken for official ones.

    Args:
        folder: of the task, in the layout at the top of this file.

    Raises:
        UserError: a row is missing, malformed, duplicated or refers to nothing (file and line are named).
    """
    splits = {name: SplitFiles.find(path) for name, path in _split_folders(folder).items()}
    digest = hashlib.sha256()
    for name, files in splits.items():
        digest.update(f"{name}:{files.check()}\n".encode())
    changes: dict[str, Any] = {
        "dataset": {"path": f"local/{folder.name}", "revision": f"local-{digest.hexdigest()[:40]}"},
        "eval_splits": list(splits),
    }
    try:
        official = mteb.get_task(folder.name).metadata
        if list(splits) == ["test"]:  # under the official name of the split: "validation" for SummScreenFD
            splits = {official.eval_splits[0]: splits["test"]}
        metadata = official.model_copy(update=changes | {"eval_splits": list(splits)})
    except KeyError:
        metadata = TaskMetadata(
            name=folder.name,
            description=f"The documents of the local folder {folder.name}.",
            type="Retrieval",
            category="t2t",
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10" if list(splits) == ["test"] else "ndcg_at_1",
            **changes,
        )
    # A class, not an instance attribute: MTEB's tasks look their metadata up on the class.
    return type(folder.name, (_LocalTask,), {"metadata": metadata, "splits": splits})()


@dataclass(frozen=True)
class SplitFiles:
    """The three files of one split.

    Attributes:
        corpus: documents.
        queries: queries.
        qrels: judgements of pairs of a query and a document.
    """

    corpus: Path
    queries: Path
    qrels: Path

    @classmethod
    def find(cls, folder: Path) -> "SplitFiles":
        """Find the files in a folder; each may be plain or gzipped.

        Raises:
            UserError: one of them is missing, or there in both forms.
        """
        paths = []
        for name in ("corpus", "queries", "qrels"):
            candidates = [folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"]
            found = [path for path in candidates if path.is_file()]
            if len(found) != 1:
                reason = "both are" if found else "neither is"
                raise UserError(f"give one of {candidates[0]} and {candidates[1].name}: {reason} there")
            paths += found
        return cls(*paths)

    def check(self) -> str:
        """Read and check all rows; only ids are kept in memory.

        Returns:
            The hash of the rows, which does not depend on the compression or on the spacing of the JSON.

        Raises:
            UserError: a row is malformed, duplicated or refers to nothing (file and line are named).
        """
        digest = hashlib.sha256()
        ids: dict[str, set[str]] = {"doc_id": set(), "qid": set()}
        for path, key in ((self.corpus, "doc_id"), (self.queries, "qid")):
            for line, row in _texts(path, key):
                if row["id"] in ids[key]:
                    raise UserError(f"{path}, row {line}: the {key} {row['id']!r} was there before; make it unique")
                ids[key].add(row["id"])
                title = [row["title"]] if row["title"] else []
                digest.update(json.dumps([row["id"], row["text"], *title]).encode())
            if not ids[key]:
                raise UserError(f"{path} is empty: there is nothing to evaluate on")
        found: dict[tuple[str, str], int] = {}
        for line, pair, score in _judgements(self.qrels):
            for key, value, path in zip(("qid", "doc_id"), pair, (self.queries, self.corpus), strict=True):
                if value not in ids[key]:
                    raise UserError(f"{self.qrels}, row {line}: the {key} {value!r} is not in {path}")
            if found.setdefault(pair, score) != score:
                raise UserError(
                    f"{self.qrels}, row {line}: {pair} has the score {found[pair]} before; give one of them"
                )
            digest.update(json.dumps(pair if score == 1 else [*pair, score]).encode())
        if not found:
            raise UserError(f"{self.qrels} is empty: no query has a relevant document")
        if max(found.values()) <= 0:
            raise UserError(f"{self.qrels}: no score is positive, so that no query has a relevant document")
        return digest.hexdigest()

    def load(self, cache_dir: str) -> Any:
        """Load the split for MTEB; the texts are in memory-mapped Arrow files under `cache_dir`."""

        def table(path: Path, key: str) -> Dataset:
            return Dataset.from_generator(
                _generate, gen_kwargs={"path": path, "key": key}, cache_dir=cache_dir, keep_in_memory=False
            )

        relevant: dict[str, dict[str, int]] = {}
        for _, (qid, doc_id), score in _judgements(self.qrels):
            relevant.setdefault(qid, {})[doc_id] = score
        return {
            "corpus": table(self.corpus, "doc_id"),
            "queries": table(self.queries, "qid"),
            "relevant_docs": relevant,
            "top_ranked": None,
        }


def _generate(path: Path, key: str) -> Iterator[dict[str, str]]:
    for _, row in _texts(path, key):
        yield row if key == "doc_id" else {"id": row["id"], "text": row["text"]}


def _texts(path: Path, key: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of each row and its `id`, `text` and `title`, which MTEB puts in front of the text."""
    for line, row in read_jsonl(path, key, "text"):
        place = f"{path}, row {line}"
        _refuse(row, place, *(("instruction",) if key == "doc_id" else ("instruction", "title")))
        title = row.get("title") or ""
        if not isinstance(title, str):
            raise UserError(f"{place}: title is {json.dumps(title)[:40]}, not a string")
        values = {"id": row[key], "text": row["text"], "title": title}
        yield line, {name: text_or_id(value, key if name == "id" else name, place) for name, value in values.items()}


def _judgements(path: Path) -> Iterator[tuple[int, tuple[str, str], int]]:
    """Yield the number of each row, its query and document, and its score."""
    for line, row in read_jsonl(path, "qid", "doc_id"):
        place = f"{path}, row {line}"
        _refuse(row, place, *GRADES)
        score = row.get("score", 1)
        if isinstance(score, bool) or not isinstance(score, int | float) or score != score // 1:
            raise UserError(f"{place}: score is {json.dumps(score)[:40]}, not a whole number")
        qid, doc_id = (text_or_id(row[key], key, place) for key in ("qid", "doc_id"))
        yield line, (qid, doc_id), int(score)


def _refuse(row: dict[str, Any], place: str, *fields: str) -> None:
    """Refuse fields that elsewhere have a meaning which is not honoured here.

    Raises:
        UserError: the row has one of them.
    """
    for field in fields:
        if row.get(field) not in (None, ""):
            advice = "name it score" if field in GRADES else "make it a part of the text, or leave it out"
            raise UserError(f"{place}: the field {field} is not read here; {advice}")


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return split -> folder, in the order of the context lengths; empty if the folder holds no task."""
    if _has_corpus(folder):
        return {"test": folder}
    lengths = [path for path in folder.glob("test_*") if path.name[5:].isdigit() and _has_corpus(path)]
    return {path.name: path for path in sorted(lengths, key=lambda path: int(path.name[5:]))}


def _has_corpus(folder: Path) -> bool:
    return (folder / "corpus.jsonl").is_file() or (folder / "corpus.jsonl.gz").is_file()


def _hub_task(name: str) -> AbsTaskRetrieval:
    try:
        task = mteb.get_task(name)
    except KeyError as error:
        raise UserError(f"MTEB has no task {name!r}: {error.args[0]}; for your own data give --data_dir") from None
    if not isinstance(task, AbsTaskRetrieval):
        raise UserError(f"{name} is no retrieval task; choose from {', '.join(LONGEMBED)}")
    return task


def load(task: AbsTask) -> None:
    """Load the data of a task, from disk or from the Hub.

    Raises:
        UserError: the data cannot be loaded.
    """
    try:
        task.load_data()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None  # the file has changed since it was checked
        raise
    except OSError as error:  # datasets and huggingface_hub raise it offline, and for missing data
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the data of {task.metadata.name} is not in the cache and cannot be loaded from the Hub ({reason}); "
            "connect, or give --data_dir with a local copy"
        ) from None


class _LocalTask(AbsTaskRetrieval):
    """Base of local tasks; a subclass for each task has its files and its metadata."""

    splits: dict[str, SplitFiles]

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        if not self.data_loaded:
            self._arrow_files = TemporaryDirectory(prefix="longembed-eval-")
            self.dataset = {
                "default": {name: files.load(self._arrow_files.name) for name, files in self.splits.items()}
            }
            self.data_loaded = True

    def unload_data(self) -> None:
        super().unload_data()
        self._arrow_files.cleanup()
