"""Retrieval tasks to judge on: MTEB's own, and any folder of JSON lines as a task that MTEB can run.

A local task is a folder `<task>/` with `corpus.jsonl` {doc_id, text}, `queries.jsonl` {qid, text} and `qrels.jsonl`
{qid, doc_id}, each plain or as `.jsonl.gz`: one split, judged by nDCG@10. Or it holds one such folder a context length,
`<task>/test_256/` and so on, as LongEmbed's synthetic tasks do: one split each, judged by nDCG@1.
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
from common.jsonl import read_text_columns

LONGEMBED = (
    "LEMBNarrativeQARetrieval",
    "LEMBQMSumRetrieval",
    "LEMBWikimQARetrieval",
    "LEMBSummScreenFDRetrieval",
    "LEMBNeedleRetrieval",
    "LEMBPasskeyRetrieval",
)


def get_tasks(names: list[str], data_dir: str | None) -> list[AbsTaskRetrieval]:
    """The tasks of these names, checked but not yet in memory.

    Args:
        names: MTEB's names (`data_dir` None) or sub-folders of `data_dir`; empty: the six of LongEmbed, or every task
            folder of `data_dir`.
        data_dir: the folder that holds one folder a task; None: MTEB's tasks on the Hub's data.

    Raises:
        UserError: a task that is not there, or local data that is not as the module says (file and line are named).
    """
    if data_dir is None:
        return [_hub_task(name) for name in names or LONGEMBED]
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"--data_dir {data_dir} is not a folder; give the folder that holds one folder a task")
    there = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and _split_folders(folder))
    for name in names:
        if name not in there:
            raise UserError(f"{root / name} holds no task (corpus.jsonl); {data_dir} has {', '.join(there) or 'none'}")
    if not there:
        raise UserError(f"--data_dir {data_dir} holds no task: no sub-folder has a corpus.jsonl or corpus.jsonl.gz")
    return [local_task(root / name) for name in names or there]


def local_task(folder: Path) -> AbsTaskRetrieval:
    """A folder of JSON lines as an MTEB task; all of it is read and checked once, and none of it kept.

    A folder named like one of MTEB's tasks takes that task's metadata. In any case the dataset's path says `local/` and
    its revision is the data's own hash, so that nobody takes the results for official ones.

    Args:
        folder: the task's folder, laid out as the module says.

    Raises:
        UserError: naming file and line of what is missing, malformed, duplicated, or refers to nothing.
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
    """The three files of one split."""

    corpus: Path
    queries: Path
    qrels: Path

    @classmethod
    def find(cls, folder: Path) -> "SplitFiles":
        """The files in `folder`; each may be plain or gzipped."""
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
        """Read everything once and hold ids alone.

        Returns:
            The hash of the rows, whatever the compression and the JSON's spacing.
        """
        digest = hashlib.sha256()
        ids: dict[str, set[str]] = {"doc_id": set(), "qid": set()}
        for path, key in ((self.corpus, "doc_id"), (self.queries, "qid")):
            for line, (identifier, text) in read_text_columns(path, key, "text"):
                if identifier in ids[key]:
                    raise UserError(f"{path}, row {line}: the {key} {identifier!r} was there before; make it unique")
                ids[key].add(identifier)
                digest.update(json.dumps([identifier, text]).encode())
            if not ids[key]:
                raise UserError(f"{path} is empty: there is nothing to judge on")
        judged = False
        for line, row in read_text_columns(self.qrels, "qid", "doc_id"):
            for key, value, path in zip(("qid", "doc_id"), row, (self.queries, self.corpus), strict=True):
                if value not in ids[key]:
                    raise UserError(f"{self.qrels}, row {line}: the {key} {value!r} is not in {path}")
            digest.update(json.dumps(row).encode())
            judged = True
        if not judged:
            raise UserError(f"{self.qrels} is empty: no query has a relevant document")
        return digest.hexdigest()

    def load(self, cache_dir: str) -> Any:
        """The split as MTEB wants it; texts lie in Arrow files under `cache_dir`, mapped, not in memory."""

        def table(path: Path, key: str) -> Dataset:
            return Dataset.from_generator(
                _generate, gen_kwargs={"path": path, "key": key}, cache_dir=cache_dir, keep_in_memory=False
            )

        relevant: dict[str, dict[str, int]] = {}
        for _, (qid, doc_id) in read_text_columns(self.qrels, "qid", "doc_id"):
            relevant.setdefault(qid, {})[doc_id] = 1
        return {
            "corpus": table(self.corpus, "doc_id"),
            "queries": table(self.queries, "qid"),
            "relevant_docs": relevant,
            "top_ranked": None,
        }


def _generate(path: Path, key: str) -> Iterator[dict[str, str]]:
    for _, (identifier, text) in read_text_columns(path, key, "text"):
        yield {"id": identifier, "text": text}


def _split_folders(folder: Path) -> dict[str, Path]:
    """Split -> folder, in the order of the context lengths; empty where there is no task."""
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
    """Bring a task's data, from disk or from the Hub.

    Raises:
        UserError: the Hub's data cannot be had.
    """
    try:
        task.load_data()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None  # the file was changed after it had been checked
        raise
    except OSError as error:  # what datasets and huggingface_hub raise offline, and for what is not there
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the data of {task.metadata.name} is not in the cache and cannot be loaded from the Hub ({reason}); "
            "connect, or give --data_dir with a local copy"
        ) from None


class _LocalTask(AbsTaskRetrieval):
    """A local folder as an MTEB task; its subclasses name the folder's files and the metadata."""

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
