"""Self-attention of the encoder: projections, positions, and the table of kernels.

`config.attention_patterns` says WHICH keys a query sees and is part of the model; `attn_implementation` says HOW the
numbers are computed and is never saved. All kernels take packed tensors and give the same numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from .kernels_longembed import attend, segment_attention
from .packing_longembed import PackedDocuments
from .patterns_longembed import AttentionPattern
from .positions_longembed import GroupedRotary, RopePlan, ScoreBias

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # optional: the `flash` extra
    flash_attn_varlen_func = None


class AttentionInputs(NamedTuple):
    """What one attention call reads. T packed tokens, H heads, D head size."""

    query: Tensor  # (T, H, D), rotated
    key: Tensor  # (T, H, D), rotated
    value: Tensor  # (T, H, D)
    pattern: AttentionPattern
    documents: PackedDocuments
    scaling: float
    dropout: float
    bias: ScoreBias | None
    grouped: GroupedRotary | None


def document_mask(pattern: AttentionPattern, documents: PackedDocuments, start: int, end: int) -> Tensor:
    """The pattern's predicate on one document, packed rows `start` to `end`: bool `(L, L)`."""
    index = torch.arange(end - start, device=documents.cu_seqlens.device)
    marked = (
        torch.zeros_like(index, dtype=torch.bool) if documents.is_global is None else documents.is_global[start:end]
    )
    return pattern.visible(index[:, None], index[None, :], marked[:, None], marked[None, :])


def eager_attention(inputs: AttentionInputs) -> tuple[Tensor, list[Tensor]]:
    """The definition, a document at a time: softmax of scores under the predicate, and its weights. L x L memory."""
    contexts, weights = [], []
    for start, end in inputs.documents.bounds:
        query, key, value = (
            x[start:end].transpose(0, 1) for x in (inputs.query, inputs.key, inputs.value)
        )  # (H, L, D)
        index = torch.arange(end - start, device=query.device)
        scores = query @ key.transpose(1, 2)
        if inputs.grouped is not None:
            scores = inputs.grouped[slice(start, end)].merge(scores, index, index)
        scores = scores * inputs.scaling
        if inputs.bias is not None:
            scores = scores + inputs.bias.dense(index, index)
        mask = document_mask(inputs.pattern, inputs.documents, start, end)
        scores = scores.masked_fill(~mask, float("-inf"))
        # A row that sees nothing is all -inf: its weights are zero, not NaN.
        attention = torch.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(
            query.dtype
        )
        attention = attention.masked_fill(~mask, 0.0)
        weights.append(attention)
        attention = torch.dropout(attention, inputs.dropout, train=inputs.dropout > 0)
        contexts.append((attention @ value).transpose(0, 1))
    return torch.cat(contexts) if contexts else torch.zeros_like(inputs.query), weights


def sdpa_attention(inputs: AttentionInputs) -> tuple[Tensor, None]:
    """torch's fused attention under each document's mask. Exact; the mask is L x L unless every token sees all."""
    contexts = []
    for start, end in inputs.documents.bounds:
        query, key, value = (x[start:end].transpose(0, 1) for x in (inputs.query, inputs.key, inputs.value))
        mask = None
        if not inputs.pattern.sees_all(end - start):
            mask = document_mask(inputs.pattern, inputs.documents, start, end)
        if inputs.bias is not None:
            index = torch.arange(end - start, device=query.device)
            bias = inputs.bias.dense(index, index)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        contexts.append(attend(query, key, value, mask, inputs.scaling, inputs.dropout).transpose(0, 1))
    return torch.cat(contexts) if contexts else torch.zeros_like(inputs.query), None


def varlen_attention(inputs: AttentionInputs) -> tuple[Tensor, None]:
    """The pattern's own path: no padding, linear memory, torch alone. The default."""
    return inputs.pattern.attend(inputs.query, inputs.key, inputs.value, *inputs[4:]), None


def flash_attention(inputs: AttentionInputs) -> tuple[Tensor, None]:
    """flash-attn's variable-length kernel (Dao 2023): full and block patterns, and windows without global tokens."""
    documents, pattern = inputs.documents, inputs.pattern
    if (
        pattern.type not in ("full", "sliding", "block")
        or documents.is_global is not None
        or getattr(pattern, "global_tokens", 0) > 0
    ):
        raise ValueError(
            "flash_attention_2 computes full, block and sliding attention without global tokens; "
            f"load with attn_implementation={DEFAULT_KERNEL!r}"
        )
    window = (pattern.window, pattern.window) if pattern.type == "sliding" else (-1, -1)
    cu_seqlens = documents.cu_seqlens if pattern.type != "block" else pattern.blocks(documents)
    longest = documents.max_seqlen if pattern.type != "block" else min(pattern.size, documents.max_seqlen)
    context = flash_attn_varlen_func(
        *inputs[:3],
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        inputs.dropout,
        softmax_scale=inputs.scaling,
        window_size=window,
    )
    return context, None


def flex_attention_kernel(inputs: AttentionInputs) -> tuple[Tensor, None]:
    """FlexAttention (Dong et al. 2024): predicate as `mask_mod`, bias as `score_mod`. On CPU forward only."""
    documents, pattern, bias = inputs.documents, inputs.pattern, inputs.bias
    if not inputs.query.is_cuda and torch.is_grad_enabled() and inputs.query.requires_grad:
        raise ValueError(
            "flex_attention has no backward pass on CPU; train with attn_implementation='longembed_varlen'"
        )
    if inputs.dropout:
        raise ValueError(
            "flex_attention has no dropout; set attention_dropout=0 or use attn_implementation='longembed_varlen'"
        )
    tokens, index, owner = len(inputs.query), documents.token_index, documents.document_ids
    marked = documents.is_global if documents.is_global is not None else torch.zeros_like(index, dtype=torch.bool)

    def mask_mod(batch, head, query, key):
        visible = pattern.visible(index[query], index[key], marked[query], marked[key])
        return visible & (owner[query] == owner[key])

    def score_mod(score, batch, head, query, key):
        return score + bias.values(index[key] - index[query], head)

    compiled = inputs.query.is_cuda
    if ("flex", pattern) not in documents.cache:
        device = inputs.query.device
        documents.cache["flex", pattern] = create_block_mask(
            mask_mod, None, None, tokens, tokens, device, _compile=compiled
        )
    function = torch.compile(flex_attention) if compiled else flex_attention
    query, key, value = (x.transpose(0, 1)[None] for x in inputs[:3])
    context = function(
        query,
        key,
        value,
        score_mod=None if bias is None else score_mod,
        block_mask=documents.cache["flex", pattern],
        scale=inputs.scaling,
    )
    return context[0].transpose(0, 1), None


# Name in `attn_implementation` -> kernel, whether it adds a score bias, whether it merges Self-Extend's scores.
KERNELS = {
    "eager": (eager_attention, True, True),
    "sdpa": (sdpa_attention, True, False),
    "longembed_varlen": (varlen_attention, True, True),
    "flash_attention_2": (flash_attention, False, False),
    "flex_attention": (flex_attention_kernel, True, False),
}
DEFAULT_KERNEL = "longembed_varlen"


def check_kernel(name: str):
    """Raises ValueError if there is no kernel called `name`, or not on this machine."""
    if name not in KERNELS:
        raise ValueError(f"attn_implementation={name!r} is none of ours; choose from {', '.join(KERNELS)}")
    if name == "flash_attention_2" and flash_attn_varlen_func is None:
        raise ValueError(
            f"attn_implementation={name!r} needs the package flash-attn, which is not installed; use {DEFAULT_KERNEL!r}"
        )


def select_kernel(name: str, has_bias: bool, is_grouped: bool):
    """The kernel called `name`, if it can compute what the model's positions need.

    Raises:
        ValueError: no such kernel, or one that cannot add this model's position scheme.
    """
    check_kernel(name)
    kernel, adds_bias, merges_groups = KERNELS[name]
    if has_bias and not adds_bias:
        raise ValueError(
            f"attn_implementation={name!r} cannot add a position bias (alibi, relative buckets); use {DEFAULT_KERNEL!r}"
        )
    if is_grouped and not merges_groups:
        raise ValueError(
            f"attn_implementation={name!r} cannot compute Self-Extend (method 'group' on rope); use {DEFAULT_KERNEL!r}"
        )
    return kernel


class LongEmbedAttention(nn.Module):
    """Multi-head self-attention of one sublayer on packed tokens."""

    def __init__(self, config, pattern: AttentionPattern):
        super().__init__()
        self.config, self.pattern = config, pattern
        self.head_dim = config.head_dim
        width = config.num_attention_heads * self.head_dim
        # Separate projections: LoRA on a fused one would share its A matrix, and a column split would need its layout.
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def forward(
        self, hidden_states: Tensor, documents: PackedDocuments, rope: dict[str, RopePlan], bias: ScoreBias | None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """`(T, d)` to `(T, d)`, and the weights of each document `(H, L, L)` if the kernel has them."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        grouped = None
        if rope:
            query, key, grouped = rope[self.pattern.layer_type](query, key)
        dropout = self.config.attention_dropout if self.training else 0.0
        kernel = select_kernel(self.config._attn_implementation, bias is not None, grouped is not None)
        inputs = AttentionInputs(
            query, key, value, self.pattern, documents, self.head_dim**-0.5, dropout, bias, grouped
        )
        context, weights = kernel(inputs)
        return self.o_proj(context.flatten(1)), weights


def longembed_varlen(
    module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, cu_seq_lens_q=None, **kwargs
):
    """Full attention on packed sequences under transformers' contract: `(1, H, T, D)` in, `(1, T, H, D)` out.

    The name has to stand in transformers' table before a model may be asked for it; the entry serves any other model
    too, padded, or packed if it passes `cu_seq_lens_q`.
    """
    if cu_seq_lens_q is None:
        batch, length = query.shape[0], query.shape[2]
        mask = torch.ones(batch, length) if attention_mask is None else attention_mask
        documents = PackedDocuments.from_attention_mask(mask.to(query.device))
    else:
        longest = int(cu_seq_lens_q.diff().max())
        documents = PackedDocuments(cu_seq_lens_q, longest)
    packed = (documents.pack(x.transpose(1, 2)) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    context = segment_attention(*packed, documents.cu_seqlens, documents.max_seqlen, scaling, dropout)
    return documents.unpack(context), None


def padding_mask(attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """The `(B, S)` padding mask as it is. Unregistered, transformers would pass None and padding be seen."""
    return attention_mask


AttentionInterface.register(DEFAULT_KERNEL, longembed_varlen)
AttentionMaskInterface.register(DEFAULT_KERNEL, padding_mask)
