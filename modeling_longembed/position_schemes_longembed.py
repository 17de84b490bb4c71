"""Position schemes: what a token knows about where it stands, and how that is stretched beyond the trained length.

A scheme acts in one of three places: it adds a vector to the embedding (absolute, sinusoidal), rotates query and key
(rope), or adds a bias to the scores (alibi, the relative buckets of T5 and MPNet; Transformer-XL's has a file of its
own). Nothing here holds tensor state: a non-persistent buffer comes back from `from_pretrained` as garbage, so tables
are computed from Python numbers in every forward pass.

An extension applies to documents that are longer than the original context only (unless `keep_short` is false), each by
its own length: a document that fits is read as the original model read it, whatever stands beside it in the batch.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .packing_longembed import PackedDocuments

# Extension methods of each scheme; those without have no trained length.
EXTENSIONS = {
    "absolute": ("repeat", "interpolate", "group", "restart"),
    "sinusoidal": ("repeat", "interpolate", "group", "restart"),
    "rope": ("linear", "dynamic", "ntk", "theta", "yarn", "group"),
    "alibi": (),
    "relative": (),
    "none": (),
}


def sinusoidal_embeddings(positions: Tensor, dim: int) -> Tensor:
    """Sine and cosine interleaved: `PE[p, 2t] = sin(p w_t)`, `PE[p, 2t + 1] = cos(p w_t)`, `w_t = 10000^(-2t / dim)`.

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
    """A learned table of P rows stretched to `length` rows.

    Args:
        table: `(P, d)`.
        length: rows wanted, at least P.
        method: `repeat` copies the table (Longformer: row j*P + r is row r); `interpolate` puts old row i at k*i,
            k = ceil(length / P), and convex combinations between (the table form of position interpolation; rows after
            the last old one repeat it).

    Returns:
        `(length, d)`, old rows bitwise.
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


def extension_factor(extension: dict, max_position_embeddings: int) -> float:
    """How many times longer the new context is, unless the extension names its own factor."""
    if extension.get("factor") is not None:
        return extension["factor"]
    return max(1.0, max_position_embeddings / extension["original_max_position_embeddings"])


def is_extended(extension: dict | None, lengths: Tensor) -> Tensor:
    """Which documents the extension applies to, given the length of each (or, for every token, of its own). Bool."""
    if extension is None:
        return torch.zeros_like(lengths, dtype=torch.bool)
    if not extension["keep_short"]:
        return torch.ones_like(lengths, dtype=torch.bool)
    return lengths > extension["original_max_position_embeddings"]


def position_ids(config, documents: PackedDocuments, token_index: Tensor) -> Tensor:
    """Rows of the position table (absolute) or arguments of the sinusoids, per document.

    `repeat` on a table needs no change of ids (the table itself is longer); on sinusoids it is `p mod P`. `interpolate`
    puts a short document on the old rows, k*p (E5-Base-4k), and a long one on p. `group` is `p // factor`. `restart` is
    `p mod period`.

    Args:
        documents: the lengths.
        token_index: `(T,)` place of each token in its document.

    Returns:
        `(T,)`: int64 for absolute, possibly fractional for sinusoidal.
    """
    extension = config.position_extension
    if extension is None:
        return token_index
    method, learned = extension["method"], config.position_embedding_type == "absolute"
    if method == "restart":
        return token_index % extension["period"]
    if method == "repeat":
        return token_index if learned else token_index % extension["original_max_position_embeddings"]
    extended = is_extended(extension, documents.document_lengths)
    factor = extension_factor(extension, config.max_position_embeddings)
    if method == "group":
        return torch.where(extended, token_index // math.ceil(factor), token_index)
    if learned:  # interpolate: the original rows stand at multiples of the factor
        return torch.where(extended, token_index, token_index * math.ceil(factor))
    return torch.where(extended, token_index / factor, token_index.float())


def position_table_rows(config) -> int:
    """Rows of the learned position table that `config` describes."""
    extension = config.position_extension
    if extension is None or extension["method"] == "repeat":
        return config.max_position_embeddings
    original = extension["original_max_position_embeddings"]
    if extension["method"] == "interpolate":  # whole steps: a document that fits reads every k-th row up to the last
        spread = original * math.ceil(extension_factor(extension, config.max_position_embeddings))
        return max(spread, config.max_position_embeddings)
    return original


def extended_position_table(table: Tensor, config) -> Tensor:
    """The table that `config` describes, from the original one of a model: `(P, d)` to `(position_table_rows, d)`."""
    extension, rows = config.position_extension or {"method": None}, position_table_rows(config)
    if extension["method"] == "interpolate":
        factor = math.ceil(extension_factor(extension, config.max_position_embeddings))
        table = extend_position_table(table, len(table) * factor, "interpolate")
    return table[:rows] if rows <= len(table) else extend_position_table(table, rows, "repeat")


def unscaled_rope_theta(rope_parameters: dict, head_dim: int) -> float:
    """The base under which `ntk` and `theta` are a rotation of `rope_type` `default`."""
    theta = float(rope_parameters["rope_theta"])
    if rope_parameters["rope_type"] == "ntk":
        theta *= rope_parameters["factor"] ** (head_dim / (head_dim - 2))
    return theta


def rope_frequencies(
    rope_parameters: dict, head_dim: int, original_length: int, extended_length: int | None = None
) -> tuple[Tensor, float]:
    """Inverse frequencies and attention factor of rotary embeddings (Su et al. 2021), scaled as transformers does it.

    Args:
        rope_parameters: transformers' form, `{"rope_type": ..., "rope_theta": ..., ...}`. `ntk` (static NTK, theta
            times `factor^(D / (D - 2))`) and `theta` (a new `rope_theta`) are ours: transformers has no name for them.
        head_dim: D, even.
        original_length: context in tokens that the model was trained at.
        extended_length: length of the document, for `dynamic`.

    Returns:
        `(D / 2,)` fp32 inverse frequencies, and the number that cos and sin are multiplied by (1 except for yarn).
    """
    rope_type = rope_parameters["rope_type"]
    if rope_type in ("default", "ntk", "theta"):
        theta = unscaled_rope_theta(rope_parameters, head_dim)
        return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim), 1.0
    # transformers reads the trained length from `max_position_embeddings`, which in our config is the extended one.
    view = SimpleNamespace(
        rope_parameters=rope_parameters,
        head_dim=head_dim,
        hidden_size=head_dim,  # read, though not needed beside head_dim
        num_attention_heads=1,
        max_position_embeddings=original_length,
        standardize_rope_params=lambda: None,
    )
    return ROPE_INIT_FUNCTIONS[rope_type](view, torch.device("cpu"), seq_len=extended_length)


def extended_rope_parameters(extension: dict, rope_parameters: dict, max_position_embeddings: int) -> dict:
    """Parameters of the stretched rotation: the base ones with the extension's type and factor."""
    method = extension["method"]
    parameters = {"rope_type": method, "rope_theta": rope_parameters["rope_theta"]}
    parameters |= {
        key: value for key, value in extension.items() if key not in ("method", "keep_short") and value is not None
    }
    if method != "theta":
        # transformers' dynamic NTK scales by f * len / L - (f - 1): only f = 1 means "as long as the document is".
        parameters["factor"] = (
            parameters.get("factor", 1.0)
            if method == "dynamic"
            else extension_factor(extension, max_position_embeddings)
        )
    return parameters


@dataclass
class Rotary:
    """Rotation of query and key: cos and sin `(T, D)` in fp32, half-split (channels t and t + D/2 form a plane)."""

    cos: Tensor
    sin: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Rotates `(T, H, D)`; in fp32 at least, because bf16 angles are off by whole turns at long range."""
        half = states.shape[-1] // 2
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        rotated = torch.cat([-wide[..., half:], wide[..., :half]], dim=-1)
        return (wide * self.cos[:, None] + rotated * self.sin[:, None]).to(states.dtype)


def rotary_at(positions: Tensor, inv_freq: Tensor, attention_factor: Tensor | float = 1.0) -> Rotary:
    """Rotation at `positions` `(T,)` with inverse frequencies `(D / 2,)` or, one row a token, `(T, D / 2)`."""
    angles = positions.to(inv_freq.dtype)[:, None] * inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    return Rotary(angles.cos() * attention_factor, angles.sin() * attention_factor)


def moved_rotary(rotary: Rotary, rows: Tensor, dtype: torch.dtype) -> Rotary:
    """What takes states that `rotary` has rotated to the places of its rows `rows` `(T,)` instead."""
    cos, sin = rotary.cos.to(dtype), rotary.sin.to(dtype)
    # cos and sin carry an attention factor, and the states as well: it must come out once.
    square = cos.square() + sin.square()
    return Rotary((cos[rows] * cos + sin[rows] * sin) / square, (sin[rows] * cos - cos[rows] * sin) / square)


@dataclass
class GroupedRotary:
    """Self-Extend (Jin et al. 2024): far keys are seen at grouped positions, near ones at their own.

    For query i and key j the relative position is `i - j` where `|i - j| < neighbours`, else
    `i // g - j // g + (w - w // g)` to the left and the mirror image to the right. Both are merged before one softmax.

    Args:
        query_left, query_right: `(T, H, D)` queries rotated for far keys on their left and on their right.
        key: `(T, H, D)` keys rotated at grouped positions.
        neighbours: `(T,)` int64, w of the document of each token; its length where the document is not extended.
    """

    query_left: Tensor
    query_right: Tensor
    key: Tensor
    neighbours: Tensor

    def __getitem__(self, rows: slice) -> "GroupedRotary":
        return GroupedRotary(self.query_left[rows], self.query_right[rows], self.key[rows], self.neighbours[rows])

    def heads(self, heads: slice) -> "GroupedRotary":
        """The same for some of the heads."""
        return GroupedRotary(self.query_left[:, heads], self.query_right[:, heads], self.key[:, heads], self.neighbours)

    def merge(self, near: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Unscaled scores `(H, Q, K)` of one document: `near` where the key is a neighbour, grouped ones elsewhere."""
        left, right = (x[query_index].transpose(0, 1) for x in (self.query_left, self.query_right))
        distance = query_index[:, None] - key_index[None, :]
        return merge_far(
            near, left, right, self.key[key_index].transpose(0, 1), distance, self.neighbours[query_index][:, None]
        )


def merge_far(
    near: Tensor, query_left: Tensor, query_right: Tensor, far_key: Tensor, distance: Tensor, neighbours: Tensor
) -> Tensor:
    """Self-Extend's unscaled scores `(..., H, Q, K)`: `near` among neighbours, those of the grouped positions beyond.

    Queries `(..., H, Q, D)` for keys on their left and on their right, keys `(..., H, K, D)`, `distance` query - key.
    """
    left, right = (query @ far_key.transpose(-1, -2) for query in (query_left, query_right))
    return torch.where(distance.abs() < neighbours, near, torch.where(distance > 0, left, right))


def grouped_positions(token_index: Tensor, group: int, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of Self-Extend's far part: a query's for keys on its left, on its right, and a key's. All `(T,)`."""
    floored = token_index // group
    shift = neighbours - neighbours // group
    return floored + shift, floored - shift, floored


class FarRotary(NamedTuple):
    """Self-Extend's second rotation, of queries and keys that are far from each other."""

    query_left: Rotary  # of a query, for keys on its left
    query_right: Rotary  # of a query, for keys on its right
    key: Rotary
    neighbours: Tensor  # (T,) int64, keys nearer than this are rotated as ever


@dataclass
class RopePlan:
    """Rotations of query and key under one set of `rope_parameters`; computed once per forward pass."""

    near: Rotary
    far: FarRotary | None = None

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, GroupedRotary | None]:
        grouped = None
        if self.far is not None:
            left, right = self.far.query_left(query), self.far.query_right(query)
            grouped = GroupedRotary(left, right, self.far.key(key), self.far.neighbours)
        return self.near(query), self.near(key), grouped


def rope_plan(config, rope_parameters: dict, documents: PackedDocuments, token_index: Tensor) -> RopePlan:
    """Rotations for one set of `rope_parameters`, every document by its own length."""
    extension, device = config.position_extension, token_index.device
    original = extension["original_max_position_embeddings"] if extension else config.max_position_embeddings
    base, base_factor = rope_frequencies(rope_parameters, config.head_dim, original)
    base = base.to(device)
    exporting = torch.compiler.is_exporting()  # a graph for all inputs holds both readings of a document
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
    if method == "dynamic":  # one frequency row a document: the length of a neighbour must not reach into this one
        rows, factors = zip(
            *(rope_frequencies(parameters, config.head_dim, original, max(n, original)) for n in documents.lengths),
            strict=True,
        )
        stretched, factor = torch.stack(rows).to(device), torch.tensor(factors, device=device)
    else:
        row, row_factor = rope_frequencies(parameters, config.head_dim, original)
        stretched, factor = row.to(device).expand(lengths.shape[0], -1), torch.tensor(row_factor, device=device)
    extended = is_extended(extension, lengths)
    inv_freq = torch.where(extended[:, None], stretched, base)[documents.document_ids]
    attention_factor = torch.where(extended, factor, base_factor)[documents.document_ids]
    return RopePlan(rotary_at(token_index, inv_freq, attention_factor[:, None]))


class ScoreBias:
    """A number added to the scaled score of query i and key j that depends on their places and on the head."""

    reads_query: ClassVar[bool] = False  # whether it depends on the query's vector too

    def heads(self, heads: slice) -> "ScoreBias":
        """The same for some of the heads."""
        raise NotImplementedError

    def dense(self, query: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        """`(..., H, Q, K)` for queries `(..., H, Q, D)` at the places `(Q,)` and keys at `(K,)` of one document."""
        raise NotImplementedError


class DistanceOnlyBias(ScoreBias):
    """A bias that is a function of `j - i` and the head alone."""

    num_heads: int

    def values(self, relative_position: Tensor, head: Tensor) -> Tensor:
        """Bias of relative positions `key - query` in the heads `head`, int64, broadcastable against each other."""
        raise NotImplementedError

    def dense(self, query: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        """`(H, Q, K)`; the query's vector does not matter."""
        head = torch.arange(self.num_heads, device=query_index.device)
        return self.values(key_index[None, :] - query_index[:, None], head[:, None, None])


def alibi_slopes(num_heads: int) -> list[float]:
    """Slopes of Press et al. 2022: `2^(-8h / H)` for H a power of two, else with every second one of the next power."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    return slopes + [2.0 ** (-4.0 * h / power) for h in range(1, 2 * (num_heads - power), 2)]


class AlibiBias(DistanceOnlyBias):
    """`-slope_h |i - j|`: the symmetric form, because an encoder looks both ways. `slopes` is `(H,)`."""

    def __init__(self, slopes: Tensor):
        self.slopes, self.num_heads = slopes, len(slopes)

    def heads(self, heads):
        return AlibiBias(self.slopes[heads])

    def values(self, relative_position: Tensor, head: Tensor) -> Tensor:
        return -relative_position.abs() * self.slopes[head]


def relative_position_bucket(relative_position: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bidirectional buckets of T5 (Raffel et al. 2020) and MPNet: half a side, exact near, logarithmic further away."""
    half = num_buckets // 2
    exact = half // 2
    side = (relative_position > 0).long() * half
    distance = relative_position.abs()
    far = (
        exact
        + (torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)).long()
    )
    return side + torch.where(distance < exact, distance, far.clamp(max=half - 1))


class BucketBias(DistanceOnlyBias):
    """A learned number for every head and bucket of distances; shared by all layers."""

    def __init__(self, table: Tensor, max_distance: int):
        self.table, self.max_distance = table, max_distance  # (num_buckets, H)
        self.num_heads = table.shape[1]

    def heads(self, heads):
        return BucketBias(self.table[:, heads], self.max_distance)

    def values(self, relative_position: Tensor, head: Tensor) -> Tensor:
        return self.table[relative_position_bucket(relative_position, len(self.table), self.max_distance), head]
