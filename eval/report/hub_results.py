"""Results of an evaluation as the Hub reads them, in both of its formats.

- `model-index`, in the metadata of a model card, lists results on any data (huggingface_hub's `EvalResult`).
- `.eval_results/<Task>.yaml`, files of a model's repository, are of benchmarks that are data sets on the Hub
  (`EvalResultEntry`). Tasks are named there as MTEB names them: the task for all of its splits together, and
  `<Task>_<subset>_<split>` for one of them. Results on local files are left out: their data is not on the Hub.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import mteb
from huggingface_hub import EvalResult, EvalResultEntry
from mteb.results import TaskResult

from common.errors import UserError, reading
from eval.report.results import Score, read_costs

LOCAL = "local-"  # what revisions of local data begin with: see eval/tasks/retrieval.py
MTEB = "https://github.com/embeddings-benchmark/mteb"
METRICS = {"ndcg_at_1": "nDCG@1", "ndcg_at_10": "nDCG@10", "cosine_spearman": "Spearman correlation of cosines"}


@dataclass(frozen=True)
class TaskScores:
    """The results of a model on a task.

    Attributes:
        model: its name, without the organisation.
        output: how it was used, such as `one vector` or `a vector a token, precision=binary`; empty for BM25.
        result: MTEB's own.
        metric: MTEB's name of the main score.
        costs: split -> bytes a document and seconds a query, where they are known.
    """

    model: str
    output: str
    result: TaskResult
    metric: str
    costs: Mapping[str, tuple[float, float]]

    @property
    def is_local(self) -> bool:
        """Whether the data of the task are files that are not on the Hub."""
        return self.result.dataset_revision.startswith(LOCAL)

    @property
    def dataset(self) -> str:
        """The Hub id of the data, or `local/<Task>`."""
        if self.is_local:
            return f"local/{self.result.task_name}"
        return mteb.get_task(self.result.task_name).metadata.dataset["path"]

    @property
    def splits(self) -> Iterator[tuple[str, str, float]]:
        """Split, subset, and main score times 100, of each."""
        for split, subsets in self.result.scores.items():
            for found in subsets:
                yield split, found["hf_subset"], round(100 * float(found["main_score"]), 3)


def described(settings: Mapping[str, Any] | None) -> str:
    """Return in words how a model was used, by the settings beside MTEB's results."""
    rest = dict(settings or {})
    words = ["a vector a token"] if rest.pop("output", None) == "tokens" else ["one vector"]
    weight = rest.pop("hybrid_weight", None)
    words += [f"{key.removeprefix('token_')}={value}" for key, value in sorted(rest.items())]
    return ", ".join(words) + (f"; with BM25, {weight} to {1 - float(weight):.3g}" if weight is not None else "")


def read_task_scores(results_dir: str | Path) -> list[TaskScores]:
    """Read results in MTEB's layout.

    Args:
        results_dir: the `output_dir` of an evaluation, or a folder in it.

    Returns:
        The newest results of each output of each model on each task, sorted.

    Raises:
        UserError: there are no results, or a file is damaged.
    """
    found: dict[tuple[str, str, str], TaskScores] = {}
    for meta_file in sorted(Path(results_dir).rglob("model_meta.json")):
        with reading(f"{meta_file} or the results beside it cannot be read; an evaluation writes them again"):
            meta = json.loads(meta_file.read_text(encoding="utf-8"))
            name = str(meta["name"]).rpartition("/")[2]
            model, output = ("BM25", "") if name == "bm25s" else (name, described(meta.get("experiment_kwargs")))
            costs = read_costs(meta_file.parent)
            for file in sorted(set(meta_file.parent.glob("*.json")) - {meta_file}):
                result = TaskResult.from_disk(file)
                own = {split: cost for (task, split), cost in costs.items() if task == result.task_name}
                scores = TaskScores(model, output, result, main_score(result), own)
                before = found.setdefault((model, output, result.task_name), scores)
                if (result.date or datetime.min) > (before.result.date or datetime.min):
                    found[model, output, result.task_name] = scores
    if not found:
        raise UserError(f"{results_dir} holds no results of MTEB; run eval/mteb_long.py first")
    return [found[key] for key in sorted(found)]


def as_scores(scores: Sequence[TaskScores]) -> list[Score]:
    """Return the same for a table, with names of models that readers of a card understand.

    Args:
        scores: of all models that are compared.
    """
    return [
        Score(
            f"{one.model}: {one.output}" if one.output else one.model,
            one.result.task_name,
            split,
            value,
            None,
            *one.costs.get(split, (None, None)),
        )
        for one in scores
        for split, _, value in one.splits
    ]


def main_score(result: TaskResult) -> str:
    """Return MTEB's name of a task's main score: that of its own task, or else of local tasks."""
    try:
        return str(mteb.get_task(result.task_name).metadata.main_score)
    except KeyError:
        return "ndcg_at_10" if list(result.scores) == ["test"] else "ndcg_at_1"


def model_index(scores: Sequence[TaskScores]) -> list[EvalResult]:
    """Return results for the metadata of a model card.

    Args:
        scores: of the model, whatever the output.
    """
    return [
        EvalResult(
            task_type="text-retrieval" if one.metric.startswith("ndcg") else "sentence-similarity",
            dataset_type=one.dataset,
            dataset_name=one.result.task_name + (", local files" if one.is_local else ""),
            dataset_config=subset,
            dataset_split=split,
            dataset_revision=one.result.dataset_revision,
            metric_type=one.metric,
            metric_name=f"{METRICS.get(one.metric, one.metric)} x 100, {one.output}",
            metric_value=value,
            source_name="MTEB",
            source_url=MTEB,
        )
        for one in scores
        for split, subset, value in one.splits
    ]


def benchmark_entries(scores: Sequence[TaskScores]) -> dict[str, list[EvalResultEntry]]:
    """Return results for `.eval_results/`.

    Args:
        scores: of the model, whatever the output.

    Returns:
        Task, which names the file, -> its entries; tasks on local files are left out.
    """
    files: dict[str, list[EvalResultEntry]] = {}
    for one in scores:
        if one.is_local:
            continue
        name, date = one.result.task_name, one.result.date
        values = {f"{name}_{subset}_{split}": value for split, subset, value in one.splits}
        if not one.result.get_missing_evaluations(mteb.get_task(name)):
            values[name] = round(100 * float(one.result.get_score()), 3)
        files.setdefault(name, []).extend(
            EvalResultEntry(
                dataset_id=one.dataset,
                task_id=task,
                value=value,
                dataset_revision=one.result.dataset_revision,
                date=date.date().isoformat() if date else None,
                source_url=MTEB,
                source_name=f"MTEB {one.result.mteb_version}",
                notes=one.output,
            )
            for task, value in values.items()
        )
    return files
