"""Attention on packed tokens in linear memory, with torch alone.

Every function takes query, key and value of shape `(T, H, D)` and returns the context `(T, H, D)`. None of them
allocates a tensor of T x T elements: queries are computed in chunks whose scores, where they exist at all, stay below
`MAX_SCORES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from .position_base_longembed import GroupedRotary, ScoreBias

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch: the loop below does the same work
    varlen_attn = None  # type: ignore[assignment]  # `varlen_kernel_applies` checks for None

# Largest number of score or mask elements that one step of a chunked path may hold (64 MB in fp32).
MAX_SCORES = 2**24
# The same for a softmax that is computed step by step and has many temporary tensors. malloc requests blocks of 32 MB
# and more from the system each time, which would cost more than the arithmetic.
MAX_UNFUSED_SCORES = 2**22


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Compute the softmax over the keys that the mask allows, in fp32 at least.

    A row that sees no key is zero, not NaN.
    """
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, scores.dtype))
    return weights.masked_fill(~mask, 0.0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    causal: bool = False,
) -> Tensor:
    """Compute attention of one segment, or of a batch of segments of equal shape.

    Args:
        query: `(..., H, Q, D)`.
        key, value: `(..., H, K, D)`.
        mask: bool or a bias, broadcastable to `(..., H, Q, K)`; None: all keys are visible, or a causal mask applies.
        scaling: factor of the scores.
        dropout: probability to leave out an attention weight.
        causal: no query sees a later key; used only without a mask.

    Returns:
        `(..., H, Q, D)`.
    """
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scaling
    )


def recompute_in_backward(function: Callable, *inputs: Any) -> Any:
    """Call `function` and recompute it in the backward pass, because stored scores would add up to T x T."""
    return checkpoint(function, *inputs, use_reentrant=False) if torch.is_grad_enabled() else function(*inputs)


def varlen_kernel_applies(query: Tensor, dropout: float) -> bool:
    """Return whether torch's variable-length flash kernel accepts the input.

    It needs CUDA, half precision, heads of at most 256 numbers in steps of 8, and has no dropout.
    """
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and dropout == 0.0
    )


def varlen_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scaling: float,
    window: int,
    causal: bool,
) -> Tensor:
    """Call torch's variable-length flash kernel.

    Args:
        query, key, value: `(T, H, D)`.
        cu_seqlens: `(N + 1,)` int32, cumulative lengths.
        longest: length of the longest segment in tokens.
        scaling: factor of the scores.
        window: number of visible tokens on each side; -1: all.
        causal: no query sees a later key.

    Returns:
        `(T, H, D)`.
    """
    sides = (window, 0 if causal else window)
    context = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=sides)
    return cast(Tensor, context)  # it returns a pair only with `return_aux`


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
    causal: bool = False,
    places: Tensor | None = None,
) -> Tensor:
    """Compute full attention inside every segment: a document, or a block of one.

    Args:
        query, key, value: `(T, H, D)`.
        cu_seqlens: `(N + 1,)` int32, cumulative lengths of the segments.
        max_seqlen: length of the longest segment in tokens.
        scaling: factor of the scores.
        dropout: probability to leave out an attention weight.
        bias: added to the scores by the distance of query and key, or None.
        grouped: the second rotation of Self-Extend for far keys, or None.
        causal: no query sees a later key of its segment.
        places: `(T,)`, position of each token in its document, for the bias; None: the tokens of a segment are
            consecutive.

    Returns:
        `(T, H, D)`.
    """
    if varlen_kernel_applies(query, dropout) and bias is None and grouped is None:
        return varlen_kernel(query, key, value, cu_seqlens, max_seqlen, scaling, -1, causal)
    lengths = cu_seqlens.diff().tolist()
    # `split`, not slices: the backward pass of a slice fills a tensor of all T tokens, that of `split` is one `cat`.
    segments = list(zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True))
    contexts = [segment[0] for segment in segments]
    if bias is None and grouped is None:  # segments of equal length are computed in one call
        for length in set(lengths) - {0}:
            same = [number for number, tokens in enumerate(lengths) if tokens == length]
            query_NHLD, key_NHLD, value_NHLD = (
                torch.stack([segments[number][part] for number in same]).transpose(1, 2) for part in range(3)
            )
            attended = attend(query_NHLD, key_NHLD, value_NHLD, None, scaling, dropout, causal)
            for number, context in zip(same, attended.transpose(1, 2).unbind(0), strict=True):
                contexts[number] = context
    else:
        starts = cu_seqlens.tolist()
        for number, length in enumerate(lengths):
            rows = slice(starts[number], starts[number] + length)
            if not length:
                continue
            if grouped is not None:
                mask = causal_mask if causal else None
                contexts[number] = online_attention(
                    *segments[number], scaling, dropout, mask=mask, bias=bias, grouped=grouped[rows]
                )
            else:
                index = torch.arange(length, device=query.device) if places is None else places[rows]
                contexts[number] = _biased_attention(*segments[number], scaling, dropout, bias, index, causal)
    return torch.cat(contexts) if contexts else torch.zeros_like(query)


def causal_mask(query_index: Tensor, key_index: Tensor) -> Tensor:
    """Return the mask `(1, Q, K)` under which no query sees a later key."""
    return (key_index[None, :] <= query_index[:, None])[None]


def _biased_attention(query, key, value, scaling, dropout, bias, index, causal) -> Tensor:
    """Compute one segment with a score bias, a chunk of queries at a time; return `(L, H, D)`."""
    length, heads = query.shape[:2]
    key_HLD, value_HLD = key.transpose(0, 1), value.transpose(0, 1)
    chunk = max(1, MAX_SCORES // (heads * length))

    def one_chunk(query_HCD: Tensor, start: int) -> Tensor:
        query_index = index[start : start + query_HCD.shape[1]]
        mask = bias.dense(query_HCD, query_index, index)
        if causal:
            mask = mask.masked_fill(~causal_mask(query_index, index), float("-inf"))
        return attend(query_HCD, key_HLD, value_HLD, mask, scaling, dropout)

    parts = [
        recompute_in_backward(one_chunk, part.transpose(0, 1), number * chunk)
        for number, part in enumerate(query.split(chunk))
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)


def online_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    dropout: float,
    mask: Callable[[Tensor, Tensor], Tensor] | None = None,
    bias: ScoreBias | None = None,
    grouped: GroupedRotary | None = None,
    softcap: float | None = None,
    query_chunk: int = 1024,
    key_chunk: int = 4096,
) -> Tensor:
    """Compute attention of ONE document with an online softmax over chunks of keys (Rabe & Staats 2021, algorithm 1).

    It is for inputs that no fused kernel supports. It holds `H * query_chunk * key_chunk` scores at a time, and the
    backward pass recomputes them. A chunk of keys that no query of a chunk sees is skipped.

    Args:
        query, key, value: `(L, H, D)`.
        scaling: factor of the scores.
        dropout: probability to leave out an attention weight.
        mask: function from positions `(Q,)` and `(K,)` to bool `(1 or H, Q, K)`; None: all keys are visible.
        bias: added to the scores by the distance of query and key, or None.
        grouped: the second rotation of Self-Extend for far keys, or None.
        softcap: the scores s become `softcap * tanh(s / softcap)` before bias and mask (Gemma 2); None: they stay.
        query_chunk, key_chunk: number of queries and of keys that are computed at once.

    Returns:
        `(L, H, D)`; zeros for a query that sees nothing.
    """
    heads = query.shape[1]
    query_chunk = max(1, min(query_chunk, MAX_SCORES // (heads * min(key_chunk, len(key)))))
    index = torch.arange(len(key), device=query.device)
    wide = torch.promote_types(torch.float32, query.dtype)

    def summary(query_HQD: Tensor, key_HKD: Tensor, value_HKD: Tensor, visible, query_index, key_index):
        """Return exp-weighted values `(H, Q, D)`, sum of weights and largest score `(H, Q, 1)` of a chunk of keys."""
        scores = query_HQD @ key_HKD.transpose(1, 2)
        if grouped is not None:
            scores = grouped.merge(scores, query_index, key_index)
        scores = (scores * scaling).to(wide)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if bias is not None:
            scores = scores + bias.dense(query_HQD, query_index, key_index)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        # Subtracting the maximum only prevents overflow: it cancels, so that it needs no gradient.
        largest = scores.detach().amax(dim=-1, keepdim=True)
        weights = (scores - largest.clamp(min=torch.finfo(wide).min)).exp()
        dropped = torch.dropout(weights, dropout, train=dropout > 0)
        return dropped.to(value.dtype) @ value_HKD, weights.sum(dim=-1, keepdim=True), largest

    def one_query_chunk(query_HQD: Tensor, key: Tensor, value: Tensor, query_index: Tensor) -> Tensor:
        parts = []
        for key_index, key_LHD, value_LHD in zip(
            index.split(key_chunk), key.split(key_chunk), value.split(key_chunk), strict=True
        ):
            visible = None if mask is None else mask(query_index, key_index)
            if visible is None or bool(visible.any()):
                states = (key_LHD.transpose(0, 1), value_LHD.transpose(0, 1))
                parts.append(recompute_in_backward(summary, query_HQD, *states, visible, query_index, key_index))
        if not parts:
            return torch.zeros_like(query_HQD)
        values, sums, largest = (torch.stack(part) for part in zip(*parts, strict=True))
        scale = (largest - largest.amax(dim=0).clamp(min=torch.finfo(wide).min)).exp()
        total = (sums * scale).sum(dim=0)
        context = (values * scale).sum(dim=0) / torch.where(total > 0, total, 1.0)
        return context.to(query.dtype)

    parts = [
        recompute_in_backward(one_query_chunk, part.transpose(0, 1), key, value, query_index)
        for part, query_index in zip(query.split(query_chunk), index.split(query_chunk), strict=True)
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)


@dataclass(frozen=True)
class GlobalKeys:
    """Keys of G tokens that every query of a document sees in addition to its window."""

    key: Tensor  # (G, H, D)
    value: Tensor  # (G, H, D)
    index: Tensor  # (G,) int64, places in the document


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    scaling: float,
    dropout: float,
    bias: ScoreBias | None = None,
    causal: bool = False,
    is_global: Tensor | None = None,
    global_keys: GlobalKeys | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Compute sliding-window attention of ONE document in blocks of queries (Longformer, Beltagy et al. 2020, 3.1).

    Args:
        query, key, value: `(L, H, D)`.
        window: number of keys that a token sees on each side.
        scaling: factor of the scores.
        dropout: probability to leave out an attention weight.
        bias: added to the scores by distance, or None.
        causal: no query sees a later key.
        is_global: `(L,)` bool, tokens whose keys are in `global_keys` and therefore not in the band; given with it.
        global_keys: keys that all queries see in addition to the band, in the same softmax, or None.
        places: `(L,)`, evenly spaced positions in the document, for a dilated window; None: 0 to L - 1.

    Returns:
        `(L, H, D)`; the rows of global tokens are computed like any other.
    """
    length, heads, _ = query.shape
    device = query.device
    block = max(window, 64)
    span = block + 2 * window  # keys that one block of queries may see
    blocks = -(-length // block)
    tail = blocks * block - length
    global_count = 0 if global_keys is None else len(global_keys.index)
    places = torch.arange(length, device=device) if places is None else places
    step_of_places = int(places[1] - places[0]) if length > 1 else 1

    query_blocks = pad(query, (0, 0, 0, 0, 0, tail)).view(blocks, block, heads, -1).transpose(1, 2)  # (N, H, block, D)
    key_padded, value_padded = (pad(x, (0, 0, 0, 0, window, window + tail)) for x in (key, value))
    offset_query = torch.arange(block, device=device)
    offset_key = torch.arange(-window, block + window, device=device)
    mask_heads = heads if bias is not None else 1
    step = max(1, MAX_SCORES // (mask_heads * block * (span + global_count)))

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
        if causal:
            mask = mask & (key_index[:, None, :] <= query_index[:, :, None])
        # A padding query after the end would see no key, and its softmax would be NaN: let it see all keys.
        mask = (mask | (query_index >= length)[:, :, None])[:, None]  # (N, 1, block, span)
        if bias is not None:  # distances are the same in all blocks
            near = bias.dense(query_blocks, offset_query * step_of_places, offset_key * step_of_places)
            mask = torch.where(mask, near, float("-inf"))  # (N, H, block, span)
        if global_keys is not None:  # appended once
            query_place = places[query_index.clamp(max=length - 1)]  # (N, block)
            extra = torch.ones(count, 1, block, global_count, dtype=torch.bool, device=device)
            if causal:
                extra = (global_keys.index <= query_place[..., None])[:, None] | (query_index >= length)[
                    :, None, :, None
                ]
            if bias is not None:
                flat = query_blocks.transpose(0, 1).flatten(1, 2)  # (H, N * block, D)
                far = bias.dense(flat, query_place.flatten(), global_keys.index)  # (H, N * block, G)
                far = far.unflatten(1, (count, block)).transpose(0, 1)
                extra = torch.where(extra, far, float("-inf"))
            mask = torch.cat([mask, extra], dim=-1)
            expanded = (count, heads, global_count, -1)
            key_blocks, value_blocks = (
                torch.cat([x, y.transpose(0, 1)[None].expand(expanded)], dim=2)
                for x, y in ((key_blocks, global_keys.key), (value_blocks, global_keys.value))
            )
        return attend(query_blocks, key_blocks, value_blocks, mask, scaling, dropout)

    run = some_blocks if bias is None else partial(recompute_in_backward, some_blocks)
    parts = [
        run(query_blocks[first : first + step], key_padded, value_padded, first) for first in range(0, blocks, step)
    ]
    return torch.cat(parts).transpose(1, 2).reshape(blocks * block, heads, -1)[:length]
