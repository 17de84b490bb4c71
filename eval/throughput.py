"""Measure speed and memory of attention patterns against length: tokens per second, peak memory, and how both grow.

    python eval/throughput.py --attention_patterns full sliding:window=128 block:size=256 \\
        --lengths 4096,8192,16384,32768,65536 --output_dir runs/throughput

Every number comes from a fresh process (eval/speed/measurement.py says what it measures). The repeats of all patterns
are interleaved, so that other load on the machine affects all of them alike; tables show medians, with half the range
as the spread. Each measurement is written to `<output_dir>/results.json` at once, next to `table.md` and `plot.png`:
the same command again measures only what is missing, or what was measured with another model, other code, other
libraries or on another machine.

A growth exponent is the slope of the least-squares line through log(value) against log(length). The values are the
median seconds of a call, and the peak memory above the base, which is what the process holds when the model is loaded
and the document has not been read. The table also has the slope between the last two lengths alone: costs that do not
grow with length make the first slope smaller than the limit that it approaches.

experiments/training_throughput.py compares a step of training with sentence-transformers.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from common.arguments import parse
from common.encoders.model_folder import ModelFolder
from common.errors import UserError, run
from common.files import atomic_write
from common.patterns import parse_pattern
from common.records import Records
from eval.speed.flops import model_flops, peak_flops
from eval.speed.growth import Curve, as_markdown, draw
from eval.speed.interleaved import measure_interleaved
from eval.speed.lengths import parse_lengths
from eval.speed.measurement import Case, Workload, resolve_device
from eval.speed.process import case_label, describe_environment
from modeling_longembed.attention_longembed import check_kernel


@dataclass
class Arguments:
    """Options of the script, in addition to those of the workload."""

    output_dir: str = field(metadata={"help": "folder of results.json, table.md and plot.png", "output": "folder"})
    attention_patterns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "patterns to compare, each used in all layers: full sliding:window=128,global_tokens=1 "
            "block:size=256; default: the patterns of the model, or full for a random model"
        },
    )
    lengths: list[str] = field(
        default_factory=lambda: ["4096,8192,16384,32768,65536"], metadata={"help": "tokens of the document"}
    )
    attn_implementation: list[str] = field(
        default_factory=lambda: ["longembed_varlen"], metadata={"help": "kernels; every pattern runs on each of them"}
    )
    repeats: int = field(default=3, metadata={"help": "measurements of each number, each in a fresh process"})
    max_seconds: float = field(
        default=600.0,
        metadata={"help": "a process that takes longer is stopped, and longer documents of its pattern are skipped"},
    )
    flops: bool = field(
        default=False, metadata={"help": "on CUDA: also report model FLOP utilisation, for devices with a known peak"}
    )


def compare(arguments: Arguments, workload: Workload) -> list[Curve]:
    """Measure what has not been measured yet.

    Args:
        arguments: parsed command-line options.
        workload: the model, and what is done with it.

    Returns:
        A curve for each pattern on each kernel, in the requested order.

    Raises:
        UserError: a pattern, a length or a combination is not possible; raised before anything is measured.
    """
    lengths = parse_lengths(arguments.lengths)
    if arguments.repeats < 1 or workload.threads < 1 or arguments.max_seconds <= 0:
        raise UserError("--repeats, --threads and --max_seconds must be positive")
    patterns: list[dict | None] = [parse_pattern(text) for text in arguments.attention_patterns]
    rows: dict[str, dict[int, Case]] = {}
    operations: dict[str, dict[int, float]] = {}
    for pattern in patterns or [None]:
        for kernel in arguments.attn_implementation:
            cases = {length: Case(workload, pattern, kernel, length, max(lengths)) for length in lengths}
            name = case_label(cases[lengths[0]])
            rows[name] = cases
            operations[name] = {length: check(case, arguments.flops) for length, case in cases.items()}
    records = Records(Path(arguments.output_dir, "results.json"))
    environment = describe_environment(resolve_device(workload.device))
    if workload.model_name_or_path is not None:
        environment += f", model {ModelFolder.find(workload.model_name_or_path).revision[:12]}"
    found = measure_interleaved(rows, records, environment, arguments.repeats, arguments.max_seconds)
    return [Curve(name, measurements, operations[name]) for name, measurements in found.items()]


def check(case: Case, with_flops: bool) -> float:
    """Check that a case can be measured.

    Returns:
        Floating-point operations of the model, or 0 without `with_flops`.

    Raises:
        UserError: there is no such kernel, pattern or model, or the document is longer than the model's context.
    """
    try:
        check_kernel(case.attn_implementation)
        config = case.config()
    except (ValueError, OSError) as error:
        raise UserError(f"{case_label(case)} at {case.length} tokens: {error}") from None
    device = resolve_device(case.workload.device)
    return float(model_flops(config, case.length, case.workload.mode, device)) if with_flops else 0.0


def describe_workload(workload: Workload) -> str:
    """Return the fields of a workload that differ from their defaults."""
    changed = {name: value for name, value in asdict(workload).items() if value != getattr(Workload(), name)}
    return ", ".join(f"{name}={value}" for name, value in changed.items()) or "default workload"


def main() -> None:
    """Run the script."""
    arguments, workload = parse(Arguments, Workload)
    device, peak = resolve_device(workload.device), None
    if arguments.flops:
        peak = peak_flops(torch.cuda.get_device_name() if device == "cuda" else device, workload.dtype)
    curves = compare(arguments, workload)
    table = as_markdown(curves, parse_lengths(arguments.lengths), peak)
    description = f"{describe_environment(device)}; {describe_workload(workload)}"
    atomic_write(Path(arguments.output_dir, "table.md"), f"{table}\n{description}\n")
    draw(curves, Path(arguments.output_dir, "plot.png"))
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown(table))
    print(description)


if __name__ == "__main__":
    run(main)
