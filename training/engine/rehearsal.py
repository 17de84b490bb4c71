"""The token budget and the memory: the heaviest batch first, the largest budget that fits, and an answer if none does.

Any script over training/engine/loop.py takes part whose batches have a method `heaviest()`, the batch that takes the
most memory of all that the data can make, and whose batches have
`largest_chunk()`, the `PackedTexts` that are held at once.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from common.errors import UserError
from common.files import atomic_write
from common.memory import is_out_of_memory, machine_memory
from training.engine.loop import AccumulateGradient, Loop, LoopArguments, restored_random_state
from training.engine.memory import GIB, MemoryEstimate, estimate_memory
from training.engine.run_log import peak_memory_gib

FOUND = "batch_tokens.json"
GRAIN = 64  # a budget is searched for in steps of so many tokens
HOPELESS = 2.0  # an estimate so many times above the limit is not tried: on the CPU the system would stop the process
SPARE = 0.9  # share of the machine's memory that a run on the CPU may take, unless a limit is given


@dataclass
class BudgetArguments:
    """What is tried before the first step, and how much memory there is."""

    rehearse: Literal["first", "only", "never"] = field(
        default="first",
        metadata={
            "help": "first: before the first step the heaviest batch is computed and forgotten, so that memory that "
            "does not suffice shows at once; only: and then the script ends, with the peak memory as a line of JSON"
        },
    )
    find_batch_tokens: bool = field(
        default=False, metadata={"help": "train with the largest --batch_tokens that fits; one process alone"}
    )
    memory_limit_gib: float | None = field(
        default=None,
        metadata={
            "help": "GiB that the run may take; default: the GPU's, or nine tenths of the machine's or container's"
        },
    )

    def __post_init__(self) -> None:
        if self.memory_limit_gib is not None and self.memory_limit_gib <= 0:
            raise UserError(f"--memory_limit_gib {self.memory_limit_gib}: must be more than 0")

    def limit_gib(self, device: torch.device) -> float:
        """GiB that this process may take."""
        if self.memory_limit_gib is not None:
            return self.memory_limit_gib
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory / GIB
        return SPARE * machine_memory() / GIB / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Probe(NamedTuple):
    """What a process that rehearsed with a budget has found.

    Attributes:
        fits: whether memory sufficed.
        tokens: of the largest chunk: less than the budget if the data does not fill it, more if one text does.
        peak_gib: most memory; 0 if it did not suffice.
        answer: the sentence if not.
    """

    fits: bool
    tokens: int = 0
    peak_gib: float = 0.0
    answer: str = ""


class Budget:
    """Memory in one run of training: what is rehearsed, and what is said when memory runs out."""

    def __init__(
        self,
        arguments: BudgetArguments,
        loop: Loop,
        model: nn.Module,
        batches: Any,
        batch_tokens: int,
        predicted_share: float = 0.0,
        length_option: str = "max_length",
    ) -> None:
        """Args:
        model: what trains is chosen already.
        batches: of the loop, with `heaviest()`.
        batch_tokens: tokens whose activations are held at once.
        predicted_share: share of the tokens that a masked-language-model head predicts.
        length_option: of the script: where texts are cut off.
        """
        self.arguments, self.loop, self.model, self.batches = arguments, loop, model, batches
        self.batch_tokens, self.predicted_share, self.length_option = batch_tokens, predicted_share, length_option
        self.tokens = self.longest = batch_tokens  # of the largest chunk, and of its longest text, once they are known
        device = loop.accelerator.device
        self.limit_gib = arguments.limit_gib(device)
        if arguments.memory_limit_gib is not None and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory / GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit_gib / total), device)

    def rehearsal(self, accumulate_gradient: AccumulateGradient) -> Callable[[nn.Module, Any], None] | None:
        """What `Loop.run` calls before the first step: the heaviest batch, forward and backward, leaving no trace.

        It is computed beside AdamW's moments, which a new optimiser does not have yet, and twice if gradients are
        accumulated, so that those of the first time are there. On the CPU the peak is compared with the limit.

        Raises:
            UserError: by what is returned, where memory does not suffice.
            SystemExit: by what is returned, under `--rehearse only`.
        """
        if self.arguments.rehearse == "never":
            return None

        def rehearse(wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            probe = self._try(wrapped, optimizer, accumulate_gradient)
            if self.arguments.rehearse == "only":
                if self.loop.is_main:
                    print(json.dumps(probe._asdict()), flush=True)
                raise SystemExit(0)
            if not probe.fits:
                raise UserError(probe.answer)

        return rehearse

    def _try(self, wrapped: nn.Module, optimizer: Any, accumulate_gradient: AccumulateGradient) -> Probe:
        device = self.loop.accelerator.device
        batch = self.batches.heaviest()
        chunk = batch.largest_chunk()
        self.tokens, self.longest = chunk.input_ids.numel(), int(chunk.max_length_q)
        if device.type != "cuda" and self.estimate(self.tokens).total > HOPELESS * self.limit_gib * GIB:
            return Probe(False, self.tokens, answer=self.answer())
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = []
        try:
            with restored_random_state():
                for parameter in trained:
                    if parameter not in optimizer.state:  # ones: memory that is not written to is not taken on the CPU
                        moments += [torch.ones_like(parameter), torch.ones_like(parameter)]
                for _ in range(min(2, self.loop.arguments.gradient_accumulation_steps)):
                    # FSDP keeps what it has not reduced where `zero_grad` does not reach.
                    accumulate_gradient(wrapped, batch.to(device), 1.0, isinstance(wrapped, FSDPModule))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return Probe(False, self.tokens, answer=self.answer())
        finally:
            optimizer.zero_grad()
        peak = peak_memory_gib(device)
        if device.type != "cuda" and peak > self.limit_gib:
            return Probe(False, self.tokens, peak, self.answer(peak))
        return Probe(True, self.tokens, peak)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Memory that runs out inside is a `UserError` that says what to change."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            answer = self.answer()
        else:
            return
        raise UserError(answer)  # outside of the handler: its traceback would hold on to the activations

    def estimate(self, tokens: int, **changes: bool) -> MemoryEstimate:
        """Memory of a step with chunks of `tokens` tokens, as the run is set up but for the changes."""
        settings = {
            "gradient_checkpointing": self.loop.arguments.gradient_checkpointing,
            "bf16": self.loop.arguments.bf16,
        }
        return estimate_memory(self.model, tokens, predicted=round(self.predicted_share * tokens), **settings | changes)

    def answer(self, peak_gib: float = 0.0) -> str:
        """One sentence: how much is needed, what for, and what each remedy would need."""
        now = self.estimate(self.tokens)
        frozen = not all(parameter.requires_grad for parameter in self.model.parameters())
        half = self.tokens // 2
        remedies = []
        if not self.loop.arguments.gradient_checkpointing:
            remedies.append(("--gradient_checkpointing", self.estimate(self.tokens, gradient_checkpointing=True)))
        if self.longest <= half:  # otherwise one text fills the chunk, and a smaller budget changes nothing
            remedies.append((f"--batch_tokens {half}", self.estimate(half)))
        else:
            limits = [f"--{self.length_option} {half}"] + [f"--batch_tokens {half}"] * (self.batch_tokens > half)
            remedies.append((" ".join(limits), self.estimate(half)))
        if not frozen:
            remedies.append(("--tuning lora", self.estimate(self.tokens, lora=True)))
        found = f"a peak of {peak_gib:.2f} GiB" if peak_gib else "memory did not suffice"
        logits = f", logits {_gib(now.logits)}" if now.logits else ""
        return (
            f"out of memory: {found} where {self.limit_gib:.2f} GiB are, with {self.tokens} tokens at once and texts "
            f"of up to {self.longest}, which are estimated to take {_gib(now.total)} beside the libraries (weights "
            f"{_gib(now.weights)}, gradients and AdamW {_gib(now.gradients + now.moments)}, activations "
            f"{_gib(now.activations)}{logits}); use "
            + " or ".join(f"{option} ({_gib(estimate.total)})" for option, estimate in remedies)
        )


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= 0.01 * GIB else f"{count / 2**20:.2f} MiB"


def chosen_batch_tokens(
    arguments: BudgetArguments,
    batch_tokens: int,
    script: str,
    argv: Sequence[str] | None,
    loop_arguments: LoopArguments,
) -> int:
    """`--batch_tokens`, or under `--find_batch_tokens` the largest that fits, found by `largest_that_fits`.

    Every budget is tried in a fresh process, which runs the script with `--rehearse only`: memory that another try has
    left behind does not count, and a process that is killed is an answer. What is found stands in the output folder,
    where a run that goes on finds it again.

    Args:
        batch_tokens: where the search starts.
        script: its file.
        argv: its arguments; the process's own if None.

    Raises:
        UserError: no budget fits, several processes, or what the script complains of.
    """
    if not arguments.find_batch_tokens or arguments.rehearse == "only":
        return batch_tokens
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--find_batch_tokens works in one process; start the script with python, then launch all processes with "
            "the --batch_tokens that it finds"
        )
    found = Path(loop_arguments.output_dir, FOUND)
    if loop_arguments.resume_from_checkpoint and found.exists():
        return json.loads(found.read_text())["batch_tokens"]
    command = [sys.executable, script, *(sys.argv[1:] if argv is None else argv), "--rehearse", "only"]

    def probe(tokens: int) -> Probe:
        found = _run_probe([*command, "--batch_tokens", str(tokens)])
        outcome = f"fits, at a peak of {found.peak_gib:.2f} GiB" if found.fits else "does not fit"
        print(f"--batch_tokens {tokens} {outcome}", file=sys.stderr, flush=True)
        return found

    best = largest_that_fits(probe, batch_tokens)
    print(f"--batch_tokens {best} is the largest that fits", file=sys.stderr)
    atomic_write(found, json.dumps({"batch_tokens": best}) + "\n")
    return best


def largest_that_fits(probe: Callable[[int], Probe], start: int) -> int:
    """The largest budget that fits, to within an eighth of itself or `GRAIN` tokens.

    Args:
        probe: tries a budget in tokens.
        start: the first try; doubled while it fits, halved while it does not.

    Raises:
        UserError: none fits: the answer of the smallest that was tried.
    """
    low, high, tokens = 0, 0, start
    while not high or high - low > max(GRAIN, low // 8):
        found = probe(tokens)
        if found.fits:
            low = tokens
            if found.tokens < tokens:  # the data does not fill it
                return low
        elif found.tokens > tokens or tokens <= GRAIN:  # it is one text that does not fit
            raise UserError(found.answer)
        else:
            high = tokens
        if not high:
            tokens = 2 * low
        elif not low:
            tokens = max(GRAIN, high // 2)
        else:
            tokens = (low + high) // 2 // GRAIN * GRAIN
            if tokens <= low:
                tokens = (low + high) // 2
    return low


def _run_probe(command: list[str]) -> Probe:
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode == -signal.SIGKILL:  # what Linux does when memory is full
        return Probe(False, answer="out of memory: the system has stopped the process; give a lower --memory_limit_gib")
    lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
    if process.returncode:
        raise UserError(lines[-1].removeprefix("error: "))
    return Probe(**json.loads(process.stdout.strip().splitlines()[-1]))
