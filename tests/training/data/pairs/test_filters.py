"""Filters: near-duplicates against exact Jaccard similarities, short documents, and leakage."""

import random
import sys
import tracemalloc

import datasets
import pytest

from common.errors import UserError
from tests.training.tiny_training import random_documents, write_jsonl
from training.data.pairs.filters import FilterArguments, NearDuplicates, filtered, leakage_files, report_leakage
from training.data.sources import Source
from training.objectives import pair_data


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


def test_what_is_kept_of_a_document_is_a_number_a_shingle():
    pytest.importorskip("datasketch")
    draw = random.Random(0)
    text = " ".join(str(draw.randrange(10**6)) for _ in range(20000))
    is_new = NearDuplicates(0.7)
    is_new("what is imported and prepared does not count")
    tracemalloc.start()
    try:
        assert is_new(text)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 12 * 20000  # bytes; a set of Python's integers takes 70 a shingle


def test_what_is_left_out_is_counted(word_tokenizer, tokenized):
    pytest.importorskip("datasketch")
    logged: list[str] = []
    long = [row["text"] for row in random_documents(30) if len(row["text"].split()) >= 20]
    texts = ["river stone", *long, long[0] + " river"]
    arguments = FilterArguments(near_duplicates=0.7, min_tokens=20)
    (left,) = filtered([source(texts)], arguments, word_tokenizer, logged.append)
    assert [*map(len, tokenized)].count(len(texts)) == 1  # at once
    assert [texts[row] for row in left] == long
    assert logged == [
        f"documents: 1 of {len(texts)} documents have fewer than 20 tokens: left out",
        f"documents: 1 of {len(texts) - 1} documents are near-duplicates of an earlier document: left out",
    ]
    with pytest.raises(UserError, match="all 1 documents have fewer than 20 tokens"):
        filtered([source(texts[:1])], arguments, word_tokenizer, logged.append)


def test_tokens_are_counted_without_special_ones_and_only_as_far_as_they_matter(word_tokenizer, tokenized):
    sizes = [*range(17, 24), 20_000]
    texts = [" ".join(["river"] * size) for size in sizes]
    (left,) = filtered([source(texts)], FilterArguments(min_tokens=20), word_tokenizer, lambda line: None)
    assert [sizes[row] for row in left] == [20, 21, 22, 23, 20_000]
    assert max(len(text) for call in tokenized for text in call) < 1000


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
    report_leakage(leakage_files(str(tmp_path)), [source([" ".join(words), "nothing else"])], logged.append)
    expected = "1 of 2 rows of 13 words or more share 13 words with the training data, the first of them row 2"
    assert logged == [f"{path}: {expected}"]
    with pytest.raises(UserError, match="--check_leakage"):
        leakage_files(str(tmp_path / "nowhere"))
    report_leakage(leakage_files(str(path)), [], logged.append)  # a file by itself
    assert logged[-1] == f"{path}: 0 of 2 rows of 13 words or more share 13 words with the training data"


def similar_pairs() -> list[dict[str, str]]:
    """Pairs whose documents have 16 shingles each, but for the last; what they share with the first is known."""
    words = [f"w{number}" for number in range(20)]
    last, middle = [*words[:19], "other"], [*words[:9], "other", *words[10:]]
    others = [[f"{letter}{number}" for number in range(20)] for letter in "xyz"]
    documents = [
        words,
        words,  # another query of the same document: it stays
        last,  # 15 of 17 shingles in common: 0.88
        middle,  # 11 of 21: 0.52
        *others,
        words[:5],  # 1 of 16, and 5 tokens
    ]
    return [{"anchor": f"query {row}", "positive": " ".join(text)} for row, text in enumerate(documents)]


@pytest.fixture
def trained_on(train_contrastive, tmp_path, monkeypatch):
    """Train on `similar_pairs` with some options; returns the numbers of the rows that are trained on, from 0."""
    rows, seen, whole = write_jsonl(tmp_path / "similar.jsonl", similar_pairs()), [], pair_data.PairBatches

    def batches(sources, *args, **kwargs):
        seen.append({int(text.split()[1]) for text in sources[0].rows["anchor"][:]})
        return whole(sources, *args, **kwargs)

    monkeypatch.setattr(pair_data, "PairBatches", batches)

    def run(options: str) -> set[int]:
        given = f"--train_data {rows} --max_steps 1 --per_device_train_batch_size 2 "
        train_contrastive(given + options, output=f"out{len(seen)}")
        return seen[-1]

    return run


def test_the_script_leaves_out_and_counts(trained_on, tmp_path, capsys):
    pytest.importorskip("datasketch")
    words = {"text": similar_pairs()[0]["positive"]}
    leak = write_jsonl(tmp_path / "task.jsonl", [words, {"text": " ".join(["new"] * 20)}])
    given = f"--near_duplicates 0.7 --min_tokens 6 --check_leakage {leak}"
    assert trained_on(given) == {0, 1, 3, 4, 5, 6}
    said, name = capsys.readouterr().err, tmp_path / "similar.jsonl"
    assert f"{name}: 1 of 8 documents have fewer than 6 tokens: left out\n" in said
    assert f"{name}: 1 of 7 documents are near-duplicates of an earlier document: left out\n" in said
    shared = "1 of 2 rows of 13 words or more share 13 words with the training data, the first of them row 1"
    assert f"{leak}: {shared}\n" in said
    assert trained_on("--near_duplicates 0.5 --min_tokens 5") == {0, 1, 4, 5, 6, 7}
    assert trained_on("--near_duplicates 0.9") == set(range(8))


def test_no_near_duplicate_of_a_held_out_document_is_trained_on(trained_on):
    pytest.importorskip("datasketch")
    for seed in range(3):  # row 2 is in neither part, wherever rows 0 and 1 are
        left = trained_on(f"--near_duplicates 0.7 --eval_split 0.4 --eval_split_seed {seed}")
        assert 2 not in left
        assert 0 < len(left) < 7
        assert (0 in left) == (1 in left)


def test_a_resumed_run_has_the_same_filters(trained_on, tmp_path):
    assert 7 not in trained_on("--min_tokens 6 --max_steps 2 --save_steps 1")
    with pytest.raises(UserError, match="min_tokens"):
        trained_on(f"--min_tokens 5 --max_steps 2 --resume_from_checkpoint {tmp_path}/out0/checkpoints/step-1")


def test_without_datasketch_it_is_said_what_to_install(trained_on, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"^--near_duplicates needs datasketch: pip install -e '.\[dedup\]'$"):
        trained_on("--near_duplicates 0.7")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--streaming --near_duplicates 0.7", "--near_duplicates.* without --streaming"),
        ("--streaming --min_tokens 6", "--min_tokens.* without --streaming"),
        ("--streaming --check_leakage .", "--check_leakage.* without --streaming"),
        ("--near_duplicates 1", "near-duplicates: 1: must be"),
        ("--min_tokens -1", "min-tokens: -1: must be"),
        ("--check_leakage nowhere", "--check_leakage nowhere: no .jsonl"),
    ],
)
def test_a_filter_that_cannot_work_is_refused(trained_on, options, complaint):
    with pytest.raises(UserError, match=complaint):
        trained_on(options)
