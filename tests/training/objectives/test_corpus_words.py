"""BM25 of any texts against bm25s, which scores the texts of an index."""

import random

import numpy as np

from common.bm25 import BM25Index
from training.objectives.contrastive.corpus_words import CorpusWords

WORDS = ("river", "stone", "cloud", "table", "green", "seven", "night", "paper", "music", "house", "the")


def test_any_texts_are_scored_as_if_they_were_in_the_corpus():
    """The scores of bm25s over the whole corpus, restricted to candidates; a text outside has those of its words."""
    draw = random.Random(0)
    corpus = [" ".join(draw.choices(WORDS, k=draw.randint(1, 90))) for _ in range(40)] + ["the", ""]
    queries = ["river stone stone", "the absent", "", *corpus[:5], "River, STONE (cloud)"]
    index, candidates = BM25Index(corpus), [3, 17, 17, 41, 2, 40]
    expected = np.stack([index.scores(query)[candidates] for query in queries])
    assert (expected > 0).sum() > 20
    words, rest = CorpusWords(), CorpusWords()
    words.add(corpus[:11])
    rest.add(corpus[11:])
    words.include(rest)
    found = words.scores(queries, [corpus[place] for place in candidates])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    outside = words.scores(queries, [f"absent {corpus[3]}", f"{corpus[3]} the"])
    np.testing.assert_array_equal(outside[:, 1], found[:, 0])  # a stop word is no word
    assert (outside[:, 0] < found[:, 0])[expected[:, 0] > 0].all()  # another word makes the text longer


def test_a_corpus_without_words_scores_nothing():
    words = CorpusWords()
    words.add(["the", ""])
    assert not words.scores(["river"], ["river stone"]).any()
