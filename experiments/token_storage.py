"""Measure what the storage of token vectors costs in quality: nDCG against bytes a document, for every combination.

    python experiments/token_storage.py --model runs/my/final --data_dir tasks --dims 128 64 --pools 2 4 \\
        --precisions int8 binary --settings precision=residual2 dim=64,pool=8 --output_dir runs/token-storage

From one vector a document to all of its tokens: each row is a value of `--model` of eval/mteb_long.py, whose results
and vectors are below `<output_dir>`, so that a killed run goes on. All tokens in float16 come first, and what is kept
in other than float32 is made of them, without reading documents again. `results.json`, `table.md` and `plot.png` are
written after each row, and `pareto` marks the rows that no other row surpasses with as few bytes.
docs/guides/late-interaction.md says what the settings are.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.markdown import Markdown

from common.arguments import parse
from common.encoders.token_settings import TokenSettings
from common.errors import UserError, run
from common.files import atomic_write
from eval.report.figures import plt, save_figure
from eval.report.markdown import markdown_table
from eval.report.results import Score
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval

STYLES = {"float16": "o", "float32": "o", "int8": "s", "binary": "^", "residual1": "v", "residual2": "D", "": "*"}


@dataclass(kw_only=True)
class Arguments:
    """Options of the script."""

    model: str = field(metadata={"help": "folder or Hub id of a model with token vectors"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with one sub-folder for each task"})
    tasks: list[str] = field(default_factory=list, metadata={"help": "tasks, as in eval/mteb_long.py; default: all"})
    output_dir: str = field(metadata={"help": "folder of the results", "output": "folder"})
    dims: list[int] = field(
        default_factory=list,
        metadata={"help": "numbers of dimensions beside all of them; they need a token head", "within": "[1, inf)"},
    )
    pools: list[int] = field(
        default_factory=list, metadata={"help": "tokens per vector beside 1", "within": "[1, inf)"}
    )
    precisions: list[str] = field(
        default_factory=lambda: ["float16", "int8", "binary"],
        metadata={"help": "storage of the vectors, beside all tokens in float16"},
    )
    settings: list[str] = field(
        default_factory=list,
        metadata={
            "help": "further rows, each as after PATH@tokens: in eval/mteb_long.py: dim=64,pool=8,precision=int8"
        },
    )
    weights: str | None = field(default=None, metadata={"help": "none: without the weights of query words"})
    chunks: list[int] = field(
        default_factory=lambda: [254],
        metadata={"help": "tokens of a late chunk, one row each", "within": "[1, inf)"},
    )
    precision: str = field(default="float32", metadata={"help": "precision of the arithmetic, as in eval/mteb_long.py"})
    batch_tokens: int = field(default=16384, metadata={"help": "tokens in one forward pass"})


@dataclass(frozen=True)
class Row:
    """One way to keep documents.

    Attributes:
        label: what is kept.
        precision: of token vectors; empty for other vectors.
        size: bytes a document, the mean over the tasks.
        scores: heading of the column -> main score, times 100.
        pool: tokens per vector.
    """

    label: str
    precision: str
    size: float
    scores: dict[str, float]
    pool: int = 1

    @property
    def score(self) -> float:
        """Mean score over the columns."""
        return mean(self.scores.values())


def combinations(arguments: Arguments) -> dict[str, tuple[str, TokenSettings | None]]:
    """Return what is measured, BM25 and all tokens first.

    Returns:
        Value of `--model` -> its label, and how tokens are kept; None where they are not.

    Raises:
        UserError: `--settings` are none of token vectors.
    """
    model, found = arguments.model, dict[str, tuple[str, TokenSettings | None]]()
    ways = [TokenSettings()]  # the first comes again if it is asked for, and stays the first
    for dim, pool, precision in itertools.product([None, *arguments.dims], [1, *arguments.pools], arguments.precisions):
        ways.append(TokenSettings(dim, pool, precision))
    ways += [TokenSettings.parse(text, f"--settings {text}") for text in arguments.settings]
    for way in ways:
        if not way.weights:
            raise UserError("--settings weights=none: give --weights none, which holds for all rows")
        parts = {"dim": way.dim, "pool": way.pool if way.pool > 1 else None, "precision": way.precision}
        parts["weights"] = arguments.weights
        value = ",".join(f"{name}={part}" for name, part in parts.items() if part is not None)
        kept = [f"{way.dim} dimensions"] if way.dim else [] if way.pool > 1 else ["all tokens"]
        kept += [f"pooled by {way.pool}"] if way.pool > 1 else []
        found[f"{model}@tokens:{value}"] = (", ".join([*kept, way.precision]), way)
    found |= {f"{model}@chunks:{size}": (f"late chunks of {size}", None) for size in arguments.chunks}
    return {"bm25": ("BM25", None)} | found | {f"{model}@vector": ("one vector", None)}


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other row surpasses: none of at most their size has at least their score. By size."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.size, -row.score)):
        if not front or row.score > front[-1].score:
            front.append(row)
    return front


def as_row(scores: Sequence[Score], label: str, settings: TokenSettings | None) -> Row:
    """Gather what was measured of one way to keep documents.

    Args:
        scores: of its tasks.
        label: what is kept.
        settings: how tokens are kept; None: they are not.

    Returns:
        The row.
    """
    sizes = [score.bytes_per_document for score in scores if score.bytes_per_document is not None]
    of_tasks = {score.column: score.value for score in scores}
    return Row(label, settings.precision if settings else "", mean(sizes), of_tasks, settings.pool if settings else 1)


def as_markdown(rows: Sequence[Row]) -> str:
    """Format the table, by size; a Pareto row of the vectors has a mark."""
    best = pareto([row for row in rows if row.label != "BM25"])
    columns = list(rows[0].scores)
    lines = [
        [
            row.label,
            f"{row.size / 1000:,.1f}",
            *(f"{row.scores[column]:.1f}" for column in columns),
            f"{row.score:.1f}",
            "x" if row in best else "",
        ]
        for row in sorted(rows, key=lambda row: row.size)
    ]
    return markdown_table(["kept of a document", "KB", *columns, "mean", "Pareto"], lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw score against bytes a document, with the Pareto front as a line; BM25 is a level.

    The marker is the precision, the colour says how many tokens a vector stands for.

    Args:
        rows: of the table.
        path: the PNG file.
    """
    figure, axis = plt.subplots(figsize=(10, 5.5), layout="constrained")
    points = [row for row in rows if row.label != "BM25"]
    for level in (row for row in rows if row.label == "BM25"):
        axis.axhline(level.score, color="0.5", linestyle="--", label=f"BM25 ({level.score:.1f})", zorder=0)
    pools = sorted({row.pool for row in points})
    colours = {pool: plt.get_cmap("viridis")(0.9 * place / len(pools)) for place, pool in enumerate(pools)}
    for precision in dict.fromkeys(row.precision for row in points):
        own = [row for row in points if row.precision == precision]
        axis.scatter(
            [row.size for row in own],
            [row.score for row in own],
            marker=STYLES[precision],
            s=40 if precision else 90,
            c=[colours[row.pool] for row in own],
        )
        axis.scatter([], [], marker=STYLES[precision], color="0.3", label=precision or "one vector, chunks")
    for pool in pools:
        label = "a vector a token" if pool == 1 else f"a vector for {pool} tokens"
        axis.plot([], [], color=colours[pool], linewidth=5, label=label)
    front = pareto(points)
    axis.plot([row.size for row in front], [row.score for row in front], color="black", linewidth=1, zorder=0)
    for number, row in enumerate(front, 1):
        axis.annotate(str(number), (row.size, row.score), fontsize=8, xytext=(-4, 7), textcoords="offset points")
        axis.plot([], [], linestyle="", label=f"{number}  {row.label}")
    axis.set_xscale("log")
    axis.set_xlabel("bytes a document")
    axis.set_ylabel("score x 100, mean over the tasks")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    save_figure(figure, path)


def measure(arguments: Arguments) -> list[Row]:
    """Evaluate every combination; what has been evaluated before is read from the results.

    Args:
        arguments: parsed command-line options.

    Returns:
        A row for each combination.

    Raises:
        UserError: a setting is not valid for this model, or `evaluate_retrieval` raises.
    """
    if arguments.weights not in (None, "none"):
        raise UserError(f"--weights {arguments.weights}: give none, or leave it out for the model's own weights")
    rows: list[Row] = []
    folder = Path(arguments.output_dir)
    for value, (label, way) in combinations(arguments).items():
        settings = RetrievalArguments(
            model=[value],
            output_dir=str(folder),
            precision=arguments.precision,
            batch_tokens=arguments.batch_tokens,
            tasks=arguments.tasks,
            data_dir=arguments.data_dir,
        )
        rows.append(as_row(evaluate_retrieval(settings), label, way))
        atomic_write(folder / "results.json", json.dumps([asdict(row) for row in rows], indent=1))
        atomic_write(folder / "table.md", as_markdown(rows))
        draw(rows, folder / "plot.png")
    return rows


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    Console().print(Markdown(as_markdown(measure(arguments))))


if __name__ == "__main__":
    run(main)
