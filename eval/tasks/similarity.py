"""Tasks of semantic textual similarity: MTEB's own, and any file of sentence pairs as a task that MTEB can run.

A local task is a file `<task>.jsonl` or `<task>.jsonl.gz` of rows {sentence1, sentence2, score} and, optionally,
{subset}.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import mteb
import numpy as np
import torch
from datasets import Dataset
from mteb._create_dataloaders import create_dataloader
from mteb.abstasks import AbsTask
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType
from scipy.stats import spearmanr
from torch.nn.functional import normalize

from common.alignment import alignment, uniformity
from common.errors import UserError
from common.jsonl import read_jsonl, text_or_id

# SimCSE's seven. https://arxiv.org/abs/2104.08821, table 5
TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICK-R")

SENTENCES = ("sentence1", "sentence2")

CLOSE = 4  # of 5: the alignment is measured on pairs with a higher score, as in SimCSE's analysis


class SimilarityTask(AbsTaskSTS):
    """MTEB's task with three more metrics.

    These are `subset_mean_spearman`, `alignment` (of the pairs with a score above 4) and `uniformity` (of all
    sentences). Both sentences of a pair are encoded as documents.
    """

    input1_prompt_type = input2_prompt_type = PromptType("document")

    def _evaluate_subset(self, model: Any, data_split: Dataset, *, encode_kwargs: Any, **kwargs: Any) -> Any:
        first, second = (self._unit_vectors(model, data_split[column], encode_kwargs) for column in SENTENCES)
        cosines = (first * second).sum(dim=1).numpy()
        name, model_name = self.metadata.name, model.mteb_model_meta.name
        if not np.isfinite(cosines).all():
            raise UserError(f"{model_name} gives vectors on {name} that are zero, NaN or infinite: it has no cosines")
        if np.ptp(cosines) < 1e-6:
            raise UserError(
                f"{model_name} gives all pairs of {name} one similarity, so that they have no order: it has collapsed"
            )
        # The vectors are in the cache by now, so nothing is encoded twice.
        scores = dict(super()._evaluate_subset(model, data_split, encode_kwargs=encode_kwargs, **kwargs))
        gold = np.asarray(data_split["score"])
        # A task without subsets is a single subset.
        subsets = np.asarray(data_split["subset"] if "subset" in data_split.column_names else [""] * len(gold))
        parts = [subsets == subset for subset in np.unique(subsets)]
        scores["subset_mean_spearman"] = mean(float(spearmanr(gold[part], cosines[part])[0]) for part in parts)
        close = torch.from_numpy(gold > CLOSE)
        scores["alignment"] = float(alignment(first[close], second[close]))  # NaN without such pairs
        scores["uniformity"] = float(uniformity(torch.cat([first, second]).unique(dim=0)))
        return scores

    def _unit_vectors(self, model: Any, texts: Sequence[str], encode_kwargs: Any) -> torch.Tensor:
        inputs: Any = create_dataloader(
            Dataset.from_dict({"text": list(texts)}), task_metadata=self.metadata, **encode_kwargs
        )
        vectors = model.encode(inputs, task_metadata=self.metadata, prompt_type=PromptType.document, **encode_kwargs)
        return normalize(torch.from_numpy(vectors), dim=1)


def get_tasks(names: Sequence[str], data_dir: str | None) -> list[AbsTask]:
    """Return the tasks of these names.

    Args:
        names: MTEB's names, or names of files of `data_dir` without their suffix; case and hyphens do not matter.
            Empty: all of them.
        data_dir: the folder of files; None: data from the Hub.

    Raises:
        UserError: there is no such task, or a file is malformed.
    """
    if data_dir is None:
        return [_hub_task(name) for name in names or TASKS]
    folder = Path(data_dir)
    files = {_task_name(path): path for path in sorted(folder.glob("*.jsonl*")) if path.suffix in (".jsonl", ".gz")}
    if not files:
        raise UserError(f"--data_dir {data_dir} holds no .jsonl or .jsonl.gz file; give the folder of the pairs")
    chosen = [_canonical(name) for name in names] or list(files)
    for name in chosen:
        if name not in files:
            raise UserError(f"{folder} has no task {name}; it has {', '.join(files)}")
    return [local_task(name, files[name]) for name in chosen]


def local_task(name: str, path: Path) -> AbsTask:
    """Read a file of pairs as an MTEB task.

    The revision of its data is the hash of its rows, so that its results are not mistaken for official ones.

    Args:
        name: of the task; one of MTEB's names gives it that task's metadata.
        path: the file.

    Raises:
        UserError: a row is malformed (file and line are named), or all scores are the same.
    """
    rows: list[dict[str, Any]] = []
    for number, row in read_jsonl(path, *SENTENCES, "score"):
        rows.append(_row(row, f"{path}, row {number}"))
        if rows[-1].keys() != rows[0].keys():
            raise UserError(f"{path}, row {number}: either every row has a subset, or none; the first row differs")
    if len({row["score"] for row in rows}) < 2:
        raise UserError(f"{path}: its {len(rows)} pairs have no two different scores, so that they have no order")
    revision = f"local-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:40]}"
    changes: dict[str, Any] = {"dataset": {"path": f"local/{path.name}", "revision": revision}, "eval_splits": ["test"]}
    try:
        metadata = mteb.get_task(name).metadata.model_copy(update=changes)
    except KeyError:
        metadata = TaskMetadata(
            name=name,
            description=f"The pairs of the local file {path.name}.",
            type="STS",
            category="t2t",
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
            **changes,
        )

    def load_data(self: AbsTask, **kwargs: Any) -> None:
        self.dataset = {"default": {"test": Dataset.from_list(rows)}}
        self.data_loaded = True

    return type(name, (SimilarityTask,), {"metadata": metadata, "load_data": load_data})()


def _row(row: dict[str, Any], where: str) -> dict[str, Any]:
    score = row["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not np.isfinite(score):
        raise UserError(f"{where}: score is {json.dumps(score)[:40]}, not a number")
    columns = (*SENTENCES, *(["subset"] if "subset" in row else []))
    texts = {column: text_or_id(row[column], column, where) for column in columns}
    return texts | {"score": float(score)}


def _hub_task(name: str) -> AbsTask:
    name = _canonical(name)
    if name not in TASKS:
        raise UserError(f"{name} is none of {', '.join(TASKS)}; for your own pairs give --data_dir")
    official = type(mteb.get_task(name))
    return type(name, (SimilarityTask, official), {"metadata": official.metadata})()


def _task_name(path: Path) -> str:
    return _canonical(path.name.split(".jsonl")[0])


def _canonical(name: str) -> str:
    """Return MTEB's spelling of a task's name; an unknown name is returned unchanged."""
    spelled = {task.replace("-", "").lower(): task for task in TASKS}
    return spelled.get(name.replace("-", "").lower(), name)
