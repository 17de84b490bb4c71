"""Self-attention distillation: the student relates the tokens of a document to each other as the teacher does.

Every loss here is a Kullback-Leibler divergence of rows of L x L numbers a head. They are computed a tile of rows at a
time, and again in the backward pass, so that of a document's L x L never more than a tile is in memory.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeling_longembed.pattern_base_longembed import AttentionInputs

MAX_SCORES = 2**22  # of a tile, all heads together: some seven tensors of this size are there at once
# The scores `(A, Q, L)` of some rows `(Q,)` of a document, given by its number, against all of its tokens.
Scores = Callable[[int, Tensor], Tensor]


def attention_kl(teacher: AttentionInputs, student: AttentionInputs, max_scores: int = MAX_SCORES) -> Tensor:
    """How far the student's attention is from the teacher's (MiniLM: Wang et al. 2020, arXiv:2002.10957, section 3.1).

        KL_i = 1/A sum_a sum_j T_aij log(T_aij / S_aij),    T, S = softmax(q_i . k_j / sqrt(D) + bias)

    over the keys j that query i sees in both models: where their patterns differ, a key that one of the two does not
    see has no probability to be compared. Positions and biases are in the scores of each as its own scheme has them.

    Args:
        teacher, student: what the attention of a sublayer reads of the same T packed tokens; the heads are as many, the
            head sizes need not be the same. The teacher gets no gradient.
        max_scores: elements of a tile.

    Returns:
        `(T,)`, the mean over the heads of each token; 0 where a query sees no key in both.

    Raises:
        ValueError: other numbers of heads.
    """
    if teacher.query.shape[1] != student.query.shape[1]:
        raise ValueError(
            f"the teacher has {teacher.query.shape[1]} attention heads, the student {student.query.shape[1]}"
        )

    bounds = teacher.documents.bounds
    boundary = _Boundary()

    def visible(number: int, row: Tensor) -> Tensor:
        rows = slice(*bounds[number])
        of_teacher, of_student = teacher.places(rows), student.places(rows)
        return teacher.mask(of_teacher.at(row), of_teacher) & student.mask(of_student.at(row), of_student)

    scores = _attention_scores(teacher, _Boundary()), _attention_scores(student, boundary)
    return _tiled(*scores, visible, boundary, bounds, teacher.query, max_scores)


def relation_kl(
    teacher: Tensor, student: Tensor, bounds: list[tuple[int, int]], max_scores: int = MAX_SCORES
) -> Tensor:
    """How far the student's relations of vectors are from the teacher's: value relations of MiniLM (Wang et al. 2020,
    arXiv:2002.10957, section 3.2), query, key and value relations of MiniLMv2 (Wang et al. 2021, arXiv:2012.15828,
    section 3.1).

        KL_i = 1/A sum_a sum_j T_aij log(T_aij / S_aij),    R_aij = softmax_j(x_ai . x_aj / sqrt(D of the model))

    over the tokens j of the document of token i.

    Args:
        teacher: `(T, A, Dt)` queries, keys or values of packed tokens, split into A relation heads; gets no gradient.
        student: `(T, A, Ds)`.
        bounds: first and one-past-last row of each document.
        max_scores: elements of a tile.

    Returns:
        `(T,)`, the mean over the relation heads of each token.
    """

    boundary = _Boundary()

    def scores(vectors: list[Tensor]) -> Scores:
        return lambda number, row: (
            vectors[number][:, row] @ vectors[number].transpose(1, 2) * vectors[number].shape[-1] ** -0.5
        )

    of_student = boundary.cut(_by_document(student, bounds))
    return _tiled(
        scores(_by_document(teacher, bounds)), scores(of_student), None, boundary, bounds, teacher, max_scores
    )


def relation_heads(vectors: Tensor, heads: int) -> Tensor:
    """Vectors `(T, H, D)` of attention heads as `(T, heads, H * D / heads)`, whatever the number of attention heads.

    Raises:
        ValueError: `heads` does not divide H * D.
    """
    width = vectors.shape[1] * vectors.shape[2]
    if width % heads:
        raise ValueError(f"{heads} relation heads do not divide a width of {width}")
    return vectors.flatten(1).unflatten(1, (heads, -1))


class _Boundary:
    """Where the graph that leads to the student's scores is cut: the tensors on both sides.

    A checkpoint a tile would do the same, but leaves something small behind for each of them, between which the memory
    of the tiles is lost to the allocator: gigabytes for a document of 4,096 tokens on a CPU.
    """

    def __init__(self) -> None:
        self.outside: list[Tensor] = []
        self.inside: list[Tensor] = []

    def cut(self, tensors: list[Tensor]) -> list[Tensor]:
        """The same numbers, whose gradient stays with them."""
        inside = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        pairs = [pair for pair in zip(tensors, inside, strict=True) if pair[0].requires_grad]
        self.outside += [tensor for tensor, _ in pairs]
        self.inside += [tensor for _, tensor in pairs]
        return inside

    def cut_attributes(self, of: Any) -> Any:
        """A copy of an object, such as a bias, whose tensors are cut, and wide enough for scores."""
        if of is None:
            return None
        inner = copy.copy(of)
        names = [name for name, value in vars(of).items() if isinstance(value, Tensor) and value.is_floating_point()]
        for name, tensor in zip(names, self.cut([_wide(getattr(of, name)) for name in names]), strict=True):
            object.__setattr__(inner, name, tensor)
        return inner


def _attention_scores(inputs: AttentionInputs, boundary: _Boundary) -> Scores:
    """Those before the mask, positions and bias in them, as `AttentionInputs.scores` has them."""
    bounds = inputs.documents.bounds
    queries, keys = (boundary.cut(_by_document(vectors, bounds)) for vectors in inputs[:2])
    groups = [boundary.cut_attributes(inputs.grouped and inputs.grouped[slice(*rows)]) for rows in bounds]
    bias = boundary.cut_attributes(inputs.bias)

    def scores(number: int, row: Tensor) -> Tensor:
        query, key = queries[number][:, row], keys[number]
        index = torch.arange(key.shape[1], device=key.device)
        values = query @ key.transpose(1, 2)
        if groups[number] is not None:
            values = groups[number].merge(values, row, index)
        values = values * inputs.scaling
        return values if bias is None else values + bias.dense(query, row, index)

    return scores


def _by_document(vectors: Tensor, bounds: list[tuple[int, int]]) -> list[Tensor]:
    """Packed `(T, A, D)` as `(A, L, D)` of each document, wide enough for scores."""
    # `split`, not slices: the backward pass of a slice fills a tensor of all T tokens.
    return [part.transpose(0, 1) for part in _wide(vectors).split([end - start for start, end in bounds])]


def _wide(tensor: Tensor) -> Tensor:
    """In at least float32: the exponentials of scores need it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _tiled(
    teacher: Scores,
    student: Scores,
    visible: Scores | None,
    boundary: _Boundary,
    bounds: list[tuple[int, int]],
    like: Tensor,
    max_scores: int,
) -> Tensor:
    """`(T,)` divergences, from the teacher's and the student's scores of a document and which of them count."""
    tiles = []
    for number, (start, end) in enumerate(bounds):
        rows = max(1, max_scores // (like.shape[1] * (end - start)))
        tiles += [(number, first, min(first + rows, end - start)) for first in range(0, end - start, rows)]

    def divergence(number: int, first: int, stop: int) -> Tensor:
        row = torch.arange(first, stop, device=like.device)
        with torch.autocast(like.device.type, enabled=False):
            with torch.no_grad():
                of_teacher = teacher(number, row)
            return _divergence(of_teacher, student(number, row), None if visible is None else visible(number, row))

    places = [slice(bounds[number][0] + first, bounds[number][0] + stop) for number, first, stop in tiles]
    dtype = torch.promote_types(like.dtype, torch.float32)
    empty = torch.empty(0, dtype=dtype, device=like.device)
    return _Tiles.apply(divergence, list(zip(tiles, places, strict=True)), empty, boundary.inside, *boundary.outside)


class _Tiles(torch.autograd.Function):
    """Tile after tile in both passes; the backward pass computes each again and leaves nothing behind but gradients."""

    @staticmethod
    def forward(ctx: Any, divergence: Callable, tiles: list, empty: Tensor, inside: list[Tensor], *outside: Tensor):
        ctx.divergence, ctx.tiles, ctx.inside = divergence, tiles, inside
        result = empty.new_zeros(sum(places.stop - places.start for _, places in tiles))
        for tile, places in tiles:
            result[places] = divergence(*tile)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        (gradient,) = gradients
        for tile, places in ctx.tiles:
            with torch.enable_grad():
                value = ctx.divergence(*tile)
            torch.autograd.backward(value, gradient[places], inputs=ctx.inside)
        found = [tensor.grad for tensor in ctx.inside]
        for tensor in ctx.inside:
            tensor.grad = None
        return None, None, None, None, *found


def _divergence(teacher: Tensor, student: Tensor, visible: Tensor | None) -> Tensor:
    """KL of the softmax of scores `(A, Q, K)`, the mean over the heads: `(Q,)`; `visible` broadcasts against them."""
    if visible is not None:
        # Finite, so that the difference of two logarithms that do not count is a number, which is then times zero.
        teacher, student = (x.masked_fill(~visible, torch.finfo(x.dtype).min) for x in (teacher, student))
    log_teacher, log_student = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1).mean(dim=0)
