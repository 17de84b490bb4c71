"""Position vectors added to the embeddings: a learned table (BERT) and sinusoids (Transformer), with extensions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .packing_longembed import PackedDocuments
from .position_base_longembed import PositionScheme, check_even_width, extension_factor, is_extended, register_scheme


def sinusoidal_embeddings(positions: Tensor, dim: int) -> Tensor:
    """Compute interleaved sines and cosines: `PE[p, 2t] = sin(p w_t)`, `PE[p, 2t + 1] = cos(p w_t)`.

    The frequencies are `w_t = 10000^(-2t / dim)`.

    Vaswani et al. 2017, section 3.5.

    Args:
        positions: `(T,)`, whole or fractional.
        dim: width of the embedding, even.

    Returns:
        `(T, dim)` fp32.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions.float()[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def extend_position_table(table: Tensor, length: int, method: str) -> Tensor:
    """Extend a learned table of P rows to `length` rows.

    Args:
        table: `(P, d)`.
        length: number of rows of the result, at least P.
        method: `repeat` copies the table (Longformer: row j*P + r is row r). `interpolate` puts old row i at k*i with
            k = ceil(length / P), and convex combinations between them (position interpolation of a table); the rows
            after the last old row repeat it.

    Returns:
        `(length, d)`; the old rows are copied bit by bit.
    """
    rows = table.shape[0]
    if method == "repeat":
        return table[torch.arange(length, device=table.device) % rows].clone()
    factor = -(-length // rows)
    place = torch.arange(length, device=table.device)
    low = (place // factor).clamp(max=rows - 1)
    high = (low + 1).clamp(max=rows - 1)
    share = ((place % factor).to(table.dtype) / factor)[:, None]
    return torch.where(share == 0, table[low], (1 - share) * table[low] + share * table[high])


def position_ids(config, documents: PackedDocuments, token_index: Tensor) -> Tensor:
    """Return the rows of the position table (absolute) or the arguments of the sinusoids.

    `repeat` on a table needs no change of ids (the table itself is longer); on sinusoids it is `p mod P`. `interpolate`
    puts a short document on the old rows, k*p (E5-Base-4k), and a long one on p. `group` is `p // factor`. `restart` is
    `p mod period`.

    Args:
        config: the config of the model.
        documents: the packed documents.
        token_index: `(T,)`, position of each token in its document.

    Returns:
        `(T,)`: int64 for absolute, possibly fractional for sinusoidal.
    """
    extension = config.position_extension
    if extension is None:
        return token_index
    method, learned = extension["method"], config.position_scheme.has_table
    if method == "restart":
        return token_index % extension["period"]
    if method == "repeat":
        return token_index if learned else token_index % extension["original_max_position_embeddings"]
    extended = is_extended(extension, documents.document_lengths)
    factor = extension_factor(extension, config.max_position_embeddings)
    if method == "group":
        return torch.where(extended, token_index // math.ceil(factor), token_index)
    if learned:  # interpolate: the original rows are at multiples of the factor
        return torch.where(extended, token_index, token_index * math.ceil(factor))
    return torch.where(extended, token_index / factor, token_index.float())


def position_table_rows(config) -> int:
    """Return the number of rows of the learned position table that `config` describes."""
    extension = config.position_extension
    if extension is None or extension["method"] == "repeat":
        return config.max_position_embeddings
    original = extension["original_max_position_embeddings"]
    if extension["method"] == "interpolate":  # an integer factor: short documents read every k-th row
        spread = original * math.ceil(extension_factor(extension, config.max_position_embeddings))
        return max(spread, config.max_position_embeddings)
    return original


def extended_position_table(table: Tensor, config) -> Tensor:
    """Return the table `(position_table_rows(config), d)` that `config` describes, given the original `(P, d)`."""
    extension, rows = config.position_extension or {"method": None}, position_table_rows(config)
    if extension["method"] == "interpolate":
        factor = math.ceil(extension_factor(extension, config.max_position_embeddings))
        table = extend_position_table(table, len(table) * factor, "interpolate")
    return table[:rows] if rows <= len(table) else extend_position_table(table, rows, "repeat")


class AddedPositions(PositionScheme):
    """Base class of the learned table and the sinusoids."""

    extensions = {"repeat": {}, "interpolate": {"factor": None}, "group": {"factor": None}, "restart": {"period": None}}

    def places(self, config: Any, documents: PackedDocuments, token_index: Tensor) -> Tensor:
        """Return `position_ids`."""
        return position_ids(config, documents, token_index)

    def default_extension(self, patterns: Sequence[Any]) -> str:
        """Return `restart` if all patterns are blocks of one size, which act as documents; else `repeat`."""
        same = len(set(patterns)) == 1 and {pattern.type for pattern in patterns} == {"block"}
        return "restart" if same else "repeat"


@register_scheme
class AbsolutePositions(AddedPositions):
    """A learned vector for every position (BERT, Devlin et al. 2019)."""

    type = "absolute"
    has_table = True

    def check(self, config: Any) -> None:
        """Check that interpolation puts the old rows at integer positions.

        Raises:
            ValueError: the factor is not an integer.
        """
        extension = config.position_extension
        if extension is None or extension["method"] != "interpolate" or not extension["factor"]:
            return
        if type(extension["factor"]) is not int:
            raise ValueError(
                f"position_extension: factor={extension['factor']} but the rows of a table are at whole positions; "
                "give a whole number, or leave it out"
            )

    def build_table(self, config: Any) -> nn.Embedding:
        """Return the learned table."""
        return nn.Embedding(position_table_rows(config), config.hidden_size)

    def embed(self, hidden_states: Tensor, places: Tensor, table: nn.Module | None) -> Tensor:
        """Add the rows of the table."""
        return hidden_states if table is None else hidden_states + table(places)

    def extend_again(self, config: Any, method: str, parameters: dict) -> dict:
        """Return the new extension; after `interpolate` only `repeat` keeps every trained row at its position.

        Raises:
            ValueError: `method` cannot be applied on top of the model's current extension.
        """
        current = config.position_extension
        if current["method"] != "interpolate":
            return super().extend_again(config, method, parameters)
        if method == "repeat" and not parameters:
            return current | {"factor": round(extension_factor(current, config.max_position_embeddings))}
        raise ValueError(
            f"extend_context: the rows of this table were trained at their interpolated positions, and {method!r} "
            "would move them; use method='repeat' without parameters"
        )

    def table_rows(self, config: Any) -> int | None:
        """Return the number of rows of the table; None if the method is `restart`, which has no limit."""
        restarts = (config.position_extension or {}).get("method") == "restart"
        return None if restarts else config.max_position_embeddings


@register_scheme
class SinusoidalPositions(AddedPositions):
    """Sines and cosines of the position (Vaswani et al. 2017, section 3.5)."""

    type = "sinusoidal"

    def check(self, config: Any) -> None:
        """Raise ValueError for an odd width."""
        check_even_width(config)

    def embed(self, hidden_states: Tensor, places: Tensor, table: nn.Module | None) -> Tensor:
        """Add the sinusoids."""
        return hidden_states + sinusoidal_embeddings(places, hidden_states.shape[-1]).to(hidden_states.dtype)
