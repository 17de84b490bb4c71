"""Speed and memory of an encoder of MiniLM's size in bfloat16 on a GPU."""

from collections.abc import Iterator
from typing import Any

import torch

from common.patterns import parse_pattern
from eval.speed import process
from eval.speed.flops import PEAKS, model_flops, peak_flops
from eval.speed.measurement import Case, Workload, measure
from experiments.gpu.check import Check

MEMORY_RATIO = 2.2
SPEED_PATTERNS = ("full", "sliding:window=128", "block:size=256")
SPEED_LENGTHS = (16384, 65536)


def run_case(case: Case) -> dict[str, Any]:
    """Measure a case: on a GPU in this process, whose allocator tells the peak, elsewhere in a process of its own."""
    return measure(case) if case.workload.device == "cuda" else process.run_case(case, limit=120)


def memory_ratio(pattern: dict, kernel: str, workload: Workload, length: int) -> float:
    """Return the ratio of the peak memory above the base, of twice the length to the length.

    Args:
        pattern: attention pattern of all layers.
        kernel: name of the attention kernel.
        workload: the model, and what is done with it.
        length: the shorter length, in tokens.
    """
    above = []
    for tokens in (length, 2 * length):
        found = run_case(Case(workload, pattern, kernel, tokens, context=2 * length))
        above.append(found["peak"] - found["base"] if found["outcome"] == "measured" else float("inf"))
    return above[1] / above[0]


def check_memory(device: str) -> Iterator[Check]:
    """Check a training step of one layer at 16,384 and 32,768 tokens."""
    workload = Workload(num_hidden_layers=1, mode="training", dtype="bfloat16", device=device)
    for text in ("full", "sliding", "block", "shifted"):
        ratio = memory_ratio(parse_pattern(text), "longembed_varlen", workload, 16384)
        yield Check(f"memory: {text}", ratio < MEMORY_RATIO, f"{ratio:.2f} times as much for twice the length")


def check_speed(device: str) -> Iterator[Check]:
    """Measure training and inference; a check passes if it can be measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    for mode in ("training", "forward"):
        workload = Workload(mode=mode, dtype="bfloat16", device=device)
        for text in SPEED_PATTERNS:
            for length in SPEED_LENGTHS:
                case = Case(workload, parse_pattern(text), "longembed_varlen", length, context=max(SPEED_LENGTHS))
                found = run_case(case)
                measured = found["outcome"] == "measured"
                detail = describe_speed(case, found, name) if measured else found["outcome"]
                yield Check(f"speed: {mode}, {text}, {length} tokens", measured, detail)


def describe_speed(case: Case, found: dict[str, Any], device_name: str) -> str:
    """Return tokens per second, model FLOP utilisation where the peak of the device is known, and peak memory.

    Args:
        case: what was measured.
        found: the fields of its `Measurement`.
        device_name: as `torch.cuda.get_device_name` returns it.
    """
    workload, seconds = case.workload, found["seconds"]
    parts = [f"{case.length / seconds:,.0f} tokens a second"]
    if device_name in PEAKS:
        operations = model_flops(case.config(), case.length, workload.mode, workload.device)
        parts.append(f"{operations / seconds / peak_flops(device_name, workload.dtype):.1%} of the peak")
    return ", ".join([*parts, f"{found['peak'] / 1e9:.2f} GB"])
