"""Fewer token vectors a document: hierarchical pooling (Ward) within windows, or a fixed number of vectors.

Clavié et al. 2024 (Token Pooling for multi-vector retrieval, arXiv:2409.14683) merge the token vectors of a document by
Ward's method on cosine distances and keep the mean of each cluster. The cost of that grows with the square of the
length, so documents are divided into windows here, and only tokens of one window are merged.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

MAX_FACTOR = 32
# Numbers in the distance matrices of the windows that are merged at a time; on the CPU they should fit into its cache.
DISTANCES = {"cpu": 2**19, "cuda": 2**24}


def pool_tokens(vectors: Tensor, factor: int, window: int = 256) -> tuple[Tensor, Tensor]:
    """Merge the token vectors of one document into `max(n // factor, 1)` vectors, by Ward's method within windows.

    Args:
        vectors: `(n, k)` unit vectors, in the order of the text.
        factor: number of vectors that one is kept of, 1 to 32; 1 keeps all.
        window: largest number of vectors that are merged with each other; a longer document is divided evenly.

    Returns:
        `(m, k)` unit vectors, ordered by the first token of each, and `(n,)` int64: the place among them of the vector
        that stands for each token. Differentiable in `vectors`; which tokens are merged is constant.

    Raises:
        ValueError: `factor` or `window` is out of range.
    """
    pooled, groups, _ = pool_packed_tokens(vectors, torch.tensor([0, len(vectors)]), factor, window)
    return pooled, groups


def pool_packed_tokens(
    vectors: Tensor, cu_seqlens: Tensor, factor: int, window: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the token vectors of packed documents, each on its own as in `pool_tokens`.

    Args:
        vectors: `(T, k)` unit vectors.
        cu_seqlens: `(D + 1,)` int, cumulative numbers of vectors of the documents.
        factor: as in `pool_tokens`.
        window: as in `pool_tokens`.

    Returns:
        `(M, k)` unit vectors; `(T,)` int64, the row among them that stands for each token; and `(D + 1,)` int32,
        cumulative numbers of vectors after pooling.

    Raises:
        ValueError: `factor` or `window` is out of range.
    """
    if not isinstance(factor, int) or not 1 <= factor <= MAX_FACTOR:
        raise ValueError(
            f"token pooling by {factor!r}: give a whole number from 1, which keeps all vectors, to {MAX_FACTOR}; for "
            "fewer vectors set a number of vectors a document"
        )
    if factor == 1:
        return vectors, torch.arange(len(vectors), device=vectors.device), cu_seqlens.to(torch.int32)
    lengths = cu_seqlens.diff().tolist()
    kept = [max(length // factor, min(length, 1)) for length in lengths]
    groups = _cluster(vectors, torch.ones(len(vectors), device=vectors.device), lengths, kept, window)
    pooled_cu = torch.nn.functional.pad(torch.tensor(kept).cumsum(0, dtype=torch.int32), (1, 0)).to(cu_seqlens.device)
    return _means(vectors, groups, sum(kept)), groups, pooled_cu


def keep_tokens(
    vectors: Tensor, budget: int, by: str = "saliency", weights: Tensor | None = None, window: int = 256
) -> tuple[Tensor, Tensor]:
    """Reduce one document to at most `budget` vectors.

    Args:
        vectors: `(n, k)` unit vectors, in the order of the text.
        budget: number of vectors to keep, at least 1.
        by: `saliency` keeps the vectors of the largest weight and drops the others; `clusters` merges vectors as
            `pool_tokens` does, in as many passes over windows as it takes.
        weights: `(n,)`, how much each token matters, such as the idf of its word; None: by how far it is from the mean
            of the document. Only for `saliency`.
        window: largest number of vectors that are merged with each other at a time. Only for `clusters`.

    Returns:
        `(m, k)` unit vectors in the order of the text, and `(n,)` int64: the place among them of the vector that stands
        for each token, -1 for a token that was dropped.

    Raises:
        ValueError: `budget` is below 1, or `by` is neither.
    """
    if not isinstance(budget, int) or budget < 1:
        raise ValueError(f"keep_tokens: budget={budget!r}; give the number of vectors to keep, at least 1")
    if by not in ("saliency", "clusters"):
        raise ValueError(f"keep_tokens: by={by!r}; choose from 'saliency', 'clusters'")
    groups = torch.arange(len(vectors), device=vectors.device)
    if by == "saliency":
        if len(vectors) <= budget:
            return vectors, groups
        if weights is None:
            weights = -(vectors @ vectors.mean(0))
        kept = weights.topk(budget).indices.sort().values
        return vectors[kept], torch.full_like(groups, -1).index_copy(0, kept, groups[:budget])
    merged, sizes = vectors, torch.ones(len(vectors), device=vectors.device)
    while len(merged) > budget:
        # One pass over several windows keeps at least 1 in 16, so that each still has tokens that are alike to merge.
        count = budget if len(merged) <= window else max(budget, len(merged) // 16)
        step = _cluster(merged, sizes, [len(merged)], [count], window)
        groups, sizes = step[groups], torch.zeros(count, device=sizes.device).index_add(0, step, sizes)
        merged = _means(vectors, groups, count)
    return merged, groups


def _means(vectors: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the mean of each of `count` groups of vectors, at unit length."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    total = wide.new_zeros(count, wide.shape[1]).index_add(0, groups, wide)
    return normalize(total, dim=-1).to(vectors.dtype)


def _cluster(vectors: Tensor, sizes: Tensor, lengths: list[int], kept: list[int], window: int) -> Tensor:
    """Cluster the vectors of each packed document within windows.

    Args:
        vectors: `(T, k)` unit vectors.
        sizes: `(T,)`, number of tokens that each vector stands for.
        lengths: number of vectors of each document.
        kept: number of clusters to make in each document.
        window: largest number of vectors that are merged with each other.

    Returns:
        `(T,)` int64, the number of the cluster of each vector; clusters are numbered by their first vectors.

    Raises:
        ValueError: `window` is too small for each to keep a vector.
    """
    if window < 2 * MAX_FACTOR:
        raise ValueError(f"token pooling in windows of {window} vectors: give at least {2 * MAX_FACTOR}")
    windows, first = [], 0  # (first row, end, number of clusters)
    for length, clusters in zip(lengths, kept, strict=True):
        count = -(-length // window)
        for number in range(count):
            start, end = length * number // count, length * (number + 1) // count
            # Rounded up, so that the first window has a cluster even if there are no more than windows.
            share = -(-clusters * end // length) - -(-clusters * start // length)
            windows.append((first + start, first + end, share))
        first += length
    roots = torch.arange(len(vectors), device=vectors.device)
    windows.sort(key=lambda each: each[1] - each[0])
    wide = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    while windows:
        longest = windows[-1][1] - windows[-1][0]
        count = max(1, DISTANCES.get(vectors.device.type, 2**22) // longest**2)
        batch, windows = windows[-count:], windows[:-count]
        starts, ends, remaining = (torch.tensor(column, device=vectors.device) for column in zip(*batch, strict=True))
        rows = starts[:, None] + torch.arange(longest, device=vectors.device)
        is_real = rows < ends[:, None]
        rows = torch.where(is_real, rows, starts[:, None])
        merged = ward(wide[rows], sizes[rows] * is_real, remaining)
        roots[rows[is_real]] = (starts[:, None] + merged)[is_real]
    return torch.unique(roots, return_inverse=True)[1]


@torch.no_grad()
def ward(vectors: Tensor, sizes: Tensor, clusters: Tensor) -> Tensor:
    """Cluster the vectors of each window by Ward's method on cosine distances (Ward 1963).

    The cost of merging clusters a and b of n_a and n_b vectors, whose squared distances sum up to S_ab between them and
    to S_aa and S_bb within them, is

        2 n_a n_b / (n_a + n_b) * (S_ab / (n_a n_b) - S_aa / (2 n_a^2) - S_bb / (2 n_b^2))

    which is what the recurrence of Lance and Williams gives. Merging is by mutual nearest neighbours: two clusters that
    are nearest to each other are merged sooner or later whatever else is merged (the linkage is reducible), so all such
    pairs of all windows are merged at once, in some ten rounds; the cheapest merges of a window are those that count.

    Args:
        vectors: `(W, n, k)` unit vectors.
        sizes: `(W, n)`, number of vectors that each stands for; 0 where a window is shorter.
        clusters: `(W,)` int64, number of clusters to make in each window.

    Returns:
        `(W, n)` int64, the first vector of the cluster of each vector.
    """
    windows, length, device = len(vectors), vectors.shape[1], vectors.device
    sizes = sizes.to(vectors.dtype)
    ids = torch.arange(length, device=device).expand(windows, length)
    wanted = (sizes > 0).sum(1) - clusters  # number of merges
    distances = (1 - vectors @ vectors.mT).nan_to_num_(nan=2.0).clamp_(0, 2)
    sums = distances.square_() * (sizes[:, :, None] * sizes[:, None, :])
    sums.diagonal(dim1=1, dim2=2).zero_()
    heights = torch.zeros_like(sizes)  # of the last merge of each cluster
    # Of each vector: at what cost and in which round its cluster went into another, and into which.
    cost_of = torch.full_like(sizes, torch.inf)
    round_of, into = torch.full_like(ids, length), ids.clone()
    bound = torch.where(wanted > 0, torch.inf, -torch.inf)[:, None]
    window = torch.arange(windows, device=device)[:, None]
    for step in range(length):
        within = sums.diagonal(dim1=1, dim2=2) / (2 * sizes.square()).clamp(min=1)
        costs = sums - (sizes[:, :, None] * sizes[:, None, :]) * (within[:, :, None] + within[:, None, :])
        costs *= 2 / (sizes[:, :, None] + sizes[:, None, :]).clamp(min=1)
        costs.masked_fill_((sizes == 0)[:, None, :], torch.inf)
        costs.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        costs = torch.maximum(costs, costs.mT)  # symmetric to the bit, or a pair may not be mutual
        cost, nearest = costs.min(2)
        places = torch.arange(costs.shape[1], device=device)
        is_first = (nearest.gather(1, nearest) == places) & (places < nearest) & (cost <= bound) & cost.isfinite()
        if not is_first.any():
            break
        heights = torch.where(
            is_first, torch.maximum(torch.maximum(cost, heights), heights.gather(1, nearest)), heights
        )
        pair = is_first.nonzero(as_tuple=True)
        removed = ids.gather(1, nearest)[pair]
        cost_of[pair[0], removed], round_of[pair[0], removed] = heights[pair], step
        into[pair[0], removed] = ids[pair]
        ranked = cost_of.sort(1).values.gather(1, (wanted - 1).clamp(min=0)[:, None])
        bound = torch.where(wanted[:, None] > 0, ranked, bound)
        # What is left, each cluster in the place of its first vector; behind it, nothing.
        is_left = sizes > 0
        is_left[pair[0], nearest[pair]] = False
        order = (~is_left).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(is_left.sum(1).max())]
        partner, has_partner = nearest.gather(1, order), is_first.gather(1, order)
        for _ in range(2):  # rows, then columns
            sums = (sums[window, order] + sums[window, partner] * has_partner[:, :, None]).mT
        sizes = sizes.gather(1, order) * is_left.gather(1, order) + sizes.gather(1, partner) * has_partner
        ids, heights = ids.gather(1, order), heights.gather(1, order)
    # The cheapest merges; at equal cost the earlier, for a cluster is made before it goes into another.
    order = round_of.argsort(dim=1, stable=True)
    order = order.gather(1, cost_of.gather(1, order).argsort(dim=1, stable=True))
    counts = torch.arange(length, device=device)[None] < wanted[:, None]
    counts = torch.zeros_like(counts).scatter(1, order, counts)
    ids = torch.arange(length, device=device).expand(windows, length)
    roots = torch.where(counts, into, ids)
    for _ in range(length.bit_length()):
        roots = roots.gather(1, roots)
    return roots
