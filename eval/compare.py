"""Compare a teacher with its students: size, speed and scores, in one table and one plot.

    python eval/compare.py TEACHER STUDENT ... --data_dir my_tasks --output_dir runs/compare

The other models are compared with the first one. Speed is measured as eval/throughput.py does it: every number in a
fresh process, the repeats of all models interleaved, so that other load on the machine affects all of them alike. The
scores are those of eval/mteb_long.py. Both are kept in `<output_dir>`: the same command again measures what is missing.
With another list of models all speeds are measured anew, so that the numbers of one table come from one run. A model of
another architecture must be converted first (`LongEmbedModel.from_encoder`), so that the same code runs all of them.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from common.arguments import parse
from common.encoders.model_folder import ModelFolder
from common.encoders.precision import ENCODER_PRECISIONS, resolve_precision
from common.errors import UserError, run
from common.files import atomic_write
from common.records import Records
from eval.report.comparison import Row, as_markdown, draw
from eval.speed.growth import Curve
from eval.speed.interleaved import measure_interleaved
from eval.speed.lengths import parse_lengths
from eval.speed.measurement import Case, Workload, resolve_device
from eval.speed.process import describe_environment
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval
from modeling_longembed import LongEmbedConfig


@dataclass
class Arguments(RetrievalArguments):
    """Options of the script."""

    model: list[str] = field(
        metadata={"help": "LongEmbed models, as folders or Hub ids; the others are compared with the first"}
    )
    precisions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "one row of each model for each of float32 bfloat16 int8, in which its speed and its scores are "
            "measured; default: --precision"
        },
    )
    lengths: list[str] = field(
        default_factory=lambda: ["512,4096,8192"],
        metadata={"help": "tokens of the documents for speed; a model skips those beyond its context"},
    )
    repeats: int = field(default=3, metadata={"help": "measurements of each speed, each in a fresh process"})
    max_seconds: float = field(default=600.0, metadata={"help": "a measurement of speed is stopped after this time"})
    threads: int = field(default=1, metadata={"help": "CPU threads of the measurements of speed"})
    device: str = field(default="auto", metadata={"help": "device for speed: cpu, cuda or auto: cuda if available"})


def compare(arguments: Arguments) -> list[Row]:
    """Measure and evaluate what is missing.

    Args:
        arguments: parsed command-line options.

    Returns:
        A row for each model in each precision, in the requested order.

    Raises:
        UserError: a model does not exist, is given twice or is no LongEmbed model; or several metrics are requested.
    """
    if arguments.repeats < 1 or arguments.threads < 1 or arguments.max_seconds <= 0:
        raise UserError("--repeats, --threads and --max_seconds must be positive")
    if len(arguments.metrics) > 1:
        raise UserError(f"--metrics {' '.join(arguments.metrics)}: a mean of several metrics says nothing; give one")
    folders = [ModelFolder.find(path) for path in arguments.model]
    if len({folder.revision for folder in folders}) < len(folders):
        raise UserError("--model: the same model is there twice; give each once")
    precisions = [resolve_precision(each, ENCODER_PRECISIONS) for each in arguments.precisions or [arguments.precision]]
    lengths = parse_lengths(arguments.lengths)
    cases, evaluations = dict[str, dict[int, Case]](), dict[str, tuple[ModelFolder, Arguments]]()
    for name, path, folder in zip(short_names(arguments.model), arguments.model, folders, strict=True):
        for precision in precisions:
            row = f"{name} ({precision})" if len(precisions) > 1 else name
            cases[row] = speed_cases(path, folder, lengths, precision, arguments)
            evaluations[row] = folder, replace(arguments, model=[path], precision=precision)
    # The list of models is a part of the environment: the numbers of one table must come from one run.
    models = sha256(" ".join(folder.revision for folder in folders).encode()).hexdigest()[:12]
    environment = f"{describe_environment(resolve_device(arguments.device))}, models {models}"
    records = Records(Path(arguments.output_dir, "speed.json"))
    found = measure_interleaved(cases, records, environment, arguments.repeats, arguments.max_seconds)
    curves = [Curve(name, measurements, {}) for name, measurements in found.items()]
    return [
        Row(
            curve.name,
            folder.parameters,
            sum(file.stat().st_size for file in folder.path.glob("*.safetensors")) / 1e6,
            {length: length / curve.seconds(length) for length in curve.lengths},
            mean_scores(settings),
        )
        for curve, (folder, settings) in zip(curves, evaluations.values(), strict=True)
    ]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the shortest ends of paths that differ, without the `final` of trainings: `runs/a/final` is `a`.

    Raises:
        UserError: two paths are the same.
    """
    folders = [Path(path) for path in paths]
    parts = [(folder.parent if folder.name == "final" else folder).parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-count:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("--model: the same model is there twice; give each once")


def speed_cases(
    path: str, folder: ModelFolder, lengths: Sequence[int], precision: str, arguments: Arguments
) -> dict[int, Case]:
    """Return what is measured of a model: length in tokens -> case, for the lengths within its context.

    Args:
        path: the model as on the command line.
        folder: its files.
        lengths: requested lengths in tokens.
        precision: of the weights and activations.
        arguments: parsed command-line options.

    Raises:
        UserError: the folder holds no LongEmbed model, or every length is beyond its context.
    """
    try:
        config = LongEmbedConfig.from_pretrained(folder.path)
    except ValueError as error:
        raise UserError(f"--model {path}: {' '.join(str(error).split())}") from None
    if LongEmbedConfig.get_config_dict(folder.path)[0].get("model_type") != LongEmbedConfig.model_type:
        raise UserError(f"--model {path}: is no LongEmbed model; convert it with LongEmbedModel.from_encoder first")
    workload = Workload(
        str(folder.path), mode="encoding", dtype=precision, device=arguments.device, threads=arguments.threads
    )
    readable = [length for length in lengths if length <= config.max_position_embeddings]
    if not readable:
        raise UserError(
            f"--lengths: {path} has a context of {config.max_position_embeddings} tokens; give one up to that"
        )
    return {length: Case(workload, None, "longembed_varlen", length, length) for length in readable}


def mean_scores(arguments: Arguments) -> dict[str, float]:
    """Evaluate one model by itself: task -> score, averaged over the splits.

    By itself, because two folders of the same name and content would be one model in the scores of several.
    """
    settings = {each.name: getattr(arguments, each.name) for each in fields(RetrievalArguments)}
    by_task: dict[str, list[float]] = {}
    for score in evaluate_retrieval(RetrievalArguments(**settings)):
        by_task.setdefault(score.task, []).append(score.value)
    return {task: statistics.mean(values) for task, values in by_task.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with `argv`, or with the options of the process if None."""
    argv = list(sys.argv[1:] if argv is None else argv)
    named = ["--model"] if argv and not argv[0].startswith("-") else []  # the models may come first, as in `cp`
    (arguments,) = parse(Arguments, argv=[*named, *argv])
    rows = compare(arguments)
    table = as_markdown(rows)
    device = describe_environment(resolve_device(arguments.device))
    description = f"{device}; {arguments.threads} threads, {' '.join(arguments.precisions) or arguments.precision}"
    atomic_write(Path(arguments.output_dir, "table.md"), f"{table}\n{description}\n")
    draw(rows, Path(arguments.output_dir, "plot.png"))
    Console().print(Markdown(table))
    print(description)


if __name__ == "__main__":
    run(main)
