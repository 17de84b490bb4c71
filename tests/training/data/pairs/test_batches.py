"""Batches of pairs: a pure function of the position, complete, and divided among processes."""

from collections import Counter
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from training.data.packing import pack
from training.data.pairs.batches import PairBatch, PairBatches, PairTokenizer, collate_pairs
from training.data.sources import Source

sizes = st.lists(st.integers(8, 40), min_size=1, max_size=3)
weights = st.sampled_from([0.5, 1.0, 1.7, 3.0])


def source(number: int, rows: int, weight: float = 1.0) -> Source:
    texts = {name: [f"{name} {number} {row}" for row in range(rows)] for name in ("anchor", "positive")}
    return Source(f"source-{number}", datasets.Dataset.from_dict(texts), ("anchor", "positive"), weight)


def batches(sources, batch_size=4, tokenize=None, **options) -> PairBatches:
    return PairBatches(
        sources, tokenize, batch_size=batch_size, batch_tokens=100, seed=options.pop("seed", 3), **options
    )


@given(sizes=sizes, index=st.integers(0, 10**9), seed=st.integers(0, 5))
def test_a_position_is_reached_without_those_before_it(sizes, index, seed):
    made = [batches([source(n, rows) for n, rows in enumerate(sizes)], seed=seed) for _ in range(2)]
    for near in range(max(0, index - 3), index):
        made[0].global_rows(near)
    assert made[0].global_rows(index) == made[1].global_rows(index)


@given(rows=st.integers(8, 40), passes=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_row_of_a_source_comes_equally_often(rows, passes, seed):
    """After k whole epochs of the rows each has come k times, though the batch size does not divide their number."""
    made = batches([source(0, rows)], seed=seed)
    # Whole epochs until the stream of rows is back at the start of a pass.
    epochs = passes * rows
    count = Counter(chain.from_iterable(made.global_rows(index)[1] for index in range(epochs * len(made))))
    assert set(count.values()) == {epochs * len(made) * 4 // rows}
    assert len(count) == rows


@given(sizes=sizes, weight=weights)
def test_the_weight_is_how_often_an_epoch_goes_through_a_source(sizes, weight):
    made = batches([source(n, rows, weight if n == 0 else 1.0) for n, rows in enumerate(sizes)])
    count = Counter(made.global_rows(index)[0] for index in range(len(made)))
    for number, rows in enumerate(sizes):
        assert count[number] == max(1, int((weight if number == 0 else 1.0) * rows / 4))


def test_epochs_and_seeds_have_orders_of_their_own():
    first, other = batches([source(0, 40)]), batches([source(0, 40)], seed=4)
    epochs = [[first.global_rows(e * len(first) + i)[1] for i in range(len(first))] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(chain(*epochs[0])) == sorted(chain(*epochs[1])) == list(range(40))
    assert epochs[0] != [other.global_rows(i)[1] for i in range(len(other))]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_batch_that_one_would_have(word_tokenizer, processes):
    tokenize = PairTokenizer(word_tokenizer, 32, 32, {})
    whole = batches([source(0, 16), source(1, 24)], batch_size=8, tokenize=tokenize)
    shares = [
        batches([source(0, 16), source(1, 24)], 8 // processes, tokenize, rank=rank, world_size=processes)
        for rank in range(processes)
    ]
    for index in (0, 3, 77):
        expected = whole[index].text_ids.view(2, 8)
        parts = [share[index].text_ids.view(2, -1) for share in shares]
        assert torch.cat(parts, dim=1).equal(expected)
    assert all(share.describe() == whole.describe() for share in shares)


def test_fewer_pairs_than_a_batch_are_refused():
    with pytest.raises(UserError, match=r"source-1: has 8 pairs, fewer than a batch of 12"):
        batches([source(0, 40), source(1, 8)], batch_size=6, world_size=2)


def test_prompts_limits_and_measures(word_tokenizer):
    tokenize = PairTokenizer(word_tokenizer, 10, 5, {"query": "north ", "document": ""})
    batch = collate_pairs([["river", "stone " * 9], ["cloud", "table " * 20], ["bread"] * 2], tokenize, 1000)
    ids = word_tokenizer.convert_tokens_to_ids
    assert batch.chunks[0].input_ids[0, :4].tolist() == ids(["[CLS]", "north", "river", "[SEP]"])
    lengths = batch.chunks[0].cu_seq_lens_q.diff().tolist()
    assert lengths == [4, 5, 3, 10, 3, 3]
    measures = {name: value.item() for name, value in batch.measures().items()}
    assert measures["token_count"] == sum(lengths)
    assert measures["pair_count"] == 2
    assert measures["padding_share"] == 0
    padded = np.array([5, 5, 10, 10, 3, 3]).sum()
    assert measures["padding_share_if_padded"] == pytest.approx(1 - sum(lengths) / padded)
    assert measures["cut_off_share"] == pytest.approx(2 / 6)
    assert batch.text_ids[4] == batch.text_ids[5]
    assert len(batch.text_ids.unique()) == 5


@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(lambda lengths: lengths * 3),
    budget=st.integers(1, 60),
)
def test_a_column_alone_is_its_texts_in_order(lengths, budget):
    documents = [[number] * length for number, length in enumerate(lengths)]
    pairs = len(documents) // 3
    whole = PairBatch(pack(documents, budget), torch.zeros(3 * pairs), pairs, sum(lengths), (9,), 0)
    for column in range(3):
        parts = whole.column_chunks(column)
        expected = list(chain.from_iterable(documents[column * pairs : (column + 1) * pairs]))
        assert torch.cat([part.input_ids[0] for part in parts]).tolist() == expected
        own = [part.cu_seq_lens_q.diff() for part in parts]
        assert torch.cat(own).tolist() == lengths[column * pairs : (column + 1) * pairs]
        assert [part.max_length_q for part in parts] == [int(part.max()) for part in own]
        assert all(part.cu_seq_lens_q[0] == 0 for part in parts)


def test_the_rows_of_a_batch_are_named_from_1(word_tokenizer):
    made = batches([source(0, 8)], tokenize=PairTokenizer(word_tokenizer, 32, 32, {}), keep_texts=True)
    number, rows = made.global_rows(5)
    assert made[5].locate() == f"source-0, rows {', '.join(str(row + 1) for row in sorted(rows))}"
    assert made[5].texts == made.sources[number].texts(rows)
