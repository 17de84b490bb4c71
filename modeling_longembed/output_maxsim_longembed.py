"""MaxSim, the similarity of late interaction (ColBERT, Khattab and Zaharia 2020, arXiv:2004.12832), in bounded memory.

The token vectors of all queries are packed, and those of all documents: Q queries with Tq vectors in all, D documents
with Td, k their width. The score of a query and a document is the sum over the query's tokens of the largest inner
product with a token of the document. The products are computed block by block; what remains of a block is the maximum
of each query token in each document and, for the gradient, which token gave it. A document without tokens scores 0.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Query tokens that are multiplied with one block of document tokens.
QUERY_ROWS = {"cpu": 1024, "cuda": 8192}
# Bytes of a block on the CPU, whatever the budget: a block that stays in the cache is reduced much faster.
CPU_BLOCK_BYTES = 8 * 2**20


def maxsim(
    query_vectors: Tensor,
    query_cu_seqlens: Tensor,
    document_vectors: Tensor,
    document_cu_seqlens: Tensor,
    memory_mb: float = 256,
    mean: bool = False,
) -> Tensor:
    """Compute the MaxSim of every query with every document.

    Differentiable; between forward and backward only the place of each maximum is kept, `(D, Tq)` int32. Ties go to
    any one of the tokens that tie.

    Args:
        query_vectors: `(Tq, k)`.
        query_cu_seqlens: `(Q + 1,)` int, cumulative numbers of vectors of the queries, starting at 0.
        document_vectors: `(Td, k)`.
        document_cu_seqlens: `(D + 1,)` int, the same of the documents.
        memory_mb: MiB that intermediate results may take at a time, beside inputs, scores, places of maxima, and
            gradients, which are fp32 until they are whole.
        mean: divide the score by the number of the query's tokens, so that queries of all lengths compare.

    Returns:
        `(Q, D)`, fp32 or wider, also under autocast; 0 where the query or the document has no tokens.

    Raises:
        ValueError: the widths differ, or the lengths do not add up to the vectors.
    """
    return _scores(query_vectors, query_cu_seqlens, document_vectors, document_cu_seqlens, memory_mb, mean, 1)


def maxsim_pairs(
    query_vectors: Tensor,
    query_cu_seqlens: Tensor,
    document_vectors: Tensor,
    document_cu_seqlens: Tensor,
    memory_mb: float = 256,
    mean: bool = False,
) -> Tensor:
    """Compute the MaxSim of every query with its own n candidates.

    Args:
        query_vectors: `(Tq, k)`.
        query_cu_seqlens: `(Q + 1,)` int, cumulative numbers of vectors of the queries, starting at 0.
        document_vectors: `(Td, k)`, the candidates of the first query, then those of the second, and so on.
        document_cu_seqlens: `(Q * n + 1,)` int, cumulative numbers of vectors of the candidates.
        memory_mb: as in `maxsim`.
        mean: as in `maxsim`.

    Returns:
        `(Q, n)`, as in `maxsim`.

    Raises:
        ValueError: as in `maxsim`, or the number of documents is no multiple of the number of queries.
    """
    groups = len(query_cu_seqlens) - 1
    return _scores(query_vectors, query_cu_seqlens, document_vectors, document_cu_seqlens, memory_mb, mean, groups)


def _scores(queries, query_cu, documents, document_cu, memory_mb: float, mean: bool, groups: int) -> Tensor:
    """Check the input, and score G equal groups of queries, each against its own equal group of documents."""
    if queries.shape[-1] != documents.shape[-1]:
        raise ValueError(f"maxsim: query vectors of width {queries.shape[-1]}, but documents' of {documents.shape[-1]}")
    if not memory_mb > 0:
        raise ValueError(f"maxsim: memory_mb is {memory_mb}; give the MiB that intermediate results may take")
    lengths = query_cu.diff().to(queries.device)
    query_cu, document_cu = query_cu.tolist(), document_cu.tolist()
    for side, cu, vectors in (("query", query_cu, queries), ("document", document_cu, documents)):
        if cu[0] != 0 or cu[-1] != len(vectors) or any(end < start for start, end in pairwise(cu)):
            raise ValueError(
                f"maxsim: {side}_cu_seqlens must rise from 0 to the {len(vectors)} vectors of the {side} side"
            )
    if groups == 0 or (len(document_cu) - 1) % groups:
        if len(document_cu) > 1:
            raise ValueError(
                f"maxsim_pairs: {len(document_cu) - 1} documents cannot be shared out equally to {groups} queries"
            )
        return queries.new_zeros(0, 0, dtype=torch.promote_types(queries.dtype, torch.float32))
    scores = _MaxSim.apply(queries, documents, query_cu, document_cu, groups, int(memory_mb * 2**20))
    return scores / lengths.clamp(min=1)[:, None].to(scores.dtype) if mean else scores


class _MaxSim(torch.autograd.Function):
    """Sums of maxima; the places of the maxima are all that the gradient needs.

    The D documents of a group are its n own. `places[j, t]` is the row of `documents` that is most similar to query
    token t among the rows of document j of the group of t.
    """

    @staticmethod
    def forward(ctx, queries, documents, query_cu, document_cu, groups, memory):
        with torch.autocast(queries.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(queries.dtype, documents.dtype), torch.float32)
            num_queries, per_group = (len(query_cu) - 1) // groups, (len(document_cu) - 1) // groups
            scores = queries.new_zeros(len(query_cu) - 1, per_group, dtype=dtype)
            places = None
            if any(ctx.needs_input_grad[:2]):
                places = torch.full((per_group, len(queries)), -1, dtype=torch.int32, device=queries.device)
            if queries.device.type == "cpu":
                memory = min(memory, CPU_BLOCK_BYTES)
            for group in range(groups):
                first_query, first_document = group * num_queries, group * per_group
                _score_group(
                    queries,
                    documents,
                    query_cu[first_query : first_query + num_queries + 1],
                    document_cu[first_document : first_document + per_group + 1],
                    scores[first_query : first_query + num_queries],
                    places,
                    memory // dtype.itemsize,
                )
            ctx.save_for_backward(queries, documents, places)
            ctx.lengths = query_cu, document_cu, groups, memory
            return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        queries, documents, places = ctx.saved_tensors
        query_cu, document_cu, groups, memory = ctx.lengths
        num_queries, per_group = (len(query_cu) - 1) // groups, (len(document_cu) - 1) // groups
        query_gradient = torch.zeros_like(queries, dtype=gradient.dtype) if ctx.needs_input_grad[0] else None
        document_gradient = torch.zeros_like(documents, dtype=gradient.dtype) if ctx.needs_input_grad[1] else None
        lengths = torch.tensor([end - start for start, end in pairwise(query_cu)], device=queries.device)
        query_of_token = torch.repeat_interleave(lengths, output_size=len(queries))
        width, elements = queries.shape[1], memory // gradient.dtype.itemsize
        step = max(1, min(QUERY_ROWS.get(queries.device.type, 8192), elements // (4 * width + 16)))
        with torch.autocast(queries.device.type, enabled=False):
            for group in range(groups):
                own_cu = document_cu[group * per_group : (group + 1) * per_group + 1]
                group_end = query_cu[(group + 1) * num_queries]
                for start in range(query_cu[group * num_queries], group_end, step):
                    end = min(start + step, group_end)
                    # No more tokens of a document are chosen than there are query tokens.
                    chosen_cu = [0, *accumulate(min(high - low, end - start) for low, high in pairwise(own_cu))]
                    free = elements - 2 * width * (end - start)
                    for first, last in _document_blocks(chosen_cu, 2 * width, 16 * (end - start), free):
                        if own_cu[first] == own_cu[last]:
                            continue
                        _add_gradients(
                            places[first:last, start:end],
                            own_cu[first],
                            gradient[query_of_token[start:end], first:last],
                            (queries[start:end], documents),
                            (None if query_gradient is None else query_gradient[start:end], document_gradient),
                        )
        if query_gradient is not None:
            query_gradient = query_gradient.to(queries.dtype)
        if document_gradient is not None:
            document_gradient = document_gradient.to(documents.dtype)
        return query_gradient, document_gradient, None, None, None, None


def _add_gradients(
    places: Tensor,
    low: int,
    weights: Tensor,
    vectors: tuple[Tensor, Tensor],
    gradients: tuple[Tensor | None, Tensor | None],
) -> None:
    """Add what a block of maxima contributes to the gradients, always in the same order of addition.

    Args:
        places: `(n, r)`, the row of document vectors that is the maximum of each of r query tokens in n documents; -1
            where there is none.
        low: the first row of these documents.
        weights: `(r, n)`, the gradients of the maxima.
        vectors: `(r, k)` of the query tokens, and `(Td, k)` of all documents.
        gradients: the same shapes; None for a side that needs none.
    """
    (queries, documents), (query_gradient, document_gradient) = vectors, gradients
    weights = weights.masked_fill_(places.T < 0, 0.0)
    # Sorted by document token, so that what belongs to one is together, and rows that were not chosen take no memory.
    chosen, order = places.clamp(min=low).flatten().sort(stable=True)
    chosen, number, counts = chosen.unique_consecutive(return_inverse=True, return_counts=True)
    if query_gradient is not None:
        number = torch.empty_like(number).scatter_(0, order, number).view_as(places)
        rows = documents.index_select(0, chosen).to(weights.dtype)
        query_gradient += embedding_bag(number.T.contiguous(), rows, mode="sum", per_sample_weights=weights)
        del rows
    del number
    if document_gradient is not None:
        begins = counts.cumsum(0).sub_(counts)
        terms = weights.T.flatten()[order]
        bags = order % len(queries), queries.to(weights.dtype), begins
        document_gradient.index_add_(0, chosen, embedding_bag(*bags, mode="sum", per_sample_weights=terms))


def _score_group(
    queries: Tensor,
    documents: Tensor,
    query_cu: list[int],
    document_cu: list[int],
    scores: Tensor,
    places: Tensor | None,
    elements: int,
) -> None:
    """Add the scores of queries and documents to `scores` `(queries, documents)`, in blocks of `elements` numbers.

    `places` `(documents, Tq)` is filled in, unless it is None.
    """
    width, begin, end = queries.shape[1], query_cu[0], query_cu[-1]
    step = max(1, min(QUERY_ROWS.get(queries.device.type, 8192), elements // (4 * width), end - begin))
    for start in range(begin, end, step):
        rows = queries[start : start + step].to(scores.dtype)
        free = elements - rows.numel()
        first_query, begins = _overlapping(query_cu, start, start + len(rows))
        offsets = torch.tensor(begins, device=queries.device)
        row_numbers = torch.arange(len(rows), device=queries.device)
        for first, last in _document_blocks(document_cu, len(rows) + width, 4 * len(rows), free):
            best, chosen = _best_of_block(rows, documents, document_cu[first : last + 1], places is not None, free)
            summed = embedding_bag(row_numbers, best.T.contiguous(), offsets, mode="sum")  # (queries of the rows, n)
            scores[first_query : first_query + len(summed), first:last] += summed
            if places is not None and chosen is not None:
                places[first:last, start : start + len(rows)] = chosen
            del best, chosen


def _overlapping(cu: list[int], start: int, end: int) -> tuple[int, list[int]]:
    """Return the first segment with rows from `start` to `end`, and where it and its followers begin, from `start`."""
    first = bisect_right(cu, start) - 1
    return first, [max(cu[number] - start, 0) for number in range(first, bisect_left(cu, end))]


def _document_blocks(cu: list[int], per_token: int, per_document: int, free: int) -> Iterator[tuple[int, int]]:
    """Divide documents into runs that fit into `free` numbers; one that does not fit is a run of its own.

    Args:
        cu: cumulative lengths of the documents.
        per_token: numbers that a token takes.
        per_document: numbers that a document takes beside its tokens.
        free: numbers of a block.

    Yields:
        The first document of a run, and the one after its last.
    """
    first = cost = 0
    for number, (start, end) in enumerate(pairwise(cu)):
        own = (end - start) * per_token + per_document
        if number > first and cost + own > free:
            yield first, number
            first, cost = number, 0
        cost += own
    if len(cu) > 1:
        yield first, len(cu) - 1


def _best_of_block(
    rows: Tensor, documents: Tensor, cu: list[int], with_places: bool, free: int
) -> tuple[Tensor, Tensor | None]:
    """Find the largest product of each row with the tokens of each document, piece by piece if they do not fit.

    Args:
        rows: `(r, k)` query vectors.
        documents: `(Td, k)`.
        cu: the first token of each of n documents, and the end of the last.
        with_places: also return which token it was.
        free: numbers that the products and the document vectors may take.

    Returns:
        `(n, r)` maxima, 0 for a document without tokens, and `(n, r)` rows of `documents`, -1 there; or None.
    """
    best = rows.new_zeros(len(cu) - 1, len(rows))
    places = torch.full(best.shape, -1, device=rows.device) if with_places else None
    step = max(1, (free - 4 * best.numel()) // (len(rows) + rows.shape[1]))
    for start in range(cu[0], cu[-1], step):
        end = min(start + step, cu[-1])
        products = rows @ documents[start:end].to(rows.dtype).T  # (r, tokens)
        for number, (low, high) in enumerate(pairwise(cu)):
            if low == high:
                continue
            part = products[:, max(low, start) - start : high - start]
            if places is None:
                found = part.amax(1)
                best[number] = found if low >= start else torch.maximum(best[number], found)
                continue
            found, where = part.max(1)
            where += max(low, start)
            if low < start:
                earlier = found <= best[number]
                found, where = torch.where(earlier, best[number], found), torch.where(earlier, places[number], where)
            best[number], places[number] = found, where
        del products, part  # or they would still be there while the next piece is multiplied
    return best, places
