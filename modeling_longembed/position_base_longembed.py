"""The interface of a position scheme, and its contributions to attention: rotations and biases on the scores.

A scheme acts in one of three places. It adds a vector to the embedding of a token (absolute, sinusoidal), rotates query
and key (rope), or adds a bias to the attention scores (alibi, relative). To add a scheme, write a subclass of
`PositionScheme` in a file of its own, register it, and import that file in `position_schemes_longembed`.

Nothing here holds tensor state. `from_pretrained` leaves non-persistent buffers uninitialised, so tables are computed
from Python numbers in every forward pass.

An extension applies only to documents that are longer than the original context (unless `keep_short` is false), and to
each by its own length. A document that fits into the original context gets the positions of the original model,
whatever else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .packing_longembed import PackedDocuments

# Rotations ------------------------------------------------------------------------------------------------------------


@dataclass
class Rotary:
    """Rotation of query and key by cosines and sines `(T, D)` in fp32; channels t and t + D/2 form a plane."""

    cos: Tensor
    sin: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Rotate `(T, H, D)`; in fp32 at least, because bf16 angles are off by whole turns at long range."""
        half = states.shape[-1] // 2
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        rotated = torch.cat([-wide[..., half:], wide[..., :half]], dim=-1)
        return (wide * self.cos[:, None] + rotated * self.sin[:, None]).to(states.dtype)


def moved_rotary(rotary: Rotary, rows: Tensor, dtype: torch.dtype) -> Rotary:
    """Return the rotation that moves states, already rotated by `rotary`, to the positions of other rows.

    Args:
        rotary: the rotation that the states have been through.
        rows: `(T,)` int64, the row of `rotary` whose position each state is moved to.
        dtype: the precision to compute in.

    Returns:
        The rotation from each position to the new one.
    """
    cos, sin = rotary.cos.to(dtype), rotary.sin.to(dtype)
    # cos and sin contain the attention factor, and so do the states: it must be divided out once.
    square = cos.square() + sin.square()
    return Rotary((cos[rows] * cos + sin[rows] * sin) / square, (sin[rows] * cos - cos[rows] * sin) / square)


@dataclass
class GroupedRotary:
    """Self-Extend (Jin et al. 2024): far keys are seen at grouped positions, near ones at their own.

    For query i and key j the relative position is `i - j` where `|i - j| < neighbours`. Otherwise it is
    `i // g - j // g + (w - w // g)` for keys on the left and the mirror image for keys on the right. Both sets of
    scores are merged before one softmax.

    Args:
        query_left, query_right: `(T, H, D)`, queries rotated for far keys on their left and on their right.
        key: `(T, H, D)`, keys rotated at grouped positions.
        neighbours: `(T,)` int64, w for the document of each token; its length where the document is not extended.
    """

    query_left: Tensor
    query_right: Tensor
    key: Tensor
    neighbours: Tensor

    def __getitem__(self, rows: slice) -> "GroupedRotary":
        return GroupedRotary(self.query_left[rows], self.query_right[rows], self.key[rows], self.neighbours[rows])

    def heads(self, heads: slice) -> "GroupedRotary":
        """Return the part for some of the heads."""
        return GroupedRotary(self.query_left[:, heads], self.query_right[:, heads], self.key[:, heads], self.neighbours)

    def merge(self, near: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Merge near and far scores of one document.

        Args:
            near: `(H, Q, K)`, unscaled scores at the tokens' own positions.
            query_index, key_index: `(Q,)` and `(K,)`, positions in the document.

        Returns:
            `(H, Q, K)`, unscaled: `near` where the key is a neighbour, grouped scores elsewhere.
        """
        left, right = (x[query_index].transpose(0, 1) for x in (self.query_left, self.query_right))
        distance = query_index[:, None] - key_index[None, :]
        return merge_far(
            near, left, right, self.key[key_index].transpose(0, 1), distance, self.neighbours[query_index][:, None]
        )


def merge_far(
    near: Tensor, query_left: Tensor, query_right: Tensor, far_key: Tensor, distance: Tensor, neighbours: Tensor
) -> Tensor:
    """Merge Self-Extend's near scores with those at the grouped positions.

    Args:
        near: `(..., H, Q, K)`, unscaled scores at the tokens' own positions.
        query_left, query_right: `(..., H, Q, D)`, queries for far keys on their left and on their right.
        far_key: `(..., H, K, D)`, keys at grouped positions.
        distance: position of the query minus that of the key, broadcastable to the scores.
        neighbours: distance from which a key counts as far, broadcastable to the scores.

    Returns:
        `(..., H, Q, K)`, unscaled.
    """
    left, right = (query @ far_key.transpose(-1, -2) for query in (query_left, query_right))
    return torch.where(distance.abs() < neighbours, near, torch.where(distance > 0, left, right))


class FarRotary(NamedTuple):
    """Self-Extend's second rotation, for queries and keys that are far from each other.

    Args:
        query_left, query_right: the rotation of a query for keys on its left and on its right.
        key: the rotation of a key.
        neighbours: `(T,)` int64, distance from which a key counts as far.
    """

    query_left: Rotary
    query_right: Rotary
    key: Rotary
    neighbours: Tensor


@dataclass
class RopePlan:
    """Rotations of query and key under one set of `rope_parameters`, computed once per forward pass."""

    near: Rotary
    far: FarRotary | None = None

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, GroupedRotary | None]:
        """Rotate query and key `(T, H, D)`; the third result is Self-Extend's second rotation, or None."""
        grouped = None
        if self.far is not None:
            left, right = self.far.query_left(query), self.far.query_right(query)
            grouped = GroupedRotary(left, right, self.far.key(key), self.far.neighbours)
        return self.near(query), self.near(key), grouped

    def at(self, rows: Tensor) -> "RopePlan":
        """Return the plan for the packed rows `rows`, without Self-Extend, which is not defined for inserted rows."""
        return RopePlan(Rotary(self.near.cos[rows], self.near.sin[rows]))


# Biases on the attention scores ---------------------------------------------------------------------------------------


class ScoreBias:
    """A number added to the scaled score of query i and key j that depends on their positions and on the head."""

    reads_query: ClassVar[bool] = False  # whether it also depends on the query's vector

    def heads(self, heads: slice) -> "ScoreBias":
        """Return the part for some of the heads."""
        raise NotImplementedError

    def dense(self, query: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Compute the bias of all pairs of some queries and some keys of one document.

        Args:
            query: `(..., H, Q, D)`.
            query_index, key_index: `(Q,)` and `(K,)`, positions in the document.

        Returns:
            `(..., H, Q, K)`, broadcastable to the scores.
        """
        raise NotImplementedError


class DistanceOnlyBias(ScoreBias):
    """A bias that is a function of `j - i` and the head alone."""

    num_heads: int

    def values(self, relative_position: Tensor, head: Tensor) -> Tensor:
        """Return the bias at relative positions `key - query` in the heads `head`.

        Args:
            relative_position, head: int64, broadcastable against each other.

        Returns:
            The bias, of the broadcast shape.
        """
        raise NotImplementedError

    def dense(self, query: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Compute the bias `(H, Q, K)`; the query's vector does not matter."""
        head = torch.arange(self.num_heads, device=query_index.device)
        return self.values(key_index[None, :] - query_index[:, None], head[:, None, None])


# What a scheme contributes to one forward pass ------------------------------------------------------------------------


@dataclass
class Positions:
    """What a scheme contributes to attention in one forward pass, computed once for all sublayers.

    Args:
        rotations: the rotation of query and key by layer type; empty for schemes that do not rotate.
        bias: what is added to the scores of all sublayers, or None.
    """

    rotations: dict[str, RopePlan] = field(default_factory=dict)
    bias: ScoreBias | None = None

    def apply(
        self, attention: Any, query: Tensor, key: Tensor, pattern: Any, documents: PackedDocuments
    ) -> tuple[Tensor, Tensor, ScoreBias | None, GroupedRotary | None]:
        """Apply the positions to query and key of one attention sublayer.

        Args:
            attention: the `LongEmbedAttention`; its `distance` is the module that `PositionScheme.build` returned.
            query, key: `(T, H, D)`, the outputs of the projections.
            pattern: the attention pattern of this forward pass.
            documents: the packed documents.

        Returns:
            Query and key with positions, the bias on the scores or None, Self-Extend's second rotation or None.
        """
        rotation = self.rotations.get(attention.layer_type)
        if rotation is None:
            return query, key, self.bias, None
        query, key, grouped = rotation(query, key)
        return query, key, self.bias, grouped

    def at(self, rows: Tensor) -> "Positions":
        """Return the positions of the packed rows `rows`, some of which may occur more than once."""
        return replace(self, rotations={name: rotation.at(rows) for name, rotation in self.rotations.items()})


# Extension of the context ---------------------------------------------------------------------------------------------


def extension_factor(extension: dict, max_position_embeddings: int) -> float:
    """Return the factor of the extension, by default the new context length divided by the original one."""
    if extension.get("factor") is not None:
        return extension["factor"]
    return max(1.0, max_position_embeddings / extension["original_max_position_embeddings"])


def is_extended(extension: dict | None, lengths: Tensor) -> Tensor:
    """Return which documents the extension applies to.

    Args:
        extension: `config.position_extension`.
        lengths: length in tokens of each document, or for every token the length of its own document.

    Returns:
        bool, shape of `lengths`.
    """
    if extension is None:
        return torch.zeros_like(lengths, dtype=torch.bool)
    if not extension["keep_short"]:
        return torch.ones_like(lengths, dtype=torch.bool)
    return lengths > extension["original_max_position_embeddings"]


# The interface --------------------------------------------------------------------------------------------------------


class PositionScheme:
    """Base class of all position schemes. A scheme has no state: its parameters are fields of the config.

    The default methods are those of a scheme that does nothing.
    """

    type: ClassVar[str]  # the name in `config.position_embedding_type`
    # Extension methods, each with its parameters and their defaults (None: derived, or required).
    extensions: ClassVar[dict[str, dict[str, Any]]] = {}
    has_table: ClassVar[bool] = False  # whether it learns a vector for each position
    rotates: ClassVar[bool] = False  # whether it rotates query and key by `config.rope_parameters`
    adds_bias: ClassVar[bool] = False  # whether it adds a bias by distance to the scores
    bias_reads_query: ClassVar[bool] = False  # whether that bias also depends on the query's vector

    def check(self, config: Any) -> None:
        """Raise ValueError, with the fields and the remedy, if `config` cannot be combined with this scheme."""

    def merges_scores(self, config: Any) -> bool:
        """Return whether attention has two scores for every pair (Self-Extend)."""
        return False

    # Contributions to the embeddings.

    def build_table(self, config: Any) -> nn.Embedding | None:
        """Return the learned vectors `(P, d)`, or None if there are none."""
        return None

    def places(self, config: Any, documents: PackedDocuments, token_index: Tensor) -> Tensor:
        """Return the position of each token that `embed` uses.

        Args:
            config: the config of the model.
            documents: the packed documents.
            token_index: `(T,)`, position of each token in its document.

        Returns:
            `(T,)`.
        """
        return token_index

    def embed(self, hidden_states: Tensor, places: Tensor, table: nn.Module | None) -> Tensor:
        """Add the vectors of the positions.

        Args:
            hidden_states: `(T, d)`, embeddings of tokens and segments.
            places: `(T,)`, the result of `places`.
            table: the result of `build_table`.

        Returns:
            `(T, d)`.
        """
        return hidden_states

    # Contributions to attention.

    def build(self, config: Any) -> nn.Module | None:
        """Return the parameters of one attention sublayer, or None if the scheme has none."""
        return None

    def initialize(self, module: nn.Module, std: float) -> None:
        """Initialise the parameters of `module` if it was returned by `build`.

        Use `transformers.initialization`, which keeps parameters that were loaded from a checkpoint.

        Args:
            module: any module of the model.
            std: `config.initializer_range`.
        """

    def prepare(self, config: Any, documents: PackedDocuments, token_index: Tensor, hidden_states: Tensor) -> Positions:
        """Compute the contribution to one forward pass, which all attention sublayers share.

        Args:
            config: the config of the model.
            documents: the packed documents.
            token_index: `(T,)`, position of each token in its document.
            hidden_states: `(T, d)`, the input of the first sublayer, with the device and data type of the result.

        Returns:
            The contribution of the scheme.
        """
        return Positions()

    def rotation(
        self, config: Any, layer_type: str, documents: PackedDocuments, token_index: Tensor
    ) -> RopePlan | None:
        """Return the rotation of the sublayers of one layer type, or None if the scheme does not rotate.

        Args:
            config: the config of the model.
            layer_type: name in `config.layer_types`.
            documents: the packed documents.
            token_index: `(T,)`, position of each token in its document.
        """
        return None

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Return how tensor parallelism splits the module of `build`: names in the attention module to styles."""
        return {}

    # Extension, chunks and export.

    def default_extension(self, patterns: Sequence[Any]) -> str | None:
        """Return the extension method that works best without training; None if the scheme has no trained length.

        Args:
            patterns: the attention patterns of the model.
        """
        return None

    def extend_again(self, config: Any, method: str, parameters: dict) -> dict:
        """Return the new `position_extension` of a model that is already extended.

        Args:
            config: the config of the model, before its context becomes longer.
            method: the requested extension method.
            parameters: parameters of the method.

        Returns:
            The extension, without the new context length.

        Raises:
            ValueError: `method` cannot be applied on top of the model's current extension.
        """
        current = config.position_extension
        if method != current["method"]:
            raise ValueError(
                f"extend_context: this model is extended by {current['method']!r} from "
                f"{current['original_max_position_embeddings']} tokens, which {method!r} cannot follow; use "
                f"method={current['method']!r}"
            )
        if method == "repeat":
            return current | {"original_max_position_embeddings": config.max_position_embeddings} | parameters
        return current | ({"factor": None} if "factor" in current else {}) | parameters

    def table_rows(self, config: Any) -> int | None:
        """Return the largest number of tokens of a document that the position table allows; None: no limit."""
        return None

    def check_chunks(self, config: Any) -> None:
        """Check that positions do not depend on the length of the document, which is unknown while reading chunks.

        Raises:
            ValueError: they do.
        """
        extension = config.position_extension
        if extension is not None and extension["method"] not in ("repeat", "restart") and extension["keep_short"]:
            raise ValueError(
                f"memory: position_extension {extension['method']!r} with keep_short=true depends on the length of "
                "the document, which is unknown while it is read in chunks; set keep_short=false"
            )

    def check_graph(self, config: Any) -> None:
        """Raise ValueError if the scheme cannot be written as an ONNX graph."""

    def complete_extension(self, config: Any) -> dict:
        """Return `config.position_extension` with every parameter of its method.

        Args:
            config: the config, whose patterns and sizes are complete.

        Returns:
            The extension; the order of its entries does not depend on the order in which they were given.

        Raises:
            ValueError: the scheme does not have the method or a parameter, or a value is out of range.
        """
        extension = dict(config.position_extension)
        method = extension.get("method")
        if not self.extensions:
            raise ValueError(
                f"position_extension: {self.type!r} positions have no trained length to extend; remove "
                "position_extension"
            )
        if method not in self.extensions:
            raise ValueError(
                f"position_extension: the method {method!r} is not defined for position_embedding_type={self.type!r}; "
                f"choose from {', '.join(self.extensions)}"
            )
        known = {"original_max_position_embeddings": None, "keep_short": True} | self.extensions[method]
        if unknown := sorted(set(extension) - set(known) - {"method"}):
            raise ValueError(
                f"position_extension: the method {method!r} has no parameter {unknown[0]!r}; it has {', '.join(known)}"
            )
        extension = {"method": method} | known | extension
        blocks = {pattern.size for pattern in config.get_patterns() if pattern.type == "block"}
        if "period" in known and extension["period"] is None and len(blocks) == 1:
            extension["period"] = blocks.pop()
        original = extension["original_max_position_embeddings"]
        for name in ("original_max_position_embeddings", "period"):
            if name in known and (type(extension[name]) is not int or extension[name] < 1):
                raise ValueError(
                    f"position_extension: {name}={extension[name]!r}; give the number of tokens, at least 1"
                )
        if original > config.max_position_embeddings:
            raise ValueError(
                f"position_extension: original_max_position_embeddings={original} is more than "
                f"max_position_embeddings={config.max_position_embeddings}; an extension makes the context longer"
            )
        if "period" in known and extension["period"] > original:
            raise ValueError(
                f"position_extension: period={extension['period']} is more than the {original} positions "
                "that were trained; give a smaller one"
            )
        for name in ("factor", "rope_theta"):
            value = extension.get(name)
            if value is not None and not (isinstance(value, (int, float)) and value >= 1):
                raise ValueError(f"position_extension: {name}={value!r}; give a number of at least 1")
        if not isinstance(extension["keep_short"], bool):
            raise ValueError(f"position_extension: keep_short={extension['keep_short']!r}; give true or false")
        return extension


POSITION_SCHEMES: dict[str, PositionScheme] = {}


def register_scheme(cls: type[PositionScheme]) -> type[PositionScheme]:
    """Class decorator: make a scheme available under its `type` in `config.position_embedding_type`."""
    POSITION_SCHEMES[cls.type] = cls()
    return cls


def check_even_width(config: Any) -> None:
    """Check that sines and cosines pair up.

    Raises:
        ValueError: `hidden_size` is odd.
    """
    if config.hidden_size % 2:
        raise ValueError(
            f"position_embedding_type={config.position_embedding_type!r} needs an even hidden_size, not "
            f"{config.hidden_size}"
        )
