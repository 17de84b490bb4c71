"""Attention patterns: which keys a query sees. The registry behind `config.attention_patterns`.

A pattern is one class: a predicate that defines it (`visible`; every kernel is tested against the dense softmax built
from it) and `attend`, which computes the same numbers at the pattern's own cost. To add one, write and register the
class.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .kernels_longembed import segment_attention, varlen_attn, varlen_kernel_applies, window_attention
from .packing_longembed import PackedDocuments, split_documents
from .positions_longembed import GroupedRotary, ScoreBias


def parameter(default: int, least: int = 1) -> Any:
    """A whole-number parameter of a pattern: its default and its smallest value."""
    return field(default=default, metadata={"least": least})


@dataclass(frozen=True)
class AttentionPattern:
    """Base of all patterns. The fields of a subclass are its parameters in `config.attention_patterns`."""

    type: ClassVar[str]
    layer_type: ClassVar[str]  # the nearest name that transformers' strict `layer_types` knows

    def __post_init__(self):
        for parameter in fields(self):
            value, least = getattr(self, parameter.name), parameter.metadata["least"]
            if type(value) is not int or value < least:
                raise ValueError(
                    f"attention_patterns: {parameter.name!r} of the pattern {self.type!r} is {value!r}; "
                    f"give a whole number of at least {least}"
                )

    def visible(self, query_index: Tensor, key_index: Tensor, query_global: Tensor, key_global: Tensor) -> Tensor:
        """The definition: may the query see the key, both of one document?

        Args:
            query_index, key_index: places in the document from 0, int64, broadcastable against each other.
            query_global, key_global: bool, whether the token is a global one; same shapes.

        Returns:
            bool, broadcast shape. Made of elementwise operations, so that it serves as flex_attention's `mask_mod`.
        """
        raise NotImplementedError

    def sees_all(self, length: int) -> bool:
        """Whether in a document of `length` tokens every token sees every other."""
        raise NotImplementedError

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: PackedDocuments,
        scaling: float,
        dropout: float,
        bias: ScoreBias | None = None,
        grouped: GroupedRotary | None = None,
    ) -> Tensor:
        """Attention of packed `(T, H, D)` tensors at the pattern's own cost; returns `(T, H, D)`."""
        raise NotImplementedError


PATTERNS: dict[str, type[AttentionPattern]] = {}


def register_pattern(cls: type[AttentionPattern]) -> type[AttentionPattern]:
    """Class decorator: makes a pattern available under its `type` in `config.attention_patterns`."""
    PATTERNS[cls.type] = dataclass(frozen=True)(cls)
    return PATTERNS[cls.type]


def build_pattern(entry: "str | dict") -> AttentionPattern:
    """A pattern from its config entry: a name, or `{"type": name, **parameters}`.

    Raises:
        ValueError: unknown name or parameter, or a parameter out of range.
    """
    if not isinstance(entry, (str, dict)):
        raise ValueError(f'attention_patterns: {entry!r} is no pattern; give a name or {{"type": name, **parameters}}')
    entry = {"type": entry} if isinstance(entry, str) else dict(entry)
    name = entry.pop("type", None)
    if name not in PATTERNS:
        raise ValueError(f"attention_patterns: there is no pattern {name!r}; choose from {', '.join(PATTERNS)}")
    known = [parameter.name for parameter in fields(PATTERNS[name])]
    if unknown := sorted(set(entry) - set(known)):
        raise ValueError(
            f"attention_patterns: the pattern {name!r} has no parameter {unknown[0]!r}; "
            f"it has {', '.join(known) or 'none'}"
        )
    return PATTERNS[name](**entry)


@register_pattern
class FullAttention(AttentionPattern):
    """Every token of a document sees every other. Cost L^2 in time, linear in memory."""

    type = "full"
    layer_type = "full_attention"

    def visible(self, query_index, key_index, query_global, key_global):
        return (query_index >= 0) & (key_index >= 0)

    def sees_all(self, length):
        return True

    def attend(self, query, key, value, documents, scaling, dropout, bias=None, grouped=None):
        cu_seqlens, max_seqlen = documents.cu_seqlens, documents.max_seqlen
        return segment_attention(query, key, value, cu_seqlens, max_seqlen, scaling, dropout, bias, grouped)


@register_pattern
class SlidingAttention(AttentionPattern):
    """A token sees `window` tokens on EACH side (Longformer's w and ModernBERT's `local_attention` are both sides).

    Global tokens (the first `global_tokens` of a document, and those of `global_attention_mask`) see all and are seen
    by all, in the same softmax and with the same projections. Cost L x window in time and memory.
    """

    type = "sliding"
    layer_type = "sliding_attention"
    window: int = parameter(256)
    global_tokens: int = parameter(0, least=0)

    def visible(self, query_index, key_index, query_global, key_global):
        near = (query_index - key_index).abs() <= self.window
        first = (query_index < self.global_tokens) | (key_index < self.global_tokens)
        return near | first | query_global | key_global

    def sees_all(self, length):
        return length <= self.window + 1

    def attend(self, query, key, value, documents, scaling, dropout, bias=None, grouped=None):
        is_global = documents.is_global
        if self.global_tokens:
            first = documents.token_index < self.global_tokens
            is_global = first if is_global is None else is_global | first
        if is_global is not None and grouped is not None:
            raise ValueError(
                "global_attention_mask cannot be combined with Self-Extend (method 'group' on rope) under a sliding "
                "window; leave it out, or extend by 'yarn'"
            )
        if is_global is None and bias is None and varlen_kernel_applies(query, dropout):
            cu, longest, window = documents.cu_seqlens, documents.max_seqlen, (self.window, self.window)
            return varlen_attn(query, key, value, cu, cu, longest, longest, scale=scaling, window_size=window)
        if self.sees_all(documents.max_seqlen):
            return segment_attention(
                query, key, value, documents.cu_seqlens, documents.max_seqlen, scaling, dropout, bias
            )
        lengths = documents.lengths
        marked = [None] * len(lengths) if is_global is None else is_global.split(lengths)
        pieces = zip(query.split(lengths), key.split(lengths), value.split(lengths), marked, strict=True)
        parts = [window_attention(q, k, v, self.window, m, scaling, dropout, bias) for q, k, v, m in pieces if len(q)]
        return torch.cat(parts)


@register_pattern
class BlockAttention(AttentionPattern):
    """Full attention inside consecutive blocks of `size` tokens, none between them. Cost L x size, linear in memory.

    With `position_extension={"method": "restart"}` every block is read as a document of its own, so that a converted
    model starts out as "cut into blocks, embed, token-weighted mean".
    """

    type = "block"
    layer_type = "chunked_attention"
    size: int = parameter(256)

    def visible(self, query_index, key_index, query_global, key_global):
        return query_index // self.size == key_index // self.size

    def sees_all(self, length):
        return length <= self.size

    def blocks(self, documents):
        """`(N + 1,)` int32 cumulative block lengths; one split serves all layers of a forward pass."""
        if self not in documents.cache:
            documents.cache[self] = split_documents(documents.cu_seqlens, self.size)
        return documents.cache[self]

    def attend(self, query, key, value, documents, scaling, dropout, bias=None, grouped=None):
        longest = min(self.size, documents.max_seqlen)
        return segment_attention(query, key, value, self.blocks(documents), longest, scaling, dropout, bias, grouped)
