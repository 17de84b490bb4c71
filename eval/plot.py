"""Draw results: score against context length where a task has lengths, bars where documents have their own.

python eval/plot.py --results_dir runs/eval --output report.png
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a script draws into a file; it needs no display
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from eval.report.results import Score, read_scores


def draw(scores: Sequence[Score], path: str | Path, labels: Mapping[str, str] | None = None) -> None:
    """One PNG with a panel for every task with context lengths and one for all the others together.

    Args:
        scores: what `read_scores` of eval.report.results or `judge` of eval.mteb_long returns; colours follow
            the models' order.
        path: the PNG file, written whole or not at all.
        labels: model name -> what the legend says; models that are not in it keep their name.

    Raises:
        UserError: there is nothing to draw.
    """
    if not scores:
        raise UserError("there are no scores to draw; run eval/mteb_long.py first")
    models = list(dict.fromkeys(score.model for score in scores))
    curves = list(dict.fromkeys(score.task for score in scores if score.length is not None))
    bars = list(dict.fromkeys(score.task for score in scores if score.length is None))
    panels = len(curves) + bool(bars)
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.2), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], curves, strict=False):
        for i, model in enumerate(models):
            points = sorted(
                (score.length, score.value)
                for score in scores
                if (score.model, score.task) == (model, task) and score.length is not None
            )
            axis.plot(*zip(*points, strict=True), marker="o", color=f"C{i}") if points else None
        lengths = sorted({score.length for score in scores if score.task == task and score.length is not None})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, map(str, lengths))
        axis.set_xlabel("context length (tokens)")
        axis.set_title(task.removesuffix("Retrieval"))
    if bars:
        _bars(axes[0][-1], [score for score in scores if score.length is None], models, bars)
    for axis in axes[0]:
        axis.set_ylim(0, 105)
        axis.set_ylabel("main score x 100")
        axis.grid(axis="y", alpha=0.3)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(models))]
    names = [(labels or {}).get(model, model) for model in models]
    figure.legend(handles, names, loc="outside lower center", ncols=panels, frameon=False)
    save(figure, path)


def save(figure: Figure, path: str | Path) -> None:
    """Close a figure into a PNG file, written whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    plt.close(figure)
    atomic_write(path, image.getvalue())


def _bars(axis: plt.Axes, scores: Sequence[Score], models: Sequence[str], tasks: Sequence[str]) -> None:
    """Groups of bars: one group a task, one bar a model, with its number."""
    width = 0.85 / len(models)
    for i, model in enumerate(models):
        values = {score.task: score.value for score in scores if score.model == model}
        places = [n + (i - (len(models) - 1) / 2) * width for n, task in enumerate(tasks) if task in values]
        bars = axis.bar(places, [values[task] for task in tasks if task in values], width, color=f"C{i}")
        axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axis.set_xticks(range(len(tasks)), [task.removesuffix("Retrieval") for task in tasks])


@dataclass
class Arguments:
    """What to draw, and where."""

    results_dir: str = field(metadata={"help": "the output_dir of eval/mteb_long.py"})
    output: str = field(metadata={"help": "the PNG file"})


def main() -> None:
    """The script."""
    (arguments,) = parse(Arguments)
    draw(read_scores(arguments.results_dir), arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    run(main)
