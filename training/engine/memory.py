"""How much memory a run may take, and the answer to memory that runs out."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from common.errors import UserError
from common.memory import is_out_of_memory, machine_memory
from training.engine.checkpoints.resuming import change_settings
from training.engine.loop import Loop
from training.engine.training import PackedTokens, Training

GIB = 2**30
CPU_SHARE = 0.9  # of the machine's memory that a run on the CPU may take if no limit is given


@dataclass(kw_only=True)
class MemoryArguments:
    """How much memory there is, and what is tried before the first step."""

    rehearse: Literal["first", "only", "never"] = field(
        default="first",
        metadata={
            "help": "first: compute the heaviest batch before the first step and discard the result, so that too "
            "little memory shows at once; only: do that, print the peak memory as a line of JSON, and exit"
        },
    )
    find_batch_tokens: bool = field(
        default=False, metadata={"help": "train with the largest --batch_tokens that fits in memory (one process only)"}
    )
    memory_limit_gib: float | None = field(
        default=None,
        metadata={
            "help": "GiB that a process may take; default: all of the GPU, or nine tenths of the machine or container",
            "within": "(0, inf)",
        },
    )


class Memory:
    """The memory of a training: its limit, and what to change if it does not suffice.

    Args:
        training: whose options the answer names.
        loop: whose device is used.
        arguments: parsed command-line options.
    """

    def __init__(self, training: Training[Any, Any], loop: Loop, arguments: MemoryArguments) -> None:
        self.training, self.options, self.resumed = training, loop.arguments, loop.checkpoint is not None
        self.largest: tuple[int, int] | None = None
        if arguments.memory_limit_gib is None:
            self.limit_gib = available_gib(loop.device)
            return
        self.limit_gib = arguments.memory_limit_gib
        if loop.device.type == "cuda":
            share = self.limit_gib / available_gib(loop.device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), loop.device)

    def note(self, chunk: PackedTokens) -> None:
        """Remember the sizes of the largest chunk of the data, for the answer."""
        self.largest = chunk.input_ids.numel(), int(chunk.max_length_q)

    def answer(self, peak_gib: float = 0.0) -> str:
        """Return a sentence: how much memory was needed for what, and what to change.

        Args:
            peak_gib: the peak that was measured; 0 if memory did not suffice to reach one.
        """
        batch_tokens = self.training.batches.batch_tokens
        tokens, longest = self.largest or (batch_tokens, batch_tokens)
        half = tokens // 2
        remedies = []
        if not self.options.gradient_checkpointing:
            remedies.append("--gradient_checkpointing")
        names = ["batch_tokens"]
        if longest > half:  # one text fills the chunk, which a smaller budget does not change
            names = [self.training.length_option] + names * (batch_tokens > half)
        permission = [change_settings(self.options.change_settings, names)] if self.resumed else []
        remedies.append(" with ".join([f"--{name} {half}" for name in names] + permission))
        if self.training.tuning == "full" and not self.resumed:
            remedies.append("--tuning lora")
        found = f"a peak of {peak_gib:.2f} GiB" if peak_gib else "memory did not suffice"
        return (
            f"out of memory: {found} where {self.limit_gib:.2f} GiB are available, with {tokens} tokens at once and "
            f"texts of up to {longest} tokens; use {' or '.join(remedies)}"
        )

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Turn memory that runs out inside the block into an error that says what to change.

        Raises:
            UserError: memory has run out.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            answer = self.answer()
        else:
            return
        raise UserError(answer)  # outside of the handler, because its traceback would hold on to the activations


def available_gib(device: torch.device) -> float:
    """Return the memory of a process in GiB: all of its GPU, or its part of nine tenths of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return CPU_SHARE * machine_memory() / GIB / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
