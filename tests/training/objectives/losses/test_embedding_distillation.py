"""Losses against teacher embeddings: sentence-transformers' formula, double loops, closed forms of the gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from training.objectives.losses.embedding_distillation import embedding_cosine, embedding_mse, max_margin_mse


def views(count: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


@pytest.mark.promise("D3")
@pytest.mark.parametrize("loss", [embedding_mse, embedding_cosine])
def test_zero_loss_and_gradient_at_the_teacher(loss):
    student, _ = views(5, 4)
    student.requires_grad_()
    value, _ = loss(student, student.detach())
    value.backward()
    torch.testing.assert_close((value.detach(), student.grad), (torch.tensor(0.0).double(), torch.zeros(5, 4).double()))


@given(count=st.integers(1, 7), dim=st.integers(1, 6), seed=st.integers(0, 99))
def test_mse_and_cosine_row_by_row(count, dim, seed):
    student, teacher = views(count, dim, seed)
    by_row = [((y - t) ** 2).mean() for y, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(embedding_mse(student, teacher)[0], torch.stack(by_row).mean(), atol=1e-12, rtol=0)
    expected = F.cosine_embedding_loss(student, teacher, torch.ones(count))
    torch.testing.assert_close(embedding_cosine(student, teacher)[0], expected, atol=1e-9, rtol=0)


@pytest.mark.promise("D5")
@given(count=st.integers(2, 7), dim=st.integers(1, 6), gamma=st.floats(0, 2), seed=st.integers(0, 99))
def test_max_margin_is_the_double_loop(count, dim, gamma, seed):
    student, teacher = views(count, dim, seed)
    expected = 0.0
    for i in range(count):
        others = [F.mse_loss(student[i], teacher[j]) for j in range(count) if j != i]
        expected = expected + (F.mse_loss(student[i], teacher[i]) - gamma * torch.stack(others).mean()) / count
    torch.testing.assert_close(max_margin_mse(student, teacher, gamma=gamma)[0], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.promise("D5")
def test_max_margin_at_gamma_0_is_mse():
    student, teacher = views(6, 5)
    ours, mse = max_margin_mse(student, teacher, gamma=0.0)[0], F.mse_loss(student, teacher)
    torch.testing.assert_close(ours, mse, atol=1e-12, rtol=0)


@pytest.mark.promise("D5")
def test_the_gradient_at_gamma_1_does_not_know_the_student():
    student, teacher = views(6, 5)
    for factor in (1.0, 100.0):
        rows = (factor * student).requires_grad_()
        max_margin_mse(rows, teacher, gamma=1.0)[0].backward()
        others = (teacher.sum(0) - teacher) / 5
        torch.testing.assert_close(rows.grad, 2 * (others - teacher) / (6 * 5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", [embedding_mse, embedding_cosine, max_margin_mse])
def test_the_teacher_gets_no_gradient_and_half_precision_is_computed_in_full(loss):
    student, teacher = (view.bfloat16().requires_grad_() for view in views(4, 8))
    value, _ = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert teacher.grad is None
    assert student.grad is not None
    torch.testing.assert_close(value, loss(student.double(), teacher.double())[0].float())


def test_a_single_document_has_no_others():
    student, teacher = views(1, 5)
    torch.testing.assert_close(max_margin_mse(student, teacher)[0], F.mse_loss(student, teacher))
