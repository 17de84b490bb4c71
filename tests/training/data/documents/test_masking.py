"""Masking: shares against their expectation, transformers' collator and closed forms; units stay whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import DataCollatorForLanguageModeling

from common.errors import UserError
from tests.training.tiny_training import SPECIALS
from training.data.documents.masking import Masking, MaskingArguments, span_lengths

VOCABULARY, MASK = 1000, 4
SPECIAL = tuple(range(len(SPECIALS)))


def masking(unit: str = "token", mask_share: float = 0.8, random_share: float = 0.1, vocabulary=VOCABULARY) -> Masking:
    return Masking(MASK, SPECIAL, vocabulary, unit, mask_share, random_share)


def texts(count: int, length: int, seed: int = 0, words: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Return random ids between [CLS] and [SEP], and which of them start a word, both `(count, length)`."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(len(SPECIAL), VOCABULARY, (count, length))
    ids[:, 0], ids[:, -1] = 2, 3
    return ids, generator.random((count, length)) < words


def mask_all(mask, ids, starts, rate, generator) -> list[np.ndarray]:
    """Mask many texts; return the ids that the model reads, and the labels, both `(count, length)`."""
    masked = [mask(text, words, rate, generator) for text, words in zip(ids, starts, strict=True)]
    return [np.stack(column) for column in zip(*masked, strict=True)]


def shares(ids: np.ndarray, read: np.ndarray, labels: np.ndarray) -> list[float]:
    """Return the share of ordinary tokens that is predicted, and of these the shares masked, replaced and kept."""
    predicted = labels >= 0
    ordinary = ~np.isin(ids, SPECIAL)
    masked, kept = (read == MASK)[predicted].mean(), (read == ids)[predicted].mean()
    return [predicted.sum() / ordinary.sum(), masked, 1 - masked - kept, kept]


@pytest.mark.promise("M1")
@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        pytest.param(unit, expected, marks=[] if unit == "word" or number == 0 else [pytest.mark.slow])
        for unit in ("token", "word", "token_span")
        for number, expected in enumerate([(0.15, 0.8, 0.1, 0.1), (0.3, 0.5, 0.0, 0.5), (0.4, 1.0, 0.0, 0.0)])
    ],
)
def test_shares_on_a_million_tokens(unit, expected):
    ids, starts = texts(2000, 512)
    rate, mask_share, random_share, _ = expected
    mask, generator = masking(unit, mask_share, random_share), np.random.default_rng(1)
    read, labels = mask_all(mask, ids, starts, rate, generator)
    # A token that is replaced by itself, once in a vocabulary, counts as kept.
    found = shares(ids, read, labels)
    assert found == pytest.approx(list(expected), abs=0.005)
    assert (labels[labels >= 0] == ids[labels >= 0]).all()
    assert (read[labels < 0] == ids[labels < 0]).all()


@pytest.mark.promise("M1")
def test_shares_are_those_of_transformers_collator(word_tokenizer):
    ids, starts = texts(400, 512)
    ids = np.where(ids < len(SPECIAL), ids, len(SPECIAL) + ids % (len(word_tokenizer) - len(SPECIAL)))
    special = np.isin(ids, SPECIAL).astype(int)
    published = DataCollatorForLanguageModeling(word_tokenizer, mlm_probability=0.15, seed=0)
    features = [
        {"input_ids": row, "special_tokens_mask": s} for row, s in zip(ids.tolist(), special.tolist(), strict=True)
    ]
    batch = published(features)
    ours, generator = Masking.of(word_tokenizer, MaskingArguments()), np.random.default_rng(0)
    read, labels = mask_all(ours, ids, starts, 0.15, generator)
    theirs = shares(ids, batch["input_ids"].numpy(), batch["labels"].numpy())
    assert shares(ids, read, labels) == pytest.approx(theirs, abs=0.01)
    # Theirs draws special tokens as replacements in a vocabulary as small as this; ours never does.
    drawn = [
        (r[(lab >= 0) & (r != MASK)] < len(SPECIAL)).sum()
        for r, lab in ((batch["input_ids"].numpy(), batch["labels"].numpy()), (read, labels))
    ]
    assert drawn[0] > 0 == drawn[1]


@given(
    ids=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    rate=st.floats(0.01, 1.0),
    unit=st.sampled_from(["token", "word", "span", "token_span"]),
    seed=st.integers(0, 100),
)
def test_special_tokens_stay_and_something_is_predicted(ids, rate, unit, seed):
    ids = np.array(ids)
    starts = np.random.default_rng(seed).random(len(ids)) < 0.5
    read, labels = masking(unit, 0.0, 1.0, vocabulary=13)(ids, starts, rate, np.random.default_rng(seed))
    special = np.isin(ids, SPECIAL)
    assert (labels[special] == -100).all()
    assert (read[special] == ids[special]).all()
    assert not np.isin(read[labels >= 0], SPECIAL).any()
    assert (labels >= 0).any() == (~special).any()
    if rate == 1:
        assert ((labels >= 0) == ~special).all()


@given(seed=st.integers(0, 1000), rate=st.floats(0.05, 0.6), unit=st.sampled_from(["word", "span"]))
def test_words_are_chosen_whole_and_not_one_too_many(seed, rate, unit):
    (ids,), (starts,) = texts(1, 80, seed)
    chosen = masking(unit).choose(ids, starts, rate, np.random.default_rng(seed))
    starts[1] = True
    word = np.where(np.isin(ids, SPECIAL), -1, np.cumsum(starts))
    taken, sizes = [], []
    for number in np.unique(word[word >= 0]):
        assert len(set(chosen[word == number])) == 1
        taken.append(chosen[word == number][0] >= 0)
        sizes.append((word == number).sum())
    count = (chosen >= 0).sum()
    # The last word ends what is wanted, rounded up or down.
    assert rate * 78 - 1 < count < max(1, rate * 78 + 1) + max(size for size, t in zip(sizes, taken, strict=True) if t)
    assert sorted(set(chosen) - {-1}) == list(range(chosen.max() + 1))


def test_words_are_those_of_transformers_whole_word_collator(word_tokenizer):
    """At a rate at which one word is chosen, ours and theirs choose the same sets: the words."""
    ids = np.array([[2, *range(5, 17), 3]])
    starts = np.array([[1, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1]], bool)
    offsets, place = [(0, 0)], 0
    for start in starts[0, 1:-1]:
        place += int(start)  # a blank before the word
        offsets.append((place, place + 1))
        place += 1
    offsets.append((0, 0))
    collator = DataCollatorForLanguageModeling(word_tokenizer, mlm_probability=0.1, whole_word_mask=True, seed=0)
    theirs, ours, generator = set(), set(), np.random.default_rng(0)
    for _ in range(150):
        feature = {"input_ids": ids[0], "special_tokens_mask": np.isin(ids[0], SPECIAL), "offset_mapping": offsets}
        labels = collator([feature])["labels"][0]
        theirs |= _words(labels.numpy() >= 0, starts[0])
        ours |= _words(masking("word").choose(ids[0], starts[0], 0.1, generator) >= 0, starts[0])
    assert ours == theirs
    assert sum(len(word) for word in ours) == 12


def _words(chosen: np.ndarray, starts: np.ndarray) -> set[tuple[int, ...]]:
    """Return the places of the chosen tokens, grouped by word."""
    words: list[list[int]] = []
    for place in np.flatnonzero(chosen):
        if starts[place] or not words or words[-1][-1] != place - 1:
            words.append([])
        words[-1].append(int(place))
    return {tuple(word) for word in words}


@pytest.mark.promise("M1")
def test_span_lengths_are_geometric_and_cut_at_ten():
    lengths = span_lengths(50_000, np.random.default_rng(0))
    expected = np.array([0.2 * 0.8 ** (n - 1) for n in range(1, 11)]) / (1 - 0.8**10)
    assert lengths.mean() == pytest.approx(3.8, abs=0.02)  # the paper's figure
    assert chisquare(np.bincount(lengths, minlength=11)[1:], 50_000 * expected).pvalue > 0.01


@pytest.mark.promise("M1")
def test_spans_in_a_text_have_these_lengths_in_words():
    (ids,), (starts,) = texts(1, 60_000)
    chosen = masking("span").choose(ids, starts, 0.01, np.random.default_rng(0))
    word = np.cumsum(starts)
    lengths = [len(np.unique(word[chosen == span])) for span in range(chosen.max())]  # the last one was cut off
    expected = np.array([0.2 * 0.8 ** (n - 1) for n in range(1, 11)]) / (1 - 0.8**10)
    assert len(lengths) > 80
    assert np.mean(lengths) == pytest.approx((expected * np.arange(1, 11)).sum(), rel=0.15)
    assert max(lengths) <= 10
    for span in range(chosen.max() + 1):
        places = np.flatnonzero(chosen == span)
        assert (np.diff(places) == 1).all()


def test_a_span_shares_one_fate():
    (ids,), (starts,) = texts(1, 20_000)
    mask = masking("token_span", 0.5, 0.5)
    chosen = mask.choose(ids, starts, 0.3, np.random.default_rng(7))
    read, labels = mask(ids, starts, 0.3, np.random.default_rng(7))
    assert ((chosen >= 0) == (labels >= 0)).all()
    for span in range(chosen.max() + 1):
        assert len(set((read == MASK)[chosen == span])) == 1
    assert 0.4 < (read == MASK)[labels >= 0].mean() < 0.6


def test_it_is_a_function_of_its_generator():
    (ids,), (starts,) = texts(1, 300)
    first, again, other = (masking("span")(ids, starts, 0.3, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize("shares", [(0.9, 0.2), (-0.1, 0.1), (0.5, -0.1)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(UserError, match=r"^--mask_replace_prob .* --random_replace_prob .*: must be at least 0"):
        MaskingArguments(mask_replace_prob=shares[0], random_replace_prob=shares[1])
