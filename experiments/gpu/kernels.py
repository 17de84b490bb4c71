"""The GPU's kernels in half precision against the dense softmax, and flex attention's number of compilations."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.patterns import parse_pattern
from experiments.gpu.check import RULE, Check, attention_inputs, ratio_of_errors
from modeling_longembed.attention_longembed import KERNELS, flash_attn_varlen_func
from modeling_longembed.pattern_base_longembed import AttentionInputs, AttentionPattern
from modeling_longembed.pattern_registry_longembed import build_pattern

# Patterns that the kernels of torch and flash-attn compute themselves.
MASKS = ("full", "sliding:window=64", "sliding:window=64,global_tokens=2", "block:size=100", "shifted:size=100")
# A mask and whether the bias of ALiBi is added: each takes several seconds to compile, the most intricate first.
FLEX_MASKS = (
    ("shifted:size=100", True),
    ("sliding:window=64,global_tokens=2", False),
    ("full", False),
    ("block:size=100", False),
)
OTHER_LENGTHS = ((800, 5, 641), (129,) * 4)


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


def error_ratio(kernel: str, inputs: AttentionInputs) -> float:
    """Compare a kernel with the dense softmax in the precision of the inputs, both relative to float64.

    Args:
        kernel: name of the attention kernel.
        inputs: of `attention_inputs`.

    Returns:
        The ratio of their errors, the largest of the output and its three gradients.
    """
    dtype = inputs.query.dtype
    exact = outputs_and_gradients("eager", inputs, torch.float64)
    dense = outputs_and_gradients("eager", inputs, dtype)
    return ratio_of_errors(outputs_and_gradients(kernel, inputs, dtype), dense, exact)


def judge(name: str, ratio: float) -> Check:
    """Return the check of a ratio of errors."""
    return Check(name, ratio <= RULE, f"{ratio:.2f} times the error of a dense softmax")


def varlen_kernels() -> list[str]:
    """Return the names of the kernels for documents of various lengths that are installed."""
    return ["longembed_varlen"] + ["flash_attention_2"] * (flash_attn_varlen_func is not None)


def check_kernels(device: str, kernels: Sequence[str] | None = None) -> Iterator[Check]:
    """Check every mask on every kernel that computes it, in both half precisions, and with the bias of ALiBi.

    Args:
        device: where the kernels run.
        kernels: names of the kernels; None: those that are installed.
    """
    for dtype, alibi in ((torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)):
        for text in MASKS:
            inputs = attention_inputs(build_pattern(parse_pattern(text)), device, dtype, alibi)
            for kernel in varlen_kernels() if kernels is None else kernels:
                if kernel == "flash_attention_2" and (alibi or inputs.pattern.segments(inputs.documents) is None):
                    continue
                name = f"kernels: {kernel} on {text}{' with alibi' if alibi else ''} in {str(dtype)[6:]}"
                yield judge(name, error_ratio(kernel, inputs))


def compilations() -> int:
    """Return the number of graphs that the compiler has captured in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def other_lengths_compile(pattern: AttentionPattern, device: str, alibi: bool) -> int:
    """Return the number of graphs that flex attention captures for batches of other lengths, with gradients.

    Args:
        pattern: the attention pattern.
        device: where it is computed.
        alibi: whether the bias of ALiBi is added.
    """
    before = compilations()
    for lengths in OTHER_LENGTHS:
        inputs = attention_inputs(pattern, device, torch.bfloat16, alibi, lengths)
        outputs_and_gradients("flex_attention", inputs, torch.bfloat16)
    return compilations() - before


def check_flex(device: str) -> Iterator[Check]:
    """Check flex attention, and that nothing is compiled again for batches of other lengths."""
    for text, alibi in FLEX_MASKS:
        pattern, name = build_pattern(parse_pattern(text)), f"flex: {text}{' with alibi' if alibi else ''}"
        before = compilations()
        ratio = error_ratio("flex_attention", attention_inputs(pattern, device, torch.bfloat16, alibi))
        first = compilations() - before
        yield judge(f"{name} in bfloat16", ratio)
        again = other_lengths_compile(pattern, device, alibi)
        yield Check(f"{name}, other lengths", again == 0, f"{first} graphs for the first batch, {again} for the others")
