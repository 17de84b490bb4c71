"""Export to ONNX: one graph for batches of any size and length, without Python, torch or this package."""

import importlib.util
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

OUTPUTS = ("last_hidden_state", "pooler_output")
KERNEL = "longembed_padded"
TOLERANCE = 1e-4


class OnnxGraph(nn.Module):
    """The encoder as a function of tensors: what becomes the graph."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None):
        outputs = self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, return_dict=True)
        return tuple(outputs[name] for name in OUTPUTS)


def export_onnx(model: PreTrainedModel, path: str | os.PathLike) -> Path:
    """Writes the encoder as an ONNX graph.

    The graph takes `input_ids` and `attention_mask`, and `token_type_ids` if the model has segments, all `(B, S)`
    int64 with any B and S, padding anywhere; it returns `last_hidden_state` `(B, S, d)` and `pooler_output`
    `(B, d)`. Only attention is computed on padding, and all its patterns as a mask: S x S scores a document. Where
    onnxruntime is installed, the graph is run and compared before it is kept.

    Args:
        path: the file to write, `model.onnx`. Weights of more than 2 GB stand beside it in `model.onnx.data`.

    Returns:
        `path`.

    Raises:
        ValueError: a model that a graph cannot express, the packages of the extra `onnx` are missing, torch
            is older than 2.13, or the outputs differ by more than 1e-4 of the largest value. Nothing is written
            then.
    """
    check_expressible(model)
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"to_onnx needs the package {package}: pip install 'longembed[onnx]'")
    if torch.__version__ < "2.13":  # the graph of 2.9 is bound to the size of the example
        raise ValueError(f"to_onnx needs torch 2.13 or later, and this is {torch.__version__}; update torch")
    path, kernel, training = Path(path), model.config._attn_implementation, model.training
    path.parent.mkdir(parents=True, exist_ok=True)
    graph, inputs = OnnxGraph(model), example_inputs(model, batch=2, longest=8)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        try:
            graph.eval()
            model.set_attn_implementation(KERNEL)
            with torch.no_grad():
                program: Any = torch.onnx.export(
                    graph,
                    kwargs=inputs,
                    input_names=list(inputs),
                    output_names=list(OUTPUTS),
                    dynamic_shapes=dict.fromkeys(inputs, axes),
                    dynamo=True,
                    verbose=False,
                )
            program.save(Path(folder) / path.name)
            compare_outputs(model, graph, Path(folder) / path.name)
        finally:
            model.set_attn_implementation(kernel)
            model.train(training)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the graph that names them
            os.replace(file, path.parent / file.name)
    return path


def check_expressible(model: PreTrainedModel):
    """Raises ValueError naming the field that no graph for all inputs can express, and what to use."""
    config = model.config
    for pattern in config.get_patterns():
        if not pattern.is_mask:
            raise ValueError(
                f"to_onnx: attention_patterns has {pattern.type!r}, which is more than a mask and has no ONNX "
                "form; use 'full', 'sliding' or 'block'"
            )
    config.position_scheme.check_graph(config)
    if config.token_weighting != "none":
        raise ValueError(
            f"to_onnx: token_weighting={config.token_weighting!r} solves a system for every document and has no "
            "ONNX form; use 'none'"
        )
    if model.dtype != torch.float32:
        raise ValueError(f"to_onnx writes float32 graphs and the model is in {model.dtype}; call model.float() first")


def example_inputs(model: PreTrainedModel, batch: int, longest: int) -> dict[str, Tensor]:
    """A padded batch of random tokens, the documents of different lengths."""
    longest = min(longest, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, longest, dtype=torch.long)
    for row in range(1, batch):
        mask[row, max(1, longest * row // batch) :] = 0
    inputs = {
        "input_ids": torch.randint(model.config.vocab_size, (batch, longest), generator=generator),
        "attention_mask": mask,
    }
    if model.config.type_vocab_size:
        segments = torch.randint(model.config.type_vocab_size, (batch, longest), generator=generator)
        inputs["token_type_ids"] = segments
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def compare_outputs(model: PreTrainedModel, graph: OnnxGraph, path: Path):
    """Raises ValueError if onnxruntime is installed and gives other outputs than the model."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:  # optional
        return
    inputs = example_inputs(model, batch=3, longest=300)
    with torch.no_grad():
        expected = graph(**inputs)
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(list(OUTPUTS), {name: tensor.cpu().numpy() for name, tensor in inputs.items()})
    for name, ours, theirs in zip(OUTPUTS, expected, outputs, strict=True):
        difference = (ours.cpu() - torch.from_numpy(theirs)).abs().max() / ours.abs().max().cpu()
        if not difference <= TOLERANCE:
            raise ValueError(
                f"to_onnx: {name} of the graph differs from the model's by {difference:.1e} of its largest value, "
                f"more than {TOLERANCE}; nothing was written"
            )
