"""Batches of sequences: the same for any number of processes, and reached at once; tokens per step stay the same."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from tests.training.data.documents.numbered_documents import READ, READ_PAIRS, numbered_documents
from training.data.documents.batches import MaskedBatches, epoch_batches, pack_masked
from training.data.documents.curriculum import Curriculum, LengthSchedule, RateSchedule
from training.data.documents.sequences import Sequences


def batches(sources, schedule="16", batch_size=64, read=READ, steps=10, **options) -> MaskedBatches:
    curriculum = Curriculum(LengthSchedule.parse(schedule.split()), RateSchedule.parse(["0.15"]), steps)
    return MaskedBatches(sources, read, curriculum, batch_size=batch_size, batch_tokens=100, seed=3, **options)


many = st.lists(st.integers(1, 70), min_size=2, max_size=12)


@given(lengths=many, index=st.integers(0, 10**7))
def test_a_position_is_reached_without_those_before_it(lengths, index):
    made = [batches([numbered_documents(lengths)]) for _ in range(2)]
    for near in range(max(0, index - 3), index):
        made[0].own_sequences(near)
    assert made[0].own_sequences(index) == made[1].own_sequences(index)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("read", [READ, READ_PAIRS])
def test_processes_share_the_texts_that_one_would_have(processes, read):
    sources = [numbered_documents([50, 7, 90, 200, 33]), numbered_documents([10, 11, 12, 400], weight=0.3)]
    whole = batches(sources, "8:0.5 16:0.5", 40 * processes, read)
    shares = [batches(sources, "8:0.5 16:0.5", 40, read, rank=rank, world_size=processes) for rank in range(processes)]
    for index in (0, 4, 5, 9, 77):
        texts = [Counter(text_rows(batch)) for batch in (whole[index], *(share[index] for share in shares))]
        assert texts[0] == sum(texts[1:], Counter())  # masked in the same way, too
    assert len({len(share) for share in (whole, *shares)}) == 1
    assert all(share.describe() == whole.describe() for share in shares)


def text_rows(batch) -> list[tuple]:
    """Return ids, labels and segment ids of each text of a batch."""
    rows = []
    for chunk in batch.chunks:
        ends = chunk.texts.cu_seq_lens_q.tolist()
        columns = [tensor[0].tolist() for tensor in (chunk.texts.input_ids, chunk.labels, chunk.token_type_ids)]
        rows += [tuple(tuple(column[start:stop]) for column in columns) for start, stop in pairwise(ends)]
    return rows


@pytest.mark.promise("M3")
def test_the_tokens_of_a_step_stay_over_the_lengths():
    sources = [numbered_documents(np.random.default_rng(0).integers(20, 2000, 40))]
    made = batches(sources, "16:0.4 64:0.4 256:0.2", 1024, steps=50)
    tokens = np.array([sum(chunk.labels.numel() for chunk in made[index].chunks) for index in range(50)])
    longest = np.array([max(chunk.texts.max_length_q for chunk in made[index].chunks) for index in range(50)])
    assert longest.tolist() == [16] * 20 + [64] * 20 + [256] * 10
    for stage, length in ((slice(0, 20), 16), (slice(20, 40), 64), (slice(40, 50), 256)):
        assert abs(tokens[stage] - 1024).max() < length  # whole texts: up to one more or less
        assert tokens[stage].mean() == pytest.approx(1024, abs=2 * length / len(tokens[stage]))


def test_weights_say_how_often_a_source_is_visited():
    sources = [numbered_documents([100] * 10, "a", 0.5), numbered_documents([100] * 10, "b", 2.0)]
    made = batches(sources)
    assert len(made) == epoch_batches(sources, 64) == round(2500 / 64)
    count = Counter(source for index in range(200) for source, _, _ in made.own_sequences(index))
    assert count[1] / count[0] == pytest.approx(4, rel=0.02)


def test_a_sequence_is_masked_anew_in_every_pass_and_the_same_in_every_run():
    source = numbered_documents([60, 9])
    epoch_tokens = Sequences(source, 16, READ).total
    made = batches([source], batch_size=epoch_tokens)
    first, second = (text_rows(made[index]) for index in range(2))
    originals = [
        Counter(tuple(np.where(np.array(labels) >= 0, labels, ids).tolist()) for ids, labels, _ in rows)
        for rows in (first, second)
    ]
    assert originals[0] == originals[1]
    assert not {labels for _, labels, _ in first} & {labels for _, labels, _ in second if len(labels) > 12}
    assert text_rows(batches([source], batch_size=epoch_tokens)[1]) == second


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), budget=st.integers(1, 90))
def test_chunks_are_the_texts_in_their_order(lengths, budget):
    generator = np.random.default_rng(0)
    documents = numbered_documents(lengths)
    sequences = Sequences(documents, 42, READ)
    texts = [READ(documents, sequences.segment(n), 0.3, generator) for n in range(len(sequences))]
    chunks = pack_masked(texts, budget)
    for name, of_chunk in (("labels", "labels"), ("segment_ids", "token_type_ids")):
        expected = np.concatenate([getattr(text, name) for text in texts]).tolist()
        assert torch.cat([getattr(chunk, of_chunk)[0] for chunk in chunks]).tolist() == expected
    assert [len(c.next_labels) for c in chunks] == [len(c.texts.cu_seq_lens_q) - 1 for c in chunks]
    assert all(c.labels.shape == c.texts.input_ids.shape == c.token_type_ids.shape for c in chunks)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"schedule": "3", "read": READ_PAIRS}, r"--sequence_length 3: leaves no room for text"),
        ({"schedule": "16:.5 100:.5"}, r"--per_device_train_tokens 64: .* at least 100, or a shorter"),
        (
            {"sources": [numbered_documents([50]), numbered_documents([9, 9])], "read": READ_PAIRS},
            "documents has one document",
        ),
        ({"sources": [numbered_documents([1, 1])], "read": READ_PAIRS}, r"no document is long enough"),
    ],
)
def test_what_makes_no_batches_is_refused(options, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        batches(options.pop("sources", [numbered_documents([100, 50])]), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [READ, READ_PAIRS])
@pytest.mark.parametrize(("schedule", "batch_tokens"), [("16:0.5 40:0.5", 100), ("40", 30), ("24", 10_000)])
def test_no_batch_is_heavier_than_the_heaviest(read, schedule, batch_tokens):
    of_run = batches(
        [numbered_documents([50, 7, 90, 200, 33]), numbered_documents([10, 11, 12, 61])], schedule, 160, read
    )
    of_run.batch_tokens = batch_tokens
    heaviest, seen = of_run.heaviest(), [of_run[index] for index in range(40)]
    largest = heaviest.largest_chunk()
    assert largest.input_ids.numel() >= max(batch.largest_chunk().input_ids.numel() for batch in seen)
    assert largest.max_length_q == max(chunk.texts.max_length_q for batch in seen for chunk in batch.chunks)
    assert len(heaviest.chunks) >= min(2, max(len(batch.chunks) for batch in seen))
    assert all(chunk.labels.shape == chunk.texts.input_ids.shape for chunk in heaviest.chunks)
