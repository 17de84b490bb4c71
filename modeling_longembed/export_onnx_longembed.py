"""ONNX export: one graph for batches of any size and length, which runs without Python, torch and this package."""

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
    """The encoder as a function of tensors, which is what the graph computes.

    Args:
        model: the encoder.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None):
        outputs = self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, return_dict=True)
        return tuple(outputs[name] for name in OUTPUTS)


def export_onnx(model: PreTrainedModel, path: str | os.PathLike) -> Path:
    """Write the encoder as an ONNX graph.

    The inputs of the graph are `input_ids` and `attention_mask`, and `token_type_ids` if the model has segments, all
    int64 `(B, S)` with any B and S, and with padding on any side. The outputs are `last_hidden_state` `(B, S, d)` and
    `pooler_output` `(B, d)`; token vectors are not in the graph. Only attention is computed on padding. All patterns
    are computed as masks, with S x S scores per document. If onnxruntime is installed, the graph is run and compared
    with the model before it is kept.

    Args:
        model: the encoder, in float32.
        path: the file to write, such as `model.onnx`. Weights of more than 2 GB go to `model.onnx.data` next to it.

    Returns:
        `path`.

    Raises:
        ValueError: a graph cannot express the model, the packages of the extra `onnx` are missing, torch is older than
            2.13, or the outputs differ by more than 1e-4 of the largest value. Nothing is written then.
    """
    check_expressible(model)
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"to_onnx needs the package {package}: pip install 'longembed[onnx]'")
    if torch.__version__ < "2.13":  # older exporters fix the shape of the example (torch 2.9)
        raise ValueError(f"to_onnx needs torch 2.13 or later, and this is {torch.__version__}; update torch")
    path, kernel, training = Path(path), model.config._attn_implementation, model.training
    path.parent.mkdir(parents=True, exist_ok=True)
    graph, inputs = OnnxGraph(model), example_inputs(model, batch=2, longest=8)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about itself
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
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the graph that refers to them
            os.replace(file, path.parent / file.name)
    return path


def check_expressible(model: PreTrainedModel):
    """Check that a graph for inputs of any shape can express the model.

    Raises:
        ValueError: it cannot; the message names the field and says what to use.
    """
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
    """Return a padded batch of random tokens, with documents of different lengths.

    Args:
        model: the encoder.
        batch: number of documents.
        longest: length of the longest document in tokens.

    Returns:
        The inputs of the graph by their names, `(batch, longest)` each.
    """
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
    """Compare the outputs of a graph with those of the model, if onnxruntime is installed.

    Args:
        model: the encoder.
        graph: the encoder as the exporter has traced it.
        path: the file of the exported graph.

    Raises:
        ValueError: the outputs differ.
    """
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
