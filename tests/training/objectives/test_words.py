"""BM25 of the texts of a batch against bm25s over the whole corpus."""

import json

import datasets
import numpy as np
import pytest

from common.bm25 import BM25Index
from common.errors import UserError
from tests.training.tiny_training import random_documents, random_pairs
from training.data.sources import Source
from training.objectives.contrastive.words import BatchWords, read_words


def source(rows: list[dict[str, str]], *columns: str) -> Source:
    return Source("rows", datasets.Dataset.from_list(rows), columns)


@pytest.mark.promise("T21")
def test_the_scores_are_those_of_the_corpus_restricted_to_the_candidates():
    """The corpus is the documents of all columns and sources, each counted once; queries are not in it."""
    rows, others = random_pairs(30, negatives=1), random_documents(12)
    rows += rows[:7]  # the same documents again
    columns = ("anchor", "positive", "negative_0")
    corpus = [row[name] for row in rows for name in columns[1:]] + [row["text"] for row in others]
    index = BM25Index(distinct := list(dict.fromkeys(corpus)))
    words = BatchWords(read_words([source(rows, *columns), source(others, "text", "text"), source(others, "text")]))
    assert words.corpus.texts == len(distinct) < len(corpus)
    batch = [[row[name] for row in rows[4:9]] for name in columns]
    places = [distinct.index(text) for column in batch[1:] for text in column]
    expected = np.stack([index.scores(query)[places] for query in batch[0]])
    assert (expected > 0).any()
    np.testing.assert_allclose(words(batch).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_documents_without_words_are_refused():
    with pytest.raises(UserError, match=r"none of the 1 documents has a word .* leave it out"):
        read_words([source([{"text": "the"}], "text")])


@pytest.mark.parametrize("data", ["pairs", "neighbours", "simcse"])
def test_a_run_learns_from_both_scores(train_contrastive, documents_file, tmp_path, data):
    """Of labelled pairs with hard negatives, of pairs made of documents, and of texts and their twins."""
    options = {
        "pairs": "",
        "neighbours": f"--pairs neighbours --train_data {documents_file} --pair_window 40 ",
        "simcse": f"--objective simcse --pairs twins --train_data {documents_file} ",
    }[data]
    options += "--teach_vector_by maxsim --objective_weight 0 --max_steps 1 "
    taught = []
    for weight in (0, 0.5):
        out = train_contrastive(f"{options} --teach_bm25_weight {weight}", str(weight))
        taught.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["teach"])
    assert taught[0] != taught[1] > 0
