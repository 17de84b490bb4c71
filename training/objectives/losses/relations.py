"""Self-attention distillation: the student relates the tokens of a document to each other as the teacher does.

Every loss here is a Kullback-Leibler divergence between rows of an L x L matrix for each head. The rows are computed in
tiles, and again in the backward pass, so that no more than a tile of a document's L x L matrices is in memory.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeling_longembed.pattern_base_longembed import AttentionInputs

MAX_SCORES = 2**22  # elements of a tile, all heads together; about seven tensors of this size exist at once
# From the number of a document and some of its rows `(Q,)` to their scores `(A, Q, L)` against all of its tokens.
Scores = Callable[[int, Tensor], Tensor]


def attention_kl(teacher: AttentionInputs, student: AttentionInputs, max_scores: int = MAX_SCORES) -> Tensor:
    """Compute the divergence of the student's attention distributions from the teacher's, for each token.

        KL_i = 1/A sum_a sum_j T_aij log(T_aij / S_aij),    T, S = softmax(q_i . k_j / sqrt(D) + bias)

    The sum runs over the keys j that query i sees in both models: where their attention patterns differ, a key that
    only one of them sees has no probability to compare with. Positions and biases enter the scores of each model as its
    own scheme defines them.

    Source: MiniLM (Wang et al. 2020, arXiv:2002.10957, section 3.1), with `relation_kl` of the values as its second
    term.

    When to use it: teacher and student have the same number of attention heads, and plain masks as attention patterns.
    Otherwise use `relation_kl` of queries, keys and values.

    Related losses: `relation_kl`; `soft_targets` is the same divergence for classes.

    Args:
        teacher: inputs of an attention sublayer for T packed tokens, in A heads; it gets no gradient.
        student: inputs for the same tokens, in as many heads; the size of a head may differ.
        max_scores: number of elements of a tile, all heads together.

    Returns:
        `(T,)`, the mean over the heads for each token; 0 where a query sees no key in both models.

    Raises:
        ValueError: the numbers of heads differ.

    Examples:
        >>> import torch
        >>> from modeling_longembed import LongEmbedConfig, LongEmbedModel
        >>> from training.teachers.projections import ProjectionTap
        >>> config = LongEmbedConfig(
        ...     vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        ... )
        >>> model = LongEmbedModel(config).eval()
        >>> tap = ProjectionTap(model)
        >>> _ = model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.long))
        >>> attention = tap.take().attention
        >>> attention_kl(attention, attention).abs().max().item()
        0.0
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
    """Compute the divergence of the student's relations between token vectors from the teacher's, for each token.

        KL_i = 1/A sum_a sum_j R_aij log(R_aij / S_aij),    R, S = softmax_j(x_ai . x_aj / sqrt(D))

    R is of the teacher's and S of the student's vectors x, each with its own head size D; the sum runs over the tokens
    j of the document of token i.

    Source: value relations of MiniLM (Wang et al. 2020, arXiv:2002.10957, section 3.2); query, key and value relations
    of MiniLMv2 (Wang et al. 2021, arXiv:2012.15828, section 3.1, with 48 relation heads for base-size teachers).

    When to use it: students of another width or another number of heads (with `relation_heads`), and attention patterns
    that are more than a mask. Queries and keys are compared before any rotation: the relations do not see positions.

    Related losses: `attention_kl`, which compares queries with keys and so does see positions.

    Args:
        teacher: `(T, A, Dt)`, queries, keys or values of packed tokens in A relation heads; they get no gradient.
        student: `(T, A, Ds)`.
        bounds: first row and row behind the last one, for each document.
        max_scores: number of elements of a tile, all heads together.

    Returns:
        `(T,)`, the mean over the relation heads for each token.

    Examples:
        >>> import torch
        >>> teacher = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
        >>> rotated = teacher.flip(-1)  # products of vectors do not change under a rotation or a reflection
        >>> relation_kl(teacher, rotated, bounds=[(0, 3), (3, 5)]).abs().max().item() < 1e-6
        True
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
    """Return vectors `(T, H, D)` of H attention heads as `(T, heads, H * D / heads)`.

    Source: MiniLMv2 (Wang et al. 2021, arXiv:2012.15828, section 3.1): teacher and student are split into the same
    number of relation heads, whatever their numbers of attention heads.

    Args:
        vectors: `(T, H, D)`.
        heads: number of relation heads.

    Returns:
        The same numbers in another shape.

    Raises:
        ValueError: `heads` does not divide H * D.

    Examples:
        >>> import torch
        >>> relation_heads(torch.zeros(5, 2, 6), heads=3).shape
        torch.Size([5, 3, 4])
    """
    width = vectors.shape[1] * vectors.shape[2]
    if width % heads:
        raise ValueError(f"{heads} relation heads do not divide a width of {width}")
    return vectors.flatten(1).unflatten(1, (heads, -1))


class _Boundary:
    """The tensors on both sides of the place where the graph of the student's scores is cut.

    Checkpointing each tile would compute the same, but leaves small tensors behind for each tile. They fragment the
    memory of the allocator: gigabytes are lost for a document of 4,096 tokens on a CPU.
    """

    def __init__(self) -> None:
        self.outside: list[Tensor] = []
        self.inside: list[Tensor] = []

    def cut(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return copies of the tensors that collect their own gradients."""
        inside = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        pairs = [pair for pair in zip(tensors, inside, strict=True) if pair[0].requires_grad]
        self.outside += [tensor for tensor, _ in pairs]
        self.inside += [tensor for _, tensor in pairs]
        return inside

    def cut_attributes(self, of: Any) -> Any:
        """Return a copy of an object, such as a bias, whose floating-point tensors are cut and at least float32."""
        if of is None:
            return None
        inner = copy.copy(of)
        names = [name for name, value in vars(of).items() if isinstance(value, Tensor) and value.is_floating_point()]
        for name, tensor in zip(names, self.cut([_wide(getattr(of, name)) for name in names]), strict=True):
            object.__setattr__(inner, name, tensor)
        return inner


def _attention_scores(inputs: AttentionInputs, boundary: _Boundary) -> Scores:
    """Return the scores before the mask, with positions and bias, as `AttentionInputs.scores` computes them."""
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
    """Split packed `(T, A, D)` into `(A, L, D)` for each document, in at least float32."""
    # `split` instead of slices: the backward pass of each slice would fill a tensor of all T tokens.
    return [part.transpose(0, 1) for part in _wide(vectors).split([end - start for start, end in bounds])]


def _wide(tensor: Tensor) -> Tensor:
    """Convert to at least float32, which the exponentials of scores need."""
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
    """Compute the divergences `(T,)` of two score functions in tiles of rows; `visible` masks the scores of both."""
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
    """Compute tile after tile in both passes; the backward pass recomputes each tile and keeps only gradients."""

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
    """Return the KL divergence of softmax rows of scores `(A, Q, K)`, averaged over the heads, `(Q,)`."""
    if visible is not None:
        # A finite minimum: the difference of two masked logarithms must be a number before it is multiplied by 0.
        teacher, student = (x.masked_fill(~visible, torch.finfo(x.dtype).min) for x in (teacher, student))
    log_teacher, log_student = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1).mean(dim=0)
