"""What every training script calls: `run_training` rehearses, trains, saves and publishes a `Training`."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.files import atomic_write
from training.engine.loop import Loop
from training.engine.loop_arguments import LoopArguments
from training.engine.memory import Memory, MemoryArguments
from training.engine.record import record
from training.engine.rehearsal import Probe, largest_that_fits, rehearse, run_probe
from training.engine.run_log import METRICS
from training.engine.saving import HubArguments, push, save
from training.engine.training import AnyBatch, AnyModel, Training

FOUND = "batch_tokens.json"
HOW_TO_RESUME = "with --resume_from_checkpoint last the same command goes on from the newest checkpoint"


@dataclass(kw_only=True)
class RunArguments(LoopArguments, MemoryArguments, HubArguments):
    """The options that all training scripts share: the loop, memory, and publishing."""

    def __post_init__(self) -> None:
        LoopArguments.__post_init__(self)
        HubArguments.__post_init__(self)


def find_batch_tokens(
    arguments: RunArguments, batch_tokens: int, script: str, argv: Sequence[str] | None = None
) -> int:
    """Return `--batch_tokens`, or under `--find_batch_tokens` the largest value that fits in memory.

    Every value is tried in a fresh process, which runs the script with `--rehearse only`: memory that an earlier try
    left behind does not count, and a process that the system kills is an answer too. The result is written to the
    output folder, where a resumed run reads it.

    Args:
        arguments: parsed command-line options.
        batch_tokens: where the search starts.
        script: file of the script.
        argv: options of the script; None: those of this process.

    Raises:
        UserError: no value fits, there are several processes, or the script itself fails.
    """
    if not arguments.find_batch_tokens or arguments.rehearse == "only":
        return batch_tokens
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--find_batch_tokens works in one process; start the script with python, then launch all processes with "
            "the --batch_tokens that it finds"
        )
    file = Path(arguments.output_dir, FOUND)
    if arguments.resume_from_checkpoint and file.exists():
        return json.loads(file.read_text())["batch_tokens"]
    command = [sys.executable, script, *(sys.argv[1:] if argv is None else argv), "--rehearse", "only"]

    def probe(tokens: int) -> Probe:
        found = run_probe([*command, "--batch_tokens", str(tokens)])
        outcome = f"fits, at a peak of {found.peak_gib:.2f} GiB" if found.fits else "does not fit"
        print(f"--batch_tokens {tokens} {outcome}", file=sys.stderr, flush=True)
        return found

    best = largest_that_fits(probe, batch_tokens)
    print(f"--batch_tokens {best} is the largest that fits", file=sys.stderr)
    atomic_write(file, json.dumps({"batch_tokens": best}) + "\n")
    return best


def run_training(training: Training[AnyModel, AnyBatch], loop: Loop, arguments: RunArguments) -> AnyModel:
    """Train what a script has built, write the final model to the output folder, and publish it if asked to.

    Args:
        training: what is trained.
        loop: made with `arguments`, before the script built the rest: it sets the random seed.
        arguments: parsed command-line options.

    Returns:
        The trained model; see `Loop.run`.

    Raises:
        UserError: memory does not suffice, the run cannot be resumed, or the loss diverges.
        SystemExit: after the rehearsal, under `--rehearse only`.
    """
    memory = Memory(training, loop, arguments)

    def rehearse_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        probe = rehearse(training, loop, memory, model, optimizer)
        if arguments.rehearse == "only":
            if loop.is_main:
                print(json.dumps(probe._asdict()), flush=True)
            raise SystemExit(0)
        if not probe.fits:
            raise UserError(probe.answer)

    with memory.answering():
        trained = loop.run(training, None if arguments.rehearse == "never" else rehearse_first)
    if loop.is_main:
        final: Any = trained if training.export is None else training.export(trained)
        folder = Path(arguments.output_dir).absolute()
        title, made = arguments.hub_model_id or folder.name, record(training.options, folder / METRICS)
        saved = save(final, folder, title, training.tuning or "full", made)
        if arguments.push_to_hub:
            assert arguments.hub_model_id  # HubArguments has checked it
            push(saved, arguments.hub_model_id, arguments.hub_private_repo)
    return trained
