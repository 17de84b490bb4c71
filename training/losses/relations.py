"""Self-attention distillation: the student relates the tokens of a document to each other as the teacher does.

Every loss here is a Kullback-Leibler divergence of rows of L x L numbers a head. They are computed a tile of rows at a
time, and again in the backward pass, so that of a document's L x L never more than a tile is in memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modeling_longembed.attention_pattern_longembed import AttentionInputs
from modeling_longembed.kernels_longembed import recompute_in_backward

MAX_SCORES = 2**22  # of a tile, all heads together: some ten tensors of this size are there at once
# The scores `(A, Q, L)` of some rows `(Q,)` of a document against all of its tokens.
Scores = Callable[[Tensor], Tensor]


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

    scores = [_attention_scores(inputs) for inputs in (teacher, student)]

    def of_document(number: int, rows: slice) -> tuple[Scores, Scores, Scores]:
        of_teacher, of_student = teacher.places(rows), student.places(rows)

        def visible(row: Tensor) -> Tensor:
            seen = teacher.mask(of_teacher.at(row), of_teacher)
            return seen & student.mask(of_student.at(row), of_student)

        return scores[0](number, rows), scores[1](number, rows), visible

    return _tiled(of_document, teacher.documents.bounds, teacher.query, max_scores)


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

    lengths = [end - start for start, end in bounds]
    of_teacher, of_student = (_by_document(vectors, lengths) for vectors in (teacher.detach(), student))

    def scores(vectors: Tensor) -> Scores:
        return lambda row: vectors[:, row] @ vectors.transpose(1, 2) * vectors.shape[-1] ** -0.5

    def of_document(number: int, rows: slice) -> tuple[Scores, Scores, None]:
        return scores(of_teacher[number]), scores(of_student[number]), None

    return _tiled(of_document, bounds, teacher, max_scores)


def relation_heads(vectors: Tensor, heads: int) -> Tensor:
    """Vectors `(T, H, D)` of attention heads as `(T, heads, H * D / heads)`, whatever the number of attention heads.

    Raises:
        ValueError: `heads` does not divide H * D.
    """
    width = vectors.shape[1] * vectors.shape[2]
    if width % heads:
        raise ValueError(f"{heads} relation heads do not divide a width of {width}")
    return vectors.flatten(1).unflatten(1, (heads, -1))


def _attention_scores(inputs: AttentionInputs) -> Callable[[int, slice], Scores]:
    """Those of a document before the mask, positions and bias in them, as `AttentionInputs.scores` has them."""
    queries, keys = (_by_document(x, [end - start for start, end in inputs.documents.bounds]) for x in inputs[:2])

    def of_document(number: int, rows: slice) -> Scores:
        query, key, grouped = queries[number], keys[number], inputs.grouped and inputs.grouped[rows]
        index = torch.arange(key.shape[1], device=key.device)

        def scores(row: Tensor) -> Tensor:
            values = query[:, row] @ key.transpose(1, 2)
            if grouped is not None:
                values = grouped.merge(values, row, index)
            values = values * inputs.scaling
            return values if inputs.bias is None else values + inputs.bias.dense(query[:, row], row, index)

        return scores

    return of_document


def _by_document(vectors: Tensor, lengths: list[int]) -> list[Tensor]:
    """Packed `(T, A, D)` as `(A, L, D)` of each document, in at least float32: the exponentials of scores need it."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    # `split`, not slices: the backward pass of a slice fills a tensor of all T tokens.
    return [part.transpose(0, 1) for part in wide.split(lengths)]


def _tiled(
    of_document: Callable[[int, slice], tuple[Scores, Scores, Scores | None]],
    bounds: list[tuple[int, int]],
    like: Tensor,
    max_scores: int,
) -> Tensor:
    """`(T,)` divergences, from the teacher's and the student's scores of a document and which of them count."""
    parts = []
    for number, (start, end) in enumerate(bounds):
        length = end - start
        teacher, student, visible = of_document(number, slice(start, end))

        def of_rows(row: Tensor, teacher=teacher, student=student, visible=visible) -> Tensor:
            with torch.autocast(like.device.type, enabled=False):
                with torch.no_grad():
                    of_teacher = teacher(row)
                return _divergence(of_teacher, student(row), None if visible is None else visible(row))

        index = torch.arange(length, device=like.device)
        tile = max(1, max_scores // (like.shape[1] * length))
        parts += [recompute_in_backward(of_rows, row) for row in index.split(tile)]
    return torch.cat(parts) if parts else like.new_zeros(0)


def _divergence(teacher: Tensor, student: Tensor, visible: Tensor | None) -> Tensor:
    """KL of the softmax of scores `(A, Q, K)`, the mean over the heads: `(Q,)`; `visible` broadcasts against them."""
    if visible is not None:
        # Finite, so that the difference of two logarithms that do not count is a number, which is then times zero.
        teacher, student = (x.masked_fill(~visible, torch.finfo(x.dtype).min) for x in (teacher, student))
    log_teacher, log_student = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1).mean(dim=0)
