"""Trainings of experiments: each in a process of its own, with a stamp of what its model is made from, and its cost."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import atomic_write
from common.jsonl import read_jsonl


def check_stamp(path: Path, made_by: dict[str, Any], made: Path | None = None) -> None:
    """Write the stamp of what is made, or check that an existing one is the same.

    Args:
        path: the stamp.
        made_by: everything that what is made depends on.
        made: the file or folder that is made; None: the folder of the stamp.

    Raises:
        UserError: what exists was made otherwise.
    """
    stamp = json.dumps(made_by, indent=1, sort_keys=True)
    if not path.exists():
        atomic_write(path, stamp)
    elif path.read_text() != stamp:
        raise UserError(
            f"{made or path.parent} was made from another model, recipe or data; remove it, or name another "
            "--output_dir"
        )


def train(script: Path, output_dir: Path, options: Sequence[str]) -> None:
    """Run a script of training/ from its last checkpoint.

    Args:
        script: the file.
        output_dir: of the training.
        options: further command-line options.

    Raises:
        UserError: it failed.
    """
    run_script(script, ["--output_dir", str(output_dir), "--resume_from_checkpoint", "last", *options])


def run_script(script: Path, options: Sequence[str]) -> None:
    """Run a script in a process of its own, which ignores Ctrl-C: the parent answers it and kills the child.

    Args:
        script: the file.
        options: command-line options.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, str(script), *options]
    # With a timeout Python polls whether the script has ended. Without one, Ctrl-C would not interrupt the wait after
    # polars has been imported (mteb needs it), and would be answered only when the script ends.
    ended = subprocess.run(command, check=False, timeout=float("inf"), preexec_fn=_ignore_interrupts)
    code = ended.returncode
    if code:
        raise UserError(f"{script.name} {' '.join(options[:2])} ended with exit code {code}; its message is above")


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_cost(metrics: Path) -> dict[str, Any]:
    """Read the cost of a training from its log.

    Args:
        metrics: its metrics.jsonl.

    Returns:
        `tokens`, `minutes` of training alone, `peak_memory_gib`, and `curve`: pairs of training tokens and held-out
        loss.
    """
    steps, tokens, seconds, memory, losses = [0], [0.0], 0.0, 0.0, []
    for _, line in read_jsonl(metrics):
        if "token_count" in line:  # averages over the steps since the previous line
            added = line["token_count"] * (line["step"] - steps[-1])
            steps.append(line["step"])
            tokens.append(tokens[-1] + added)
            seconds += added / line["tokens_per_second"]
            memory = max(memory, line["peak_memory_gib"])
        elif "eval_loss" in line:
            losses.append((line["step"], line["eval_loss"]))
    curve = [[round(float(np.interp(step, steps, tokens))), loss] for step, loss in losses]
    return {"tokens": round(tokens[-1]), "minutes": seconds / 60, "peak_memory_gib": memory, "curve": curve}
