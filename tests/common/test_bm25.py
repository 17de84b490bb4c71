"""BM25 where there are no words: it gives nothing, instead of an error from within a library."""

import numpy as np
import pytest

from common.bm25 import BM25Index
from common.errors import UserError


def test_the_best_are_those_of_all_scores():
    index = BM25Index(["river stone", "the winter", "stone river stone", ""])
    for query in ("stone winter", "the", "", "absent"):
        scores, found = index.search([query], 3)
        every = index.scores(query)
        assert every.shape == (4,)
        np.testing.assert_array_equal(every[found[0]], scores[0])
        np.testing.assert_array_equal(scores[0], -np.sort(-every)[:3])
        assert every.any() == (query == "stone winter")


def test_documents_of_stop_words_alone_are_refused():
    with pytest.raises(UserError, match=r"none of the 2 documents has a word .* leave BM25 out"):
        BM25Index(["the", ""])
