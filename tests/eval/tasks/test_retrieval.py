"""Local folders as tasks: what is judged how, whose data the results say they are from, what is refused how."""

import gzip
import json
import re

import mteb
import pytest
from mteb._create_dataloaders import create_dataloader
from mteb.types import PromptType

from common.errors import UserError
from eval.models.mteb_models import EvaluatedModel
from eval.models.search import Search, WordScores
from eval.tasks.retrieval import get_tasks, load, local_task
from tests.eval.task_files import write_rows

TEXTS = ["one red fox", "two blue whales", "three green frogs"]
QUERIES = ["fox", "whales"]
TITLED = (("A fox", TEXTS[0]), ("", TEXTS[1]), (None, TEXTS[2]))


def evaluate_words(task) -> list[dict]:
    """All scores of BM25."""
    load(task)
    results = mteb.evaluate(Search(WordScores(), EvaluatedModel("bm25").meta), task, cache=None, co2_tracker=False)
    return results.task_results[0].scores["test"]


def test_a_flat_folder_is_one_split_judged_by_ndcg_at_10(make_task):
    task = local_task(make_task("Animals", TEXTS, QUERIES))
    assert (list(task.eval_splits), task.metadata.main_score) == (["test"], "ndcg_at_10")
    load(task)
    split = task.dataset["default"]["test"]
    assert list(split["corpus"]["text"]) == TEXTS
    assert list(split["queries"]["id"]) == ["q0", "q1"]
    assert split["relevant_docs"] == {"q0": {"d0": 1}, "q1": {"d1": 1}}


def test_titles_are_in_front_of_the_texts_for_every_system(make_task):
    """As MTEB joins them for its own tasks, and BEIR for its: title, space, text."""
    titled = [{"doc_id": f"d{i}", "title": title, "text": text} for i, (title, text) in enumerate(TITLED)]
    folder = make_task("Titled", TEXTS, QUERIES)
    plain = local_task(folder).metadata.revision
    write_rows(folder / "corpus.jsonl", titled)
    task = local_task(folder)
    assert task.metadata.revision != plain
    load(task)
    loader = create_dataloader(
        task.dataset["default"]["test"]["corpus"], task_metadata=task.metadata, prompt_type=PromptType.document
    )
    assert list(loader.dataset["text"]) == ["A fox one red fox", "two blue whales", "three green frogs"]
    joined = make_task("Joined", ["A fox one red fox", *TEXTS[1:]], QUERIES)
    scores = [evaluate_words(found) for found in (task, local_task(joined))]
    assert scores[0] == scores[1]


def test_a_judgement_without_a_score_is_one_of_1(make_task):
    folder = make_task("Same", TEXTS, QUERIES)
    plain = local_task(folder).metadata.revision
    for score, same in ((1, True), (1.0, True), (2, False)):
        rows = [{"qid": f"q{i}", "doc_id": f"d{i}", "score": score, "context_length": 256} for i in range(2)]
        write_rows(folder / "qrels.jsonl", rows)
        assert (local_task(folder).metadata.revision == plain) is same


def test_lengths_are_splits_in_their_order_judged_by_ndcg_at_1(make_task):
    for length in (1024, 256, 512):
        folder = make_task("Hidden", TEXTS, QUERIES, split=f"test_{length}")
    task = local_task(folder)
    assert list(task.eval_splits) == ["test_256", "test_512", "test_1024"]
    assert task.metadata.main_score == "ndcg_at_1"


def test_the_revision_is_that_of_the_rows_and_not_of_the_bytes(make_task):
    plain = local_task(make_task("Same", TEXTS, QUERIES)).metadata.revision
    for name, texts, suffix, same in (
        ("Zipped", TEXTS, ".jsonl.gz", True),
        ("Reordered", TEXTS[::-1], ".jsonl", False),
        ("Edited", [*TEXTS[:2], "three green frogs."], ".jsonl", False),
    ):
        revision = local_task(make_task(name, texts, QUERIES, suffix=suffix)).metadata.revision
        assert (revision == plain) is same, name


@pytest.mark.parametrize(
    ("name", "split"), [("LEMBQMSumRetrieval", "test"), ("LEMBSummScreenFDRetrieval", "validation")]
)
def test_a_copy_of_an_official_task_never_carries_the_official_revision(make_task, name, split):
    official = mteb.get_task(name).metadata
    task = local_task(make_task(name, TEXTS, QUERIES))
    assert list(task.eval_splits) == [split] == official.eval_splits
    assert task.metadata.main_score == official.main_score
    assert task.metadata.revision != official.revision
    assert task.metadata.dataset["path"] == f"local/{name}"
    assert official == mteb.get_task(name).metadata  # MTEB's own is untouched


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("corpus", b'{"doc_id": "d0", "text": "a"}\n{"doc_id": "d1", "text": \n', "corpus.jsonl, row 2: is not JSON"),
        ("corpus", b'["d0", "a"]\n', "corpus.jsonl, row 1: is a JSON list"),
        (
            "corpus",
            b'{"doc_id": "d0", "body": "a"}\n',
            "corpus.jsonl, row 1: the column text is missing; it has doc_id, body",
        ),
        ("corpus", b'{"doc_id": "d0", "text": 7}\n', "corpus.jsonl, row 1: text is 7, not a string"),
        ("corpus", b'{"doc_id": "d0", "text": "\\ud800"}\n', "row 1: text has half a surrogate pair"),
        ("corpus", b'{"doc_id": "d0", "text": "\xff"}\n', "corpus.jsonl, row 1: is not JSON"),
        (
            "corpus",
            b'{"doc_id": "d0", "text": "a"}\n\n{"doc_id": "d0", "text": "b"}\n',
            "row 3: the doc_id 'd0' was there",
        ),
        ("corpus", b"", "corpus.jsonl is empty"),
        ("queries", b"\n", "queries.jsonl is empty"),
        ("corpus", b'{"doc_id": "d0", "text": "a", "title": 7}\n', "corpus.jsonl, row 1: title is 7, not a string"),
        (
            "queries",
            b'{"qid": "q0", "text": "a"}\n{"qid": "q1", "text": "a", "instruction": "find"}\n',
            "queries.jsonl, row 2: the field instruction is not read here",
        ),
        ("queries", b'{"qid": "q0", "text": "a", "title": "b"}\n', "queries.jsonl, row 1: the field title is not read"),
        ("qrels", b'{"qid": "q0", "doc_id": "d0", "score": 0.5}\n', "qrels.jsonl, row 1: score is 0.5, not a whole"),
        ("qrels", b'{"qid": "q0", "doc_id": "d0", "score": NaN}\n', "qrels.jsonl, row 1: score is NaN, not a whole"),
        ("qrels", b'{"qid": "q0", "doc_id": "d0", "score": "1"}\n', 'qrels.jsonl, row 1: score is "1", not a whole'),
        ("qrels", b'{"qid": "q0", "doc_id": "d0", "score": null}\n', "qrels.jsonl, row 1: score is null, not a whole"),
        ("qrels", b'{"qid": "q0", "doc_id": "d0", "grade": 2}\n', "row 1: the field grade is not read here; name it"),
        ("qrels", b'{"qid": "q0", "doc_id": "d0", "score": 0}\n', "qrels.jsonl: no score is positive"),
        (
            "qrels",
            b'{"qid": "q0", "doc_id": "d0"}\n{"qid": "q0", "doc_id": "d0", "score": 0}\n',
            "qrels.jsonl, row 2: ('q0', 'd0') has the score 1 before",
        ),
        ("qrels", b"", "qrels.jsonl is empty"),
        ("qrels", b'{"qid": "q0", "doc_id": "d9"}\n', "qrels.jsonl, row 1: the doc_id 'd9' is not in"),
        ("qrels", b'{"qid": "q0", "doc_id": "d0"}\n{"qid": "q9", "doc_id": "d0"}\n', "row 2: the qid 'q9' is not in"),
    ],
)
def test_bad_data_is_told_with_file_and_line(make_task, file, content, words):
    folder = make_task("Bad", TEXTS, QUERIES)
    (folder / f"{file}.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)) as told:
        local_task(folder)
    assert "\n" not in str(told.value)


def test_a_torn_gzip_file_is_told(make_task):
    folder = make_task("Torn", TEXTS, QUERIES, suffix=".jsonl.gz")
    file = folder / "corpus.jsonl.gz"
    rows = "".join(json.dumps({"doc_id": f"d{i}", "text": str(i)}) + "\n" for i in range(10_000))
    file.write_bytes(gzip.compress(rows.encode())[:5_000])
    with pytest.raises(UserError, match=r"corpus.jsonl.gz: cannot be read"):
        local_task(folder)


def test_what_is_not_there_is_told_with_what_is(make_task, tmp_path):
    folder = make_task("Here", TEXTS, QUERIES)
    data = str(tmp_path / "data")
    with pytest.raises(UserError, match=r"There holds no task .* has Here"):
        get_tasks(["There"], data)
    with pytest.raises(UserError, match="is not a folder"):
        get_tasks([], data + "/nowhere")
    (folder / "qrels.jsonl").unlink()
    with pytest.raises(UserError, match=r"qrels.jsonl and qrels.jsonl.gz: neither is there"):
        get_tasks([], data)
    with pytest.raises(UserError, match="MTEB has no task 'LEMBQMSum'"):
        get_tasks(["LEMBQMSum"], None)


def test_hub_data_that_cannot_be_had_is_told(tmp_path, monkeypatch):
    (task,) = get_tasks(["LEMBPasskeyRetrieval"], None)
    monkeypatch.setattr(task, "load_data", _offline)
    with pytest.raises(UserError, match=r"the data of LEMBPasskeyRetrieval .* give --data_dir"):
        load(task)


def _offline():
    raise ConnectionError("Couldn't reach the Hub (offline mode is enabled).")
