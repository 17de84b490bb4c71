"""The result of one check, and the models and inputs that several parts share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_base_longembed import AttentionInputs, AttentionPattern
from modeling_longembed.position_alibi_longembed import AlibiBias, alibi_slopes

# Largest error of a kernel in half precision, in units of the error of the dense softmax in the same precision, both
# relative to float64. It is the rule of the tests of flash attention (Dao 2023).
RULE = 3.0
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


def ratio_of_errors(found: Sequence[Tensor], dense: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest ratio of the errors of `found` and `dense`, both relative to `exact`, over all tensors."""
    pairs = zip(found, dense, exact, strict=True)
    return max(((ours.double() - x).norm() / (theirs.double() - x).norm()).item() for ours, theirs, x in pairs)


def attention_inputs(
    pattern: AttentionPattern, device: str, dtype: torch.dtype, alibi: bool = False, lengths: Sequence[int] = ()
) -> AttentionInputs:
    """Return random queries, keys and values `(T, H, D)` of a packed batch.

    Args:
        pattern: the attention pattern.
        device: of the tensors.
        dtype: of the tensors.
        alibi: whether the bias of ALiBi is added.
        lengths: of the documents; empty: `LENGTHS`.
    """
    lengths = lengths or LENGTHS
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sum(lengths), HEADS, HEAD_DIM, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3)
    )
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    bias = AlibiBias(torch.tensor(alibi_slopes(HEADS), device=device)) if alibi else None
    documents = PackedDocuments(cu_seqlens, max(lengths))
    return AttentionInputs(query, key, value, pattern, documents, scaling=HEAD_DIM**-0.5, dropout=0.0, bias=bias)


def batch_of(lengths: Sequence[int], device: str) -> dict[str, Any]:
    """Return a packed batch of random tokens, as keyword arguments of the model."""
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
