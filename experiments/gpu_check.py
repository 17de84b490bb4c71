"""Check everything that needs a GPU, in one call of four minutes.

    python experiments/gpu_check.py --output runs/gpu_check

1. kernels: the kernels for documents of various lengths in half precision against the dense definition in float64,
   forward and gradients. The rule is that of the authors of flash attention: at most `RULE` times the error of the
   dense softmax in the same precision.
2. foreign: `attn_implementation="longembed_varlen"` on models of transformers against their eager attention, same rule.
3. compilation: the packed forward is one graph (`fullgraph=True`), compiled once for all lengths, and the compiled
   model gives the same results as the eager one.
4. flex: flex attention by the same rule, compiled once for each mask.
5. device: every registered pattern gives the same results on the GPU and on the CPU, in training and in inference.
6. speed: tokens per second and model FLOP utilisation (docs/reports/attention-cost.md).
7. memory: a training step on twice the length takes less than `MEMORY_RATIO` times the memory.

Each part runs in a process of its own and is stopped when its budget is used up. Parts that measure run alone, after
the others, which run at the same time: compilers keep the CPU busy and not the GPU. The results are in `checks.json` as
soon as each check ends.

The exit code is 0 if every check passes, 1 if one fails or a part is cut short, 2 without CUDA.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.arguments import parse
from common.conditions import NOT_GIVEN
from common.errors import UserError, one_line, run
from common.files import atomic_write
from experiments.gpu.check import Check
from experiments.gpu.compilation import check_compilation, check_device
from experiments.gpu.cost import check_memory, check_speed
from experiments.gpu.foreign import check_foreign
from experiments.gpu.kernels import check_flex, check_kernels, varlen_kernels

ROOT = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """A part of the checks.

    Attributes:
        checks: yields the checks on a device.
        seconds: budget of its process, on an H100.
        measures: whether it measures time or memory, so that nothing else may run at the same time.
    """

    checks: Callable[[str], Iterator[Check]]
    seconds: float
    measures: bool = False


# In the order of their value. With these budgets all parts end within 240 seconds (`longest_time`).
PARTS = {
    "kernels": Part(check_kernels, 60),
    "foreign": Part(check_foreign, 60),
    "compilation": Part(check_compilation, 150),
    "flex": Part(check_flex, 150),
    "device": Part(check_device, 150),
    "speed": Part(check_speed, 50, measures=True),
    "memory": Part(check_memory, 40, measures=True),
}


@dataclass
class Arguments:
    """Options of the script."""

    output: str = field(metadata={"help": "folder of checks.json", "output": "folder"})
    parts: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "parts to run, in this order", "choices": list(PARTS), "applies": {"part": NOT_GIVEN}},
    )
    budgets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "seconds of a part where they are not the default, such as flex=100 speed=60",
            "applies": {"part": NOT_GIVEN},
        },
    )
    part: str | None = field(
        default=None,
        metadata={
            "help": "run this part in this process, without a budget, and add its checks to checks.json; the exit code "
            "is 0 whether they pass or not",
            "choices": list(PARTS),
        },
    )


def parse_budgets(texts: Sequence[str]) -> dict[str, float]:
    """Return the budget of every part in seconds, given those that differ as `part=seconds`.

    Raises:
        UserError: there is no such part, or the number is not positive.
    """
    budgets = {name: part.seconds for name, part in PARTS.items()}
    for text in texts:
        name, _, seconds = text.partition("=")
        try:
            budgets[name] = float(seconds)
        except ValueError:
            budgets[name] = 0.0
        if name not in PARTS or not budgets[name] > 0:
            raise UserError(f"--budgets: {text!r} is not part=seconds; the parts are {', '.join(PARTS)}")
    return budgets


class Report:
    """The results so far, in a file that every process rewrites after each check.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, Any]:
        """Return the environment, the outcome of each part and the checks."""
        return json.loads(self.path.read_text(encoding="utf-8"))

    def begin(self, environment: str) -> None:
        """Write a report without checks."""
        atomic_write(self.path, json.dumps({"environment": environment, "parts": {}, "checks": []}, indent=1))

    @contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """Give the report for changes, and write it; other processes wait."""
        folder = os.open(self.path.parent, os.O_RDONLY)  # the file itself is replaced, and a lock would go with it
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            found = self.read()
            yield found
            atomic_write(self.path, json.dumps(found, indent=1))
        finally:
            os.close(folder)

    def add(self, check: Check) -> None:
        """Add a check, and print it."""
        with self.changing() as found:
            found["checks"].append(check._asdict())
        print(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}", flush=True)

    def end_part(self, name: str, outcome: str, seconds: float) -> None:
        """Add the outcome of a part, and print it.

        Args:
            name: of the part.
            outcome: how it ended.
            seconds: how long it took.
        """
        with self.changing() as found:
            found["parts"][name] = {"outcome": outcome, "seconds": round(seconds, 1)}
        print(f"[{seconds:4.0f} s] {name}: {outcome}", flush=True)


def run_part(name: str, checks: Iterator[Check], report: Report) -> None:
    """Report the checks of a part; if one of them raises, that is a failed check of its own and the last one.

    Args:
        name: of the part.
        checks: its checks.
        report: where they are added.
    """
    try:
        for check in checks:
            report.add(check)
    except Exception as error:
        report.add(Check(name, False, f"{type(error).__name__}: {one_line(error)}"))


def run_in_time(commands: Mapping[str, Sequence[str]], budgets: Mapping[str, float], report: Report) -> None:
    """Run processes of parts at the same time, and report how each one ended.

    A process is stopped, with all that it started, when its time is over.

    Args:
        commands: name of each part -> words of the command that runs it.
        budgets: name of each part -> seconds.
        report: where the outcomes are added.
    """
    begin = time.monotonic()
    running = {name: subprocess.Popen(command, cwd=ROOT, start_new_session=True) for name, command in commands.items()}
    try:
        while running:
            time.sleep(0.05)
            for name, process in list(running.items()):
                code, seconds = process.poll(), time.monotonic() - begin
                if code is None and seconds < budgets[name]:
                    continue
                outcome = f"ended with exit code {code}" if code else "finished"
                if code is None:
                    outcome = f"cut short after its budget of {budgets[name]:g} s"
                stop_group(running.pop(name))
                report.end_part(name, outcome, seconds)
    finally:
        for process in running.values():
            stop_group(process)


def stop_group(leader: subprocess.Popen) -> None:
    """Kill what is left of a process group, and wait until its leader has ended."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


def groups_of(parts: Sequence[str]) -> list[list[str]]:
    """Return the parts that run at the same time, in the order in which their groups run; empty groups are left out."""
    together = [name for name in parts if not PARTS[name].measures]
    return [group for group in (together, *([name] for name in parts if PARTS[name].measures)) if group]


def longest_time(parts: Sequence[str], budgets: Mapping[str, float]) -> float:
    """Return the seconds after which all parts have ended or were stopped."""
    return sum(max(budgets[name] for name in group) for group in groups_of(parts))


def main() -> None:
    """Run the script.

    Raises:
        UserError: there is no CUDA device.
    """
    (arguments,) = parse(Arguments)
    budgets = parse_budgets(arguments.budgets)
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA device here, and this script checks nothing else; run it on a GPU")
    report = Report(Path(arguments.output, "checks.json").resolve())
    if arguments.part is not None:
        if not report.path.exists():
            report.begin(describe_environment())
        run_part(arguments.part, PARTS[arguments.part].checks("cuda"), report)
    else:
        run_all(arguments, budgets, report)


def describe_environment() -> str:
    """Return the names of the card and of the kernels, and torch's version."""
    kernels = ", ".join(varlen_kernels())
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, kernels {kernels}, flex_attention"


def run_all(arguments: Arguments, budgets: dict[str, float], report: Report) -> None:
    """Run all parts, each in a process of its own, and print what did not pass.

    Args:
        arguments: options of the script.
        budgets: seconds of each part.
        report: where the results go.

    Raises:
        SystemExit: 1 if a check failed, or a part did not finish.
    """
    environment = describe_environment()
    report.begin(environment)
    print(environment, flush=True)
    command = [sys.executable, "-m", "experiments.gpu_check", "--output", str(report.path.parent), "--part"]
    for group in groups_of(arguments.parts):
        run_in_time({name: [*command, name] for name in group}, budgets, report)
    found = report.read()
    failed = [check["name"] for check in found["checks"] if not check["passed"]]
    cut = [f"{name}: {part['outcome']}" for name, part in found["parts"].items() if part["outcome"] != "finished"]
    print(f"{len(found['checks']) - len(failed)} of {len(found['checks'])} checks passed")
    for line in (*failed, *cut):
        print(f"  {line}")
    if failed or cut:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
