"""Spread-out regularisation against sentence-transformers', debiasing against kernels and a linear probe."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss
from sklearn.linear_model import LogisticRegression

from tests.training.tiny_training import unit
from training.objectives.losses.regularizers import debias, spread_out


@given(rows=st.integers(1, 12), dim=st.integers(1, 8), seed=st.integers(0, 99))
def test_spread_out_equals_sentence_transformers(rows, dim, seed):
    embeddings = unit(rows, dim, seed=seed)
    published = GlobalOrthogonalRegularizationLoss(torch.nn.Sequential(torch.nn.Identity()))
    terms = published.compute_loss_from_embeddings([embeddings])
    loss, _ = spread_out(embeddings)
    torch.testing.assert_close(loss, terms["gor_mean"] + terms["gor_second_moment"], atol=1e-12, rtol=1e-12)


def test_spread_out_is_largest_for_one_vector_and_zero_for_orthogonal_ones():
    loss, metrics = spread_out(unit(1, 8).expand(6, 8))
    torch.testing.assert_close(loss, torch.tensor(1 + 1 - 1 / 8, dtype=torch.float64), atol=1e-12, rtol=0)
    assert metrics["similarity_mean"] == pytest.approx(1)
    assert spread_out(torch.eye(8, dtype=torch.float64))[0] == 0


@given(groups=st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(lambda g: len(set(g)) > 1))
def test_debias_is_the_independence_criterion_with_linear_kernels(groups):
    """Gretton et al. 2005: tr(K H L H) / (n - 1)^2, on the matrices of the documents instead of the dimensions."""
    embeddings, attribute = unit(len(groups), 5), torch.tensor(groups)
    kernel = embeddings @ embeddings.T
    same = (attribute[:, None] == attribute).double()
    centre = torch.eye(len(groups), dtype=torch.float64) - 1 / len(groups)
    expected = (kernel @ centre @ same @ centre).trace() / (len(groups) - 1) ** 2
    loss, metrics = debias(embeddings, attribute)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    assert metrics["groups_in_batch"] == len(set(groups))


def test_debias_leaves_out_what_is_not_known_and_needs_two_groups():
    embeddings = unit(6, 5).requires_grad_()
    attribute = torch.tensor([2, -1, 0, 0, -1, 2])
    known = attribute >= 0
    torch.testing.assert_close(debias(embeddings, attribute)[0], debias(embeddings[known], attribute[known])[0])
    for nothing_to_tell in (torch.full((6,), 3), torch.full((6,), -1)):
        loss, _ = debias(embeddings, nothing_to_tell)
        loss.backward()
        assert loss == 0
        assert (embeddings.grad == 0).all()


def test_a_linear_probe_learns_nothing_where_debias_is_zero():
    generator = torch.Generator().manual_seed(0)
    attribute = torch.arange(400) % 2
    planted = torch.randn(400, 6, generator=generator, dtype=torch.float64) + attribute[:, None]
    projection = torch.eye(6, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([projection], lr=0.05)
    first = debias(planted @ projection, attribute)[0].item()
    for _ in range(200):
        optimizer.zero_grad()
        loss, _ = debias(planted @ projection, attribute)
        loss.backward()
        optimizer.step()
    assert loss < 1e-6 * first

    def probe(rows: torch.Tensor) -> float:
        # Scaled, so that the probe's own regularisation does not decide.
        rows = rows.detach() / rows.detach().std()
        return LogisticRegression().fit(rows, attribute).score(rows, attribute)

    assert probe(planted) > 0.8
    assert probe(planted @ projection) < 0.55
    assert (planted @ projection).std() > 0.1  # not by collapse
