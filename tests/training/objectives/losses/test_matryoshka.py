"""Matryoshka against sentence-transformers' and the plain loss."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss

from tests.training.tiny_training import unit
from training.objectives.losses.contrastive import info_nce
from training.objectives.losses.matryoshka import matryoshka
from training.objectives.losses.vicreg import vicreg

pytestmark = pytest.mark.promise("C10")


def published_loss(columns, dims, weights):
    """sentence-transformers' Matryoshka loss of given embeddings; only its cached loss can be called with them."""
    model = torch.nn.Sequential(torch.nn.Identity())
    model.get_embedding_dimension = lambda: columns[0].shape[1]
    inner = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=64)
    MatryoshkaLoss(model, inner, dims, weights)
    with torch.no_grad():
        return inner.calculate_loss([[column] for column in columns])


@given(
    pairs=st.integers(1, 7),
    dims=st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 99),
)
def test_equals_sentence_transformers(pairs, dims, seed):
    columns = [unit(pairs, 12, seed=seed + number) for number in range(2)]
    weights = [0.5 + number for number in range(len(dims))]
    loss, metrics = matryoshka(info_nce, dims, weights)(*columns)
    torch.testing.assert_close(loss, published_loss(columns, dims, weights), atol=1e-12, rtol=1e-12)
    assert {f"loss_at_{dim}" for dim in dims} | {"accuracy"} == metrics.keys()


def test_of_the_whole_width_is_the_plain_loss():
    query, positive = unit(6, 12), unit(6, 12, seed=1)
    (loss, metrics), (plain, plain_metrics) = matryoshka(info_nce, [12])(query, positive), info_nce(query, positive)
    torch.testing.assert_close(loss, plain, atol=0, rtol=0)
    assert metrics == plain_metrics | {"loss_at_12": plain}


def test_no_gradient_beyond_the_widest():
    query, positive = unit(6, 12).requires_grad_(), unit(6, 12, seed=1)
    matryoshka(info_nce, [3, 8])(query, positive)[0].backward()
    assert (query.grad[:, 8:] == 0).all()
    assert (query.grad[:, :8] != 0).any(dim=0).all()


def test_metrics_are_those_of_the_widest():
    query = unit(6, 12)
    positive = F.normalize(
        query * torch.tensor([-1.0] * 2 + [1.0] * 10), dim=-1
    )  # the first two dimensions are misleading
    _, metrics = matryoshka(info_nce, [2, 12])(query, positive)
    assert (
        metrics["accuracy"]
        == info_nce(query, positive)[1]["accuracy"]
        != info_nce(*(F.normalize(rows[:, :2], dim=-1) for rows in (query, positive)))[1]["accuracy"]
    )


def test_without_lengths_the_embeddings_are_only_cut():
    first, second = 3 * unit(6, 12), 3 * unit(6, 12, seed=1)
    loss, _ = matryoshka(vicreg, [4, 12], [0.5, 1.0], normalize=False)(first, second)
    expected = vicreg(first, second)[0] + 0.5 * vicreg(first[:, :4], second[:, :4])[0]
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dims", "weights"), [([], None), ([0, 4], None), ([4, 8], [1.0])])
def test_invalid_dims_are_refused(dims, weights):
    with pytest.raises(ValueError, match="dims"):
        matryoshka(info_nce, dims, weights)


def test_a_dim_that_the_embeddings_do_not_have_is_refused():
    with pytest.raises(ValueError, match="12 dimensions, fewer than 13"):
        matryoshka(info_nce, [13])(unit(2, 12), unit(2, 12))
