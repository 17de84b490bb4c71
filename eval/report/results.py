"""Results in MTEB's own files: written whole or not at all, read back, and formatted as tables."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from mteb import ResultCache
from mteb.abstasks import AbsTask
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult
from rich.table import Table

from common.errors import UserError, reading
from common.files import atomic_write, remove_leftovers, write_jsonl
from common.jsonl import read_jsonl
from eval.models.costs import Costs
from eval.report.markdown import markdown_table

STAMPS = "computed_by.jsonl"  # not .json, which is what MTEB's readers take for results
COSTS = "costs.jsonl"
QUERIES = "queries.jsonl"
_COST_FIELDS = ("task", "split", "bytes_per_document", "seconds_per_query")
_QUERY_FIELDS = ("task", "split", "scores")


class AtomicResultCache(ResultCache):
    """MTEB's cache of results, with files that are whole or absent even if the process is killed.

    MTEB writes to the final name; a kill would leave half a JSON file there, on which the next run would fail. Nor does
    MTEB ask what has computed the results that it finds: here that is written beside them, into
    `computed_by.jsonl`, and results of other code are not current. What retrieval costs is in `costs.jsonl`, and what
    each query scores in `queries.jsonl`.

    Args:
        path: the folder of the results.
        computed_by: what computes the results of the model that is evaluated; see `common.provenance`.

    Attributes:
        costs: of the task that is evaluated, for each of its splits; the model fills it in.
        query_scores: main score of each query of that task: split -> query id -> score; see `noting_query_scores`.
    """

    def __init__(self, path: str | Path, computed_by: Mapping[str, Any] | None = None):
        super().__init__(path)
        self.computed_by = dict(computed_by or {})
        self.costs: Mapping[str, Costs] = {}
        self.query_scores: Mapping[str, Mapping[str, float]] = {}

    def save_to_cache(
        self,
        task_result: TaskResult,
        model_name: str | ModelMeta,
        model_revision: str | None = None,
        *,
        encode_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `<Task>.json`, `model_meta.json` and `run_settings.jsonl` of one model, as MTEB does.

        Args:
            task_result: the scores.
            model_name: name or description of the model.
            model_revision: its revision, unless the description has it.
            encode_kwargs: settings of the encoding, which MTEB records.
        """
        final = self.get_task_result_path(task_result.task_name, model_name, model_revision).parent
        with TemporaryDirectory() as temporary:
            temporary_cache = ResultCache(temporary)
            folder = temporary_cache.get_task_result_path(task_result.task_name, model_name, model_revision).parent
            folder.mkdir(parents=True)
            settings = final / "run_settings.jsonl"
            if settings.is_file():  # MTEB merges into it
                (folder / settings.name).write_bytes(settings.read_bytes())
            temporary_cache.save_to_cache(task_result, model_name, model_revision, encode_kwargs=encode_kwargs)
            # The scores are moved last: if they are there, so is the description of the model.
            for file in sorted(folder.iterdir(), key=lambda file: file.name == f"{task_result.task_name}.json"):
                atomic_write(final / file.name, file.read_bytes())
        task, costs, queries = task_result.task_name, read_costs(final), read_queries(final)
        for split, found in self.costs.items():
            costs[task, split] = (found.bytes_per_document, found.seconds_per_query)
        if costs:
            write_jsonl(final / COSTS, [dict(zip(_COST_FIELDS, (*k, *v), strict=True)) for k, v in costs.items()])
        queries |= {(task, split): scores for split, scores in self.query_scores.items()}
        if queries:
            write_jsonl(final / QUERIES, [dict(zip(_QUERY_FIELDS, (*k, v), strict=True)) for k, v in queries.items()])
        # After the scores: a kill between the two leaves results that are not current, and computed again.
        stamps = self._stamps(final) | {task: self.computed_by}
        if rows := [{"task": name, "computed_by": by} for name, by in sorted(stamps.items()) if by]:
            write_jsonl(final / STAMPS, rows)

    def _stamps(self, folder: Path) -> dict[str, Any]:
        """Return what has computed the results in a folder: task -> `computed_by`."""
        path = folder / STAMPS
        rows = read_jsonl(path, "task", "computed_by") if path.is_file() else ()
        return {row["task"]: row["computed_by"] for _, row in rows}

    def is_complete(self, task: AbsTask, meta: ModelMeta) -> bool:
        """Return whether there are results of all splits of the task that are current."""
        folder = self.get_task_result_path(task.metadata.name, meta).parent
        if folder.is_dir():
            remove_leftovers(folder)  # MTEB writes a result more than once, and the first time may have been enough
        result = self.load_task_result(task.metadata.name, meta)
        return self.is_current(task, meta) and result is not None and not result.get_missing_evaluations(task)

    def is_current(self, task: AbsTask, meta: ModelMeta) -> bool:
        """Return whether existing results, if any, come from the same data and were computed in the same way."""
        result = self.load_task_result(task.metadata.name, meta)
        if result is None:
            return True
        found = self._stamps(self.get_task_result_path(task.metadata.name, meta).parent).get(task.metadata.name, {})
        return result.dataset_revision == task.metadata.revision and found == self.computed_by

    def scores(self, task: AbsTask, meta: ModelMeta, metrics: Sequence[str] = ()) -> list["Score"]:
        """Return the scores of the splits that have results, in the order of the task's splits.

        Args:
            task: the task.
            meta: MTEB's description of the model.
            metrics: MTEB's names of the metrics; none: the task's main score.

        Raises:
            UserError: the task does not have a metric.
        """
        result = self.load_task_result(task.metadata.name, meta)
        found = result.scores if result else {}
        name = str(meta.model_name_with_experiment)
        folder = self.get_task_result_path(task.metadata.name, meta).parent
        costs, queries = read_costs(folder), read_queries(folder)
        scores = []
        for split in task.eval_splits:
            if split in found:
                values = found[split][0]
                for metric in metrics or ["main_score"]:
                    if not isinstance(values.get(metric), float):
                        near = difflib.get_close_matches(metric, values, n=3, cutoff=0)
                        raise UserError(f"{task.metadata.name} has no metric {metric!r}; near it are {', '.join(near)}")
                    title = metric if metrics else None
                    size, seconds = costs.get((task.metadata.name, split), (None, None))
                    is_main = metric in ("main_score", task.metadata.main_score)
                    of_queries = queries.get((task.metadata.name, split), {}) if is_main else {}
                    of_queries = {query: 100 * score for query, score in of_queries.items()}
                    scores.append(
                        Score(name, task.metadata.name, split, 100 * values[metric], title, size, seconds, of_queries)
                    )
        return scores


def read_costs(folder: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the costs beside results: (task, split) -> bytes per document, seconds per query.

    Args:
        folder: of the results of one model; without a file of costs, nothing is known.
    """
    path = folder / COSTS
    rows = read_jsonl(path, *_COST_FIELDS) if path.is_file() else ()
    found = (tuple(row[name] for name in _COST_FIELDS) for _, row in rows)
    return {(task, split): (size, seconds) for task, split, size, seconds in found}


def read_queries(folder: Path) -> dict[tuple[str, str], Mapping[str, float]]:
    """Return the main scores of queries beside results: (task, split) -> query id -> score.

    Args:
        folder: of the results of one model; without a file of such scores, nothing is known.
    """
    path = folder / QUERIES
    rows = read_jsonl(path, *_QUERY_FIELDS) if path.is_file() else ()
    return {(row["task"], row["split"]): row["scores"] for _, row in rows}


@dataclass(frozen=True)
class Score:
    """The score of a model on a split.

    Attributes:
        model: `org/model`, followed by settings that differ from the default, if any, and by the revision where two
            models would have the same name otherwise.
        task: MTEB's name of the task.
        split: MTEB's name of the split.
        value: the score times 100.
        metric: MTEB's name of the metric; None: the task's main score.
        bytes_per_document: what is kept of a document for the search; None: not known.
        seconds_per_query: time to compare a query with all documents; None: not known.
        queries: query id -> its score times 100, of which `value` is the mean; empty: not known.
    """

    model: str
    task: str
    split: str
    value: float
    metric: str | None = None
    bytes_per_document: float | None = None
    seconds_per_query: float | None = None
    queries: Mapping[str, float] = field(default_factory=dict, repr=False, hash=False)

    @property
    def length(self) -> int | None:
        """Context length in tokens of a split such as `test_4096`; None if its documents have their natural lengths."""
        tokens = self.split.removeprefix("test_")
        return int(tokens) if tokens.isdigit() else None

    @property
    def column(self) -> str:
        """Heading of the score's column in tables."""
        parts = (self.task.removesuffix("Retrieval"), self.length, self.metric)
        return " ".join(str(part) for part in parts if part is not None)


def read_scores(results_dir: str | Path) -> list[Score]:
    """Read all main scores below a folder in MTEB's layout.

    Args:
        results_dir: the `output_dir` of eval/mteb_long.py, or a folder in it.

    Returns:
        The scores, sorted by model, task and length; the newest one if there are several of the same split. Models that
        share a name are told apart by their revisions.

    Raises:
        UserError: the folder holds no results.
    """
    newest: dict[tuple[tuple[str, str], str, str], tuple[float, float]] = {}
    for meta_file in sorted(Path(results_dir).rglob("model_meta.json")):
        for file in meta_file.parent.glob("*.json"):
            if file != meta_file:
                with reading(f"{meta_file} or {file.name} is no result of MTEB, which an evaluation writes again"):
                    for key, entry in read_result(meta_file, file):
                        newest[key] = max(newest.get(key, entry), entry)
    if not newest:
        raise UserError(
            f"{results_dir} holds no results (model_meta.json next to <Task>.json); run eval/mteb_long.py first"
        )
    models = list(dict.fromkeys(model for model, _, _ in newest))
    names = dict(zip(models, distinct_names(models), strict=True))
    scores = [Score(names[model], task, split, value) for (model, task, split), (_, value) in newest.items()]
    return sorted(scores, key=lambda score: (score.model, score.task, score.length or 0))


def read_result(meta_file: Path, file: Path) -> Iterator[tuple[tuple[tuple[str, str], str, str], tuple[float, float]]]:
    """Read the main scores of one model on one task.

    Args:
        meta_file: MTEB's description of the model.
        file: its results.

    Yields:
        For each split ((name and revision of the model, task, split), (date, score times 100)).
    """
    meta, result = (json.loads(path.read_text(encoding="utf-8")) for path in (meta_file, file))
    model = str(meta["name"])
    if settings := meta.get("experiment_kwargs"):
        model += f" ({', '.join(f'{key}={value}' for key, value in sorted(settings.items()))})"
    for split, subsets in result["scores"].items():
        entry = (float(result["date"] or 0.0), 100 * float(subsets[0]["main_score"]))
        yield ((model, str(meta.get("revision") or "")), str(result["task_name"]), split), entry


def distinct_names(models: Sequence[tuple[str, str]]) -> list[str]:
    """Return names that tell models apart.

    Args:
        models: name and revision of each; the folders of two trainings have one name, such as `final`.

    Returns:
        For each model its name, followed by the start of the revision where another one has the same name.
    """
    revisions: dict[str, set[str]] = {}
    for name, revision in models:
        revisions.setdefault(name, set()).add(revision)
    return [f"{name} {revision[:7]}" if len(revisions[name]) > 1 else name for name, revision in models]


def pivot(scores: Sequence[Score]) -> tuple[list[str], dict[str, list[float | None]]]:
    """Arrange scores as a table.

    Returns:
        The headings of the columns, and for each model its row, in the order of their first scores.
    """
    columns = list(dict.fromkeys(score.column for score in scores))
    rows: dict[str, list[float | None]] = {score.model: [None] * len(columns) for score in scores}
    for score in scores:
        rows[score.model][columns.index(score.column)] = score.value
    return columns, rows


def cost_columns(scores: Sequence[Score]) -> tuple[list[str], dict[str, list[str]]]:
    """Format what the models cost, as means over the splits.

    Returns:
        The headings of the columns, and for each model its cells; no columns if nothing is known of any model.
    """
    headings, cells = ["KB a document", "ms a query"], dict[str, list[str]]()
    for model in dict.fromkeys(score.model for score in scores):
        own = [score for score in scores if score.model == model and score.bytes_per_document is not None]
        kilobytes = [score.bytes_per_document / 1000 for score in own if score.bytes_per_document is not None]
        milliseconds = [score.seconds_per_query * 1000 for score in own if score.seconds_per_query is not None]
        cells[model] = [_rounded(mean(values)) if values else "" for values in (kilobytes, milliseconds)]
    known = any(any(row) for row in cells.values())
    return (headings, cells) if known else ([], {model: [] for model in cells})


def as_table(scores: Sequence[Score], title: str = "score x 100") -> Table:
    """Format a table for the terminal, with the best score of each column in bold."""
    columns, rows = pivot(scores)
    headings, costs = cost_columns(scores)
    best = [max(score.value for score in scores if score.column == column) for column in columns]
    table = Table(title=title)
    table.add_column("model", overflow="fold")
    for column in [*columns, *headings]:
        table.add_column(column, justify="right")
    for model, row in rows.items():
        cells = [_cell(value) for value in row]
        bold = [
            f"[bold]{cell}[/bold]" if value == top else cell for cell, value, top in zip(cells, row, best, strict=True)
        ]
        table.add_row(model, *bold, *costs[model])
    return table


def as_markdown(scores: Sequence[Score]) -> str:
    """Format a Markdown table, for a README or a model card."""
    columns, rows = pivot(scores)
    headings, costs = cost_columns(scores)
    lines = [[model, *map(_cell, row), *costs[model]] for model, row in rows.items()]
    return markdown_table(["model", *columns, *headings], lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _rounded(value: float) -> str:
    """Format a positive number with three digits: 0.00512, 1.54, 10,600."""
    digits = f"{value:.3g}"
    return f"{float(digits):,.0f}" if value >= 100 else f"{float(digits):.15g}"
