"""Results: the metric is the one of two other libraries, files are whole, and stale ones are not taken for current."""

import json
import os

import mteb
import numpy as np
import pytest
import pytrec_eval
from matplotlib.figure import Figure
from sklearn.metrics import ndcg_score

from common.errors import UserError
from eval.models.mteb_models import EvaluatedModel
from eval.report.length_plot import draw_scores
from eval.report.results import AtomicResultCache, Score, as_markdown, as_table, pivot, read_scores
from eval.tasks.retrieval import load, local_task
from tests.eval.task_files import write_rows


class Known:
    """A model of MTEB's search protocol whose scores are given."""

    def __init__(self, scores: np.ndarray, name: str = "test/known"):
        self.scores = scores
        self.mteb_model_meta = EvaluatedModel("bm25").meta.model_copy(update={"name": name})
        self.searched = 0

    def index(self, corpus, **kwargs):
        self.ids = list(corpus["id"])

    def search(self, queries, **kwargs):
        self.searched += 1
        return {
            query: dict(zip(self.ids, map(float, self.scores[int(query[1:])]), strict=True)) for query in queries["id"]
        }


def evaluate(model, task, cache=None, **kwargs):
    load(task)
    return mteb.evaluate(model, task, cache=cache, co2_tracker=False, show_progress_bar=False, **kwargs).task_results[0]


@pytest.mark.promise("E1")
@pytest.mark.parametrize("seed", range(5))
def test_ndcg_equals_scikit_learn_and_trec_eval(make_task, seed):
    generator = np.random.default_rng(seed)
    queries, documents = 12, 40
    relevant = generator.random((queries, documents)) < 0.08
    relevant[np.arange(queries), generator.integers(0, documents, queries)] = True
    scores = generator.permuted(np.tile(np.linspace(0, 1, documents), (queries, 1)), axis=1)
    texts = [f"text {i}" for i in range(documents)]
    pairs = [(q, d) for q, d in np.argwhere(relevant).tolist()]
    task = local_task(make_task("Judged", texts, texts[:queries], qrels=pairs))
    (found,) = evaluate(Known(scores), task).scores["test"]
    for k in (1, 3, 10):
        assert found[f"ndcg_at_{k}"] == pytest.approx(ndcg_score(relevant, scores, k=k), abs=1e-5)  # MTEB rounds to 5
    qrels = {f"q{q}": {f"d{d}": 1 for d in np.flatnonzero(relevant[q])} for q in range(queries)}
    run = {f"q{q}": {f"d{d}": float(scores[q, d]) for d in range(documents)} for q in range(queries)}
    judged = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    assert found["main_score"] == pytest.approx(np.mean([q["ndcg_cut_10"] for q in judged.values()]), abs=1e-5)


@pytest.mark.promise("E1")
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_grades_as_in_trec_eval(make_task, seed):
    """Explicit zeros are not relevant, grades are gains, and a query with zeros alone counts as one without success."""
    generator = np.random.default_rng(seed)
    queries, documents = 8, 30
    grades = np.where(generator.random((queries, documents)) < 0.3, generator.integers(0, 4, (queries, documents)), -1)
    grades[:, 0] = 0  # a judgement for every query
    grades[1:, 1], grades[0] = 3, np.minimum(grades[0], 0)  # nothing is relevant for the first query
    scores = generator.permuted(np.tile(np.linspace(0, 1, documents), (queries, 1)), axis=1)
    texts = [f"text {i}" for i in range(documents)]
    folder = make_task("Graded", texts, texts[:queries])
    qrels = {f"q{q}": {f"d{d}": int(grades[q, d]) for d in np.flatnonzero(grades[q] >= 0)} for q in range(queries)}
    rows = [{"qid": q, "doc_id": d, "score": grade} for q, found in qrels.items() for d, grade in found.items()]
    write_rows(folder / "qrels.jsonl", rows)
    (found,) = evaluate(Known(scores), local_task(folder)).scores["test"]
    run = {f"q{q}": {f"d{d}": float(scores[q, d]) for d in range(documents)} for q in range(queries)}
    judged = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10", "recip_rank"}).evaluate(run)
    for ours, theirs in (("ndcg_at_10", "ndcg_cut_10"), ("recall_at_10", "recall_10")):
        assert found[ours] == pytest.approx(np.mean([q[theirs] for q in judged.values()]), abs=1e-5)
    gains = np.maximum(grades[1:], 0)
    assert found["ndcg_at_10"] * queries == pytest.approx(
        (queries - 1) * ndcg_score(gains, scores[1:], k=10), abs=1e-3
    )  # scikit-learn, without the first query, which has none


def test_a_perfect_ranking_is_perfect_whatever_else_was_judged(make_task):
    texts = [f"text {i}" for i in range(6)]
    folder = make_task("Zeros", texts, texts[:2])
    rows = [{"qid": f"q{q}", "doc_id": f"d{d}", "score": 2 * (q == d)} for q in range(2) for d in range(6)]
    write_rows(folder / "qrels.jsonl", rows)
    (found,) = evaluate(Known(np.eye(6)[:2]), local_task(folder)).scores["test"]
    assert found["ndcg_at_10"] == 1.0


@pytest.mark.promise("E1")
def test_the_score_of_a_toy_task_is_the_one_worked_out_by_hand(make_task):
    """Ranks 1, 2 and 4 of the one relevant document: (1 + 1/log2(3) + 1/log2(5)) / 3."""
    texts = [f"text {i}" for i in range(5)]
    scores = np.array([[5, 4, 3, 2, 1], [5, 4, 3, 2, 1], [5, 4, 1, 3, 2.5]])
    scores[2] = [5, 4, 2, 3, 1]
    task = local_task(make_task("Toy", texts, texts[:3]))
    (found,) = evaluate(Known(scores), task).scores["test"]
    assert found["main_score"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(5)) / 3, abs=1e-5)


def test_the_files_are_mtebs_own(make_task, tmp_path):
    texts = ["a", "b", "c"]
    task, model = local_task(make_task("Own", texts, texts)), Known(np.eye(3))
    ours, theirs = AtomicResultCache(tmp_path / "ours"), mteb.ResultCache(tmp_path / "theirs")
    for cache in (ours, theirs):
        evaluate(model, task, cache)
    folders = [cache.get_task_result_path("Own", model.mteb_model_meta).parent for cache in (ours, theirs)]
    assert {f.name for f in folders[0].iterdir()} == {f.name for f in folders[1].iterdir()}
    assert (folders[0] / "run_settings.jsonl").read_bytes() == (folders[1] / "run_settings.jsonl").read_bytes()
    results = [json.loads((folder / "Own.json").read_text()) for folder in folders]
    for result in results:
        for volatile in ("date", "evaluation_time", "evaluation_phases"):
            result.pop(volatile, None)
    assert results[0] == results[1]
    assert results[0]["dataset_revision"].startswith("local-")


def test_a_finished_split_is_not_run_again(make_task, tmp_path):
    texts = ["a", "b", "c"]
    cache, model = AtomicResultCache(tmp_path / "r"), Known(np.eye(3))
    folder = make_task("Grows", texts, texts, split="test_128")
    make_task("Grows", texts, texts, split="test_256")
    task = local_task(folder)
    assert not cache.is_complete(task, model.mteb_model_meta)
    evaluate(model, task, cache)
    assert model.searched == 2
    path = cache.get_task_result_path("Grows", model.mteb_model_meta)
    result = json.loads(path.read_text())
    del result["scores"]["test_256"]  # as a kill between the two splits leaves it
    path.write_text(json.dumps(result))
    assert not cache.is_complete(local_task(folder), model.mteb_model_meta)
    evaluate(model, local_task(folder), cache)
    assert model.searched == 3
    assert cache.is_complete(task, model.mteb_model_meta)


def test_results_of_other_data_are_not_current(make_task, tmp_path):
    texts = ["a", "b", "c"]
    cache, model = AtomicResultCache(tmp_path / "r"), Known(np.eye(3))
    evaluate(model, local_task(make_task("Changing", texts, texts)), cache)
    changed = local_task(make_task("Changing", [*texts[:2], "d"], texts))
    assert not cache.is_current(changed, model.mteb_model_meta)
    assert not cache.is_complete(changed, model.mteb_model_meta)


def test_a_failed_write_leaves_the_old_result(make_task, tmp_path, monkeypatch):
    texts = ["a", "b", "c"]
    task, cache, model = local_task(make_task("Old", texts, texts)), AtomicResultCache(tmp_path / "r"), Known(np.eye(3))
    evaluate(model, task, cache)
    path = cache.get_task_result_path("Old", model.mteb_model_meta)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        evaluate(model, task, cache, overwrite_strategy="always")
    assert path.read_bytes() == before
    assert not [file for file in path.parent.iterdir() if ".tmp-" in file.name]


def test_scores_are_read_back_into_the_table_and_the_plot(make_task, tmp_path):
    texts = [f"text {i}" for i in range(4)]
    cache = AtomicResultCache(tmp_path / "r")
    flat = local_task(make_task("FlatRetrieval", texts, texts))
    for length in (256, 1024, 128):
        folder = make_task("LongRetrieval", texts, texts, split=f"test_{length}")
    for name, scores in (("test/all", np.eye(4)), ("test/none", -np.eye(4))):
        for task in (flat, local_task(folder)):
            evaluate(Known(scores, name), task, cache)
    found = read_scores(tmp_path / "r")
    columns, rows = pivot(found)
    assert columns == ["Flat", "Long 128", "Long 256", "Long 1024"]
    assert rows == {"test/all": [100.0] * 4, "test/none": [pytest.approx(100 / np.log2(5), abs=1e-3), 0.0, 0.0, 0.0]}
    assert as_markdown(found).splitlines()[2] == "| test/all | 100.0 | 100.0 | 100.0 | 100.0 |"
    assert as_table(found).row_count == 2
    draw_scores(found, tmp_path / "report.png", {"test/all": "sees all"})
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    for part in ([s for s in found if s.length], [s for s in found if not s.length], [Score("m", "t", "test", 5.0)]):
        draw_scores(part, tmp_path / "report.png")


def test_two_models_of_one_name_are_two_in_the_plot_and_one_model_keeps_its_name(make_task, tmp_path, monkeypatch):
    texts = [f"text {i}" for i in range(4)]
    cache = AtomicResultCache(tmp_path / "r")
    task = local_task(make_task("FlatRetrieval", texts, texts))
    for revision, scores in (("1" * 40, np.eye(4)), ("2" * 40, -np.eye(4))):
        model = Known(scores, "local/final")
        model.mteb_model_meta = model.mteb_model_meta.model_copy(update={"revision": revision})
        evaluate(model, task, cache)
    evaluate(Known(np.eye(4), "local/other"), task, cache)
    found = read_scores(tmp_path / "r")
    assert [score.model for score in found] == ["local/final 1111111", "local/final 2222222", "local/other"]
    assert [score.value for score in found] == [100.0, pytest.approx(100 / np.log2(5), abs=1e-3), 100.0]
    drawn: list[str] = []
    legend = Figure.legend
    monkeypatch.setattr(Figure, "legend", lambda *a, **k: drawn.extend(a[2]) or legend(*a, **k))
    draw_scores(found, tmp_path / "report.png")
    assert drawn == [score.model for score in found]


def test_a_folder_without_results_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        read_scores(tmp_path)
    with pytest.raises(UserError, match="no scores to draw"):
        draw_scores([], tmp_path / "report.png")


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff", b"{", b"[" * 100_000])
def test_a_damaged_result_is_named(tmp_path, content):
    for damaged, whole in (("model_meta.json", "Task.json"), ("Task.json", "model_meta.json")):
        (tmp_path / whole).write_text('{"name": "m", "scores": {}, "date": 0, "task_name": "Task"}')
        (tmp_path / damaged).write_bytes(content)
        with pytest.raises(UserError, match="is no result of MTEB, which an evaluation writes again") as refused:
            if not read_scores(tmp_path):
                pytest.fail("read")
        assert "\n" not in str(refused.value)
