"""Tables and heat maps of pass-key accuracy by length and depth, for eval/passkey.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.report.figures import plt, save_figure
from eval.report.markdown import markdown_table


@dataclass(frozen=True)
class Cell:
    """The accuracy of one model at one length and depth.

    Attributes:
        model: its label.
        length: tokens of a document.
        depth: of the pass key, 0 (start) to 1 (end).
        accuracy: 0 to 1.
    """

    model: str
    length: int
    depth: float
    accuracy: float


def grids(cells: Sequence[Cell]) -> Iterator[tuple[str, list[int], list[float], np.ndarray]]:
    """Arrange the cells as one matrix for each model.

    Yields:
        The model's label, the lengths, the depths, and accuracies `(depths, lengths)` that are NaN where the length is
        beyond the model's context.
    """
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    for model in dict.fromkeys(cell.model for cell in cells):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            if cell.model == model:
                grid[depths.index(cell.depth), lengths.index(cell.length)] = cell.accuracy
        yield model, lengths, depths, grid


def as_markdown(cells: Sequence[Cell]) -> str:
    """Format a table of each model: accuracy in percent, a row for each depth and their mean, a column per length."""
    tables = []
    for model, lengths, depths, grid in grids(cells):
        rows = [*zip((f"{depth:.0%}" for depth in depths), grid, strict=True), ("mean", grid.mean(0))]
        lines = [[name, *("" if np.isnan(value) else f"{value:.0%}" for value in row)] for name, row in rows]
        table = markdown_table(["depth", *(f"{length:,}" for length in lengths)], lines, left=0)
        tables.append(f"{model}\n\n{table}")
    return "\n".join(tables)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw one heat map for each model: lengths across, depths down, accuracy as colour and in percent."""
    models = list(grids(cells))
    width = max(3.2, 0.6 * len(models[0][1]) + 1.2)
    size = (width * len(models) + 0.8, 3.6)
    figure, axes = plt.subplots(1, len(models), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for axis, (model, lengths, depths, grid) in zip(axes[0], models, strict=True):
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value):
                color = "white" if value > 0.7 else "black"
                axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_xlabel("length (tokens)")
        axis.set_title(model, fontsize=9)
    axes[0][0].set_ylabel("depth of the pass key")
    figure.colorbar(image, ax=axes[0], label="accuracy")
    save_figure(figure, path)
