"""Momentum contrast against a plain list of keys and closed forms."""

from collections import deque

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.training.tiny_training import unit
from training.objectives.losses.contrastive import info_nce
from training.objectives.losses.momentum import MomentumQueue, exponential_moving_average, momentum_contrast

pytestmark = pytest.mark.promise("C5")


@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 12), max_size=6))
def test_the_queue_holds_the_last_keys(size, batches):
    queue, expected = MomentumQueue(size, 4), deque(maxlen=size)
    number = 0
    for count in batches:
        keys, ids = unit(count, 4, seed=number), torch.arange(number, number + count)
        queue.enqueue(keys.float(), ids)
        expected.extend(zip(ids.tolist(), keys.float(), strict=True))
        number += count
    keys, ids = queue.filled()
    assert sorted(ids.tolist()) == sorted(one for one, _ in expected)
    by_id = dict(expected)
    for key, one in zip(keys, ids.tolist(), strict=True):
        torch.testing.assert_close(key, by_id[one], atol=0, rtol=0)


def test_the_oldest_key_goes_out_first_after_a_round_trip_through_a_checkpoint():
    queue = MomentumQueue(5, 4)
    queue.enqueue(unit(7, 4).float(), torch.arange(7))
    loaded = MomentumQueue(5, 4)
    loaded.load_state_dict(queue.state_dict())
    loaded.enqueue(unit(2, 4, seed=1).float(), torch.tensor([7, 8]))
    assert sorted(loaded.filled()[1].tolist()) == [4, 5, 6, 7, 8]


@given(rows=st.integers(1, 6), earlier=st.integers(0, 9), temperature=st.floats(0.05, 2.0))
def test_the_loss_is_a_cross_entropy_over_the_own_key_and_the_queue(rows, earlier, temperature):
    query, key, queue = unit(rows, 8), unit(rows, 8, seed=1), unit(earlier, 8, seed=2)
    loss, _ = momentum_contrast(query, key, queue, temperature=temperature)
    each = [
        F.cross_entropy(torch.cat([key[i : i + 1], queue]) @ query[i] / temperature, torch.tensor(0))
        for i in range(rows)
    ]
    torch.testing.assert_close(loss, torch.stack(each).mean(), atol=1e-12, rtol=1e-12)


def test_an_empty_queue_leaves_nothing_to_tell_apart():
    query = unit(3, 8).requires_grad_()
    queue, _ = MomentumQueue(4, 8).filled()
    loss, _ = momentum_contrast(query, unit(3, 8, seed=1), queue.double())
    loss.backward()
    assert loss == 0
    torch.testing.assert_close(query.grad, torch.zeros_like(query), atol=0, rtol=0)


def test_of_one_query_it_is_info_nce_with_the_queue_as_hard_negatives():
    query, key, queue = unit(1, 8), unit(1, 8, seed=1), unit(6, 8, seed=2)
    ours, _ = momentum_contrast(query, key, queue, temperature=0.05)
    torch.testing.assert_close(ours, info_nce(query, key, queue)[0], atol=1e-12, rtol=0)


def test_an_earlier_key_of_the_same_document_is_no_negative():
    query, key, queue = unit(3, 8), unit(3, 8, seed=1), unit(4, 8, seed=2)
    ids = {"key_id": torch.tensor([7, 8, 9]), "queue_id": torch.tensor([5, 8, 8, 9])}
    loss, _ = momentum_contrast(query, key, queue, **ids)
    kept = [[0, 1, 2, 3], [0, 3], [0, 1, 2]]
    each = [momentum_contrast(query[i : i + 1], key[i : i + 1], queue[kept[i]])[0] for i in range(3)]
    torch.testing.assert_close(loss, torch.stack(each).mean(), atol=1e-12, rtol=0)


def test_keys_get_no_gradient():
    query, key, queue = (unit(3, 8, seed=seed).requires_grad_() for seed in range(3))
    momentum_contrast(query, key, queue)[0].backward()
    assert query.grad.abs().sum() > 0
    assert key.grad is None
    assert queue.grad is None


def test_rows_of_all_processes_average_to_the_whole():
    query, key, queue = unit(6, 8), unit(6, 8, seed=1), unit(4, 8, seed=2)
    parts = [momentum_contrast(query, key, queue, rows=rows)[0] for rows in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(sum(parts) / 2, momentum_contrast(query, key, queue)[0], atol=1e-12, rtol=0)


def test_the_moving_average_has_its_closed_form():
    target, source = [unit(3, 4), unit(5, seed=1)], [unit(3, 4, seed=2), unit(5, seed=3)]
    start = [weight.clone() for weight in target]
    for _ in range(7):
        exponential_moving_average(target, source, 0.9)
    for weight, first, followed in zip(target, start, source, strict=True):
        torch.testing.assert_close(weight, 0.9**7 * first + (1 - 0.9**7) * followed, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("momentum", "which"), [(1.0, 0), (0.0, 1)])
def test_momentum_one_keeps_and_zero_copies(momentum, which):
    weights = [torch.nn.Parameter(unit(3, 4, seed=seed)) for seed in range(2)]
    expected = weights[which].detach().clone()
    exponential_moving_average(weights[:1], weights[1:], momentum)
    torch.testing.assert_close(weights[0].detach(), expected, atol=0, rtol=0)
