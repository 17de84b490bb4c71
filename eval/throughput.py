"""Speed and memory of attention patterns against length: tokens a second, peak memory, and how both grow.

    python eval/throughput.py --attention_patterns full sliding:window=128 block:size=256 \\
        --lengths 4096,8192,16384,32768,65536 --output_dir runs/throughput

With --training it compares steps of contrastive training with sentence-transformers' instead, see
experiments/training_throughput.py.

Every number comes from a fresh process (eval/speed/measurement.py says what it measures). The processes of the
repeats are interleaved, so that what else the machine does falls on all patterns alike; tables show medians, and half
the range as the spread. What is measured stands in `<output_dir>/results.json` at once, beside `table.md` and
`plot.png`: the same
command again measures only what is missing, or was measured with other code of the model or on another machine.

A growth exponent is the slope of the least-squares line through log(value) against log(length). The values are the
medians of the seconds of a call, and of the peak memory above the base, which is what the process holds when the model
is loaded and the document has not been read. Beside it stands the slope between the last two lengths alone: a part that
does not grow makes the first slope smaller than what it tends to.
"""

import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from common.patterns import parse_pattern
from eval.speed.flops import model_flops, peak_flops
from eval.speed.growth import GB, Curve, as_markdown, draw
from eval.speed.measurement import Case, Measurement, Workload, resolve_device
from experiments.training_throughput import TrainingThroughputArguments, compare_training
from modeling_longembed.attention_longembed import check_kernel

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Arguments:
    """What is compared, how often, and where the results go."""

    output_dir: str = field(metadata={"help": "folder of results.json, table.md and plot.png"})
    attention_patterns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "each for all layers: full sliding:window=128,global_tokens=1 block:size=256; default: the model's "
            "own, of a random model full"
        },
    )
    lengths: list[str] = field(
        default_factory=lambda: ["4096,8192,16384,32768,65536"], metadata={"help": "tokens of the document"}
    )
    attn_implementation: list[str] = field(
        default_factory=lambda: ["longembed_varlen"], metadata={"help": "kernels; every pattern runs on each of them"}
    )
    repeats: int = field(default=3, metadata={"help": "fresh processes a number"})
    max_seconds: float = field(
        default=600.0,
        metadata={
            "help": "a process that takes longer is stopped and said to be over the limit, as are longer lengths"
        },
    )
    flops: bool = field(default=False, metadata={"help": "on CUDA: model FLOP utilisation, of devices that we know"})


def parse_lengths(words: Iterable[str]) -> list[int]:
    """Ascending lengths from words such as `4096,8192`.

    Raises:
        UserError: one of them is no positive whole number, or there is none.
    """
    texts = [text for word in words for text in word.split(",") if text]
    wrong = [text for text in texts if not text.isdecimal() or int(text) < 1]
    if wrong or not texts:
        raise UserError(f"--lengths: {wrong[0] if wrong else ''!r} is no number of tokens; write such as 4096,8192")
    return sorted({int(text) for text in texts})


def label(case: Case) -> str:
    """What the tables call a row: the pattern with its parameters as given, and the kernel unless it is the default."""
    if case.attention_pattern is None:
        name = "own patterns"
    else:
        parameters = [f"{key}={value}" for key, value in case.attention_pattern.items() if key != "type"]
        name = ":".join([case.attention_pattern["type"], *([",".join(parameters)] if parameters else [])])
    return name if case.attn_implementation == "longembed_varlen" else f"{name} ({case.attn_implementation})"


def where(device: str) -> str:
    """Machine and code of a measurement: numbers of others are not comparable."""
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1] if found else name
    code = hashlib.sha256()
    for path in sorted((ROOT / "modeling_longembed").glob("*.py")):
        code.update(path.read_bytes())
    return f"{name}, torch {torch.__version__}, code {code.hexdigest()[:12]}"


def run_process(case: Case, limit: float) -> dict:
    """Measures in a fresh process; the fields of a `Measurement` from `outcome` on.

    Raises:
        UserError: the process failed, and not for want of time or memory.
    """
    threads = str(case.workload.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, "-m", "eval.speed.measurement", json.dumps(asdict(case))]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "over limit"}
    if process.returncode == -signal.SIGKILL:  # what Linux does when memory is full
        return {"outcome": "out of memory"}
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise UserError(f"{label(case)} at {case.length} tokens could not be measured: {last}")
    return json.loads(process.stdout.splitlines()[-1])


class Results:
    """The measurements in `results.json`, which is written whole after each of them."""

    def __init__(self, path: Path):
        self.path = path
        records = json.loads(path.read_text()) if path.exists() else []
        self.measurements = [Measurement(**record | {"case": Case.from_dict(record["case"])}) for record in records]

    def of(self, case: Case, where: str, limit: float) -> list[Measurement]:
        """The measurements of a case, by repeat; one that was stopped counts if it had as much time as `limit`."""
        found = [m for m in self.measurements if (m.case, m.where) == (case, where)]
        return sorted(
            (m for m in found if m.outcome != "over limit" or m.limit >= limit), key=lambda found: found.repeat
        )

    def add(self, measurement: Measurement) -> None:
        """Keeps a measurement, in the place of an older one of the same case and repeat."""
        kept = [m for m in self.measurements if (m.case, m.repeat) != (measurement.case, measurement.repeat)]
        self.measurements = [*kept, measurement]
        atomic_write(self.path, json.dumps([asdict(m) for m in self.measurements], indent=1))


def compare(arguments: Arguments, workload: Workload) -> list[Curve]:
    """Measures what is missing.

    Args:
        arguments, workload: as on the command line.

    Returns:
        A curve for each pattern on each kernel, in the order asked for.

    Raises:
        UserError: a pattern, a length or a combination that cannot be; told before anything is measured.
    """
    lengths = parse_lengths(arguments.lengths)
    if arguments.repeats < 1 or workload.threads < 1 or arguments.max_seconds <= 0:
        raise UserError("--repeats, --threads and --max_seconds must be positive")
    patterns: list[dict | None] = [parse_pattern(text) for text in arguments.attention_patterns]
    device = resolve_device(workload.device)
    grid = [
        [Case(workload, pattern, kernel, length, max(lengths)) for length in lengths]
        for pattern in patterns or [None]
        for kernel in arguments.attn_implementation
    ]
    flops = [{case.length: check(case, arguments.flops) for case in cases} for cases in grid]
    rows = {label(cases[0]): {case.length: case for case in cases} for cases in grid}
    operations = {label(cases[0]): of_row for cases, of_row in zip(grid, flops, strict=True)}
    results = Results(Path(arguments.output_dir, "results.json"))
    found = measure_interleaved(rows, results, where(device), arguments.repeats, arguments.max_seconds)
    return [Curve(name, measurements, operations[name]) for name, measurements in found.items()]


def measure_interleaved(
    rows: Mapping[str, Mapping[int, Case]], results: Results, here: str, repeats: int, max_seconds: float
) -> dict[str, dict[int, list[Measurement]]]:
    """Measures what is missing, a repeat of all rows after the other.

    Args:
        rows: name of a row -> length -> what is measured there.
        results: where measurements are and go.
        here: machine and code.
        repeats: fresh processes a number.
        max_seconds: after which a process is stopped.

    Returns:
        Name of a row -> length -> its measurements, in the order of `rows`.
    """

    def known(name: str) -> dict[int, list[Measurement]]:
        return {length: results.of(case, here, max_seconds)[:repeats] for length, case in rows[name].items()}

    for repeat in range(repeats):
        for length in sorted({length for cases in rows.values() for length in cases}):
            for name, cases in rows.items():
                if length not in cases:
                    continue
                found = known(name)
                if Curve(name, found, {}).failure(length) or repeat in [m.repeat for m in found[length]]:
                    continue
                measurement = Measurement(
                    cases[length], repeat, here, max_seconds, **run_process(cases[length], max_seconds)
                )
                results.add(measurement)
                print(f"repeat {repeat + 1}, {name}, {length} tokens: {told(measurement)}", flush=True)
    return {name: known(name) for name in rows}


def check(case: Case, with_flops: bool) -> float:
    """Operations of the model, 0 if nobody asks. Raises UserError if the case cannot be measured."""
    try:
        check_kernel(case.attn_implementation)
        config = case.config()
    except (ValueError, OSError) as error:
        raise UserError(f"{label(case)} at {case.length} tokens: {error}") from None
    device = resolve_device(case.workload.device)
    return float(model_flops(config, case.length, case.workload.mode, device)) if with_flops else 0.0


def told(measurement: Measurement) -> str:
    """A measurement in a few words."""
    if measurement.outcome != "measured":
        return measurement.outcome
    speed = measurement.case.length / measurement.seconds
    return f"{speed:,.0f} tokens/s, {measurement.peak / GB:.2f} GB"


def main() -> None:
    """The script."""
    arguments, workload, side_by_side = parse(Arguments, Workload, TrainingThroughputArguments)
    if side_by_side.training:
        patterns, lengths = arguments.attention_patterns or ["full"], parse_lengths(arguments.lengths)
        output = Path(arguments.output_dir)
        print(compare_training(side_by_side, patterns, lengths, arguments.repeats, workload.threads, output))
        return
    device, peak = resolve_device(workload.device), None
    if arguments.flops:
        peak = peak_flops(torch.cuda.get_device_name() if device == "cuda" else device, workload.dtype)
    curves = compare(arguments, workload)
    table = as_markdown(curves, parse_lengths(arguments.lengths), peak)
    description = f"{where(device)}; {describe(workload)}"
    atomic_write(Path(arguments.output_dir, "table.md"), f"{table}\n{description}\n")
    draw(curves, Path(arguments.output_dir, "plot.png"))
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown(table))
    print(description)


def describe(workload: Workload) -> str:
    """The settings that are not the default."""
    changed = {name: value for name, value in asdict(workload).items() if value != getattr(Workload(), name)}
    return ", ".join(f"{name}={value}" for name, value in changed.items()) or "default workload"


if __name__ == "__main__":
    run(main)
