"""Tables and plots of perplexity against context length, for eval/perplexity.py."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.report.figures import plt, save_figure, use_length_axis, use_log_values
from eval.report.markdown import markdown_table


@dataclass(frozen=True)
class Point:
    """The perplexity of one model at one length.

    Attributes:
        model: its label.
        score: the kind of perplexity: `pseudo`, `masked`, `last` or `window`.
        length: tokens that the model reads.
        losses: for each document the sum of the losses (in nats) and the number of the tokens scored.
    """

    model: str
    score: str
    length: int
    losses: list[tuple[float, int]]

    @property
    def perplexity(self) -> float:
        """exp(mean loss) over all scored tokens."""
        return math.exp(sum(loss for loss, _ in self.losses) / sum(tokens for _, tokens in self.losses))

    @property
    def error(self) -> float | None:
        """Standard error over the documents, to first order (delta method); None for a single document."""
        if len(self.losses) < 2:
            return None
        mean, tokens = math.log(self.perplexity), sum(tokens for _, tokens in self.losses)
        deviations = [(loss - mean * own) * len(self.losses) / tokens for loss, own in self.losses]
        return self.perplexity * statistics.stdev(deviations, xbar=0.0) / math.sqrt(len(self.losses))


def as_markdown(points: Sequence[Point], lengths: Sequence[int], titles: dict[str, str]) -> str:
    """Return one Markdown table for each kind of perplexity: a row for each model, a column for each length.

    Args:
        points: what was measured.
        lengths: the columns, in tokens.
        titles: kind of perplexity -> title of its table, in the order of the tables.
    """
    tables = []
    for score in (score for score in titles if score in {point.score for point in points}):
        chosen = [point for point in points if point.score == score]
        cells: dict[str, dict[int, str]] = defaultdict(dict)
        for point in chosen:
            digits = 2 if point.perplexity < 100 else 0
            error = "" if point.error is None else f" ± {point.error:,.{digits}f}"
            cells[point.model][point.length] = f"{point.perplexity:,.{digits}f}{error}"
        rows = [[model, *(row.get(n, "beyond context") for n in lengths)] for model, row in cells.items()]
        counts = {(len(point.losses), sum(tokens for _, tokens in point.losses)) for point in chosen}
        scored = ", ".join(f"{tokens:,} tokens of {documents} documents" for documents, tokens in sorted(counts))
        table = markdown_table(["model", *(f"{n:,}" for n in lengths)], rows)
        tables.append(f"{titles[score]} ({scored})\n\n{table}")
    return "\n".join(tables)


def draw(points: Sequence[Point], path: Path, titles: dict[str, str]) -> None:
    """Draw one panel for each kind of perplexity: perplexity against length, a line for each model.

    Args:
        points: what was measured.
        path: the PNG file, written whole or not at all.
        titles: kind of perplexity -> title of its panel, in the order of the panels.
    """
    scores = [score for score in titles if score in {point.score for point in points}]
    models = list(dict.fromkeys(point.model for point in points))
    figure, axes = plt.subplots(1, len(scores), figsize=(5.5 * len(scores), 4.2), squeeze=False, layout="constrained")
    for axis, score in zip(axes[0], scores, strict=True):
        for i, model in enumerate(models):
            line = sorted(
                (p.length, p.perplexity, p.error or 0.0) for p in points if (p.model, p.score) == (model, score)
            )
            if line:
                axis.errorbar(*zip(*line, strict=True), marker="o", capsize=3, color=f"C{i}")
        use_length_axis(axis, (point.length for point in points if point.score == score), "context length (tokens)")
        use_log_values(axis)
        axis.set_title(titles[score].replace(": ", ":\n"), fontsize=9)
        axis.grid(alpha=0.3)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(models))]
    figure.legend(handles, models, loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)
