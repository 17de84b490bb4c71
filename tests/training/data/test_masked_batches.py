"""Batches of pieces: each piece once a pass, the same pieces for any number of processes, tokens as they were."""

from collections import Counter
from itertools import chain, pairwise

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from tests.training.tiny_training import SPECIALS, WORDS
from training.data.curriculum import Course, LengthSchedule, RateSchedule
from training.data.masked_batches import (
    LENGTHS,
    MaskedBatches,
    PieceReader,
    Pieces,
    SpecialTokens,
    TokenizedDocuments,
    epoch_batches,
    pack_masked,
    tokenize_documents,
    word_starts,
)
from training.data.masking import Masking
from training.data.sources import Source

MASKING = Masking(4, tuple(range(5)), 31)
SPECIAL = SpecialTokens((2,), (3,))
READ, PAIRS = PieceReader(SPECIAL, MASKING), PieceReader(SPECIAL, MASKING, next_sentence=True)


class InMemory(TokenizedDocuments):
    """Documents that were never written to a disk; token n of a document d is 1000 d + n + 10."""

    def __init__(self, lengths, name="documents", weight=1.0):
        self.name, self.weight, self.lengths = name, weight, np.array(lengths)
        self.offsets = np.append(0, np.cumsum(lengths))
        self.ids = np.concatenate([1000 * d + np.arange(length) + 10 for d, length in enumerate(lengths)])
        self.starts_word = np.ones(len(self.ids), bool)


def batches(sources, schedule="16", batch_size=64, read=READ, steps=10, **options) -> MaskedBatches:
    course = Course(LengthSchedule.parse(schedule.split()), RateSchedule.parse(["0.15"]), steps)
    return MaskedBatches(sources, read, course, batch_size=batch_size, batch_tokens=100, seed=3, **options)


many = st.lists(st.integers(1, 70), min_size=2, max_size=12)


@given(lengths=many, length=st.integers(6, 40), pairs=st.booleans())
def test_pieces_are_consecutive_and_whole(lengths, length, pairs):
    read = PAIRS if pairs else READ
    pieces, size = Pieces(InMemory(lengths), length, read), length - read.special_tokens
    of_document = [[s for s in map(pieces.segment, range(len(pieces))) if s.document == d] for d in range(len(lengths))]
    for total, segments in zip(lengths, of_document, strict=True):
        assert all(one.stop == two.start for one, two in pairwise(segments))
        assert all(s.stop - s.start == size for s in segments[:-1])
        read_of_it = segments[-1].stop if segments else 0
        assert read_of_it == (total if not pairs or total % size != 1 else total - 1)
    assert pieces.total == sum(s.stop - s.start + read.special_tokens for s in chain(*of_document))


@given(lengths=many, length=st.integers(6, 20), seed=st.integers(0, 3))
def test_a_pass_holds_every_piece_once(lengths, length, seed):
    pieces = Pieces(InMemory(lengths), length, READ)
    cuts = sorted(np.random.default_rng(seed).integers(0, 3 * pieces.total, 7).tolist())
    found = list(chain(*(pieces.between(a, b, seed) for a, b in pairwise([0, *cuts, 3 * pieces.total]))))
    assert Counter(found) == Counter((number, piece) for number in range(3) for piece in range(len(pieces)))


@given(lengths=many, index=st.integers(0, 10**7))
def test_a_position_is_reached_without_those_before_it(lengths, index):
    made = [batches([InMemory(lengths)]) for _ in range(2)]
    for near in range(max(0, index - 3), index):
        made[0].own_pieces(near)
    assert made[0].own_pieces(index) == made[1].own_pieces(index)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("read", [READ, PAIRS])
def test_processes_share_the_texts_that_one_would_have(processes, read):
    sources = [InMemory([50, 7, 90, 200, 33]), InMemory([10, 11, 12, 400], weight=0.3)]
    whole = batches(sources, "8:0.5 16:0.5", 40 * processes, read)
    shares = [batches(sources, "8:0.5 16:0.5", 40, read, rank=rank, world_size=processes) for rank in range(processes)]
    for index in (0, 4, 5, 9, 77):
        texts = [Counter(text_rows(batch)) for batch in (whole[index], *(share[index] for share in shares))]
        assert texts[0] == sum(texts[1:], Counter())  # masked in the same way, too
    assert len({len(share) for share in (whole, *shares)}) == 1
    assert all(share.describe() == whole.describe() for share in shares)


def text_rows(batch) -> list[tuple]:
    """Ids, labels, and segment ids of each text of a batch."""
    rows = []
    for chunk in batch.chunks:
        sizes = chunk.texts.cu_seq_lens_q.diff().tolist()
        columns = (chunk.texts.input_ids[0], chunk.labels[0], chunk.token_type_ids[0])
        rows += [
            tuple(tuple(c.tolist()) for c in text) for text in zip(*(c.split(sizes) for c in columns), strict=True)
        ]
    return rows


@pytest.mark.promise("M3")
def test_the_tokens_of_a_step_stay_over_the_lengths():
    sources = [InMemory(np.random.default_rng(0).integers(20, 2000, 40))]
    made = batches(sources, "16:0.4 64:0.4 256:0.2", 1024, steps=50)
    tokens = np.array([sum(chunk.labels.numel() for chunk in made[index].chunks) for index in range(50)])
    longest = np.array([max(chunk.texts.max_length_q for chunk in made[index].chunks) for index in range(50)])
    assert longest.tolist() == [16] * 20 + [64] * 20 + [256] * 10
    for stage, length in ((slice(0, 20), 16), (slice(20, 40), 64), (slice(40, 50), 256)):
        assert abs(tokens[stage] - 1024).max() < length  # whole texts: up to one more or less
        assert tokens[stage].mean() == pytest.approx(1024, abs=2 * length / len(tokens[stage]))


def test_weights_say_how_often_a_source_is_gone_through():
    sources = [InMemory([100] * 10, "a", 0.5), InMemory([100] * 10, "b", 2.0)]
    made = batches(sources)
    assert len(made) == epoch_batches(sources, 64) == round(2500 / 64)
    count = Counter(source for index in range(200) for source, _, _ in made.own_pieces(index))
    assert count[1] / count[0] == pytest.approx(4, rel=0.02)


def test_a_piece_is_masked_anew_in_every_pass_and_the_same_in_every_run():
    source = InMemory([60, 9])
    a_pass = Pieces(source, 16, READ).total
    made = batches([source], batch_size=a_pass)
    first, second = (text_rows(made[index]) for index in range(2))
    originals = [
        Counter(tuple(np.where(np.array(labels) >= 0, labels, ids).tolist()) for ids, labels, _ in rows)
        for rows in (first, second)
    ]
    assert originals[0] == originals[1]
    assert not {labels for _, labels, _ in first} & {labels for _, labels, _ in second if len(labels) > 12}
    assert text_rows(batches([source], batch_size=a_pass)[1]) == second


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), budget=st.integers(1, 90))
def test_chunks_are_the_texts_in_their_order(lengths, budget):
    generator = np.random.default_rng(0)
    documents = InMemory(lengths)
    pieces = Pieces(documents, 42, READ)
    texts = [READ(documents, pieces.segment(n), 0.3, generator) for n in range(len(pieces))]
    chunks = pack_masked(texts, budget)
    for name, of_chunk in (("labels", "labels"), ("segment_ids", "token_type_ids")):
        expected = np.concatenate([getattr(text, name) for text in texts]).tolist()
        assert torch.cat([getattr(chunk, of_chunk)[0] for chunk in chunks]).tolist() == expected
    assert [len(c.next_labels) for c in chunks] == [len(c.texts.cu_seq_lens_q) - 1 for c in chunks]
    assert all(c.labels.shape == c.texts.input_ids.shape == c.token_type_ids.shape for c in chunks)


def source(texts: list[str]) -> Source:
    return Source("documents", datasets.Dataset.from_dict({"text": texts}), ("text",))


def test_documents_are_tokenised_once(word_tokenizer, tmp_path, monkeypatch):
    texts = ["river stone", " ", "cloud " * 200]
    word_tokenizer(texts, truncation=True, max_length=9)  # leaves no trace
    first = tokenize_documents(source(texts), word_tokenizer, tmp_path)
    assert first.lengths.tolist() == [2, 200]
    for number, text in enumerate((texts[0], texts[2])):
        expected = word_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert first.read(Pieces(first, 1000, READ).segment(number))[0].tolist() == expected
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", None)  # would fail
    again = tokenize_documents(source(texts), word_tokenizer, tmp_path)
    assert (again.ids == first.ids).all()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    monkeypatch.undo()
    other = tokenize_documents(source(["river"]), word_tokenizer, tmp_path)
    assert other.folder != first.folder
    assert not list(tmp_path.glob(".*"))


def test_nothing_half_tokenised_stays(word_tokenizer, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        tokenize_documents(source(["river stone"]), word_tokenizer, tmp_path)
    assert not list(tmp_path.rglob(LENGTHS))
    assert not list(tmp_path.iterdir())


def test_words_are_the_tokenizers():
    vocabulary = [*SPECIALS, "ri", "##ver", "##s", ".", *WORDS]
    core = Tokenizer(WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    encoded = wordpiece(["rivers stone. ris"], add_special_tokens=False)
    expected = [True, False, True, True, True, False]  # river ##s stone . ri ##s
    assert word_starts(wordpiece, encoded["input_ids"][0], encoded.encodings).tolist() == expected
    assert word_starts(wordpiece, encoded["input_ids"][0]).tolist() == expected  # by the marks alone


def test_special_tokens_are_those_of_the_tokenizer(word_tokenizer):
    assert SpecialTokens.of(word_tokenizer) == SPECIAL
    assert [SPECIAL.count(segments) for segments in (1, 2)] == [2, 3]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"schedule": "3", "read": PAIRS}, r"--sequence_length 3: leaves no room for text"),
        ({"schedule": "16:.5 100:.5"}, r"--per_device_train_tokens 64: .* at least 100, or a shorter"),
        (
            {"sources": [InMemory([50]), InMemory([9, 9])], "read": PAIRS},
            "documents has one document",
        ),
        ({"sources": [InMemory([1, 1])], "read": PAIRS}, r"no document is long enough"),
    ],
)
def test_what_makes_no_batches_is_refused(options, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        batches(options.pop("sources", [InMemory([100, 50])]), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [READ, PAIRS])
@pytest.mark.parametrize(("schedule", "batch_tokens"), [("16:0.5 40:0.5", 100), ("40", 30), ("24", 10_000)])
def test_no_batch_is_heavier_than_the_heaviest(read, schedule, batch_tokens):
    of_run = batches([InMemory([50, 7, 90, 200, 33]), InMemory([10, 11, 12, 61])], schedule, 160, read)
    of_run.batch_tokens = batch_tokens
    heaviest, seen = of_run.heaviest(), [of_run[index] for index in range(40)]
    largest = heaviest.largest_chunk()
    assert largest.input_ids.numel() >= max(batch.largest_chunk().input_ids.numel() for batch in seen)
    assert largest.max_length_q == max(chunk.texts.max_length_q for batch in seen for chunk in batch.chunks)
    assert len(heaviest.chunks) >= min(2, max(len(batch.chunks) for batch in seen))
    assert all(chunk.labels.shape == chunk.texts.input_ids.shape for chunk in heaviest.chunks)
