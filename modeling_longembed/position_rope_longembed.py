"""Rotary position embeddings (Su et al. 2021) and their extensions to longer contexts, including Self-Extend."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .packing_longembed import PackedDocuments
from .position_base_longembed import (
    FarRotary,
    Positions,
    PositionScheme,
    RopePlan,
    Rotary,
    extension_factor,
    is_extended,
    register_scheme,
)


def unscaled_rope_theta(rope_parameters: dict, head_dim: int) -> float:
    """Return the `rope_theta` with which `rope_type` `default` gives the same rotation as `ntk` or `theta`."""
    theta = float(rope_parameters["rope_theta"])
    if rope_parameters["rope_type"] == "ntk":
        theta *= rope_parameters["factor"] ** (head_dim / (head_dim - 2))
    return theta


def rope_frequencies(
    rope_parameters: dict, head_dim: int, original_length: int, extended_length: int | None = None
) -> tuple[Tensor, float]:
    """Compute the inverse frequencies of rotary embeddings (Su et al. 2021), scaled as transformers does it.

    Args:
        rope_parameters: `{"rope_type": ..., "rope_theta": ..., ...}`, in transformers' format. The types `ntk` (static
            NTK, theta times `factor^(D / (D - 2))`) and `theta` (a new `rope_theta`) exist only here.
        head_dim: D, even.
        original_length: context length in tokens that the model was trained with.
        extended_length: length of the document in tokens, for `dynamic`.

    Returns:
        `(D / 2,)` fp32 inverse frequencies, and the factor of cosines and sines (1 except for yarn).
    """
    rope_type = rope_parameters["rope_type"]
    if rope_type in ("default", "ntk", "theta"):
        theta = unscaled_rope_theta(rope_parameters, head_dim)
        return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim), 1.0
    # transformers expects the trained length in `max_position_embeddings`, where our config has the extended length.
    view = SimpleNamespace(
        rope_parameters=rope_parameters,
        head_dim=head_dim,
        hidden_size=head_dim,  # transformers reads it, although head_dim is enough
        num_attention_heads=1,
        max_position_embeddings=original_length,
        standardize_rope_params=lambda: None,
    )
    return ROPE_INIT_FUNCTIONS[rope_type](view, torch.device("cpu"), seq_len=extended_length)


def extended_rope_parameters(extension: dict, rope_parameters: dict, max_position_embeddings: int) -> dict:
    """Return the RoPE parameters of the extended rotation: the base ones with the extension's type and factor.

    Args:
        extension: `config.position_extension`.
        rope_parameters: the parameters of the base rotation.
        max_position_embeddings: the extended context in tokens.
    """
    method = extension["method"]
    parameters = {"rope_type": method, "rope_theta": rope_parameters["rope_theta"]}
    parameters |= {
        key: value for key, value in extension.items() if key not in ("method", "keep_short") and value is not None
    }
    if method != "theta":
        # transformers' dynamic NTK scales by f * len / L - (f - 1), which is len / L only for f = 1.
        parameters["factor"] = (
            parameters.get("factor", 1.0)
            if method == "dynamic"
            else extension_factor(extension, max_position_embeddings)
        )
    return parameters


def rotary_at(positions: Tensor, inv_freq: Tensor, attention_factor: Tensor | float = 1.0) -> Rotary:
    """Return the rotation at the given positions.

    Args:
        positions: `(T,)`.
        inv_freq: inverse frequencies, `(D / 2,)`, or `(T, D / 2)` with one row per token.
        attention_factor: factor of cosines and sines, a number or `(T, 1)`.
    """
    angles = positions.to(inv_freq.dtype)[:, None] * inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    return Rotary(angles.cos() * attention_factor, angles.sin() * attention_factor)


def grouped_positions(token_index: Tensor, group: int, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return Self-Extend's far positions: of a query for keys on its left, on its right, and of a key; all `(T,)`.

    Args:
        token_index: `(T,)`, position of each token in its document.
        group: g, number of positions that are merged into one.
        neighbours: w, distance from which a key counts as far.
    """
    floored = token_index // group
    shift = neighbours - neighbours // group
    return floored + shift, floored - shift, floored


def rope_plan(config, rope_parameters: dict, documents: PackedDocuments, token_index: Tensor) -> RopePlan:
    """Compute the rotations for one set of `rope_parameters`, for every document by its own length.

    Args:
        config: the config of the model.
        rope_parameters: those of one layer type.
        documents: the packed documents.
        token_index: `(T,)`, position of each token in its document.

    Returns:
        The rotations.
    """
    extension, device = config.position_extension, token_index.device
    original = extension["original_max_position_embeddings"] if extension else config.max_position_embeddings
    base, base_factor = rope_frequencies(rope_parameters, config.head_dim, original)
    base = base.to(device)
    exporting = torch.compiler.is_exporting()  # a graph for all inputs computes both the base and the extended case
    if extension is None or not (exporting or is_extended(extension, torch.tensor(documents.max_seqlen))):
        return RopePlan(rotary_at(token_index, base, base_factor))
    method = extension["method"]
    if method == "group":
        group, window = math.ceil(extension_factor(extension, config.max_position_embeddings)), extension["neighbours"]
        left, right, floored = (rotary_at(x, base, base_factor) for x in grouped_positions(token_index, group, window))
        lengths = documents.document_lengths
        neighbours = torch.where(is_extended(extension, lengths), torch.full_like(lengths, window), lengths)
        return RopePlan(rotary_at(token_index, base, base_factor), FarRotary(left, right, floored, neighbours))
    parameters = extended_rope_parameters(extension, rope_parameters, config.max_position_embeddings)
    lengths = documents.cu_seqlens.diff()
    if method == "dynamic":  # one row per document, so that no document depends on the length of another
        rows, factors = zip(
            *(rope_frequencies(parameters, config.head_dim, original, max(n, original)) for n in documents.lengths),
            strict=True,
        )
        scaled, factor = torch.stack(rows).to(device), torch.tensor(factors, device=device)
    else:
        row, row_factor = rope_frequencies(parameters, config.head_dim, original)
        scaled, factor = row.to(device).expand(lengths.shape[0], -1), torch.tensor(row_factor, device=device)
    extended = is_extended(extension, lengths)
    inv_freq = torch.where(extended[:, None], scaled, base)[documents.document_ids]
    attention_factor = torch.where(extended, factor, base_factor)[documents.document_ids]
    return RopePlan(rotary_at(token_index, inv_freq, attention_factor[:, None]))


@register_scheme
class RopePositions(PositionScheme):
    """Rotation of query and key by an angle that grows with the position (Su et al. 2021, arXiv:2104.09864)."""

    type = "rope"
    rotates = True
    extensions = {
        "linear": {"factor": None},
        "dynamic": {"factor": None},
        "ntk": {"factor": None},
        "theta": {"rope_theta": 100_000.0},
        "yarn": {"factor": None, "beta_fast": None, "beta_slow": None, "attention_factor": None, "truncate": None},
        "group": {"factor": None, "neighbours": 64},
    }

    def check(self, config: Any) -> None:
        """Check the head size and the parameters of the rotation.

        Raises:
            ValueError: the head size is odd, the parameters cannot be combined, or `rope_type` is not supported.
        """
        extension = config.position_extension
        if config.head_dim % 2:
            raise ValueError(
                f"position_embedding_type='rope' rotates pairs of channels, head_dim={config.head_dim} is odd; "
                "use an even one"
            )
        nested = [config.rope_parameters.get(kind) for kind in dict.fromkeys(config.layer_types)]
        for parameters in nested if all(nested) else [config.rope_parameters]:
            for name in ("rope_theta", "factor"):
                value = parameters.get(name, 1.0)
                if not (isinstance(value, (int, float)) and value >= 1):
                    raise ValueError(f"rope_parameters: {name}={value!r}; give a number of at least 1")
            rope_type = parameters.get("rope_type")
            if rope_type not in ("default", "linear", "yarn", "llama3"):
                raise ValueError(
                    f"rope_parameters: rope_type={rope_type!r} does not rotate every document in the same "
                    "way; use 'default', 'linear', 'yarn' or 'llama3' here and position_extension for the rest"
                )
            if extension is not None and rope_type != "default":
                raise ValueError(
                    f"position_extension cannot be put on top of rope_parameters with rope_type={rope_type!r}; "
                    "set rope_type='default'"
                )
        if self.merges_scores(config):
            if type(extension["neighbours"]) is not int or extension["neighbours"] < 1:
                raise ValueError(
                    f"position_extension: neighbours={extension['neighbours']!r}; give a whole number of at least 1"
                )
            if config.relative_attention_num_buckets:
                raise ValueError(
                    "position_extension 'group' on rope and relative_attention_num_buckets cannot be merged; use 'yarn'"
                )

    def merges_scores(self, config: Any) -> bool:
        """Return whether the extension is Self-Extend."""
        return config.position_extension is not None and config.position_extension["method"] == "group"

    def prepare(self, config: Any, documents: PackedDocuments, token_index: Tensor, hidden_states: Tensor) -> Positions:
        """Compute the rotation of each layer type."""
        plans = {
            kind: self.rotation(config, kind, documents, token_index) for kind in dict.fromkeys(config.layer_types)
        }
        return Positions(rotations=plans)

    def rotation(self, config: Any, layer_type: str, documents: PackedDocuments, token_index: Tensor) -> RopePlan:
        """Return the rotation of the sublayers of one layer type."""
        parameters = config.rope_parameters
        return rope_plan(config, parameters.get(layer_type, parameters), documents, token_index)

    def default_extension(self, patterns: Sequence[Any]) -> str:
        """Return `dynamic`, which needs no training and does not change short documents."""
        return "dynamic"

    def check_chunks(self, config: Any) -> None:
        """Check that the rotation does not depend on the length of the document.

        Raises:
            ValueError: it does.
        """
        if (config.position_extension or {}).get("method") == "dynamic":
            raise ValueError(
                "memory: position_extension 'dynamic' depends on the length of the document, which is unknown "
                "while it is read in chunks; use 'yarn' with keep_short=false"
            )
        super().check_chunks(config)

    def check_graph(self, config: Any) -> None:
        """Check that the extension does not compute each document separately.

        Raises:
            ValueError: it does.
        """
        method = (config.position_extension or {}).get("method")
        if method in ("dynamic", "group"):
            raise ValueError(
                f"to_onnx: position_extension {method!r} on rope computes each document separately and has no ONNX "
                "form; use 'yarn', 'ntk' or 'linear'"
            )
