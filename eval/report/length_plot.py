"""The plot of retrieval scores: against context length where a task has lengths, as bars where it has none."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from common.errors import UserError
from eval.report.figures import plt, save_figure, use_length_axis
from eval.report.results import Score


def draw_scores(scores: Sequence[Score], path: str | Path, labels: Mapping[str, str] | None = None) -> None:
    """Draw one panel for each task with context lengths, and one with bars for all the other tasks.

    Args:
        scores: what `read_scores` of eval/report/results.py or `evaluate_retrieval` of eval/tasks/evaluation.py
            returns; colours follow the order of the models.
        path: the PNG file, written whole or not at all.
        labels: model name -> its name in the legend; models that are not in it keep their name.

    Raises:
        UserError: there is nothing to draw.
    """
    if not scores:
        raise UserError("there are no scores to draw; run eval/mteb_long.py first")
    models = list(dict.fromkeys(score.model for score in scores))
    with_lengths = list(dict.fromkeys(score.task for score in scores if score.length is not None))
    without_lengths = list(dict.fromkeys(score.task for score in scores if score.length is None))
    panels = len(with_lengths) + bool(without_lengths)
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.2), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], with_lengths, strict=False):
        lengths: set[int] = set()
        for i, model in enumerate(models):
            points = sorted(
                (score.length, score.value)
                for score in scores
                if (score.model, score.task) == (model, task) and score.length is not None
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=f"C{i}")
            lengths |= {length for length, _ in points}
        use_length_axis(axis, lengths, "context length (tokens)")
        axis.set_title(task.removesuffix("Retrieval"))
    if without_lengths:
        _draw_bars(axes[0][-1], [score for score in scores if score.length is None], models, without_lengths)
    for axis in axes[0]:
        axis.set_ylim(0, 105)
        axis.set_ylabel("main score x 100")
        axis.grid(axis="y", alpha=0.3)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(models))]
    names = [(labels or {}).get(model, model) for model in models]
    figure.legend(handles, names, loc="outside lower center", ncols=panels, frameon=False)
    save_figure(figure, path)


def _draw_bars(axis: Axes, scores: Sequence[Score], models: Sequence[str], tasks: Sequence[str]) -> None:
    """Draw one group of bars for each task, with a bar and its number for each model."""
    width = 0.85 / len(models)
    for i, model in enumerate(models):
        values = {score.task: score.value for score in scores if score.model == model}
        places = [n + (i - (len(models) - 1) / 2) * width for n, task in enumerate(tasks) if task in values]
        bars = axis.bar(places, [values[task] for task in tasks if task in values], width, color=f"C{i}")
        axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axis.set_xticks(range(len(tasks)), [task.removesuffix("Retrieval") for task in tasks])
