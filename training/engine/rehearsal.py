"""The heaviest batch first, and the search for the largest `--batch_tokens` that fits in memory."""

import json
import signal
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from common.errors import UserError
from common.memory import is_out_of_memory
from training.engine.checkpoints.random_state import restored_random_state
from training.engine.loop import Loop
from training.engine.memory import Memory
from training.engine.run_log import peak_memory_gib
from training.engine.training import Training

STEP = 64  # the search stops at differences of so many tokens


class Probe(NamedTuple):
    """The result of rehearsing the heaviest batch with one `--batch_tokens`.

    Attributes:
        fits: whether memory sufficed.
        tokens: number of tokens of the largest chunk: fewer than `--batch_tokens` if the data does not fill it, more if
            a single text is longer.
        peak_gib: peak memory in GiB; 0 if memory did not suffice.
        answer: the error message if it did not.
    """

    fits: bool
    tokens: int = 0
    peak_gib: float = 0.0
    answer: str = ""


def rehearse(
    training: Training[Any, Any], loop: Loop, memory: Memory, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Probe:
    """Compute the gradient of the heaviest batch and discard it, leaving model, optimiser and random numbers unchanged.

    AdamW's moments, which a new optimiser does not have yet, are allocated meanwhile. If gradients are accumulated, the
    batch is computed twice, so that the gradients of the first time are there. On the CPU, which has no limit of its
    own, the peak is compared with the limit.

    Args:
        training: its batches give the heaviest one.
        loop: of the run.
        memory: the limit.
        model: as the loop wraps it.
        optimizer: of the run.

    Returns:
        Whether memory sufficed, and the peak.
    """
    device, batch = loop.device, training.batches.heaviest()
    chunk = batch.largest_chunk()
    memory.note(chunk)
    tokens = chunk.input_ids.numel()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = []
    try:
        with restored_random_state():
            for parameter in trained:
                if parameter not in optimizer.state:  # ones, because the CPU does not take memory that is only zero
                    moments += [torch.ones_like(parameter), torch.ones_like(parameter)]
            for _ in range(min(2, loop.arguments.gradient_accumulation_steps)):
                # FSDP keeps gradients that it has not reduced where `zero_grad` does not reach.
                training.gradient(model, batch.to(device), 1.0, isinstance(model, FSDPModule))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Probe(False, tokens, answer=memory.answer())
    finally:
        optimizer.zero_grad()
    peak = peak_memory_gib(device)
    if device.type != "cuda" and peak > memory.limit_gib:
        return Probe(False, tokens, peak, memory.answer(peak))
    return Probe(True, tokens, peak)


def largest_that_fits(probe: Callable[[int], Probe], start: int) -> int:
    """Return the largest number of tokens that fits, to within an eighth of itself or `STEP` tokens.

    Args:
        probe: tries a number of tokens.
        start: the first try; doubled as long as it fits, halved as long as it does not.

    Raises:
        UserError: nothing fits; the message is that of the smallest try.
    """
    low, high, tokens = 0, 0, start
    while not high or high - low > max(STEP, low // 8):
        found = probe(tokens)
        if found.fits:
            low = tokens
            if found.tokens < tokens:  # the data does not fill it
                return low
        elif found.tokens > tokens or tokens <= STEP:  # a single text does not fit
            raise UserError(found.answer)
        else:
            high = tokens
        if not high:
            tokens = 2 * low
        elif not low:
            tokens = max(STEP, high // 2)
        else:
            tokens = (low + high) // 2 // STEP * STEP
            if tokens <= low:
                tokens = (low + high) // 2
    return low


def run_probe(command: list[str]) -> Probe:
    """Run a script that rehearses, and return what it found.

    Args:
        command: a script with `--rehearse only`.

    Raises:
        UserError: the script failed for another reason than memory.
    """
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode == -signal.SIGKILL:  # what Linux does when memory is full
        return Probe(False, answer="out of memory: the system has stopped the process; give a lower --memory_limit_gib")
    lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
    if process.returncode:
        raise UserError(lines[-1].removeprefix("error: "))
    return Probe(**json.loads(process.stdout.strip().splitlines()[-1]))
