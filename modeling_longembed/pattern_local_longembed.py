"""Attention patterns that are only a mask: full, block, shifted and sliding attention.

T tokens of all documents, H heads, D head size, L tokens of one document.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .attention_kernels_longembed import (
    GlobalKeys,
    attend,
    causal_mask,
    segment_attention,
    varlen_kernel,
    varlen_kernel_applies,
    window_attention,
)
from .packing_longembed import PackedDocuments, split_documents
from .pattern_base_longembed import (
    AttentionInputs,
    AttentionPattern,
    parameter,
    register_pattern,
    switch,
)


def attend_segments(inputs: AttentionInputs, cu_seqlens: Tensor, longest: int, places: Tensor | None = None) -> Tensor:
    """Compute full attention within segments, with the positions that the inputs carry.

    Args:
        inputs: query, key and value `(T, H, D)`, and the options of the call.
        cu_seqlens: `(N + 1,)` int32, cumulative lengths of the N segments.
        longest: length of the longest segment in tokens.
        places: `(T,)` int64, place of each token in its document; None: tokens are in the order of the document.

    Returns:
        The context `(T, H, D)`.
    """
    return segment_attention(
        *inputs[:3],
        cu_seqlens,
        longest,
        inputs.scaling,
        inputs.dropout,
        inputs.bias,
        inputs.grouped,
        inputs.causal,
        places,
    )


@register_pattern
class FullAttention(AttentionPattern):
    """Full attention: every token of a document sees every other.

    Cost: L^2 in time, L in memory.
    """

    type = "full"
    layer_type = "full_attention"

    @property
    def is_one_graph(self):
        return True

    def visible(self, query, key, head, num_heads):
        return (query.index >= 0) & (key.index >= 0)

    def sees_all(self, length):
        return True

    def segments(self, documents):
        return documents.cu_seqlens, documents.max_seqlen, -1

    def attend(self, inputs):
        return attend_segments(inputs, inputs.documents.cu_seqlens, inputs.documents.max_seqlen)


@register_pattern
class BlockAttention(AttentionPattern):
    """Block attention: full attention within consecutive blocks of `size` tokens, and none between blocks.

    With `position_extension={"method": "restart"}` the positions of every block start at 0, so that a converted model
    initially computes the token-weighted mean of the embeddings of the blocks.

    Cost: L x size in time, L in memory.
    """

    type = "block"
    layer_type = "chunked_attention"
    size: int = parameter(256)

    @property
    def is_one_graph(self):
        return True

    def visible(self, query, key, head, num_heads):
        return query.index // self.size == key.index // self.size

    def sees_all(self, length):
        return length <= self.size

    def reach(self, documents):
        return max(0, min(documents.max_seqlen, self.size) - 1)

    def segments(self, documents):
        cu_seqlens = documents.once(self, lambda: split_documents(documents.cu_seqlens, self.size))
        return cu_seqlens, min(self.size, documents.max_seqlen), -1

    def attend(self, inputs):
        return attend_segments(inputs, *self.segments(inputs.documents)[:2])


@register_pattern
class ShiftedAttention(AttentionPattern):
    """Shifted attention: groups of `size` tokens, shifted for half of the heads.

    This is S2-Attn of LongLoRA (Chen et al. 2023, arXiv:2309.12307). The first half of the heads attends within groups
    of `size` tokens, counted from the start of each document. The second half attends within groups that are shifted by
    `size // 2`, so that information passes between neighbouring groups. Without `wrap` the half groups at the two ends
    of a document stay separate; with `wrap` (the paper's roll) they form one group. A document of at most `size` tokens
    is one group for all heads.

    Cost: L x size in time, L in memory.
    """

    type = "shifted"
    layer_type = "chunked_attention"
    per_head = True
    size: int = parameter(256, least=2)
    wrap: bool = switch(False)

    def check(self, config):
        if config.num_attention_heads < 2:
            raise ValueError(
                "attention_patterns: 'shifted' shifts half of the heads and num_attention_heads=1; use 'block' or "
                "at least 2 heads"
            )
        if self.wrap and config.is_causal:
            raise ValueError(
                "attention_patterns: 'shifted' with wrap=true joins the end of a document with its beginning, which "
                "is_causal=true forbids; set wrap=false"
            )
        if self.wrap and config.extends_by_groups:
            raise ValueError(
                "attention_patterns: 'shifted' with wrap=true cannot be computed under Self-Extend "
                "(position_extension 'group' on rope); set wrap=false, or extend by 'yarn'"
            )

    @property
    def is_one_graph(self):
        return True

    def visible(self, query, key, head, num_heads):
        def same_group(shift):
            if self.wrap:
                places = ((x.index - shift) % x.length.clamp(min=1) for x in (query, key))
            else:
                places = (x.index - shift for x in (query, key))
            first, second = (place // self.size for place in places)
            return first == second

        shifted = head >= num_heads // 2
        within = (shifted & same_group(self.size // 2)) | (~shifted & same_group(0))
        return within | (query.length <= self.size)

    def sees_all(self, length):
        return length <= self.size

    def reach(self, documents):
        longest = documents.max_seqlen if self.wrap else min(documents.max_seqlen, self.size)
        return max(0, longest - 1)

    def attend(self, inputs):
        documents, heads = inputs.documents, inputs.query.shape[1]
        # Under tensor parallelism this process has some of the model's heads; the first `half` of them are not shifted.
        half = min(max(inputs.model_heads // 2 - inputs.first_head, 0), heads)
        longest, cu_seqlens = min(self.size, documents.max_seqlen), documents.cu_seqlens
        groups = documents.once(self, lambda: split_documents(cu_seqlens, self.size))
        plain = attend_segments(inputs.heads(slice(None, half)), groups, longest)
        shifted = inputs.heads(slice(half, None))
        if not self.wrap:
            first = self.size // 2
            groups = documents.once((self, "shifted"), lambda: split_documents(cu_seqlens, self.size, first))
            return torch.cat([plain, attend_segments(shifted, groups, longest)], dim=1)
        order = documents.once((self, "rolled"), lambda: self.rolled(documents))
        query, key, value = (x[order] for x in shifted[:3])
        rolled = shifted._replace(query=query, key=key, value=value)
        context = attend_segments(rolled, groups, longest, places=documents.token_index[order])
        return torch.cat([plain, context[order.argsort()]], dim=1)

    def rolled(self, documents: PackedDocuments) -> Tensor:
        """Return the packed rows `(T,)` with every document that has several groups rolled left by half a group."""
        lengths = documents.document_lengths
        shift = torch.where(lengths > self.size, self.size // 2, 0)
        starts = documents.cu_seqlens.long()[documents.document_ids]
        return starts + (documents.token_index + shift) % lengths


class GlobalProjections(nn.Module):
    """The second set of projections of Longformer, for the rows of global tokens; initialized as copies of the first.

    Args:
        config: the config of the model.
    """

    def __init__(self, config):
        super().__init__()
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)


@register_pattern
class SlidingAttention(AttentionPattern):
    """Sliding window: a token sees `window` tokens on EACH side, and itself.

    Longformer's w and ModernBERT's `local_attention` count both sides together. With a `dilation` of r a token sees
    every r-th token, `window` of them on each side. Global tokens (the first `global_tokens` of a document, and those
    of `global_attention_mask`) see all tokens and are seen by all, in the same softmax. With `global_projections` they
    have projections of their own, as in Longformer (Beltagy et al. 2020, arXiv:2004.05150, section 3.1): the query of a
    global token, and the keys and values that it sees, come from these; the keys and values of a global token that
    other tokens see come from the ordinary projections.

    Cost: L x window in time and memory, and L more for every global token.
    """

    type = "sliding"
    layer_type = "sliding_attention"
    window: int = parameter(256)
    global_tokens: int = parameter(0, least=0)
    dilation: int = parameter(1)
    global_projections: bool = switch(False)

    def check(self, config):
        if self.window * self.dilation > config.max_position_embeddings:
            raise ValueError(
                f"attention_patterns: window={self.window} times dilation={self.dilation} of 'sliding' is more than "
                f"max_position_embeddings={config.max_position_embeddings}; use 'full' or a smaller one"
            )
        neighbours = (config.position_extension or {}).get("neighbours", 0)
        if config.extends_by_groups and (self.window * self.dilation >= neighbours or self.global_tokens):
            raise ValueError(
                f"position_extension: Self-Extend with neighbours={neighbours} cannot be computed "
                f"under the sliding window {self.window} (dilation {self.dilation}) with {self.global_tokens} global "
                "tokens; use neighbours > window and no global tokens, or 'yarn'"
            )

    @property
    def is_mask(self):
        return not self.global_projections

    @property
    def own_weights(self):
        return self.global_projections

    @property
    def is_one_graph(self):
        return not self.global_tokens and self.dilation == 1

    def visible(self, query, key, head, num_heads):
        distance = (query.index - key.index).abs()
        near = (distance <= self.window * self.dilation) & (distance % self.dilation == 0)
        first = (query.index < self.global_tokens) | (key.index < self.global_tokens)
        return near | first | query.is_global | key.is_global

    def sees_all(self, length):
        own_rows = self.global_projections and self.global_tokens
        return length <= 1 or (length <= self.window + 1 and self.dilation == 1 and not own_rows)

    def reach(self, documents):
        furthest = max(0, documents.max_seqlen - 1)
        return furthest if self.is_global(documents) is not None else min(furthest, self.window * self.dilation)

    def segments(self, documents):
        if self.dilation > 1 or self.global_tokens or documents.is_global is not None:
            return None
        return documents.cu_seqlens, documents.max_seqlen, self.window

    def is_global(self, documents: PackedDocuments) -> Tensor | None:
        """Return which tokens are global, bool `(T,)`; None if no token can be."""
        if not self.global_tokens:
            return documents.is_global
        first = documents.token_index < self.global_tokens
        return first if documents.is_global is None else documents.is_global | first

    @property
    def at_start(self):
        return replace(self, global_projections=False)

    def build(self, config):
        return GlobalProjections(config) if self.global_projections else None

    def tensor_parallel_plan(self):
        return dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise") if self.global_projections else {}

    def initialize(self, attention):
        if self.global_projections:
            for name in ("q_proj", "k_proj", "v_proj"):
                for own, other in zip(
                    getattr(attention.own, name).parameters(), getattr(attention, name).parameters(), strict=True
                ):
                    init.copy_(own, other)

    def prepare(self, attention, states, context):
        """Return query, key and value from the global projections, `(T, H, D)` each; None if there are none."""
        if not self.global_projections or self.is_global(context.documents) is None:
            return None
        own = attention.own
        query, key, value = (
            project(states).unflatten(-1, (-1, attention.head_dim)) for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        plan = context.positions.rotations.get(attention.layer_type)
        return (query, key, value) if plan is None else (plan.near(query), plan.near(key), value)

    def dense(self, inputs, rows):
        is_global = self.is_global(inputs.documents)
        context, weights = super().dense(inputs, rows)
        if inputs.own is None or not is_global[rows].any():
            return context, weights
        query, key, value = inputs.own
        own = inputs._replace(query=query, key=key, value=value)
        context_global, weights_global = super().dense(own, rows)
        chosen = is_global[rows]
        return (
            torch.where(chosen[:, None, None], context_global, context),
            torch.where(chosen[:, None], weights_global, weights),
        )

    def attend(self, inputs):
        documents, is_global = inputs.documents, self.is_global(inputs.documents)
        if is_global is not None and inputs.grouped is not None:
            raise ValueError(
                "global_attention_mask cannot be combined with Self-Extend (method 'group' on rope) under a sliding "
                "window; leave it out, or extend by 'yarn'"
            )
        segments = self.segments(documents)
        if segments is not None and inputs.bias is None and varlen_kernel_applies(inputs.query, inputs.dropout):
            cu_seqlens, longest, window = segments
            return varlen_kernel(*inputs[:3], cu_seqlens, longest, inputs.scaling, window, inputs.causal)
        if self.sees_all(documents.max_seqlen) and inputs.own is None:
            return attend_segments(inputs._replace(grouped=None), documents.cu_seqlens, documents.max_seqlen)
        contexts = [
            self.one_document(inputs, slice(start, end), None if is_global is None else is_global[start:end])
            for start, end in documents.bounds
        ]
        return torch.cat(contexts) if contexts else torch.zeros_like(inputs.query)

    def one_document(self, inputs: AttentionInputs, rows: slice, is_global: Tensor | None) -> Tensor:
        """Compute the window of all tokens and the rows of the global tokens of one document.

        With a dilation of r, the tokens whose places have the same remainder modulo r are computed as one sequence.

        Args:
            inputs: the inputs of all documents.
            rows: the packed rows of the document.
            is_global: `(L,)` bool; None if no token is global.

        Returns:
            The context `(L, H, D)`.
        """
        query, key, value = (x[rows] for x in inputs[:3])
        scaling, dropout, bias, causal = inputs.scaling, inputs.dropout, inputs.bias, inputs.causal
        global_keys = None
        if is_global is not None and is_global.any():
            index = is_global.nonzero(as_tuple=True)[0]
            global_keys = GlobalKeys(key[index], value[index], index)
        band = (self.window, scaling, dropout, bias, causal)
        if self.dilation == 1:
            context = window_attention(query, key, value, *band, is_global, global_keys)
        else:
            index = torch.arange(len(query), device=query.device)
            parts = [index[first :: self.dilation] for first in range(min(self.dilation, len(index)))]
            contexts = [
                window_attention(
                    query[at],
                    key[at],
                    value[at],
                    *band,
                    None if global_keys is None or is_global is None else is_global[at],
                    global_keys,
                    places=at,
                )
                for at in parts
            ]
            context = torch.cat(contexts)[torch.cat(parts).argsort()]
        if global_keys is None:
            return context
        at, places = global_keys.index, torch.arange(len(query), device=query.device)
        if inputs.own is not None:
            query, key, value = (x[rows] for x in inputs.own)
        query_HGD, key_HLD, value_HLD = (x.transpose(0, 1) for x in (query[at], key, value))
        mask = causal_mask(at, places) if causal else None
        if bias is not None:
            dense = bias.dense(query_HGD, at, places)  # (H, G, L)
            mask = dense if mask is None else dense.masked_fill(~mask, float("-inf"))
        global_rows = attend(query_HGD, key_HLD, value_HLD, mask, scaling, dropout).transpose(0, 1)
        return context.index_copy(0, at, global_rows)
