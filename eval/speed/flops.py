"""Floating-point operations of a model, and the share of a GPU's peak that it uses (model FLOP utilisation).

Model FLOPs are defined as in PaLM (Chowdhery et al. 2022, appendix B): twice the multiplications of every matrix
product, over the pairs of query and key that the pattern's predicate allows, and three times as many in training. Pairs
that a kernel computes and then masks out do not count, nor does what gradient checkpointing recomputes.
"""

import torch

from common.errors import UserError
from modeling_longembed import LongEmbedConfig
from modeling_longembed.pattern_base_longembed import AttentionPattern, Places

# Peak operations per second by data sheet, without sparsity: half precision on tensor cores, float32 without TF32.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": {"half": 312e12, "float32": 19.5e12},
    "NVIDIA A100-SXM4-80GB": {"half": 312e12, "float32": 19.5e12},
    "NVIDIA A100-PCIE-40GB": {"half": 312e12, "float32": 19.5e12},
    "NVIDIA A100 80GB PCIe": {"half": 312e12, "float32": 19.5e12},
    "NVIDIA H100 80GB HBM3": {"half": 989e12, "float32": 67e12},
    "NVIDIA H100 PCIe": {"half": 756e12, "float32": 51e12},
    "NVIDIA H200": {"half": 989e12, "float32": 67e12},
    "NVIDIA L4": {"half": 121e12, "float32": 30.3e12},
    "NVIDIA L40S": {"half": 362e12, "float32": 91.6e12},
}


def peak_flops(device_name: str, dtype: str) -> float:
    """Return the peak operations per second of a device.

    Args:
        device_name: as `torch.cuda.get_device_name` returns it.
        dtype: `float32`, `bfloat16` or `float16`.

    Raises:
        UserError: the device is not in `PEAKS`.
    """
    if device_name not in PEAKS:
        raise UserError(
            f"there is no peak for {device_name!r} in eval/speed/flops.py, so its utilisation is not known; add it "
            "there, or leave --flops out"
        )
    return PEAKS[device_name]["float32" if dtype == "float32" else "half"]


def visible_pairs(pattern: AttentionPattern, length: int, num_heads: int, causal: bool, device: str = "cpu") -> int:
    """Return the number of pairs of query and key that a pattern allows in one document, summed over all heads.

    Args:
        pattern: the attention pattern.
        length: tokens of the document.
        num_heads: attention heads.
        causal: whether a query sees only keys up to its own position.
        device: where the pairs are counted.

    Raises:
        UserError: the pattern is more than a mask, so that the number depends on the document.
    """
    if not pattern.is_mask:
        raise UserError(f"the FLOPs of the pattern {pattern.type!r} are not known in closed form; leave --flops out")
    index = torch.arange(length, device=device)
    places = Places(index, torch.full_like(index, length), torch.zeros_like(index, dtype=torch.bool))
    keys = places.at((None, None, slice(None)))
    heads = torch.arange(num_heads if pattern.per_head else 1, device=device)[:, None, None]
    pairs = 0
    for rows in index.split(max(1, 2**24 // (len(heads) * length))):
        queries = places.at((None, rows, None))
        visible = pattern.visible(queries, keys, heads, num_heads)
        if causal:
            visible = visible & (keys.index <= queries.index)
        pairs += int(visible.expand(len(heads), len(rows), length).sum())
    return pairs if pattern.per_head else pairs * num_heads


def model_flops(config: LongEmbedConfig, length: int, mode: str = "forward", device: str = "cpu") -> int:
    """Return the number of floating-point operations of one document through the encoder.

    Args:
        config: of the model.
        length: tokens of the document.
        mode: `forward` or `training`.
        device: where the pairs are counted.

    Raises:
        UserError: a pattern is more than a mask.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    feed_forward = (3 if config.feed_forward_gated else 2) * width * config.intermediate_size
    multiplications = (config.sublayer_pattern or "").count("f") * length * feed_forward
    pairs: dict[AttentionPattern, int] = {}
    for pattern in config.get_patterns():
        if pattern not in pairs:
            pairs[pattern] = visible_pairs(pattern, length, heads, config.is_causal, device)
        projections = 3 if pattern.shares_query_key else 4
        multiplications += length * projections * width**2 + 2 * pairs[pattern] * width // heads
    return (6 if mode == "training" else 2) * multiplications
