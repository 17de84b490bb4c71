"""Check everything that needs a GPU, in one call of a few minutes.

    python experiments/gpu_check.py --output_dir runs/gpu_check

1. precision: the GPU's kernels in bfloat16 against the dense definition in float64, forward and gradients. The rule is
   that of the authors of flash attention: at most `RULE` times the error of the dense softmax in bfloat16.
2. device: every registered pattern gives the same results on the GPU and on the CPU, in training and in inference.
3. compilation: the packed forward is one graph (`fullgraph=True`), also for documents of other lengths, and the
   compiled model gives the same results as the eager one.
4. memory: a training step on twice the length takes less than `MEMORY_RATIO` times the memory.
5. speed: tokens per second and model FLOP utilisation, by eval/throughput.py (docs/reports/attention-cost.md).

The exit code is 0 if every check passes, 1 if one fails, 2 without CUDA.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from common.patterns import parse_pattern
from eval import throughput
from eval.speed import process
from eval.speed.flops import PEAKS, peak_flops
from eval.speed.growth import as_markdown
from eval.speed.lengths import parse_lengths
from eval.speed.measurement import Case, Workload
from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.attention_longembed import KERNELS, flash_attn_varlen_func
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_base_longembed import AttentionInputs, AttentionPattern
from modeling_longembed.pattern_registry_longembed import PATTERNS, build_pattern
from modeling_longembed.position_alibi_longembed import AlibiBias, alibi_slopes

RULE = 3.0
MEMORY_RATIO = 2.2
HEADS, HEAD_DIM = 4, 64
LENGTHS = (1, 67, 300, 0, 1031)  # of the documents of a packed batch
SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "num_attention_heads": HEADS,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
    "hidden_dropout_prob": 0.0,
}
# Patterns that the kernels of torch and flash-attn compute themselves.
MASKS = ("full", "sliding:window=64", "sliding:window=64,global_tokens=2", "block:size=100", "shifted:size=100")


class Check(NamedTuple):
    """The result of one check.

    Attributes:
        name: of the part and of what was checked.
        passed: whether the rule holds.
        detail: the numbers, or the error.
    """

    name: str
    passed: bool
    detail: str


# 1. precision ---------------------------------------------------------------------------------------------------------


def attention_inputs(pattern: AttentionPattern, device: str, alibi: bool) -> AttentionInputs:
    """Return random bfloat16 queries, keys and values `(T, H, D)` of a packed batch.

    Args:
        pattern: the attention pattern.
        device: of the tensors.
        alibi: whether the bias of ALiBi is added.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sum(LENGTHS), HEADS, HEAD_DIM, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    bias = AlibiBias(torch.tensor(alibi_slopes(HEADS), device=device)) if alibi else None
    documents = PackedDocuments(cu_seqlens, max(LENGTHS))
    return AttentionInputs(query, key, value, pattern, documents, scaling=HEAD_DIM**-0.5, dropout=0.0, bias=bias)


def outputs_and_gradients(kernel: str, inputs: AttentionInputs, dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of query, key and value under a fixed weighting, in float64.

    Args:
        kernel: name of the attention kernel.
        inputs: of `attention_inputs`.
        dtype: in which the kernel computes.
    """
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
    query, key, value = leaves
    context, _ = KERNELS[kernel].function(inputs._replace(query=query, key=key, value=value))
    weights = torch.linspace(-1, 1, context.numel(), device=context.device).view_as(context)
    gradients = torch.autograd.grad((context * weights.to(dtype)).sum(), leaves)
    return [x.detach().double() for x in (context, *gradients)]


def error_ratios(pattern: AttentionPattern, kernel: str, device: str, alibi: bool = False) -> list[float]:
    """Compare a kernel with the dense softmax, both in bfloat16 and relative to float64.

    Args:
        pattern: the attention pattern.
        kernel: name of the attention kernel.
        device: where both are computed.
        alibi: whether the bias of ALiBi is added.

    Returns:
        The ratio of their errors, for the output and for each of its three gradients.
    """
    inputs = attention_inputs(pattern, device, alibi)
    exact = outputs_and_gradients("eager", inputs, torch.float64)
    dense = outputs_and_gradients("eager", inputs, torch.bfloat16)
    found = outputs_and_gradients(kernel, inputs, torch.bfloat16)
    return [
        ((ours - truth).norm() / (theirs - truth).norm()).item()
        for ours, theirs, truth in zip(found, dense, exact, strict=True)
    ]


def check_precision(kernels: Sequence[str], device: str) -> Iterator[Check]:
    """Check every mask on every kernel that computes it, without a bias and with that of ALiBi."""
    for text in MASKS:
        pattern = build_pattern(parse_pattern(text))
        for kernel in kernels:
            segments = pattern.segments(attention_inputs(pattern, device, False).documents)
            if kernel == "flash_attention_2" and segments is None:
                continue
            for alibi in (False, True) if KERNELS[kernel].bias else (False,):
                torch._dynamo.reset()  # flex_attention compiles a kernel for each mask, and dynamo keeps only a few
                ratios = error_ratios(pattern, kernel, device, alibi)
                detail = f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} times the error of a dense softmax"
                name = f"precision: {kernel} on {text}{' with alibi' if alibi else ''}"
                yield Check(name, max(ratios) <= RULE, detail)


# 2. device ------------------------------------------------------------------------------------------------------------


def batch_of(lengths: Sequence[int], device: str) -> dict[str, Any]:
    """Return a packed batch of random tokens."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return {
        "input_ids": torch.randint(1, SIZES["vocab_size"], (1, sum(lengths)), generator=generator).to(device),
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
        "max_length_q": max(lengths),
    }


def tiny_model(pattern: str | dict, device: str, dtype: torch.dtype, **fields: Any) -> Any:
    """Return a model with random weights, the same for the same shape, so large that attention affects the output.

    Args:
        pattern: attention pattern of all layers.
        device: of the model.
        dtype: of its weights.
        fields: further fields of its config.
    """
    torch.manual_seed(0)
    config = LongEmbedConfig(**SIZES | {"attention_patterns": pattern, "initializer_range": 0.2} | fields)
    model: Any = LongEmbedModel._from_config(config)
    return model.to(device, dtype).eval()


def check_device(device: str) -> Iterator[Check]:
    """Check embeddings and gradients of every registered pattern, in float64, against the CPU."""
    for name in PATTERNS:
        for training in (False, True):
            results = []
            for place in ("cpu", device):
                model = tiny_model(name, place, torch.float64).train(training)
                embeddings = model(**batch_of(LENGTHS, place)).pooler_output
                gradients = torch.autograd.grad(embeddings.square().sum(), list(model.parameters()), allow_unused=True)
                results.append([x.detach().cpu() for x in (embeddings, *gradients) if x is not None])
            difference = max(((a - b).abs().max() / (1 + b.abs().max())).item() for a, b in zip(*results, strict=True))
            mode = "training" if training else "inference"
            yield Check(f"device: {name} in {mode}", difference < 1e-8, f"differs from the CPU by {difference:.1e}")


# 3. compilation -------------------------------------------------------------------------------------------------------


def compile_whole(model: LongEmbedModel, batches: Sequence[dict[str, Any]], backend: str) -> tuple[list[Tensor], str]:
    """Return the embeddings of packed batches by the compiled model, or the reason why its forward is not one graph.

    Args:
        model: the model.
        batches: keyword arguments of its forward.
        backend: of torch.compile.
    """
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    try:
        with torch.no_grad():
            return [compiled(**batch).pooler_output for batch in batches], ""
    except torch._dynamo.exc.TorchDynamoException as error:
        return [], str(error).strip()


def check_compilation(device: str, backend: str = "inductor") -> Iterator[Check]:
    """Check the patterns that torch's variable-length kernel computes, in bfloat16."""
    batches = [batch_of(lengths, device) for lengths in (LENGTHS, (90, 33, 1200, 5))]
    for text in ("full", "sliding:window=64", "block:size=100", "shifted:size=100"):
        model = tiny_model(parse_pattern(text), device, torch.bfloat16, position_embedding_type="rope")
        found, reason = compile_whole(model, batches, backend)
        name = f"compilation: {text}"
        if reason:
            yield Check(name, False, reason)
            continue
        with torch.no_grad():
            expected = [model(**batch).pooler_output for batch in batches]
            exact = [model.float()(**batch).pooler_output for batch in batches]
        ratio = max(((a - c).norm() / (b - c).norm()).item() for a, b, c in zip(found, expected, exact, strict=True))
        yield Check(name, ratio <= RULE, f"one graph; {ratio:.2f} times the error of the eager model in bfloat16")


# 4. memory ------------------------------------------------------------------------------------------------------------


def memory_ratio(pattern: dict, kernel: str, workload: Workload, length: int) -> float:
    """Return the ratio of the peak memory above the base, of twice the length to the length, in fresh processes.

    Args:
        pattern: attention pattern of all layers.
        kernel: name of the attention kernel.
        workload: the model, and what is done with it.
        length: the shorter length, in tokens.
    """
    above = []
    for tokens in (length, 2 * length):
        found = process.run_case(Case(workload, pattern, kernel, tokens, context=2 * length), limit=120)
        above.append(found["peak"] - found["base"] if found["outcome"] == "measured" else float("inf"))
    return above[1] / above[0]


def check_memory(device: str) -> Iterator[Check]:
    """Check a training step of one layer at 16,384 and 32,768 tokens."""
    workload = Workload(num_hidden_layers=1, mode="training", dtype="bfloat16", device=device)
    for text in ("full", "sliding", "block", "shifted"):
        ratio = memory_ratio(parse_pattern(text), "longembed_varlen", workload, 16384)
        yield Check(f"memory: {text}", ratio < MEMORY_RATIO, f"{ratio:.2f} times as much for twice the length")


# 5. speed -------------------------------------------------------------------------------------------------------------


def check_speed(device: str, output_dir: str) -> Iterator[Check]:
    """Measure an encoder of MiniLM's size in bfloat16, forward and training; passes if it can be measured."""
    known = torch.cuda.get_device_name() in PEAKS
    for mode in ("forward", "training"):
        workload = Workload(mode=mode, dtype="bfloat16", device=device)
        arguments = throughput.Arguments(
            output_dir,
            attention_patterns=["full", "sliding:window=128", "block:size=256"],
            lengths=["16384,65536"],
            repeats=1,
            max_seconds=60,
            flops=known,
        )
        curves = throughput.compare(arguments, workload)
        peak = peak_flops(torch.cuda.get_device_name(), workload.dtype) if known else None
        table = as_markdown(curves, parse_lengths(arguments.lengths), peak)
        measured = all(len(curve.lengths) == 2 for curve in curves)
        yield Check(f"speed: {mode}", measured, f"\n\n{table}")


@dataclass
class Arguments:
    """Options of the script."""

    output_dir: str = field(metadata={"help": "folder of checks.json and of the files of eval/throughput.py"})
    max_seconds: float = field(
        default=520.0, metadata={"help": "checks that have not begun by then are reported as not run"}
    )


def main() -> None:
    """Run the script.

    Raises:
        UserError: there is no CUDA device.
    """
    (arguments,) = parse(Arguments)
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA device here, and this script checks nothing else; run it on a GPU")
    kernels = ["longembed_varlen", "flex_attention"] + ["flash_attention_2"] * (flash_attn_varlen_func is not None)
    parts: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("precision", lambda: check_precision(kernels, "cuda")),
        ("device", lambda: check_device("cuda")),
        ("compilation", lambda: check_compilation("cuda")),
        ("memory", lambda: check_memory("cuda")),
        ("speed", lambda: check_speed("cuda", arguments.output_dir)),
    ]
    begin, checks = time.monotonic(), []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, kernels {', '.join(kernels)}", flush=True)
    for name, part in parts:
        for check in in_time(name, part(), begin + arguments.max_seconds):
            checks.append(check)
            verdict = "passed" if check.passed else "FAILED"
            print(f"[{time.monotonic() - begin:4.0f} s] {verdict}  {check.name}: {check.detail}", flush=True)
            atomic_write(Path(arguments.output_dir, "checks.json"), json.dumps([c._asdict() for c in checks], indent=1))
    failed = [check.name for check in checks if not check.passed]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed" + "".join(f"\n  {name}" for name in failed))
    if failed:
        raise SystemExit(1)


def in_time(name: str, checks: Iterator[Check], end: float) -> Iterator[Check]:
    """Yield checks until the time is over or one of them raises, which is a failed check of its own.

    Args:
        name: of the part.
        checks: its checks.
        end: of `time.monotonic`.
    """
    try:
        while time.monotonic() < end:
            yield next(checks)
        yield Check(name, False, "the rest did not run: the time is over (--max_seconds)")
    except StopIteration:
        return
    except Exception as error:
        yield Check(name, False, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    run(main)
