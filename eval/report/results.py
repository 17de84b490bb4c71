"""Results in MTEB's own files: written whole or not at all, read back, and shown as a table."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mteb import ResultCache
from mteb.abstasks import AbsTask
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult
from rich.table import Table

from common.errors import UserError
from common.files import atomic_write


class AtomicResultCache(ResultCache):
    """MTEB's cache of results whose files are whole or absent, whatever kills the process.

    MTEB writes into the file under its final name; a kill leaves half a JSON there, on which the next run fails.
    """

    def save_to_cache(
        self,
        task_result: TaskResult,
        model_name: str | ModelMeta,
        model_revision: str | None = None,
        *,
        encode_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """As in MTEB: `<Task>.json`, `model_meta.json` and `run_settings.jsonl` of one model."""
        final = self.get_task_result_path(task_result.task_name, model_name, model_revision).parent
        with TemporaryDirectory() as temporary:
            beside = ResultCache(temporary)
            folder = beside.get_task_result_path(task_result.task_name, model_name, model_revision).parent
            folder.mkdir(parents=True)
            settings = final / "run_settings.jsonl"
            if settings.is_file():  # MTEB merges into it
                (folder / settings.name).write_bytes(settings.read_bytes())
            beside.save_to_cache(task_result, model_name, model_revision, encode_kwargs=encode_kwargs)
            # The scores go last: where they are, the description of the model is too.
            for file in sorted(folder.iterdir(), key=lambda file: file.name == f"{task_result.task_name}.json"):
                atomic_write(final / file.name, file.read_bytes())

    def is_complete(self, task: AbsTask, meta: ModelMeta) -> bool:
        """Whether all splits of the task are there, of these very data."""
        result = self.load_task_result(task.metadata.name, meta)
        return self.is_current(task, meta) and result is not None and not result.get_missing_evaluations(task)

    def is_current(self, task: AbsTask, meta: ModelMeta) -> bool:
        """Whether what is there, if anything, comes from these very data; MTEB would take a full result of others."""
        result = self.load_task_result(task.metadata.name, meta)
        return result is None or result.dataset_revision == task.metadata.revision

    def scores(self, task: AbsTask, meta: ModelMeta, metrics: Sequence[str] = ()) -> list["Score"]:
        """The scores of the task's splits that are there, in the task's order.

        Args:
            task, meta: what was judged on what.
            metrics: MTEB's names of what to return; none: the task's main score.

        Raises:
            UserError: a metric that the task does not have.
        """
        result = self.load_task_result(task.metadata.name, meta)
        found = result.scores if result else {}
        name = str(meta.model_name_with_experiment)
        scores = []
        for split in task.eval_splits:
            if split in found:
                values = found[split][0]
                for metric in metrics or ["main_score"]:
                    if not isinstance(values.get(metric), float):
                        near = difflib.get_close_matches(metric, values, n=3, cutoff=0)
                        raise UserError(f"{task.metadata.name} has no metric {metric!r}; near it are {', '.join(near)}")
                    title = metric if metrics else None
                    scores.append(Score(name, task.metadata.name, split, 100 * values[metric], title))
        return scores


@dataclass(frozen=True)
class Score:
    """One number of the table: a score of a model on a split, from 0 to 100.

    Attributes:
        model: `org/model`, followed by settings that differ from the default, if any.
        task, split: MTEB's names.
        value: the score times 100.
        metric: MTEB's name of it; None: the task's main score.
    """

    model: str
    task: str
    split: str
    value: float
    metric: str | None = None

    @property
    def length(self) -> int | None:
        """The context length in tokens that the split stands for (`test_4096`), None where documents have their own."""
        tokens = self.split.removeprefix("test_")
        return int(tokens) if tokens.isdigit() else None

    @property
    def column(self) -> str:
        """The heading of its column in a table."""
        parts = (self.task.removesuffix("Retrieval"), self.length, self.metric)
        return " ".join(str(part) for part in parts if part is not None)


def read_scores(results_dir: str | Path) -> list[Score]:
    """All main scores below a folder in MTEB's layout, by model, task, and length; the newest where one is there twice.

    Raises:
        UserError: the folder holds no results.
    """
    newest: dict[tuple[str, str, str], tuple[float, float]] = {}
    for meta_file in sorted(Path(results_dir).rglob("model_meta.json")):
        meta = json.loads(meta_file.read_text())
        model = meta["name"]
        if settings := meta.get("experiment_kwargs"):
            model += f" ({', '.join(f'{key}={value}' for key, value in sorted(settings.items()))})"
        for file in meta_file.parent.glob("*.json"):
            if file != meta_file:
                result = json.loads(file.read_text())
                for split, subsets in result["scores"].items():
                    entry = (result["date"] or 0.0, 100 * subsets[0]["main_score"])
                    key = (model, result["task_name"], split)
                    newest[key] = max(newest.get(key, entry), entry)
    if not newest:
        raise UserError(
            f"{results_dir} holds no results (model_meta.json beside <Task>.json); run eval/mteb_long.py first"
        )
    scores = [Score(*key, value) for key, (_, value) in newest.items()]
    return sorted(scores, key=lambda score: (score.model, score.task, score.length or 0))


def pivot(scores: Sequence[Score]) -> tuple[list[str], dict[str, list[float | None]]]:
    """Scores as headings of columns and one row a model; models and columns in the order of their first score."""
    columns = list(dict.fromkeys(score.column for score in scores))
    rows: dict[str, list[float | None]] = {score.model: [None] * len(columns) for score in scores}
    for score in scores:
        rows[score.model][columns.index(score.column)] = score.value
    return columns, rows


def as_table(scores: Sequence[Score], title: str = "score x 100") -> Table:
    """The table for a terminal; the best of each column is bold."""
    columns, rows = pivot(scores)
    best = [max(score.value for score in scores if score.column == column) for column in columns]
    table = Table(title=title)
    table.add_column("model", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    for model, row in rows.items():
        cells = [_cell(value) for value in row]
        bold = [
            f"[bold]{cell}[/bold]" if value == top else cell for cell, value, top in zip(cells, row, best, strict=True)
        ]
        table.add_row(model, *bold)
    return table


def as_markdown(scores: Sequence[Score]) -> str:
    """The table for a README or a model card."""
    columns, rows = pivot(scores)
    lines = [["model", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[model, *map(_cell, row)] for model, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
