"""Tables and plots of experiments/findings.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.report.figures import plt, save_figure
from eval.report.markdown import markdown_table

COST = {"tokens": ",d", "minutes": ".1f", "peak_memory_gib": ".2f"}


def as_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Format a table: for each row its scores, the pairs and tokens that it was trained on, and their cost."""
    columns = list(dict.fromkeys(column for result in results for column in result["scores"]))
    headings = ["", *columns, "steps", "pairs", "tokens", "minutes", "peak GiB"]
    rows = []
    for result in results:
        scores = [_cell(column, result["scores"].get(column)) for column in columns]
        cost = [""] * (len(headings) - len(columns) - 1)
        if result["training"]:
            cost = [f"{result['steps']:,}", f"{result['pairs']:,}"]
            cost += [format(result["training"][name], form) for name, form in COST.items()]
        rows.append([result["row"].replace("_", " "), *scores, *cost])
    return markdown_table(headings, rows)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return format(value, ".3f" if column in ("alignment", "uniformity") else ".1f")


def draw(title: str, columns: Sequence[str], results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the results of one finding.

    Args:
        title: of the figure.
        columns: of the table; each is a panel of bars. Rows with stages are a last panel: similarity by step.
        results: of `findings.compare`.
        path: the PNG file.
    """
    staged = [result for result in results if result["stages"]]
    panels = len(columns) + bool(staged)
    size = (4.6 * panels, 1.3 + 0.34 * max(6, len(results)))
    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    names = [result["row"].replace("_", " ") for result in results]
    for number, (axis, column) in enumerate(zip(axes[0], columns, strict=False)):
        values = [result["scores"].get(column, float("nan")) for result in results]
        colors = ["black" if result["training"] is None else f"C{n % 10}" for n, result in enumerate(results)]
        axis.bar_label(axis.barh(names, values, color=colors), fmt="%.1f", fontsize=8, padding=2)
        axis.invert_yaxis()
        axis.set_title(column)
        axis.margins(x=0.15)
        if number:
            axis.set_yticklabels([])
    if staged:
        for number, result in enumerate(results):
            if result["stages"]:
                points = [(0, results[0]["scores"]), *result["stages"], (result["steps"], result["scores"])]
                line = [(step, scores["Spearman"]) for step, scores in points]
                axes[0][-1].plot(*zip(*line, strict=True), marker="o", color=f"C{number % 10}", label=names[number])
        axes[0][-1].set_title("Spearman during training")
        axes[0][-1].set_xlabel("steps")
        axes[0][-1].legend(fontsize=8)
        axes[0][-1].grid(alpha=0.3)
    figure.suptitle(title)
    save_figure(figure, path)


def draw_plane(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw alignment against uniformity of all rows of all findings (Wang and Isola 2020; Gao et al. 2021, figure 2).

    Args:
        found: finding -> its results.
        path: the PNG file; it is not written without results of textual similarity.
    """
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    lines = []
    for results in found.values():
        for result in results:
            stages = [scores for _, scores in result["stages"]] + [result["scores"]]
            if "Spearman" in result["scores"]:
                points = [[scores[name] for name in ("uniformity", "alignment", "Spearman")] for scores in stages]
                lines.append((result["row"].replace("_", " "), result["training"] is None, np.array(points)))
    if not lines:
        return
    spearman = np.concatenate([line[:, 2] for _, _, line in lines])
    for number, (name, is_start, line) in enumerate(lines):
        uniform, aligned, values = line.T
        axis.plot(uniform, aligned, color="0.8", linewidth=1, zorder=0)
        shape: dict[str, Any] = {"marker": "*", "s": 160} if is_start else {"marker": "o", "s": 45}
        limits = {"vmin": spearman.min(), "vmax": spearman.max()}
        dots = axis.scatter(uniform, aligned, c=values, edgecolors="0.3", linewidths=0.5, **limits, **shape)
        place = (6, 5 if number % 2 else -10)  # neighbours in the plane are often neighbours in the list
        axis.annotate(name, (uniform[-1], aligned[-1]), fontsize=7, xytext=place, textcoords="offset points")
    figure.colorbar(dots, label="Spearman x 100")
    axis.set_xlabel("uniformity (lower: texts are spread more evenly)")
    axis.set_ylabel("alignment (lower: similar texts are closer)")
    axis.grid(alpha=0.3)
    save_figure(figure, path)
