"""Pairs made from documents: real ones, and ones whose words are numbered, so that a span tells where it comes from."""

import inspect
import json.decoder
import statistics
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from training.data.document import Document
from training.data.pairs.makers import Crops, InverseCloze, Neighbours, Segments, make_pairs

pytestmark = pytest.mark.promise("C4")
seeds = st.integers(0, 2**32)
REAL = [inspect.getsource(module) for module in (json.decoder, statistics)]
STRATEGIES = [Crops(100, (0.1, 0.5), 0.1), InverseCloze(100, 0.9), Neighbours(50), Segments(100, 30, -70)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def numbered(word_tokenizer):
    """A document whose n-th word is n; a sentence ends after the words in `stops`, a paragraph after `blanks`."""

    def make(words: int, stops=(), blanks=()) -> Document:
        marks = {**dict.fromkeys(stops, ". "), **dict.fromkeys(blanks, "\n\n")}
        text = "".join(f"{word}{marks.get(word, ' ')}" for word in range(words))
        document = Document.read(text, word_tokenizer)
        # A full stop is a token too; tests that count tokens give none.
        assert len(document) == words + len(set(stops) - set(blanks))
        return document

    return make


def words(span: str) -> list[int]:
    return [int(word) for word in span.replace(".", " ").split()]


def is_consecutive(found: list[int]) -> bool:
    return found == list(range(found[0], found[-1] + 1))


@given(st.integers(2, 300), st.integers(2, 400), st.floats(0.01, 1), st.floats(0.01, 1), seeds)
def test_crops_are_spans_of_one_window_within_the_ratio(numbered, tokens, window, one, other, seed):
    ratio = min(one, other), max(one, other)
    pair = Crops(window, ratio, 0.0)(numbered(tokens), rng(seed))
    size = min(window, tokens)
    for span in map(words, pair):
        assert is_consecutive(span)
        assert 0 <= span[0] <= span[-1] < tokens
        inside = ratio[0] * size <= len(span) <= ratio[1] * size
        assert inside or len(span) in (1, int(np.ceil(ratio[0] * size)))  # where no whole number is inside
        assert len(span) <= Crops(window, ratio, 0.0).longest(tokens)
    assert max(map(max, map(words, pair))) - min(map(min, map(words, pair))) < size


def test_crops_are_independent_and_anywhere(numbered):
    document, draw = numbered(100), Crops(1000, (0.05, 0.5), 0.0)
    crops = [list(map(words, draw(document, rng(seed)))) for seed in range(4000)]
    lengths = np.array([[len(first), len(second)] for first, second in crops])
    centres = np.array([[np.mean(first), np.mean(second)] for first, second in crops])
    for pairs in (lengths, centres):
        assert abs(np.corrcoef(pairs.T)[0, 1]) < 4 / np.sqrt(len(crops))
    # Uniform over 5 to 50, so of mean 27.5 and deviation 13.3; the centre of what is drawn uniformly is the middle.
    assert lengths.mean() == pytest.approx(27.5, abs=4 * 13.3 / np.sqrt(lengths.size))
    assert set(lengths.ravel()) == set(range(5, 51))
    assert centres.mean() == pytest.approx(49.5, abs=4 * centres.std() / np.sqrt(centres.size))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_words_are_deleted_at_their_rate_and_keep_their_order(numbered, rate):
    document, draw = numbered(200), Crops(200, (1.0, 1.0), rate)
    kept = [words(span) for seed in range(100) for span in draw(document, rng(seed))]
    assert all(span == sorted(set(span)) for span in kept)
    count = 200 * len(kept)
    share = 1 - sum(map(len, kept)) / count
    assert share == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / count))
    every = np.bincount(np.concatenate(kept), minlength=200) / len(kept)
    assert np.abs(every - (1 - rate)).max() < 5 * np.sqrt(rate * (1 - rate) / len(kept))


def test_a_deleted_word_goes_with_all_of_its_tokens_and_one_word_stays(word_tokenizer):
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "ab": 1, "##cd": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    document = Document.read("abcd  abcd\nabcd", PreTrainedTokenizerFast(tokenizer_object=core))
    assert len(document) == 6
    found = {span for seed in range(200) for span in Crops(6, (1.0, 1.0), 0.7)(document, rng(seed))}
    assert found == {"abcd", "abcd  abcd", "abcd\nabcd", "abcd  abcd\nabcd"}
    document = Document.read("river. stone", word_tokenizer)  # words stay apart when the mark between them goes
    found = {span for seed in range(200) for span in Crops(3, (1.0, 1.0), 0.5)(document, rng(seed))}
    assert found == {"river. stone", "river stone", "river.", "river", ". stone", "stone", "."}


def test_a_sentence_is_removed_at_its_rate(numbered):
    stops = range(6, 300, 7)
    document, draw = numbered(300, stops), InverseCloze(60, 0.9)
    removed = 0
    for seed in range(20000):
        query, passage = map(words, draw(document, rng(seed)))
        assert is_consecutive(query)
        # a whole sentence, and the last one has no full stop
        assert query[0] % 7 == 0
        assert len(query) == min(7, 300 - query[0])
        inside = set(query) & set(passage)
        assert inside in (set(), set(query))
        removed += not inside
        assert is_consecutive(sorted({*query, *passage}))  # it was taken from that passage
        assert len({*query, *passage}) <= 60
    assert removed / 20000 == pytest.approx(0.9, abs=0.01)


@given(st.integers(2, 200), st.sets(st.integers(0, 198)), st.sets(st.integers(0, 198)), st.integers(2, 100), seeds)
def test_neighbours_are_adjacent_and_disjoint(numbered, tokens, stops, blanks, window, seed):
    stops, blanks = ({place for place in places if place < tokens - 1} for places in (stops, blanks))
    document = numbered(tokens, stops - blanks, blanks)
    before, after = map(words, Neighbours(window)(document, rng(seed)))
    assert is_consecutive(before)
    assert is_consecutive(after)
    assert after[0] == before[-1] + 1
    assert max(len(before), len(after)) <= window
    assert before[-1] in (blanks or stops or range(tokens))
    if not stops - blanks:  # no tokens but the words: each is as long as it can be
        assert len(before) == min(window, after[0])
        assert len(after) == min(window, tokens - after[0])


def test_every_place_between_paragraphs_is_drawn(numbered):
    document = numbered(100, stops=range(0, 99, 2), blanks=(9, 29, 79))
    count = Counter(words(Neighbours(5)(document, rng(seed))[1])[0] for seed in range(600))
    assert set(count) == {10, 30, 80}
    assert min(count.values()) > 150


@given(st.integers(1, 200), st.integers(1, 90), st.data())
def test_segments_are_two_of_the_windows_at_least_the_gap_apart(numbered, tokens, window, data):
    step, gap = data.draw(st.integers(1, window)), data.draw(st.integers(1 - window, 100))
    windows, start = [], 0
    while not windows or windows[-1][-1] < tokens - 1:  # until one reaches the end
        windows.append(list(range(start, min(start + window, tokens))))
        start += step
    far = [(a, b) for a, b in combinations(windows, 2) if b[0] - a[-1] - 1 >= gap]
    strategy = Segments(window, step, gap)
    pair = strategy(numbered(tokens), rng(data.draw(seeds)))
    assert (pair is None) == (not far)
    assert (tokens >= int(strategy.needs.split()[0])) == bool(far)
    if pair is not None:
        assert tuple(sorted(map(words, pair))) in far


@pytest.mark.parametrize("gap", [0, 1, -2])
def test_all_pairs_of_segments_are_drawn_equally_often(numbered, gap):
    document, starts = numbered(10), (0, 2, 4, 6)
    drawn = Counter(tuple(words(span)[0] for span in Segments(4, 2, gap)(document, rng(seed))) for seed in range(600))
    assert set(drawn) == {(a, b) for a in starts for b in starts if abs(a - b) >= 4 + gap and a != b}
    assert min(drawn.values()) > 0.5 * 600 / len(drawn)


def test_no_token_is_in_both_segments_by_default(numbered):
    """With a step of 64, 93 % of the pairs of windows of a document of 600 tokens would share some."""
    pairs = [Segments(288, 64)(numbered(600), rng(seed)) for seed in range(50)]
    assert not any(set(words(first)) & set(words(second)) for first, second in pairs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("text", REAL)
def test_spans_of_real_documents(strategy, text, word_tokenizer):
    document = Document.read(text, word_tokenizer)
    pairs = [strategy(document, rng(seed)) for seed in range(50)]
    assert pairs == [strategy(document, rng(seed)) for seed in range(50)]
    assert len(set(pairs)) > 25
    flat = text.split()
    for pair in pairs:
        for span in pair:
            assert span.strip()
            tokens = len(word_tokenizer(span, add_special_tokens=False)["input_ids"])
            assert tokens <= strategy.longest(len(document)) + 2  # a name that is cut in the middle
            if not isinstance(strategy, Crops | InverseCloze):
                assert span in text
            inner = iter(flat)  # in order, the words at the ends maybe cut
            assert isinstance(strategy, Crops) or all(word in inner for word in span.split()[1:-1])


@pytest.mark.parametrize(
    ("strategy", "shortest"),
    [
        (Crops(100, (0.25, 0.5), 0.1), "one two"),
        (InverseCloze(100, 0.9), "One. Two."),
        (Neighbours(100), "one two"),
        (Segments(3, 2), "one two three four five six"),
        (Segments(3, 2, -2), "one two three four"),
    ],
)
def test_documents_without_a_second_span(word_tokenizer, strategy, shortest):
    documents = [Document.read(shortest, word_tokenizer)] * 50
    assert all(all(side) for side in make_pairs(strategy, documents, [rng(seed) for seed in range(50)]))
    for text in ("", " \n", "one", shortest.rpartition(" ")[0]):
        assert strategy(Document.read(text, word_tokenizer), rng()) is None, text


def test_a_character_of_several_tokens_is_cut_once():
    """Bytes as tokens: neighbours share no character, and no span is blank."""
    core = Tokenizer(models.BPE({token: n for n, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "naïve  \n 日本語 and \U0001f600 end"
    document = Document.read(text, PreTrainedTokenizerFast(tokenizer_object=core))
    assert [document.span(n, n + 1) for n in range(len(document))] == [*"".join(text.split())]
    for seed in range(50):
        before, after = Neighbours(100)(document, rng(seed))
        assert "".join((before + after).split()) == "".join(text.split())


def test_a_tokenizer_that_cannot_say_where_its_tokens_stand_is_refused(word_tokenizer, monkeypatch):
    monkeypatch.setattr(type(word_tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(UserError, match="fast tokenizer"):
        Document.read("one two", word_tokenizer)
