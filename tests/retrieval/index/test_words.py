"""BM25 over shards equals bm25s over the whole corpus."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.bm25 import BM25Index, words_of
from retrieval.index.words import WordScores, find_word, postings

WORD = st.sampled_from(["river", "River", "stone", "the", "a", "größe", "雨が", "x1", "don't", "night", "night,", "\0"])
TEXT = st.lists(WORD, max_size=12).map(" ".join)


@pytest.mark.promise("I1")
@given(
    shards=st.lists(st.lists(TEXT, max_size=4), min_size=1, max_size=4),
    query=st.lists(WORD, min_size=1, max_size=6).map(" ".join),
    seed=st.integers(0, 99),
)
def test_scores_are_those_of_one_index_of_the_documents_that_are_not_deleted(shards, query, seed):
    random = np.random.default_rng(seed)
    alive = [random.random(len(texts)) < 0.7 for texts in shards]
    texts = [
        text for texts, kept in zip(shards, alive, strict=True) for text, one in zip(texts, kept, strict=True) if one
    ]
    scores = WordScores([postings(texts) for texts in shards], alive)(query)[np.concatenate(alive)]
    if any(words_of(texts)):
        np.testing.assert_allclose(scores, BM25Index(texts).scores(query), rtol=1e-5, atol=1e-6)
    else:
        assert not scores.any()


@given(st.lists(TEXT, max_size=6))
def test_each_word_is_found_and_no_other(texts):
    arrays = postings(texts)
    words = words_of(texts)
    for word in {word for row in words for word in row}:
        rows = find_word(arrays, word)
        expected = {place: row.count(word) for place, row in enumerate(words) if word in row}
        found = dict(zip(arrays["word_documents"][rows].tolist(), arrays["word_counts"][rows].tolist(), strict=True))
        assert found == expected
    assert all(find_word(arrays, word) is None for word in ("", "riv", "rivers", "zz", "aa"))
