"""The packed forward as one compiled graph, and every pattern on the GPU against the CPU."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from common.patterns import parse_pattern
from experiments.gpu.check import LENGTHS, RULE, Check, batch_of, ratio_of_errors, tiny_model
from modeling_longembed import LongEmbedModel
from modeling_longembed.pattern_registry_longembed import PATTERNS, build_pattern

OTHER_LENGTHS = (90, 33, 1200, 5)


def compile_whole(
    model: LongEmbedModel, batches: Sequence[dict[str, Any]], backend: Any, dynamic: bool | None = None
) -> tuple[list[Tensor], str]:
    """Return the embeddings of packed batches by the compiled model, or the reason why its forward is not one graph.

    Args:
        model: the model.
        batches: keyword arguments of its forward.
        backend: of torch.compile.
        dynamic: of torch.compile: True compiles once for all lengths; None compiles the first batch for its own.
    """
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    try:
        with torch.no_grad():
            return [compiled(**batch).pooler_output for batch in batches], ""
    except torch._dynamo.exc.TorchDynamoException as error:
        return [], str(error).strip()


def one_graph_patterns() -> list[str]:
    """Return the registered patterns that claim to be one graph, the most intricate first."""
    names = [name for name in PATTERNS if build_pattern(name).is_one_graph]
    return ["shifted:size=100,wrap=true", *sorted(names, key=lambda name: name != "shifted")]


def check_compilation(device: str, backend: str = "inductor") -> Iterator[Check]:
    """Check every pattern that claims to be one graph, in bfloat16.

    Args:
        device: of the model.
        backend: of torch.compile.
    """
    batches = [batch_of(lengths, device) for lengths in (LENGTHS, OTHER_LENGTHS)]
    for text in one_graph_patterns():
        model = tiny_model(parse_pattern(text), device, torch.bfloat16, position_embedding_type="rope")
        found, reason = compile_whole(model, batches, backend, dynamic=True)
        name = f"compilation: {text}"
        if reason:
            yield Check(name, False, reason)
            continue
        with torch.no_grad():
            dense = [model(**batch).pooler_output for batch in batches]
            exact = [model.float()(**batch).pooler_output for batch in batches]
        ratio = ratio_of_errors(found, dense, exact)
        yield Check(name, ratio <= RULE, f"one graph; {ratio:.2f} times the error of the eager model in bfloat16")


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
