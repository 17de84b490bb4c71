"""DCCA against NumPy's and scikit-learn's canonical correlations; soft CCA against the recursion and closed forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cross_decomposition import CCA

from common.errors import UserError
from training.objectives.losses.correlation import SoftCCA, dcca


def views(count: int, first: int, second: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, first, generator=generator, dtype=torch.float64)
    y = torch.randn(count, second, generator=generator, dtype=torch.float64)
    shared = min(first, second)
    y[:, :shared] += x[:, :shared] * torch.linspace(2.0, 0.2, shared, dtype=torch.float64)
    return x, y @ torch.randn(second, second, generator=generator, dtype=torch.float64)


def canonical_correlations(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """Of the orthonormal bases of the centred views (Bjorck and Golub 1973)."""
    bases = [np.linalg.qr(view.numpy() - view.numpy().mean(0))[0] for view in (x, y)]
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)


@pytest.mark.promise("D7")
@pytest.mark.parametrize(("first", "second"), [(4, 4), (3, 6), (6, 2)])
@pytest.mark.parametrize("components", [None, 2])
def test_equals_numpys_canonical_correlations(first, second, components):
    x, y = views(50, first, second)
    expected = canonical_correlations(x, y)[:components]
    loss, metrics = dcca(x, y, regularization=0.0, components=components)
    assert loss.item() == pytest.approx(-expected.sum(), abs=1e-9)
    assert metrics["correlation"].item() == pytest.approx(expected.mean(), abs=1e-9)


@pytest.mark.promise("D7")
@pytest.mark.parametrize("regularization", [1e-3, 0.3])
def test_the_regularization_is_added_to_the_variances(regularization):
    """The squares of the correlations are the eigenvalues of (S11 + rI)^-1 S12 (S22 + rI)^-1 S21."""
    x, y = views(50, 3, 4)
    covariance = np.cov(x.numpy(), y.numpy(), rowvar=False)
    first, second = (covariance[part, part] for part in (slice(0, 3), slice(3, 7)))
    first, second = (own + regularization * np.eye(len(own)) for own in (first, second))
    product = np.linalg.solve(first, covariance[:3, 3:]) @ np.linalg.solve(second, covariance[3:, :3])
    expected = -np.sqrt(np.linalg.eigvals(product).real).sum()
    assert dcca(x, y, regularization=regularization)[0].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.promise("D7")
def test_equals_scikit_learn():
    x, y = views(200, 4, 5)
    a, b = CCA(n_components=1, max_iter=5000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    expected = np.corrcoef(a[:, 0], b[:, 0])[0, 1]
    assert -dcca(x, y, regularization=0.0, components=1)[0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.promise("D7")
def test_affine_maps_change_nothing_and_identical_views_correlate_in_all_dimensions():
    x, y = views(40, 4, 5)
    maps = [torch.randn(n, n, dtype=torch.float64) + 3 * torch.eye(n) for n in (4, 5)]
    mapped = dcca(x @ maps[0] + 7, y @ maps[1] - 2, regularization=0.0)[0]
    torch.testing.assert_close(mapped, dcca(x, y, regularization=0.0)[0], atol=1e-9, rtol=0)
    assert dcca(x, x @ maps[0], regularization=0.0)[0].item() == pytest.approx(-4, abs=1e-9)


@pytest.mark.promise("D7")
def test_the_gradient_is_that_of_finite_differences():
    x, y = (view.requires_grad_() for view in views(12, 3, 4))
    assert torch.autograd.gradcheck(lambda x, y: dcca(x, y, regularization=1e-3)[0], (x, y))


@pytest.mark.promise("D7")
def test_no_more_rows_than_dimensions_are_refused():
    x, y = views(6, 3, 6)
    with pytest.raises(UserError, match="DCCA of 6 documents in 6 dimensions"):
        dcca(x, y)
    with pytest.raises(UserError, match="larger --dcca_regularization"):
        dcca(torch.ones(9, 3), torch.ones(9, 2), regularization=0.0)


@pytest.mark.promise("D7")
def test_collapsed_views_have_a_finite_gradient():
    rows = torch.ones(9, 3, requires_grad=True)
    dcca(rows, torch.randn(9, 2))[0].backward()
    assert torch.isfinite(rows.grad).all()


def whitened(count: int, dim: int) -> torch.Tensor:
    """Columns of mean 0, variance 1 and no covariance."""
    rows = torch.randn(count, dim, dtype=torch.float64)
    return torch.linalg.qr(rows - rows.mean(0))[0] * count**0.5


def loss_of(*views: torch.Tensor, **options) -> tuple[SoftCCA, torch.Tensor, dict]:
    module = SoftCCA(views[0].shape[1], **options).double()
    return module, *module(*views)


@pytest.mark.promise("D6")
def test_white_views_have_no_decorrelation_loss_and_equal_columns_all_of_it():
    white = whitened(20, 4)
    _, loss, parts = loss_of(white, white)
    assert loss.item() == pytest.approx(0, abs=1e-9)
    same = torch.randn(20, 1, dtype=torch.float64).expand(20, 4)
    _, _, parts = loss_of(same, same)
    assert parts["decorrelation"].item() == pytest.approx(2 * 20 / 19, rel=1e-4)  # of two views; batch norm's epsilon


@pytest.mark.promise("D6")
def test_the_average_is_the_explicit_sum_over_batches():
    beta, module, summed = 0.7, SoftCCA(3, momentum=0.7, sdl_weight=0.5).double(), []
    for step in range(4):
        x, y = views(10, 3, 3, seed=step)
        own = []
        for view in (x, y):
            z = (view - view.mean(0)) / (view.var(0, correction=0) + 1e-5).sqrt()
            own.append((z, z.T @ z / 9))
        summed.append(torch.stack([covariance for _, covariance in own]))
        ages = range(len(summed) - 1, -1, -1)
        expected = sum(beta**age * covariance for age, covariance in zip(ages, summed, strict=True))
        expected = expected / sum(beta**age for age in ages)
        expected = expected[:, ~torch.eye(3, dtype=torch.bool)].abs().mean(1).sum()
        loss, parts = module(x, y)
        torch.testing.assert_close(parts["decorrelation"], expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(loss, F.mse_loss(own[0][0], own[1][0]) + 0.5 * expected, atol=1e-9, rtol=0)


@pytest.mark.promise("D6")
def test_the_gradient_is_of_the_newest_batch_over_the_normalizer():
    x, y = views(10, 3, 3)
    grads = []
    module = SoftCCA(3, momentum=1.0, sdl_weight=1.0).double()
    for _ in range(2):
        rows = x.clone().requires_grad_()
        loss, _ = module(rows, y)
        (loss - F.mse_loss(*(F.batch_norm(v, None, None, training=True) for v in (rows, y)))).backward()
        grads.append(rows.grad)
    torch.testing.assert_close(grads[1], grads[0] / 2, atol=1e-9, rtol=0)


def decorrelation(x: np.ndarray, past: np.ndarray, momentum: float) -> float:
    """Of the second batch, NumPy's."""
    z = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    covariance = (momentum * past + z.T @ z / (len(z) - 1)) / (momentum + 1)
    return np.abs(covariance[~np.eye(len(covariance), dtype=bool)]).mean()


@pytest.mark.promise("D6")
def test_the_gradient_of_the_decorrelation_is_that_of_finite_differences():
    """Of a second batch: what came before is a constant."""
    (before, _), (x, y) = views(10, 3, 3, seed=1), views(10, 3, 3)
    module = SoftCCA(3, momentum=0.7, sdl_weight=1.0).double()
    module(before, y)
    rows, past = x.clone().requires_grad_(), module.covariances[0].numpy().copy()
    loss, _ = module(rows, y)
    (loss - F.mse_loss(*(F.batch_norm(v, None, None, training=True) for v in (rows, y)))).backward()
    expected = np.zeros(x.shape)
    for place in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[place] = 1e-6
        ends = [decorrelation(x.numpy() + sign * step, past, 0.7) for sign in (1, -1)]
        expected[place] = (ends[0] - ends[1]) / 2e-6
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(rows.grad.numpy(), expected, atol=1e-7)


@pytest.mark.promise("D6")
def test_evaluation_changes_no_buffer():
    module = SoftCCA(3).double()
    module(*views(10, 3, 3))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.eval()(*views(10, 3, 3, seed=1))
    torch.testing.assert_close(dict(module.named_buffers()), before, atol=0, rtol=0)
    with pytest.raises(UserError, match="a single row"):
        module(torch.ones(1, 3), torch.ones(1, 3))
