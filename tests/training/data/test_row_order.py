"""Row order: batches without duplicate texts, epochs with every row once."""

from collections import Counter
from itertools import chain, groupby

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from training.data.row_order import RowOrder


def clashes(batch: list[int], text_ids: np.ndarray) -> int:
    """Count the rows of a batch that share a text with a row before them."""
    seen, count = set(), 0
    for row in batch:
        own = set(text_ids[row].tolist())
        count += bool(own & seen)
        seen |= own
    return count


def grouped(rows: int, size: int, seed: int) -> np.ndarray:
    """Return ids of two columns: unique texts in the first, each text of the second in `size` random rows."""
    second = np.random.default_rng(seed).permutation(rows) // size + rows
    return np.stack([np.arange(rows), second], axis=1)


@given(st.integers(2, 12), st.data())
def test_no_batch_has_a_text_twice_and_every_epoch_has_each_row_once(batch_size, data):
    rows = data.draw(st.integers(6 * batch_size, 12 * batch_size))
    size = data.draw(st.integers(1, 3))  # at most half as many as there are batches in a pass
    text_ids = grouped(rows, size, data.draw(st.integers(0, 9)))
    order = RowOrder(text_ids, batch_size, data.draw(st.integers(0, 9)), 1)
    batches = [order.batch(number) for number in range(3 * rows)]
    assert sum(clashes(batch, text_ids) for batch in batches) == 0
    stream = list(chain(*batches))
    for start in range(0, len(stream) - rows + 1, rows):
        assert sorted(stream[start : start + rows]) == list(range(rows))


@given(st.integers(2, 12), st.integers(1, 30), st.integers(0, 10**6), st.integers(0, 9))
def test_a_batch_is_reached_without_those_before_it(batch_size, more, number, seed):
    text_ids = grouped(batch_size + more, 2, seed)
    near = RowOrder(text_ids, batch_size, seed)
    for before in range(max(0, number - 3), number):
        near.batch(before)
    assert near.batch(number) == RowOrder(text_ids, batch_size, seed).batch(number)


def test_batches_are_as_free_of_duplicates_as_those_of_sentence_transformers():
    rows = [(f"question {n % 150}", f"document {n * 7 % 40}") for n in range(400)]
    dataset = datasets.Dataset.from_dict(
        dict(zip(("anchor", "positive"), map(list, zip(*rows, strict=True)), strict=True))
    )
    texts = {text: number for number, text in enumerate(dict.fromkeys(chain(*rows)))}
    text_ids = np.array([[texts[text] for text in row] for row in rows])
    theirs = list(NoDuplicatesBatchSampler(dataset, batch_size=16, drop_last=True, seed=1))
    order = RowOrder(text_ids, 16, 1)
    ours = [order.batch(number) for number in range(25)]
    shuffled = np.random.default_rng(1).permutation(400).reshape(25, 16).tolist()
    assert sum(clashes(batch, text_ids) for batch in shuffled) > 10
    for batches in (theirs, ours):
        assert sum(clashes(batch, text_ids) for batch in batches) == 0
    assert Counter(chain(*ours)) == Counter(range(400))


def test_rows_that_cannot_be_separated_come_once_an_epoch():
    text_ids = np.stack([np.arange(60), np.r_[np.zeros(30), np.arange(100, 130)]], axis=1).astype(int)
    order = RowOrder(text_ids, 6, 0)
    batches = [order.batch(number) for number in range(10)]
    assert Counter(chain(*batches)) == Counter(range(60))
    assert sum(clashes(batch, text_ids) for batch in batches) == 20  # 30 rows of one text, 10 batches


def test_epochs_are_shuffled_anew_and_uniformly():
    text_ids = grouped(40, 4, 0)
    order = RowOrder(text_ids, 8, 7)
    places = np.zeros((40, 5))
    for epoch in range(2000):
        for place in range(5):
            places[order.batch(5 * epoch + place), place] += 1
    assert np.abs(places / 2000 - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / 2000)
    first = [order.batch(number) for number in range(5)]
    assert first != [order.batch(number) for number in range(5, 10)]
    assert first != [RowOrder(text_ids, 8, 8).batch(number) for number in range(5)]


@pytest.mark.parametrize("batch_size", [3, 4, 5])
def test_a_row_does_not_come_twice_in_a_batch_across_two_epochs(batch_size):
    text_ids = np.arange(10)[:, None]
    order = RowOrder(text_ids, batch_size, 3)
    batches = [order.batch(number) for number in range(200)]
    assert all(len(set(batch)) == batch_size for batch in batches)
    assert [len(list(group)) for _, group in groupby(sorted(chain(*batches[:10])))] == [batch_size] * 10
