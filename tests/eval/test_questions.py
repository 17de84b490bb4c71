"""Questions with long answers: the task that comes of them, and its scores, against counting ranks by hand."""

import json
import re
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sklearn.metrics import top_k_accuracy_score

from common.errors import UserError, run
from common.jsonl import read_text_columns
from eval import questions
from eval.questions import Arguments, write_question_task
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval
from eval.tasks.retrieval import local_task

ANIMALS = "fox whale frog heron badger otter salmon eagle beetle mole".split()  # noqa: SIM905
ROWS = [
    {"question": f"where does the {animal} live", "long_answer": f"The {animal} lives in the wood, near {other}s. " * 3}
    for animal, other in zip(ANIMALS, ANIMALS[::-1], strict=True)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@hypothesis.settings(max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    pairs=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyzuv")), min_size=1, max_size=9),
    skipped=st.integers(0, 8),
)
def test_each_question_finds_all_of_its_answers_among_those_of_all_rows(tmp_path, pairs, skipped):
    hypothesis.assume(skipped < len(pairs))
    data = write(tmp_path / "q.jsonl", [{"question": q, "long_answer": a, "title": 1} for q, a in pairs])
    folder = tmp_path / "Questions"
    counts = write_question_task(Arguments(data, str(folder), skipped))
    local_task(folder)  # unique ids that refer to what is there
    corpus, queries = (
        dict(row for _, row in read_text_columns(folder / f"{name}.jsonl.gz", key, "text"))
        for name, key in (("corpus", "doc_id"), ("queries", "qid"))
    )
    judged = [(queries[q], corpus[d]) for _, (q, d) in read_text_columns(folder / "qrels.jsonl.gz", "qid", "doc_id")]
    assert sorted(judged) == sorted(set(pairs[skipped:]))
    assert sorted(corpus.values()) == sorted({answer for _, answer in pairs})
    assert counts == (len(queries), len(corpus)) == (len({q for q, _ in pairs[skipped:]}), len({a for _, a in pairs}))


@pytest.mark.promise("E1")
def test_top_1_top_5_and_mrr_are_those_of_scikit_learn_and_of_the_ranks(
    tiny_sentence_transformer, tmp_path, monkeypatch, capsys
):
    data = write(tmp_path / "q.jsonl", ROWS)
    write_question_task(Arguments(data, str(tmp_path / "data" / "Animals"), judge_from=3))
    metrics = ["hit_rate_at_1", "hit_rate_at_5", "mrr_at_10"]
    arguments = RetrievalArguments(
        [str(tiny_sentence_transformer)], str(tmp_path / "r"), data_dir=str(tmp_path / "data"), metrics=metrics
    )
    found = {score.metric: score.value for score in evaluate_retrieval(arguments)}
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu")
    model.max_seq_length = 64
    asked = model.encode_query([row["question"] for row in ROWS[3:]])
    scores = asked @ model.encode_document([row["long_answer"].strip() for row in ROWS]).T
    gold = np.arange(3, len(ROWS))
    for k in (1, 5):
        expected = top_k_accuracy_score(gold, scores, k=k, labels=np.arange(len(ROWS)))
        assert found[f"hit_rate_at_{k}"] == pytest.approx(100 * expected, abs=1e-2)  # MTEB rounds to 5 digits
    ranks = 1 + (scores > scores[np.arange(len(gold)), gold][:, None]).sum(1)
    assert 1 < ranks.mean() < 10  # a random model: neither all right nor all wrong
    assert found["mrr_at_10"] == pytest.approx(100 * (1 / ranks).mean(), abs=1e-2)


def test_a_metric_that_is_not_there_is_told_with_those_near_it(tmp_path):
    write_question_task(Arguments(write(tmp_path / "q.jsonl", ROWS), str(tmp_path / "data" / "Animals")))
    arguments = RetrievalArguments(
        ["bm25"], str(tmp_path / "r"), data_dir=str(tmp_path / "data"), metrics=["hitrate_at_1"]
    )
    with pytest.raises(UserError, match=r"Animals has no metric 'hitrate_at_1'; near it are .*hit_rate_at_1"):
        evaluate_retrieval(arguments)


@pytest.mark.parametrize(
    ("rows", "judge_from", "words"),
    [
        ([{"question": "who", "long_answer": "x"}], 1, "--judge_from 1: .* has 1 rows; give fewer than that"),
        ([{"question": "who", "long_answer": "x"}, {"question": "who", "long_answer": " "}], 0, "row 2: .* is empty"),
        ([{"question": "who", "long_answer": None}], 0, "row 1: long_answer is null, not a string"),
        ([{"question": "who"}], 0, "row 1: the column long_answer is missing"),
    ],
)
def test_bad_rows_are_told_and_leave_no_task(tmp_path, monkeypatch, capsys, rows, judge_from, words):
    data = write(tmp_path / "q.jsonl", rows)
    argv = ["questions", "--data", data, "--output_dir", str(tmp_path / "T"), "--judge_from", str(judge_from)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as left:
        run(questions.main)
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert len(error.splitlines()) == 1
    assert re.search(words, error)
    assert not (tmp_path / "T").exists()
