"""NT-Xent and SupCon against double loops, pytorch-metric-learning and each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

from tests.training.tiny_training import unit
from training.objectives.losses.simclr import nt_xent
from training.objectives.losses.supcon import sup_con

pytestmark = pytest.mark.promise("C6")


def nt_xent_by_loops(first, second, temperature):
    """Equation 1 of SimCLR, term by term."""
    views, count = torch.cat([first, second]), len(first)
    losses = []
    for a in range(2 * count):
        b = (a + count) % (2 * count)
        others = [views[a] @ views[c] / temperature for c in range(2 * count) if c != a]
        losses.append(torch.stack(others).logsumexp(0) - views[a] @ views[b] / temperature)
    return torch.stack(losses).mean()


def sup_con_by_loops(embeddings, label, temperature):
    """Equation 2 of SupCon, term by term, over the anchors that have a positive."""
    losses = []
    for a in range(len(label)):
        scores = {c: embeddings[a] @ embeddings[c] / temperature for c in range(len(label)) if c != a}
        denominator = torch.stack(list(scores.values())).logsumexp(0) if scores else None
        positives = [denominator - score for c, score in scores.items() if label[c] == label[a]]
        if positives:
            losses.append(torch.stack(positives).mean())
    return torch.stack(losses).mean() if losses else torch.tensor(0.0, dtype=embeddings.dtype)


@given(pairs=st.integers(1, 8), temperature=st.floats(0.05, 2.0), seed=st.integers(0, 99))
def test_nt_xent_equals_the_double_loop(pairs, temperature, seed):
    first, second = unit(pairs, 8, seed=seed), unit(pairs, 8, seed=seed + 100)
    loss, _ = nt_xent(first, second, temperature=temperature)
    torch.testing.assert_close(loss, nt_xent_by_loops(first, second, temperature), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(nt_xent(second, first, temperature=temperature)[0], loss, atol=1e-12, rtol=1e-12)


@given(pairs=st.integers(2, 8), temperature=st.floats(0.1, 2.0), seed=st.integers(0, 99))
def test_nt_xent_equals_pytorch_metric_learning(pairs, temperature, seed):
    first, second = unit(pairs, 8, seed=seed), unit(pairs, 8, seed=seed + 100)
    published = NTXentLoss(temperature)(torch.cat([first, second]), torch.arange(pairs).repeat(2))
    torch.testing.assert_close(nt_xent(first, second, temperature=temperature)[0], published, atol=1e-12, rtol=1e-12)


def test_nt_xent_of_one_document_is_zero():
    assert nt_xent(unit(1, 8), unit(1, 8, seed=1))[0] == 0


def test_nt_xent_counts_the_views_that_are_recognised():
    first = unit(4, 8)
    second = first.clone()
    second[0] = -first[0]  # neither of these two finds the other
    assert nt_xent(first, second)[1]["accuracy"] == pytest.approx(6 / 8)


@given(pairs=st.integers(1, 8), temperature=st.floats(0.05, 2.0), seed=st.integers(0, 99))
def test_sup_con_with_a_label_a_document_is_nt_xent(pairs, temperature, seed):
    first, second = unit(pairs, 8, seed=seed), unit(pairs, 8, seed=seed + 100)
    loss, _ = sup_con(torch.cat([first, second]), torch.arange(pairs).repeat(2), temperature=temperature)
    torch.testing.assert_close(loss, nt_xent(first, second, temperature=temperature)[0], atol=1e-12, rtol=1e-12)


@given(label=st.lists(st.integers(0, 3), min_size=1, max_size=12), temperature=st.floats(0.05, 2.0))
def test_sup_con_equals_the_double_loop(label, temperature):
    embeddings, label = unit(len(label), 8), torch.tensor(label)
    loss, metrics = sup_con(embeddings, label, temperature=temperature)
    torch.testing.assert_close(loss, sup_con_by_loops(embeddings, label, temperature), atol=1e-12, rtol=1e-12)
    alone = sum(label.tolist().count(one) == 1 for one in label.tolist())
    assert metrics["without_positive_share"] == pytest.approx(alone / len(label))


def test_sup_con_equals_pytorch_metric_learning():
    embeddings, label = unit(12, 8), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 3, 1, 4, 2])  # 3 and 4 have no positive
    published = SupConLoss(temperature=0.07)(embeddings, label)
    torch.testing.assert_close(sup_con(embeddings, label)[0], published, atol=1e-9, rtol=0)  # it adds 1e-16 in places


def test_sup_con_without_any_positive_is_zero_and_has_a_gradient():
    embeddings = unit(3, 8).requires_grad_()
    loss, metrics = sup_con(embeddings, torch.arange(3))
    loss.backward()
    assert loss == 0
    assert metrics["without_positive_share"] == 1
    torch.testing.assert_close(embeddings.grad, torch.zeros_like(embeddings), atol=0, rtol=0)


def test_rows_of_all_processes_average_to_the_whole():
    first, second, label = unit(6, 8), unit(6, 8, seed=1), torch.tensor([0, 1, 0, 2, 0, 3])  # one process has 2, one 1
    halves = (slice(0, 3), slice(3, 6))
    for loss in (
        lambda rows: nt_xent(first, second, rows=rows)[0],
        lambda rows: sup_con(first, label, rows=rows)[0],
    ):
        parts = torch.stack([loss(rows) for rows in halves])
        torch.testing.assert_close(parts.mean(), loss(slice(None)), atol=1e-12, rtol=0)
