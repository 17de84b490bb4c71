"""Filters: near-duplicates against exact Jaccard similarities, short documents, and leakage."""

import random

import datasets
import pytest

from common.errors import UserError
from tests.training.tiny_training import random_documents, write_jsonl
from training.data.filters import FilterArguments, NearDuplicates, filtered, report_leakage
from training.data.sources import Source


def source(texts: list[str]) -> Source:
    return Source("documents", datasets.Dataset.from_dict({"text": texts}), ("text",))


def changed_documents(seed: int) -> list[str]:
    """Documents of 80 random numbers and their copies with some numbers changed."""
    draw, texts = random.Random(seed), []
    for _ in range(12):
        words = [str(draw.randrange(10**6)) for _ in range(80)]
        texts.append(" ".join(words))
        for changes in (0, 1, 2, 3, 5, 12):
            copy = list(words)
            for place in draw.sample(range(80), changes):
                copy[place] = "changed"
            texts.append(" ".join(copy))
    draw.shuffle(texts)
    return texts


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_those_of_the_exact_similarity(seed):
    pytest.importorskip("datasketch")

    def shingles(text):
        words = text.split()
        return {tuple(words[start : start + 5]) for start in range(len(words) - 4)}

    texts, kept = changed_documents(seed), []
    for text in texts:
        own = shingles(text)
        if all(len(own & shingles(other)) / len(own | shingles(other)) <= 0.7 for other in kept):
            kept.append(text)
    is_new = NearDuplicates(0.7)
    assert [text for text in texts if is_new(text)] == kept
    assert 12 < len(kept) < len(texts)


def test_what_is_left_out_is_counted(word_tokenizer):
    pytest.importorskip("datasketch")
    logged: list[str] = []
    long = [row["text"] for row in random_documents(30) if len(row["text"].split()) >= 20]
    texts = ["river stone", *long, long[0] + " river"]
    arguments = FilterArguments(near_duplicates=0.7, min_tokens=20)
    (left,) = filtered([source(texts)], arguments, word_tokenizer, logged.append)
    assert left.rows["text"][:] == long
    assert logged == [
        f"documents: 1 of {len(texts)} documents have fewer than 20 tokens: left out",
        f"documents: 1 of {len(texts) - 1} documents are near-duplicates of an earlier document: left out",
    ]
    with pytest.raises(UserError, match="all 1 documents have fewer than 20 tokens"):
        filtered([source(texts[:1])], arguments, word_tokenizer, logged.append)


def test_leakage_counts_the_rows_that_share_thirteen_words(tmp_path):
    words = [f"w{number}" for number in range(40)]
    rows = [
        {"id": "a", "text": " ".join(words[:12] + ["other"] * 5)},  # 12 words of the training data
        {"id": "b", "text": " ".join(["other", *words[20:33]]).upper() + "!"},  # 13 of them
        {"id": "c", "text": " ".join(words[:5])},  # too short to be looked at
    ]
    (tmp_path / "task").mkdir()
    path = write_jsonl(tmp_path / "task" / "corpus.jsonl", rows)
    logged: list[str] = []
    report_leakage(str(tmp_path), [source([" ".join(words), "nothing else"])], logged.append)
    expected = "1 of 2 rows of 13 words or more share 13 words with the training data, the first of them row 2"
    assert logged == [f"{path}: {expected}"]
    with pytest.raises(UserError, match="--check_leakage"):
        report_leakage(str(tmp_path / "nowhere"), [], logged.append)
