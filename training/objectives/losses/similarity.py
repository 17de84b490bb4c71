"""The score matrix of the softmax losses: dot products of vectors, or MaxSim of token vectors."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from modeling_longembed.output_maxsim_longembed import maxsim, maxsim_pairs
from training.objectives.losses.token_vectors import TokenVectors, concatenate

Texts = TypeVar("Texts", Tensor, TokenVectors)  # one vector a text `(n, d)`, or one a token


def similarity(rows: Texts, columns: Texts, temperature: float | Tensor) -> Tensor:
    """Return dot products, or MaxSim scores of token vectors, divided by a temperature, in at least float32.

    MaxSim (Khattab and Zaharia 2020, arXiv:2004.12832, section 3.3) is the sum over the tokens of a row of the largest
    dot product with a token of the column, so rows are queries and columns are documents.

    In half precision, or under autocast, a score of 20 is off by 0.06 and its exponential by 6 %.

    Args:
        rows: `(n, d)`, or n texts as token vectors.
        columns: `(m, d)`, or m texts as token vectors.
        temperature: a number, or a scalar tensor that is trained.

    Returns:
        `(n, m)` scores.

    Examples:
        >>> import torch
        >>> similarity(torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]]), temperature=0.5)
        tensor([[2.0000, 1.2000],
                [0.0000, 1.6000]])
    """
    if isinstance(rows, TokenVectors):
        assert isinstance(columns, TokenVectors)
        return maxsim(*rows.packed(), *columns.packed()) / temperature
    with torch.autocast(rows.device.type, enabled=False):
        return _wide(rows) @ _wide(columns).T / temperature


def similarity_of_candidates(query: Texts, candidates: Texts) -> Tensor:
    """Return the scores of the candidates of each query, in at least float32.

    Args:
        query: `(n, d)`, or n texts as token vectors.
        candidates: `(n, m, d)`, or `(n, m)` texts as token vectors.

    Returns:
        `(n, m)` scores: dot products or MaxSim.

    Examples:
        >>> import torch
        >>> similarity_of_candidates(torch.eye(2), torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [0.8, 0.6]]]))
        tensor([[1.0000, 0.6000],
                [1.0000, 0.6000]])
    """
    if isinstance(query, TokenVectors):
        assert isinstance(candidates, TokenVectors)
        return maxsim_pairs(*query.packed(), *candidates.packed())
    return (_wide(query)[:, None] * _wide(candidates)).sum(-1)


def in_one(texts: Sequence[Texts]) -> Texts:
    """Return texts one after another.

    Examples:
        >>> import torch
        >>> in_one([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
        tensor([[1., 0.],
                [0., 1.]])
    """
    if isinstance(texts[0], TokenVectors):
        return concatenate(texts)
    return torch.cat(tuple(texts))


def _wide(vectors: Tensor) -> Tensor:
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))
