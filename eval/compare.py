"""What a teacher and its students cost and keep: size, speed side by side, and scores, in one table and one plot.

    python eval/compare.py TEACHER STUDENT ... --data_dir my_tasks --output_dir runs/compare

The first model is what the others are compared with. Speed is measured as eval/throughput.py does it: every number in a
fresh process, the processes of all models interleaved, so that what else the machine does falls on all alike; scores
are those of eval/mteb_long.py. Both are kept in `<output_dir>`: the same command again measures what is missing, and
with another model beside them the speed of all anew. A model that is not ours is converted first
(`LongEmbedModel.from_encoder`), so that the same code runs them all.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a script draws into a file; it needs no display
import matplotlib.pyplot as plt
from rich.console import Console
from rich.markdown import Markdown

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from common.model_folder import ModelFolder
from common.precision import ENCODER_PRECISIONS, resolve_precision
from eval import mteb_long
from eval.plot import save
from eval.speed.growth import Curve
from eval.speed.measurement import Case, Workload, resolve_device
from eval.throughput import Results, measure_interleaved, parse_lengths, where
from modeling_longembed import LongEmbedConfig


@dataclass
class Arguments(mteb_long.Arguments):
    """What is compared, and on what."""

    precisions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "rows of each model, float32 bfloat16 int8, of its speed and its scores; default: --precision"
        },
    )
    lengths: list[str] = field(
        default_factory=lambda: ["512,4096,8192"],
        metadata={
            "help": "tokens of the documents that speed is measured on; a model leaves out those beyond its context"
        },
    )
    repeats: int = field(default=3, metadata={"help": "fresh processes a number of speed"})
    max_seconds: float = field(default=600.0, metadata={"help": "a process of speed that takes longer is stopped"})
    threads: int = field(default=1, metadata={"help": "CPU threads of speed"})
    device: str = field(default="auto", metadata={"help": "of speed: cpu, cuda; auto: cuda where there is one"})


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        name: as it was given, as far as it tells the models apart.
        parameters: numbers in its weights.
        megabytes: of its weight files.
        speed: length -> tokens a second, the median; lengths beyond its context, or its time, are not there.
        scores: task -> main score, or the one metric that was asked for, times 100; the mean over its splits.
    """

    name: str
    parameters: int
    megabytes: float
    speed: dict[int, float]
    scores: dict[str, float]

    @property
    def mean(self) -> float:
        """Of the scores of all tasks."""
        return statistics.mean(self.scores.values())


def compare(arguments: Arguments) -> list[Row]:
    """Measures and judges what is missing; a row a model, in the order asked for.

    Args:
        arguments: as on the command line.

    Raises:
        UserError: a model that is not there, is there twice, or is none of ours; several metrics.
    """
    if arguments.repeats < 1 or arguments.threads < 1 or arguments.max_seconds <= 0:
        raise UserError("--repeats, --threads and --max_seconds must be positive")
    if len(arguments.metrics) > 1:
        raise UserError(f"--metrics {' '.join(arguments.metrics)}: a mean of several says nothing; give one")
    folders = [ModelFolder.find(path) for path in arguments.model]
    if len({folder.revision for folder in folders}) < len(folders):
        raise UserError("--model: the same model is there twice; give each once")
    precisions = [resolve_precision(each, ENCODER_PRECISIONS) for each in arguments.precisions or [arguments.precision]]
    lengths = parse_lengths(arguments.lengths)
    cases, judged = dict[str, dict[int, Case]](), dict[str, tuple[ModelFolder, Arguments]]()
    for name, path, folder in zip(short_names(arguments.model), arguments.model, folders, strict=True):
        for precision in precisions:
            row = f"{name} ({precision})" if len(precisions) > 1 else name
            cases[row] = _cases(path, folder, lengths, precision, arguments)
            judged[row] = folder, replace(arguments, model=[path], precision=precision)
    # With other models beside it a model is measured anew: numbers of one table come from one run.
    beside = sha256(" ".join(folder.revision for folder in folders).encode()).hexdigest()[:12]
    here = f"{where(resolve_device(arguments.device))}, models {beside}"
    results = Results(Path(arguments.output_dir, "speed.json"))
    found = measure_interleaved(cases, results, here, arguments.repeats, arguments.max_seconds)
    curves = [Curve(name, measurements, {}) for name, measurements in found.items()]
    return [
        Row(
            curve.name,
            folder.parameters,
            sum(file.stat().st_size for file in folder.path.glob("*.safetensors")) / 1e6,
            {length: length / curve.seconds(length) for length in curve.lengths},
            _scores(settings),
        )
        for curve, (folder, settings) in zip(curves, judged.values(), strict=True)
    ]


def short_names(paths: Sequence[str]) -> list[str]:
    """The ends of paths that tell them apart, without the `final` of trainings: `runs/a/final` is `a`."""
    folders = [Path(path) for path in paths]
    parts = [(folder.parent if folder.name == "final" else folder).parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-count:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("--model: the same model is there twice; give each once")


def as_markdown(rows: Sequence[Row]) -> str:
    """The table; beside each speed how many times the first model's it is, and beside the mean what is kept of it."""
    lengths = sorted({length for row in rows for length in row.speed})
    tasks, teacher = list(rows[0].scores), rows[0]
    headings = ["model", "parameters", "MB", *(f"tokens/s at {length:,}" for length in lengths)]
    headings += [*(task.removesuffix("Retrieval") for task in tasks), "mean", "kept"]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for row in rows:
        cells = [row.name, f"{row.parameters / 1e6:.1f} M", f"{row.megabytes:.1f}"]
        for length in lengths:
            speed, first = row.speed.get(length), teacher.speed.get(length)
            times = f" ({speed / first:.2f} x)" if speed and first else ""
            cells.append(f"{speed:,.0f}{times}" if speed else "")
        cells += [f"{row.scores[task]:.1f}" for task in tasks]
        kept = f"{row.mean / teacher.mean:.1%}" if teacher.mean else ""
        lines.append([*cells, f"{row.mean:.1f}", kept])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """One PNG: the mean score against tokens a second, a panel for each length that all models read; areas of the
    points go with the parameters.
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
        axis.set_xlabel(f"tokens a second at {length:,}")
        axis.set_xlim(0, 1.15 * max(row.speed[length] for row in rows))
        axis.margins(y=0.2)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean score x 100")
    if lengths:
        legend = figure.legend(loc="outside lower center", ncols=min(4, len(rows)), frameon=False)
        for handle in legend.legend_handles:
            handle.set_sizes([60])  # type: ignore[union-attr]
    save(figure, path)


def _cases(path: str, folder: ModelFolder, lengths: list[int], precision: str, arguments: Arguments) -> dict[int, Case]:
    try:
        config = LongEmbedConfig.from_pretrained(folder.path)
    except ValueError as error:
        raise UserError(f"--model {path}: {' '.join(str(error).split())}") from None
    if LongEmbedConfig.get_config_dict(folder.path)[0].get("model_type") != LongEmbedConfig.model_type:
        raise UserError(f"--model {path}: is none of ours; convert it with LongEmbedModel.from_encoder first")
    workload = Workload(
        str(folder.path), mode="encoding", dtype=precision, device=arguments.device, threads=arguments.threads
    )
    read = [length for length in lengths if length <= config.max_position_embeddings]
    if not read:
        raise UserError(
            f"--lengths: {path} has a context of {config.max_position_embeddings} tokens; give one up to that"
        )
    return {length: Case(workload, None, "longembed_varlen", length, length) for length in read}


def _scores(arguments: Arguments) -> dict[str, float]:
    """By task, of one model: two folders of one name are one model in a table of scores."""
    settings = {each.name: getattr(arguments, each.name) for each in fields(mteb_long.Arguments)}
    by_task: dict[str, list[float]] = {}
    for score in mteb_long.judge(mteb_long.Arguments(**settings)):
        by_task.setdefault(score.task, []).append(score.value)
    return {task: statistics.mean(values) for task, values in by_task.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """The script; `argv` is the process's own if None."""
    argv = list(sys.argv[1:] if argv is None else argv)
    named = ["--model"] if argv and not argv[0].startswith("-") else []  # the models may come first, as in `cp`
    (arguments,) = parse(Arguments, argv=[*named, *argv])
    rows = compare(arguments)
    table = as_markdown(rows)
    device = where(resolve_device(arguments.device))
    description = f"{device}; {arguments.threads} threads, {' '.join(arguments.precisions) or arguments.precision}"
    atomic_write(Path(arguments.output_dir, "table.md"), f"{table}\n{description}\n")
    draw(rows, Path(arguments.output_dir, "plot.png"))
    Console().print(Markdown(table))
    print(description)


if __name__ == "__main__":
    run(main)
