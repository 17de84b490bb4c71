"""InfoNCE against cross entropy, sentence-transformers and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from training.losses.contrastive import info_nce

pytestmark = pytest.mark.promise("C1")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def published_loss(query, positive, negative, temperature, symmetric):
    """sentence-transformers' loss of ready embeddings; its constructor wants a model that it then does not use."""
    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    loss = MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=1 / temperature, directions=directions, partition_mode="per_direction"
    )
    columns = [query, positive] + ([] if negative is None else list(negative.split(len(query))))
    return loss.compute_loss_from_embeddings(columns, labels=None)


@given(
    pairs=st.integers(1, 9),
    negatives=st.integers(0, 3),
    temperature=st.floats(0.01, 2.0),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_sentence_transformers(pairs, negatives, temperature, symmetric, seed):
    query, positive = unit(pairs, 8, seed=seed), unit(pairs, 8, seed=seed + 100)
    negative = unit(pairs * negatives, 8, seed=seed + 200) if negatives else None
    ours, _ = info_nce(query, positive, negative, temperature=temperature, symmetric=symmetric)
    theirs = published_loss(query, positive, negative, temperature, symmetric)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_equals_cross_entropy_and_its_accuracy():
    query, positive = unit(7, 8), unit(7, 8, seed=1)
    scores = query @ positive.T / 0.05
    loss, metrics = info_nce(query, positive)
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.arange(7)), atol=1e-12, rtol=0)
    assert metrics["accuracy"] == (scores.argmax(1) == torch.arange(7)).double().mean()


def test_is_ln_of_the_columns_when_all_vectors_are_equal():
    same = unit(1, 8).expand(6, 8)
    assert math.isclose(info_nce(same, same)[0].item(), math.log(6), abs_tol=1e-12)
    assert math.isclose(info_nce(same, same, same)[0].item(), math.log(12), abs_tol=1e-12)


def test_gradient_is_the_closed_form():
    temperature, query, positive = 0.1, unit(5, 8), unit(5, 8, seed=1).requires_grad_()
    info_nce(query, positive, temperature=temperature)[0].backward()
    p = (query @ positive.detach().T / temperature).softmax(dim=1)
    expected = (p - torch.eye(5)).T @ query / (5 * temperature)
    torch.testing.assert_close(positive.grad, expected, atol=1e-12, rtol=0)


def test_does_not_change_under_rotation_and_under_permutation_of_pairs():
    query, positive, negative = unit(6, 8), unit(6, 8, seed=1), unit(12, 8, seed=2)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    order = torch.randperm(6)
    loss, _ = info_nce(query, positive, negative, symmetric=True)
    rotated, _ = info_nce(query @ rotation, positive @ rotation, negative @ rotation, symmetric=True)
    permuted, _ = info_nce(query[order], positive[order], negative[torch.randperm(12)], symmetric=True)
    torch.testing.assert_close(rotated, loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(permuted, loss, atol=1e-12, rtol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_all_processes_average_to_the_whole(symmetric):
    query, positive, negative = unit(6, 8), unit(6, 8, seed=1), unit(6, 8, seed=2)
    whole, _ = info_nce(query, positive, negative, symmetric=symmetric)
    parts = [
        info_nce(query, positive, negative, symmetric=symmetric, rows=rows)[0] for rows in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole, atol=1e-12, rtol=0)


def test_equal_texts_are_no_negatives_of_each_other():
    # Pair 3 repeats the positive of pair 0, pair 4 the query of pair 1, negative 2 is the positive of pair 2.
    query, positive, negative = unit(5, 8), unit(5, 8, seed=1), unit(5, 8, seed=2)
    query_id = torch.tensor([0, 1, 2, 3, 1])
    positive_id = torch.tensor([10, 11, 12, 10, 14])
    negative_id = torch.tensor([20, 21, 12, 23, 24])
    scores = torch.cat([query @ positive.T, query @ negative.T], dim=1) / 0.05
    left_out = {0: [3], 1: [4], 2: [7], 3: [0], 4: [1]}
    expected = torch.stack(
        [
            scores[row, [c for c in range(10) if c not in left_out[row]]].logsumexp(0) - scores[row, row]
            for row in range(5)
        ]
    ).mean()
    ids = {"query_id": query_id, "positive_id": positive_id, "negative_id": negative_id}
    torch.testing.assert_close(info_nce(query, positive, negative, **ids)[0], expected, atol=1e-12, rtol=0)

    back = positive @ query.T / 0.05
    kept = [[c for c in range(5) if c not in left_out[row]] for row in range(5)]
    other_way = torch.stack([back[row, kept[row]].logsumexp(0) - back[row, row] for row in range(5)]).mean()
    both, _ = info_nce(query, positive, negative, symmetric=True, **ids)
    torch.testing.assert_close(both, (expected + other_way) / 2, atol=1e-12, rtol=0)
