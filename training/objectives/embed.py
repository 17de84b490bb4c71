"""Vectors of packed texts from a model, differentiable unless the caller disables gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_longembed.output_pooling_longembed import pool as pool_segments
from modeling_longembed.packing_longembed import split_documents
from training.data.packing import PackedTexts
from training.objectives.losses.token_vectors import TokenVectors
from training.objectives.token_arguments import TokenArguments


def pool(model: Callable[..., Any], chunk: PackedTexts) -> Tensor:
    """Return the model's pooled vectors of n packed texts, `(n, d)`, not normalised."""
    return model(
        input_ids=chunk.input_ids, cu_seq_lens_q=chunk.cu_seq_lens_q, max_length_q=chunk.max_length_q
    ).pooler_output


def embed(model: Callable[..., Any], chunk: PackedTexts) -> Tensor:
    """Return unit vectors of n packed texts, `(n, d)`."""
    return F.normalize(pool(model, chunk), dim=-1)


def outputs(model: Callable[..., Any], chunk: PackedTexts, is_query: Tensor, by_tokens: bool) -> tuple[Tensor, ...]:
    """Return what objectives read of n packed texts, all of one forward pass.

    Args:
        model: the model.
        chunk: the texts.
        is_query: `(n,)` bool, which texts are queries: their token vectors are multiplied by their weights.
        by_tokens: whether there is anything but the pooled vectors.

    Returns:
        Pooled vectors `(n, d)`, not normalised; with `by_tokens` also the vectors of all tokens that have one,
        `(T, k)`, and the number of these tokens of each text, `(n,)` int64.
    """
    if not by_tokens:
        return (pool(model, chunk),)
    output = model(
        input_ids=chunk.input_ids,
        cu_seq_lens_q=chunk.cu_seq_lens_q,
        max_length_q=chunk.max_length_q,
        token_vectors=is_query,
    )
    kept = output.token_mask[0]
    ends = F.pad(kept.cumsum(0), (1, 0))[chunk.cu_seq_lens_q.long()]
    return output.pooler_output, output.token_vectors[0][kept], ends.diff()


def outputs_with_chunks(
    model: Callable[..., Any], chunk: PackedTexts, is_cut: Tensor, size: int, pooling: str
) -> tuple[Tensor, Tensor]:
    """Return vectors of n packed texts and of the late chunks of some of them, all of one forward pass.

    Args:
        model: the model.
        chunk: the texts.
        is_cut: `(n,)` bool, which texts are cut into late chunks.
        size: tokens of a late chunk, as in `encode(late_chunk_tokens=size)`.
        pooling: how tokens become a vector, a name in `POOLINGS`.

    Returns:
        Pooled vectors `(n, d)`, and those of the late chunks, `(chunks, d)`, text after text; neither is normalised.
    """
    output = model(input_ids=chunk.input_ids, cu_seq_lens_q=chunk.cu_seq_lens_q, max_length_q=chunk.max_length_q)
    vectors = pool_segments(output.last_hidden_state[0], split_documents(chunk.cu_seq_lens_q, size), pooling)
    counts = (chunk.cu_seq_lens_q.diff() + size - 1) // size
    return output.pooler_output, vectors[is_cut.repeat_interleave(counts)]


def with_queries(chunks: Sequence[PackedTexts], queries: int) -> Iterator[tuple[PackedTexts, Tensor]]:
    """Yield each chunk with which of its texts are queries, `(n,)` bool: the first `queries` texts of all chunks."""
    first = 0
    for chunk in chunks:
        count = len(chunk.cu_seq_lens_q) - 1
        yield chunk, torch.arange(first, first + count, device=chunk.input_ids.device) < queries
        first += count


def embed_for_scoring(
    model: Callable[..., Any], chunk: PackedTexts, kind: str, arguments: TokenArguments
) -> Tensor | TokenVectors:
    """Return n packed texts of one kind as they are compared: unit vectors `(n, d)`, or token vectors.

    Args:
        model: the model.
        chunk: the texts.
        kind: `query` or `document`.
        arguments: parsed command-line options, which say how texts are compared.
    """
    if not arguments.by_tokens:
        return embed(model, chunk)
    count = len(chunk.cu_seq_lens_q) - 1
    queries = count if kind == "query" else 0
    ((chunk, is_query),) = with_queries([chunk], queries)
    _, vectors, tokens = outputs(model, chunk, is_query, by_tokens=True)
    return arguments.for_scoring(vectors, tokens, queries)
