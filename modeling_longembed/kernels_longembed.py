"""The attention arithmetic on packed tokens that needs torch alone, at linear memory.

Every function takes query, key and value of shape `(T, H, D)` and returns the context `(T, H, D)`. None of them
allocates a tensor of T x T elements: queries are taken in chunks whose scores, where they exist at all, stay below
`MAX_SCORES`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from .positions_longembed import GroupedRotary, ScoreBias

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch: the loop below does the same work
    varlen_attn = None

# Largest number of score or mask elements that one step of a chunked path may hold (64 MB in fp32).
MAX_SCORES = 2**24


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """Attention of one or of N equal problems, mask broadcastable to the scores.

    Query `(..., H, Q, D)`, key and value `(..., H, K, D)`, mask `(..., H, Q, K)`; returns `(..., H, Q, D)`.
    """
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)


def recompute_in_backward(function: Callable, *inputs: Any) -> Tensor:
    """Calls `function`; backward computes its scores again: kept for it, they would add up to T x T elements."""
    return checkpoint(function, *inputs, use_reentrant=False) if torch.is_grad_enabled() else function(*inputs)


def varlen_kernel_applies(query: Tensor, dropout: float) -> bool:
    """Whether torch's own variable-length flash kernel takes this input: CUDA, half precision, no dropout."""
    return (
        varlen_attn is not None and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0
    )


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float,
    dropout: float,
    bias: ScoreBias | None = None,
    grouped: GroupedRotary | None = None,
) -> Tensor:
    """Full attention inside every segment: a document, or a block of one.

    Args:
        cu_seqlens: `(N + 1,)` int32 cumulative segment lengths.
        max_seqlen: longest segment in tokens.
        bias: added to the scores by the distance of query and key, or None.
        grouped: the second rotation of Self-Extend for far keys, or None.
    """
    if varlen_kernel_applies(query, dropout) and bias is None and grouped is None:
        context = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling)
        return cast(Tensor, context)  # a pair only where `return_aux` asks for one
    lengths = cu_seqlens.diff().tolist()
    # `split`, not slices: the backward pass of a slice fills a tensor of all T tokens, that of a split is one `cat`.
    pieces = list(zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True))
    contexts = [piece[0] for piece in pieces]
    if bias is None and grouped is None:  # segments of one length are one call
        for length in set(lengths) - {0}:
            same = [number for number, tokens in enumerate(lengths) if tokens == length]
            query_NHLD, key_NHLD, value_NHLD = (
                torch.stack([pieces[number][part] for number in same]).transpose(1, 2) for part in range(3)
            )
            attended = attend(query_NHLD, key_NHLD, value_NHLD, None, scaling, dropout)
            for number, context in zip(same, attended.transpose(1, 2).unbind(0), strict=True):
                contexts[number] = context
    else:
        starts = cu_seqlens.tolist()
        for number, length in enumerate(lengths):
            rows = slice(starts[number], starts[number] + length)
            if length:
                part = grouped and grouped[rows]
                query_LHD, key_LHD, value_LHD = pieces[number]
                contexts[number] = _chunked_document(query_LHD, key_LHD, value_LHD, scaling, dropout, bias, part)
    return torch.cat(contexts) if contexts else torch.zeros_like(query)


def _chunked_document(query, key, value, scaling, dropout, bias, grouped) -> Tensor:
    """One document with a score bias or with Self-Extend, a chunk of queries at a time. `(L, H, D)` to `(L, H, D)`."""
    length, heads = query.shape[:2]
    key_HLD, value_HLD = key.transpose(0, 1), value.transpose(0, 1)
    key_index = torch.arange(length, device=query.device)
    chunk = max(1, MAX_SCORES // (heads * length))

    def one_chunk(query_HCD: Tensor, start: int) -> Tensor:
        query_index = key_index[start : start + query_HCD.shape[1]]
        if grouped is None:
            return attend(query_HCD, key_HLD, value_HLD, bias.dense(query_index, key_index), scaling, dropout)
        scores = grouped.merge(query_HCD @ key_HLD.transpose(1, 2), query_index, key_index) * scaling
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(value.dtype)
        return torch.dropout(weights, dropout, train=dropout > 0) @ value_HLD

    parts = [
        recompute_in_backward(one_chunk, part.transpose(0, 1), number * chunk)
        for number, part in enumerate(query.split(chunk))
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    is_global: Tensor | None,
    scaling: float,
    dropout: float,
    bias: ScoreBias | None = None,
) -> Tensor:
    """Sliding-window attention of ONE document, blocks of queries against the keys around them (Longformer, 3.1).

    Args:
        query, key, value: `(L, H, D)`.
        window: keys that a token sees on each side.
        is_global: `(L,)` bool; these tokens see all keys and are seen by all queries. None: no such token.
        bias: added to the scores by distance, or None.
    """
    length, heads, _ = query.shape
    device = query.device
    block = max(window, 64)
    span = block + 2 * window  # keys that one block of queries may see
    blocks = -(-length // block)
    tail = blocks * block - length
    global_index = None if is_global is None else is_global.nonzero(as_tuple=True)[0]
    global_count = 0 if global_index is None else len(global_index)

    query_blocks = pad(query, (0, 0, 0, 0, 0, tail)).view(blocks, block, heads, -1).transpose(1, 2)  # (N, H, block, D)
    key_padded, value_padded = (pad(x, (0, 0, 0, 0, window, window + tail)) for x in (key, value))
    offset_query = torch.arange(block, device=device)
    offset_key = torch.arange(-window, block + window, device=device)
    bias_dense = (
        None if bias is None else bias.dense(offset_query, offset_key)
    )  # (H, block, span), the same for all blocks
    visible_heads = heads if bias is not None else 1
    step = max(1, MAX_SCORES // (visible_heads * block * (span + global_count)))

    def some_blocks(query_blocks: Tensor, key_padded: Tensor, value_padded: Tensor, first: int) -> Tensor:
        count = query_blocks.shape[0]
        rows = slice(first * block, (first + count) * block + 2 * window)
        # unfold is a view: (N, H, D, span)
        key_blocks, value_blocks = (x[rows].unfold(0, span, block).transpose(2, 3) for x in (key_padded, value_padded))
        begin = block * torch.arange(first, first + count, device=device)[:, None]
        query_index, key_index = begin + offset_query, begin + offset_key  # (N, block), (N, span)
        in_document = (key_index >= 0) & (key_index < length)
        local = in_document if is_global is None else in_document & ~is_global[key_index.clamp(0, length - 1)]
        mask = ((query_index[:, :, None] - key_index[:, None, :]).abs() <= window) & local[:, None, :]
        # A query past the end has no key of its own: let it see everything, or softmax makes NaN out of it.
        mask = (mask | (query_index >= length)[:, :, None])[:, None]  # (N, 1, block, span)
        if bias_dense is not None:
            mask = torch.where(mask, bias_dense, float("-inf"))  # (N, H, block, span)
        if global_count:  # global keys are taken out of the band above and appended once
            extra = mask.new_zeros(1) if bias is not None else mask.new_ones(1)
            extra = extra.expand(count, mask.shape[1], block, global_count)
            if bias is not None:
                far = bias.dense(query_index.flatten(), global_index)  # (H, N * block, G)
                extra = far.view(heads, count, block, global_count).transpose(0, 1)
            mask = torch.cat([mask, extra], dim=-1)
            expanded = (count, heads, global_count, -1)
            key_blocks, value_blocks = (
                torch.cat([x, y[window + global_index].transpose(0, 1)[None].expand(expanded)], dim=2)
                for x, y in ((key_blocks, key_padded), (value_blocks, value_padded))
            )
        return attend(query_blocks, key_blocks, value_blocks, mask, scaling, dropout)

    run = some_blocks if bias is None else partial(recompute_in_backward, some_blocks)
    parts = [
        run(query_blocks[first : first + step], key_padded, value_padded, first) for first in range(0, blocks, step)
    ]
    context = torch.cat(parts).transpose(1, 2).reshape(blocks * block, heads, -1)[:length]
    if global_count:
        rows = _global_rows(query, key, value, global_index, scaling, dropout, bias)
        context = context.index_copy(0, global_index, rows)
    return context


def _global_rows(query, key, value, global_index, scaling, dropout, bias) -> Tensor:
    """Global tokens of one document see all its keys: `(G, H, D)`, G x L scores."""
    mask = None if bias is None else bias.dense(global_index, torch.arange(len(key), device=key.device))
    query_HGD, key_HLD, value_HLD = (x.transpose(0, 1) for x in (query[global_index], key, value))
    return attend(query_HGD, key_HLD, value_HLD, mask, scaling, dropout).transpose(0, 1)
