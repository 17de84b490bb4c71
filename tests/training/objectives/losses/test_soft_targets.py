"""Hinton's loss against its limits and the double loop; Margin-MSE against sentence-transformers' formula."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from training.objectives.losses.soft_targets import margin_mse, soft_targets

pytestmark = pytest.mark.promise("D1")


def logits(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, classes, generator=generator, dtype=torch.float64).unbind()


@given(
    count=st.integers(1, 5),
    classes=st.integers(2, 6),
    teachers=st.integers(1, 3),
    temperature=st.floats(0.5, 10),
    seed=st.integers(0, 99),
)
def test_the_double_loop(count, classes, teachers, temperature, seed):
    student, _ = logits(count, classes, seed)
    ensemble = [logits(count, classes, seed + 1 + number)[0] for number in range(teachers)]
    expected = 0.0
    for i in range(count):
        target = sum((t[i] / temperature).softmax(0) for t in ensemble) / teachers
        predicted = (student[i] / temperature).softmax(0)
        expected = expected + temperature**2 * (target * (target / predicted).log()).sum() / count
    loss, _ = soft_targets(student, ensemble, temperature=temperature)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)


def test_zero_if_and_only_if_the_logits_agree_up_to_a_constant():
    student, teacher = logits(4, 5)
    shifted = (teacher + torch.arange(4)[:, None]).requires_grad_()
    loss, metrics = soft_targets(shifted, teacher, temperature=3.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert shifted.grad.abs().max() < 1e-12
    assert metrics["agreement"] == 1
    assert soft_targets(student, teacher, temperature=3.0)[0] > 1e-3


def test_the_gradient_keeps_its_size_and_comes_to_matching_logits():
    student, teacher = logits(6, 8)
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = centred / (6 * 8)
    for temperature, tolerance in ((20.0, 0.1), (200.0, 0.01), (2000.0, 0.001)):
        rows = student.clone().requires_grad_()
        soft_targets(rows, teacher, temperature=temperature)[0].backward()
        assert (rows.grad - limit).norm() < tolerance * limit.norm()
        assert rows.grad.norm().item() == pytest.approx(limit.norm().item(), rel=0.01)  # at temperature 20 already


def test_an_ensemble_is_the_mean_of_distributions_not_of_logits():
    student, _ = logits(3, 4)
    sure = torch.zeros(3, 4, dtype=torch.float64)
    first, second = sure.clone(), sure.clone()
    first[:, 0], second[:, 1] = 50.0, 50.0
    loss, _ = soft_targets(student, [first, second])
    expected = -(0.5 * student.log_softmax(1)[:, :2]).sum(1).mean() - torch.tensor(2.0).log()
    torch.testing.assert_close(loss, expected)


@given(count=st.integers(1, 5), negatives=st.integers(1, 4), seed=st.integers(0, 99))
def test_margins_are_sentence_transformers(count, negatives, seed):
    """As in MarginMSELoss: differences of scores against differences of scores, any constant aside."""
    student, teacher = logits(count, 1 + negatives, seed)
    by_negative = [
        F.mse_loss(student[:, 0] - student[:, j], teacher[:, 0] - teacher[:, j]) for j in range(1, 1 + negatives)
    ]
    loss, _ = margin_mse(student, teacher + torch.arange(count)[:, None])
    torch.testing.assert_close(loss, torch.stack(by_negative).mean(), atol=1e-12, rtol=0)
    assert margin_mse(teacher + 3, teacher)[0] < 1e-20


@pytest.mark.parametrize("loss", [soft_targets, margin_mse])
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = (rows.requires_grad_() for rows in logits(3, 4))
    loss(student, teacher)[0].backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0
