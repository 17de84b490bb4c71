"""The table and the plot of eval/compare.py: what models cost, and how much of the first one's quality they keep."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.report.figures import plt, save_figure
from eval.report.markdown import markdown_table


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        name: the part of its path that distinguishes it from the others.
        parameters: number of its weights.
        megabytes: size of its weight files.
        speed: length in tokens -> median tokens per second; without the lengths beyond its context or the time limit.
        scores: task -> main score or the requested metric, times 100, averaged over the splits.
    """

    name: str
    parameters: int
    megabytes: float
    speed: dict[int, float]
    scores: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean score over the tasks."""
        return statistics.mean(self.scores.values())


def as_markdown(rows: Sequence[Row]) -> str:
    """Format the table.

    Each speed is followed by its ratio to the first model's, and the last column is the share of the first model's
    mean score that a model keeps.
    """
    lengths = sorted({length for row in rows for length in row.speed})
    tasks, teacher = list(rows[0].scores), rows[0]
    headings = ["model", "parameters", "MB", *(f"tokens/s at {length:,}" for length in lengths)]
    headings += [*(task.removesuffix("Retrieval") for task in tasks), "mean", "kept"]
    lines = []
    for row in rows:
        cells = [row.name, f"{row.parameters / 1e6:.1f} M", f"{row.megabytes:.1f}"]
        for length in lengths:
            speed, first = row.speed.get(length), teacher.speed.get(length)
            ratio = f" ({speed / first:.2f} x)" if speed and first else ""
            cells.append(f"{speed:,.0f}{ratio}" if speed else "")
        cells += [f"{row.scores[task]:.1f}" for task in tasks]
        kept = f"{row.mean / teacher.mean:.1%}" if teacher.mean else ""
        lines.append([*cells, f"{row.mean:.1f}", kept])
    return markdown_table(headings, lines)


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """Draw the mean score against tokens per second, one panel for each length that all models read.

    The area of a point grows with the number of parameters.
    """
    lengths = [length for length in sorted(rows[0].speed) if all(length in row.speed for row in rows)]
    panels = max(1, len(lengths))
    figure, axes = plt.subplots(
        1, panels, figsize=(4.6 * panels, 4.2), squeeze=False, layout="constrained", sharey=True
    )
    largest = max(row.parameters for row in rows)
    for axis, length in zip(axes[0], lengths, strict=False):
        for number, row in enumerate(rows):
            size = 30 + 220 * row.parameters / largest
            label = row.name if length == lengths[0] else None
            axis.scatter(row.speed[length], row.mean, s=size, color=f"C{number % 10}", alpha=0.8, label=label)
        axis.set_xlabel(f"tokens per second at {length:,}")
        axis.set_xlim(0, 1.15 * max(row.speed[length] for row in rows))
        axis.margins(y=0.2)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean score x 100")
    if lengths:
        legend = figure.legend(loc="outside lower center", ncols=min(4, len(rows)), frameon=False)
        for handle in legend.legend_handles:
            handle.set_sizes([60])  # type: ignore[union-attr]  # a legend of points
    save_figure(figure, path)
