"""Models that a comparison trains: in a process of their own, stamped with what they are made from, and their cost."""

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


def check_stamp(path: Path, made_by: dict[str, Any]) -> None:
    """Refuses to go on with a model that was made otherwise.

    Args:
        path: the stamp, beside the model; written if it is not there.
        made_by: all that the model depends on.

    Raises:
        UserError: the stamp says something else.
    """
    wanted = json.dumps(made_by, indent=1, sort_keys=True)
    if not path.exists():
        atomic_write(path, wanted)
    elif path.read_text() != wanted:
        raise UserError(
            f"{path.parent} was made from another model, recipe or data; remove it, or name another --output_dir"
        )


def train(script: Path, output_dir: Path, options: Sequence[str]) -> None:
    """A script of training/, going on from the last checkpoint.

    Raises:
        UserError: it failed.
    """
    run_script(script, ["--output_dir", str(output_dir), "--resume_from_checkpoint", "last", *options])


def run_script(script: Path, options: Sequence[str]) -> None:
    """A script in a process of its own, which Ctrl-C does not reach: who started it answers, and kills it.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, str(script), *options]
    # With a timeout it is asked again and again whether the script has ended: after the import of polars, which mteb
    # needs, Ctrl-C does not end a wait, and would be answered when the script is through.
    ended = subprocess.run(command, check=False, timeout=float("inf"), preexec_fn=_ignore_interrupts)
    code = ended.returncode
    if code:
        raise UserError(f"{script.name} {' '.join(options[:2])} ended with exit code {code}; its message stands above")


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_cost(metrics: Path) -> dict[str, Any]:
    """What a run says of itself.

    Args:
        metrics: its metrics.jsonl.

    Returns:
        `tokens`, `minutes` of training alone, `peak_memory_gib`, and `curve`: pairs of tokens and held-out loss.
    """
    steps, tokens, seconds, memory, losses = [0], [0.0], 0.0, 0.0, []
    for _, line in read_jsonl(metrics):
        if "token_count" in line:  # a mean over the steps since the line before
            part = line["token_count"] * (line["step"] - steps[-1])
            steps.append(line["step"])
            tokens.append(tokens[-1] + part)
            seconds += part / line["tokens_per_second"]
            memory = max(memory, line["peak_memory_gib"])
        elif "eval_loss" in line:
            losses.append((line["step"], line["eval_loss"]))
    curve = [[round(float(np.interp(step, steps, tokens))), loss] for step, loss in losses]
    return {"tokens": round(tokens[-1]), "minutes": seconds / 60, "peak_memory_gib": memory, "curve": curve}
