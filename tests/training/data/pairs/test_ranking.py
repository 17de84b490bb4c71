"""Rankers, compared with brute force: every document is scored, and all are sorted."""

import sys
from types import SimpleNamespace

import bm25s
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from sentence_transformers.util import maxsim, mean_maxsim

from common.encoders.model_spec import ModelSpec
from common.encoders.token_settings import TokenSettings
from common.encoders.token_store import TokenStore
from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from training.data.pairs.ranking import RankerWithWords, TokenRanker, VectorRanker, WordRanker, load_ranker


class Random:
    """An encoder of random vectors; a text consists of its number of rows and a seed."""

    batch_tokens, dimension = 4, 6

    def __init__(self, similarity: str = "cosine"):
        self.identity = similarity
        self.prompts: dict[str, str | None] = {}
        self.computed_by: dict[str, str] = {}
        self.model = SimpleNamespace(similarity_fn_name=similarity)

    def __call__(self, texts, prompt_type):
        made = []
        for text in texts:
            rows, seed = map(int, text.split())
            made.append(np.random.default_rng([seed, prompt_type == "query"]).standard_normal((rows, 6)))
        return made


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def brute_force(queries, documents, every_row, similarity):
    """Return the scores of all documents for all queries."""
    encode = Random()
    scores = np.empty((len(queries), len(documents)))
    for i, query in enumerate(encode(queries, "query")):
        for j, document in enumerate(encode(documents, "document")):
            vector, rows = query.sum(0), document if every_row else document.sum(0, keepdims=True)
            if similarity == "cosine" or every_row:
                vector, rows = unit(vector), unit(rows)
            scores[i, j] = (rows @ vector).max()
    return scores


texts = st.lists(st.integers(1, 5), min_size=1, max_size=25).map(lambda rows: [f"{n} {i}" for i, n in enumerate(rows)])


@hypothesis.given(
    queries=texts,
    documents=texts,
    k=st.integers(1, 30),
    every_row=st.booleans(),
    similarity=st.sampled_from(["cosine", "dot"]),
)
def test_the_nearest_documents_are_those_of_brute_force(queries, documents, k, every_row, similarity):
    ranker = VectorRanker(Random(similarity), queries, documents, VectorCache(":memory:"), every_row=every_row)
    expected = brute_force(queries, documents, every_row, similarity)
    order = np.argsort(-expected, axis=1)[:, :k]
    scores, found = ranker.nearest(k)
    there = min(k, len(documents))
    np.testing.assert_array_equal(found[:, :there], order)
    np.testing.assert_allclose(scores[:, :there], np.take_along_axis(expected, order, axis=1), atol=1e-5)
    assert (found[:, there:] == -1).all()
    assert np.isneginf(scores[:, there:]).all()
    some = np.random.default_rng(0).integers(0, len(documents), 7)
    np.testing.assert_allclose(ranker.scores(len(queries) - 1, some), expected[-1, some], atol=1e-5)


def test_more_queries_than_one_search_takes(monkeypatch):
    monkeypatch.setattr("training.data.pairs.ranking._QUERIES_AT_ONCE", 4)
    queries, documents = ([f"2 {i}" for i in range(n)] for n in (11, 9))
    _, found = VectorRanker(Random(), queries, documents, VectorCache(":memory:")).nearest(3)
    np.testing.assert_array_equal(found, np.argsort(-brute_force(queries, documents, False, "cosine"), axis=1)[:, :3])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_hnsw_finds_nearly_all_of_what_is_nearest(similarity):
    """By inner product: with faiss's default metric, vectors of unequal length have other neighbours."""
    queries, documents = ([f"1 {i}" for i in range(n)] for n in (20, 600))
    exact, near = (
        VectorRanker(Random(similarity), queries, documents, VectorCache(":memory:"), index=index).nearest(10)
        for index in ("flat", "hnsw")
    )
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(exact[1], near[1], strict=True)])
    assert recall > 0.98
    assert near[0].max() == pytest.approx(exact[0].max(), abs=1e-5)


def test_bm25_ranks_as_bm25s_does():
    """The reference is bm25s' own scores of all documents, which it tests against Lucene."""
    words = "fox whale frog heron badger otter salmon eagle".split()  # noqa: SIM905
    generator = np.random.default_rng(0)
    queries, documents = ([" ".join(generator.choice(words, 5)) for _ in range(n)] for n in (6, 12))
    retriever = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    retriever.index(bm25s.tokenize(documents, stopwords="en", show_progress=False), show_progress=False)
    expected = np.array([retriever.get_scores(query.split()) for query in queries])
    ranker = WordRanker(queries, documents)
    scores, found = ranker.nearest(15)
    np.testing.assert_allclose(scores[:, :12], -np.sort(-expected, axis=1), atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, found[:, :12], axis=1), scores[:, :12], atol=1e-5)
    assert (found[:, 12:] == -1).all()
    for query in range(6):
        np.testing.assert_allclose(ranker.scores(query, np.array([3, 0])), expected[query, [3, 0]], atol=1e-5)


@pytest.mark.parametrize("similarity", ["maxsim", "meanmaxsim"])
def test_maxsim_ranks_as_sentence_transformers_scores(similarity, tmp_path):
    """Token vectors are read from the disk, a few documents at a time."""
    encoder = Random()
    encoder.similarity_fn_name = similarity
    queries, documents = ([f"{1 + i % 5} {seed + i}" for i in range(n)] for n, seed in ((7, 100), (20, 0)))
    vectors = [
        [torch.tensor(matrix, dtype=torch.float32) for matrix in encoder(texts, side)]
        for texts, side in ((queries, "query"), (documents, "document"))
    ]
    expected = (maxsim if similarity == "maxsim" else mean_maxsim)(*vectors).numpy()
    cache, settings = VectorCache(tmp_path / "vectors.sqlite"), TokenSettings(precision="float32")
    ranker = TokenRanker(encoder, settings, queries, documents, cache, TokenStore(tmp_path / "tokens"))
    scores, found = ranker.nearest(25)
    np.testing.assert_allclose(scores[:, :20], -np.sort(-expected, axis=1), atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, found[:, :20], axis=1), scores[:, :20], atol=1e-5)
    assert (found[:, 20:] == -1).all()
    assert np.isneginf(scores[:, 20:]).all()
    np.testing.assert_allclose(ranker.scores(3, np.array([5, 2])), expected[3, [5, 2]], atol=1e-5)


def test_a_query_without_tokens_scores_0_also_from_the_cache(tmp_path):
    encoder, settings = Random(), TokenSettings(precision="float32")
    encoder.similarity_fn_name = "maxsim"
    for _ in range(2):  # computed, and read from the cache
        cache, store = VectorCache(tmp_path / "vectors.sqlite"), TokenStore(tmp_path / "tokens")
        ranker = TokenRanker(encoder, settings, ["2 0", "0 1"], ["3 2", "4 3"], cache, store)
        assert ranker.nearest(2)[0][1].tolist() == [0, 0]
        assert ranker.scores(1, np.array([1])).tolist() == [0]


@pytest.mark.parametrize(
    ("value", "words"),
    [("hybrid:{}@tokens:0.5", "give the model alone, and --add_bm25"), ("{}@chunks:16", "mines no negatives")],
)
def test_scores_that_mine_nothing_are_refused(model_folder, value, words):
    with pytest.raises(UserError, match=words):
        load_ranker(ModelSpec.parse(value.format(model_folder)), ["a"], ["b"], VectorCache(":memory:"))


class Fixed:
    """A ranker with given scores."""

    def __init__(self, scores):
        self._all = np.asarray(scores, np.float32)

    def nearest(self, k):
        order = np.argsort(-self._all, axis=1)[:, :k]
        return np.take_along_axis(self._all, order, axis=1), order

    def scores(self, query, documents):
        return self._all[query, documents]


def test_candidates_of_two_rankers_come_by_turns_in_the_order_of_the_first():
    ranker = RankerWithWords(Fixed([[9, 8, 7, 6, 5, 4]]), Fixed([[0, 1, 2, 3, 4, 5]]), [set()], 4)
    scores, found = ranker.nearest(4)  # 0, 5, 1, 4 by turns
    assert found.tolist() == [[0, 1, 4, 5]]
    assert scores.tolist() == [[9, 8, 5, 4]]
    assert ranker.scores(0, np.array([3])).tolist() == [6]


def test_vectors_that_are_not_finite_are_refused():
    class Broken(Random):
        def __call__(self, texts, prompt_type):
            return [np.full((1, 6), np.nan)] * len(texts)

    with pytest.raises(UserError, match="NaN or infinite"):
        VectorRanker(Broken(), ["1 0"], ["1 0"], VectorCache(":memory:"))


def test_without_faiss_the_extra_is_named(model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[search\]'"):
        load_ranker(ModelSpec.parse(str(model_folder)), ["a"], ["b"], VectorCache(":memory:"))
