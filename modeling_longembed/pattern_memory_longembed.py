"""Transformer-XL's memory (Dai et al. 2019, arXiv:1901.02860, section 3.2), and documents that are encoded in chunks.

A segment reads the last states before it, to which no gradient flows. All segments of a whole document can therefore be
computed at once, layer by layer, and the result equals that of encoding it segment by segment with `memory=`.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import lcm
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .attention_kernels_longembed import masked_softmax
from .attention_past_longembed import PastKeys, Segments, past_attention
from .output_pooling_longembed import pool_incrementally
from .packing_longembed import PackedDocuments
from .pattern_base_longembed import AttentionInputs, AttentionPattern, Places, parameter, register_pattern
from .pattern_local_longembed import BlockAttention
from .position_base_longembed import RopePlan, merge_far


class Past(NamedTuple):
    """What a sublayer's queries read in addition to their own segment; `past_keys` concatenates the two."""

    # With a stream: the `memory` tokens before the chunk, for each of B documents, the most recent last.
    stored: PastKeys | None
    # The T tokens of the chunk, projected from detached states; None: the ordinary keys and values are used.
    chunk: PastKeys | None


@register_pattern
class MemoryAttention(AttentionPattern):
    """Segments of `size` tokens that read the last `memory` tokens before them (Transformer-XL, Dai et al. 2019).

    A token sees its own segment in both directions (if causal, only earlier tokens) and the memory. The states of the
    memory are constants in training (stop-gradient), so that a document may have any length. Information travels
    `n * memory` tokens forward through n sublayers, and never backward beyond a segment. `memory=0` equals `block`.
    Use the pattern for documents that are too long to be held in memory at once (`model.new_memory`), or to train with
    earlier context without backpropagating through it.

    Cost: L x (size + memory) in time, L in memory; in training keys and values are projected twice.
    """

    type = "memory"
    layer_type = "chunked_attention"
    size: int = parameter(256)
    memory: int = parameter(256, least=0)

    @property
    def is_mask(self):
        return False  # the predicate does not define where the gradient stops

    def visible(self, query, key, head, num_heads):
        start = query.index // self.size * self.size
        before = (key.index < start) & (key.index >= start - self.memory)
        return before | (key.index // self.size == query.index // self.size)

    def sees_all(self, length):
        return length <= self.size

    def reach(self, documents):
        furthest = self.size - 1 + self.memory
        return furthest if documents.past is not None else max(0, min(documents.max_seqlen - 1, furthest))

    def prepare(self, attention, states, context):
        plan, stored, chunk = context.positions.rotations.get(attention.layer_type), None, None
        if context.stream is not None:
            stored = project_past(attention, *context.stream.recall(attention, states, self.memory))
        if torch.is_grad_enabled() and self.memory:
            chunk = project_past(attention, states.detach(), plan)
        return Past(stored, chunk)

    def past_keys(self, inputs: AttentionInputs) -> PastKeys:
        """Return what `Segments.past` indexes: the stored tokens of all documents, then the T tokens of the chunk."""
        stored, chunk = inputs.own or Past(None, None)
        if chunk is None:
            chunk = PastKeys(inputs.key, inputs.value, None if inputs.grouped is None else inputs.grouped.key)
        if stored is None:
            return chunk
        far = None
        if stored.far_key is not None and chunk.far_key is not None:
            far = torch.cat([stored.far_key, chunk.far_key])
        return PastKeys(torch.cat([stored.key, chunk.key]), torch.cat([stored.value, chunk.value]), far)

    def cut(self, documents: PackedDocuments) -> list[Segments]:
        """Return the segments of all documents, grouped by shape."""
        past, device = documents.past, documents.cu_seqlens.device
        seen = [0] * len(documents.lengths) if past is None else past.tolist()
        shapes: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
        for number, (start, length) in enumerate(zip(documents.cu_seqlens.tolist(), documents.lengths, strict=False)):
            for offset in range(0, length, self.size):
                shape = min(self.size, length - offset), min(self.memory, seen[number] + offset)
                shapes[shape].append((number, start, offset))
        segments = []
        for (length, read), members in shapes.items():
            numbers, starts, offsets = torch.tensor(members, device=device).unbind(1)
            past_index = torch.arange(-read, 0, device=device)
            places = offsets[:, None] + past_index  # in the chunk; negative: before it
            rows = starts[:, None] + places
            if past is not None:
                stored = (numbers[:, None] + 1) * self.memory + places
                rows = torch.where(places < 0, stored, len(seen) * self.memory + rows)
            segments.append(Segments(length, starts + offsets, rows, past_index))
        return segments

    def attend(self, inputs):
        segments = inputs.documents.once(self, lambda: self.cut(inputs.documents))
        return past_attention(
            *(inputs.query, inputs.key, inputs.value),
            self.past_keys(inputs),
            segments,
            inputs.scaling,
            inputs.dropout,
            inputs.bias,
            inputs.grouped,
            inputs.causal,
        )

    def dense(self, inputs, rows):
        """Compute one softmax over `[past, own]`; keys of earlier segments are read from the past."""
        documents, past, device = inputs.documents, self.past_keys(inputs), inputs.query.device
        length, first, seen = rows.stop - rows.start, 0, 0
        past_rows = torch.arange(rows.start, rows.stop, device=device)
        if documents.past is not None:
            number = int(documents.document_ids[rows.start])
            seen = min(self.memory, int(documents.past[number]))
            first = len(documents.past) * self.memory
            stored = torch.arange((number + 1) * self.memory - seen, (number + 1) * self.memory, device=device)
            past_rows = torch.cat([stored, first + past_rows])
        index = torch.arange(length, device=device)
        key_index = torch.cat([torch.arange(-seen, length, device=device), index])
        is_past = torch.arange(len(key_index), device=device) < seen + length

        def keys(past_states: Tensor, states: Tensor) -> Tensor:
            return torch.cat([past_states[past_rows], states[rows]]).transpose(0, 1)  # (H, seen + 2 L, D)

        query, value = inputs.query[rows].transpose(0, 1), keys(past.value, inputs.value)
        scores = query @ keys(past.key, inputs.key).transpose(1, 2)
        if (grouped := inputs.grouped) is not None:
            left, right = (x[rows].transpose(0, 1) for x in (grouped.query_left, grouped.query_right))
            distance, neighbours = index[:, None] - key_index, grouped.neighbours[rows][:, None]
            far_key = keys(cast(Tensor, past.far_key), grouped.key)
            scores = merge_far(scores, left, right, far_key, distance, neighbours)
        scores = scores * inputs.scaling
        if inputs.bias is not None:
            scores = scores + inputs.bias.dense(query, index, key_index)
        none = torch.zeros_like(key_index, dtype=torch.bool)
        mask = inputs.mask(Places(index, index, none[:length]), Places(key_index, key_index, none))
        own_segment = key_index // self.size == index[:, None] // self.size
        weights = masked_softmax(scores, mask & (own_segment != is_past)).to(value.dtype)
        context = torch.dropout(weights, inputs.dropout, train=inputs.dropout > 0) @ value
        return context.transpose(0, 1), weights[..., seen : seen + length] + weights[..., seen + length :]


def project_past(attention: Any, states: Tensor, plan: RopePlan | None) -> PastKeys:
    """Project states to keys and values at the positions of a rotation.

    Args:
        attention: the attention module of the sublayer.
        states: `(P, d)`.
        plan: the rotation; None: the scheme does not rotate.

    Returns:
        Keys and values `(P, H, D)`.
    """
    key, value = (
        project(states).unflatten(-1, (-1, attention.head_dim)) for project in (attention.k_proj, attention.v_proj)
    )
    if plan is None:
        return PastKeys(key, value)
    return PastKeys(plan.near(key), value, None if plan.far is None else plan.far.key(key))


@dataclass
class Memory:
    """The memory of B documents that are encoded in chunks; its size does not depend on the number of tokens read.

    Args:
        states: one entry per attention sublayer, `(B, M, d)` with M its `memory` (0 for a block sublayer): the last M
            states that the projections have read, the most recent last, without gradient.
        seen: `(B,)` int64, number of tokens read of each document.
        pooled: `(B, d)`, the embedding of the tokens read of each document, without gradient.
    """

    states: tuple[Tensor, ...]
    seen: Tensor
    pooled: Tensor

    @classmethod
    def empty(cls, config, batch_size: int, training: bool, dtype: torch.dtype, device: torch.device) -> "Memory":
        """Return the memory of documents of which nothing has been read yet.

        Args:
            config: the config of the model.
            batch_size: B, number of documents.
            training: whether the training patterns are used.
            dtype, device: data type and device of the model.

        Returns:
            The memory.

        Raises:
            ValueError: the model cannot be computed in chunks.
        """
        sizes = [memory_length(pattern) for pattern in streaming_patterns(config, training)]
        return cls(
            tuple(torch.zeros(batch_size, size, config.hidden_size, dtype=dtype, device=device) for size in sizes),
            torch.zeros(batch_size, dtype=torch.long, device=device),
            torch.zeros(batch_size, config.hidden_size, dtype=dtype, device=device),
        )

    def reset(self, documents: Tensor) -> "Memory":
        """Return a memory in which the `documents` `(B,)` bool are empty, so that new ones can take their places."""
        return Memory(
            tuple(states.masked_fill(documents[:, None, None], 0.0) for states in self.states),
            self.seen.masked_fill(documents, 0),
            self.pooled.masked_fill(documents[:, None], 0.0),
        )


def memory_length(pattern: AttentionPattern) -> int:
    """Return the number of states that a sublayer with this pattern remembers."""
    return pattern.memory if isinstance(pattern, MemoryAttention) else 0


class Stream:
    """One chunk of every document during a forward pass, with the old memory and the new one.

    Args:
        config: the config of the model.
        attentions: the attention modules of the sublayers, in order.
        memory: the memory of the documents.
        documents: the chunk; its positions continue from the past.
        training: whether the training patterns are used.

    Raises:
        ValueError: the model cannot be computed in chunks, or the chunk does not fit the memory.
    """

    def __init__(
        self, config, attentions: Iterable[nn.Module], memory: Memory, documents: PackedDocuments, training: bool
    ):
        check_chunk(config, streaming_patterns(config, training), memory, documents)
        self.config, self.memory, self.documents = config, memory, replace(documents, past=memory.seen, cache={})
        self.attentions = list(attentions)
        self.states = dict(zip(self.attentions, memory.states, strict=True))
        self.next_states: dict[nn.Module, Tensor] = {}

    def recall(self, attention: nn.Module, states: Tensor, size: int) -> tuple[Tensor, RopePlan | None]:
        """Return what a sublayer remembers, and keep its last states for the next chunk.

        Args:
            attention: the attention module of the sublayer.
            states: `(T, d)`, what it reads in this chunk.
            size: M, number of states that it remembers.

        Returns:
            The stored states `(B * M, d)`, and their rotation or None.
        """
        documents, stored = self.documents, self.states[attention].flatten(0, 1)
        last, plan = documents.once(("recall", attention.layer_type, size), lambda: self._places(attention, size))
        kept = torch.cat([stored, states.detach()])[last]
        self.next_states[attention] = kept.unflatten(0, (*self.memory.seen.shape, size))
        return stored, plan

    def _places(self, attention: nn.Module, size: int) -> tuple[Tensor, RopePlan | None]:
        """Return the rows of `[stored, chunk]` that each document remembers, and the rotation of what is stored."""
        documents, config = self.documents, self.config
        past = self.memory.seen
        batch = len(past)
        number = torch.arange(batch, device=past.device)[:, None]
        lengths = documents.cu_seqlens.diff().long()[:, None]
        place = lengths + torch.arange(-size, 0, device=past.device)  # (B, size), in the chunk; negative: before it
        first = documents.cu_seqlens[:-1, None] + batch * size  # row of the chunk's first token
        last = torch.where(place < 0, (number + 1) * size + place, first + place)
        if not config.position_scheme.rotates:
            return last.flatten(), None
        cu_seqlens = size * torch.arange(batch + 1, dtype=torch.int32, device=past.device)
        stored = PackedDocuments(cu_seqlens, size, past=past - size)
        rotation = config.position_scheme.rotation(config, attention.layer_type, stored, stored.token_index)
        return last.flatten(), rotation

    def finish(self, hidden_states: Tensor) -> tuple[Tensor, Memory]:
        """Return the embedding `(B, d)` of all tokens read so far, and the memory for the next chunk."""
        cu_seqlens, memory = self.documents.cu_seqlens, self.memory
        pooled = pool_incrementally(memory.pooled, memory.seen, hidden_states, cu_seqlens, self.config.pooling)
        states = tuple(self.next_states.get(attention, self.states[attention]) for attention in self.attentions)
        return pooled, Memory(states, memory.seen + cu_seqlens.diff(), pooled.detach())


def streaming_patterns(config, training: bool) -> list[AttentionPattern]:
    """Return the patterns of the attention sublayers of a model that is computed in chunks.

    Raises:
        ValueError: a model with this config cannot be computed in chunks.
    """
    patterns = config.get_training_patterns() if training else config.get_patterns()
    for pattern in patterns:
        if not isinstance(pattern, (MemoryAttention, BlockAttention)):
            raise ValueError(
                f"memory: a sublayer of the pattern {pattern.type!r} reads the whole document at once; leave memory "
                "out, or use attention_patterns 'memory' and 'block' alone"
            )
    if config.token_weighting != "none":
        raise ValueError(
            f"memory: token_weighting={config.token_weighting!r} depends on the whole document, and a chunk is "
            "only a part of it; use token_weighting='none'"
        )
    config.position_scheme.check_chunks(config)
    if training and config.layerdrop:
        raise ValueError(
            f"memory: layerdrop={config.layerdrop} drops sublayers whose states the next chunk needs; set "
            "layerdrop=0, or train on whole documents without memory"
        )
    return patterns


def check_chunk(config, patterns: list[AttentionPattern], memory: Memory, documents: PackedDocuments):
    """Check that a chunk can follow the documents in the memory.

    Args:
        config: the config of the model.
        patterns: the patterns of the attention sublayers.
        memory: the memory of the documents.
        documents: the chunk.

    Raises:
        ValueError: the memory is of another number of documents or another model, or the chunk follows an incomplete
            segment or exceeds the table of positions.
    """
    batch, lengths = len(memory.seen), documents.lengths
    if len(lengths) != batch:
        raise ValueError(
            f"memory holds {batch} documents and the input {len(lengths)}; give a chunk of each, without tokens where "
            "a document has ended"
        )
    if [states.shape[1] for states in memory.states] != [memory_length(pattern) for pattern in patterns]:
        raise ValueError("memory does not fit this model's attention_patterns; begin with model.new_memory(batch_size)")
    size = lcm(*(pattern.size for pattern in patterns if isinstance(pattern, (MemoryAttention, BlockAttention))))
    table = config.position_scheme.table_rows(config)
    for number, (seen, length) in enumerate(zip(memory.seen.tolist(), lengths, strict=True)):
        if length and seen % size:
            raise ValueError(
                f"memory: document {number} continues after {seen} tokens, which is not a multiple of {size}, the "
                "least common multiple of the sizes of its segments; make every chunk but the last a multiple of it"
            )
        if length and table is not None and seen + length > table:
            raise ValueError(
                f"memory: document {number} has {seen + length} tokens with this chunk, and the table of positions "
                f"(max_position_embeddings) has {table} rows; extend the context, or use a scheme without a table"
            )
