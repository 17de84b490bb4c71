"""VICReg against the authors' code, pytorch-metric-learning and closed forms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.losses import VICRegLoss

from common.errors import UserError
from training.objectives.losses.vicreg import vicreg

pytestmark = pytest.mark.promise("C7")


def views(count: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, dim, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3.0, dim)
    return first, first + 0.3 * torch.randn(count, dim, generator=generator, dtype=torch.float64)


def whitened(count: int, dim: int) -> torch.Tensor:
    """Columns of mean 0, variance 1 and no covariance."""
    centred = views(count, dim)[0]
    centred = centred - centred.mean(0)
    return torch.linalg.qr(centred)[0] * (count - 1) ** 0.5


@given(count=st.integers(2, 9), dim=st.integers(1, 6), seed=st.integers(0, 99))
def test_equals_the_authors_formula(count, dim, seed):
    """As in their main_vicreg.py: elements off the diagonal, torch.var, half the variance term a view."""
    x, y = views(count, dim, seed)

    def off_diagonal(matrix):
        return matrix[~torch.eye(len(matrix), dtype=torch.bool)]

    std_loss = sum(torch.mean(F.relu(1 - torch.sqrt(z.var(dim=0) + 0.0001))) / 2 for z in (x, y))
    cov_loss = sum(off_diagonal(torch.cov(z.T).reshape(dim, dim)).pow(2).sum() / dim for z in (x, y))
    loss, terms = vicreg(x, y)
    expected = 25 * F.mse_loss(x, y) + 25 * std_loss + cov_loss
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(terms["variance"], std_loss, atol=1e-9, rtol=0)
    torch.testing.assert_close(terms["covariance"], cov_loss, atol=1e-9, rtol=1e-9)


def test_equals_pytorch_metric_learning():
    x, y = views(7, 5)
    published = VICRegLoss(invariance_lambda=3, variance_mu=5, covariance_v=2, eps=1e-3)(x, ref_emb=y)
    loss, _ = vicreg(x, y, invariance_weight=3, variance_weight=5, covariance_weight=2, epsilon=1e-3)
    torch.testing.assert_close(loss, published, atol=1e-9, rtol=0)


def test_is_zero_for_one_whitened_view():
    z = whitened(12, 5)
    loss, terms = vicreg(z, z, epsilon=1e-12)
    assert abs(loss.item()) < 1e-9
    assert all(abs(term.item()) < 1e-9 for term in terms.values())


def test_constant_vectors_have_the_largest_variance_term():
    same = torch.full((6, 5), 0.7, dtype=torch.float64)
    loss, _ = vicreg(same, same)
    assert loss.item() == pytest.approx(25 * (1 - 1e-4**0.5), abs=1e-9)  # 24.75


def test_the_variance_term_does_not_pull_where_the_standard_deviation_is_above_one():
    z = (2 * whitened(12, 5)).requires_grad_()
    vicreg(z, z, covariance_weight=0)[0].backward()
    torch.testing.assert_close(z.grad, torch.zeros_like(z), atol=1e-12, rtol=0)


def test_one_pair_has_no_variance():
    with pytest.raises(UserError, match="single pair"):
        vicreg(torch.zeros(1, 4), torch.zeros(1, 4))


def test_half_precision_is_computed_in_full():
    x, y = (z.bfloat16() for z in views(9, 5))
    exact, _ = vicreg(x.double(), y.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = vicreg(x, y)
    torch.testing.assert_close(loss.double(), exact, atol=0, rtol=1e-5)
