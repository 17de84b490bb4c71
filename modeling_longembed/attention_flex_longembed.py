"""FlexAttention (Dong et al. 2024, arXiv:2412.05496) under the predicate of a pattern, compiled once for each mask.

The compiler keeps its programs by the code object of the function that it compiled, at most eight for each, and
recompiles when a value that the function closes over has changed. Therefore a mask has functions of its own, which
close over nothing but the mask; the tokens, the bias and the blocks are their arguments.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .pattern_base_longembed import AttentionInputs, AttentionPattern, Places
from .position_base_longembed import ScoreBias

# The tensors of a `BlockMask`, as its constructor takes them.
BLOCKS = (
    *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
)
# The compiler's backend by type of device. On a CPU nothing is compiled: there this kernel is only a check.
BACKENDS: dict[str, str] = {"cuda": "inductor"}
# Queries and keys in a block, of which the kernel computes all or none.
BLOCK_SIZE = 128


class FlexMask(NamedTuple):
    """Everything that a program depends on beside tensors.

    Attributes:
        pattern: which keys a query sees.
        causal: no query sees a later key.
        scaling: factor of the scores.
        heads: number of heads on this process.
        first_head: number of the first of them among those of the model.
        model_heads: number of heads of the model.
    """

    pattern: AttentionPattern
    causal: bool
    scaling: float
    heads: int
    first_head: int
    model_heads: int


class Tokens(NamedTuple):
    """The packed tokens as a mask sees them, each `(T,)`.

    Attributes:
        document: int64, number of the document.
        token_index: int64, place in the document.
        length: int64, length of the document.
        is_global: bool, whether the token is global.
    """

    document: Tensor
    token_index: Tensor
    length: Tensor
    is_global: Tensor


def attend_by_flex(inputs: AttentionInputs) -> tuple[Tensor, None]:
    """Compute attention under any predicate and bias by distance.

    Returns:
        The context `(T, H, D)`, and None for the weights.

    Raises:
        ValueError: the call needs dropout, or a backward pass on a CPU, which FlexAttention does not support.
    """
    documents, query = inputs.documents, inputs.query
    if not query.is_cuda and torch.is_grad_enabled() and query.requires_grad:
        raise ValueError(
            "flex_attention has no backward pass on CPU; train with attn_implementation='longembed_varlen'"
        )
    if inputs.dropout:
        raise ValueError(
            "flex_attention has no dropout; set attention_dropout=0 or use attn_implementation='longembed_varlen'"
        )
    mask = FlexMask(
        inputs.pattern, inputs.causal, inputs.scaling, query.shape[1], inputs.first_head, inputs.model_heads
    )
    index = documents.token_index
    marked = documents.is_global if documents.is_global is not None else torch.zeros_like(index, dtype=torch.bool)
    tokens = Tokens(documents.document_ids, index, documents.document_lengths, marked)
    backend = None if torch.compiler.is_compiling() else BACKENDS.get(query.device.type)
    find_blocks, attend = _programs(mask) if backend is None else _compiled_programs(mask, backend)
    blocks = documents.once(("flex", mask), lambda: find_blocks(tokens))
    return attend(query, inputs.key, inputs.value, tokens, blocks, inputs.bias), None


def _programs(mask: FlexMask) -> tuple[Callable, Callable]:
    """Return the two programs of a mask: one finds the blocks of visible pairs, the other computes attention."""

    def visible_pairs(tokens: Tokens) -> Callable:
        places = Places(tokens.token_index, tokens.length, tokens.is_global)

        def mask_mod(batch, head, query, key):
            visible = mask.pattern.visible(places.at(query), places.at(key), head + mask.first_head, mask.model_heads)
            visible = visible & (tokens.document[query] == tokens.document[key])
            return visible & (tokens.token_index[key] <= tokens.token_index[query]) if mask.causal else visible

        return mask_mod

    def find_blocks(tokens: Tokens) -> tuple[Tensor, ...]:
        rows, heads = len(tokens.token_index), mask.heads if mask.pattern.per_head else None
        found = create_block_mask(visible_pairs(tokens), None, heads, rows, rows, tokens.token_index.device, BLOCK_SIZE)
        return tuple(getattr(found, name) for name in BLOCKS)

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tokens: Tokens,
        blocks: tuple[Tensor, ...],
        bias: ScoreBias | None,
    ) -> Tensor:
        def score_mod(score, batch, head, query, key):
            return score + bias.values(tokens.token_index[key] - tokens.token_index[query], head)

        size = (BLOCK_SIZE, BLOCK_SIZE)
        named: dict[str, Any] = dict(zip(BLOCKS, blocks, strict=True))
        block_mask = BlockMask((len(query), len(key)), BLOCK_SIZE=size, mask_mod=visible_pairs(tokens), **named)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        context: Any = flex_attention(
            query, key, value, score_mod=None if bias is None else score_mod, block_mask=block_mask, scale=mask.scaling
        )
        return context[0].transpose(0, 1)

    return find_blocks, attend


@cache
def _compiled_programs(mask: FlexMask, backend: str) -> tuple[Callable, Callable]:
    """Compile the programs of a mask, each for any number of tokens; one block alone is a program of its own."""
    find_blocks, attend = (
        torch.compile(_own_code(program), backend=backend, dynamic=True, fullgraph=True) for program in _programs(mask)
    )
    return find_blocks, attend


def _own_code(function: Callable) -> Callable:
    """Return the function with a code object of its own, so that its compiled programs do not count for another's."""
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
