"""Intervals over queries: as scipy's bootstrap and closed forms give them, of scores that other libraries give too."""

import mteb
import numpy as np
import pytest
from scipy.stats import binom, bootstrap, norm
from sklearn.metrics import ndcg_score

from common.errors import UserError
from eval.report.intervals import interval, interval_markdown
from eval.report.results import Score
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval
from eval.tasks.query_scores import noting_query_scores
from eval.tasks.retrieval import load, local_task
from tests.eval.report.test_results import Known

TEXTS = [
    f"The {animal} of the {place} is seen at night." for animal in ("fox", "owl", "bat") for place in ("hill", "lake")
]


def test_the_interval_is_the_one_of_scipy():
    values = np.random.default_rng(0).beta(0.5, 0.3, 200)
    theirs = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", batch=500).confidence_interval
    assert interval([values]) == pytest.approx(tuple(theirs), abs=0.02 * (theirs.high - theirs.low))


@pytest.mark.parametrize(("queries", "right"), [(50, 31), (281, 267)])
def test_the_interval_of_hits_is_the_binomial_one(queries, right):
    """The number of hits among queries drawn with replacement is binomial."""
    hits = np.arange(queries) < right
    expected = binom.ppf([0.025, 0.975], queries, right / queries) / queries
    assert interval([hits.astype(float)]) == pytest.approx(expected, abs=1.01 / queries)  # one query


def test_tasks_count_alike_in_the_interval_of_their_mean():
    generator = np.random.default_rng(1)
    samples = [generator.normal(0.6, 0.2, 300), generator.normal(0.9, 0.1, 40), generator.normal(0.5, 0.3, 100)]
    mean, error = np.mean([x.mean() for x in samples]), np.sqrt(sum(x.var() / len(x) for x in samples)) / 3
    expected = norm.interval(0.95, mean, error)
    assert interval(samples) == pytest.approx(expected, abs=0.1 * error)


def score(model: str, values, task: str = "Words", **changes) -> Score:
    of_queries = {f"q{number}": float(value) for number, value in values}
    return Score(model, task, "test", 50.0, queries=of_queries, **changes)


def test_a_difference_is_drawn_on_the_same_queries():
    """A model that is better by 2 on each query is better for certain, however much the scores vary; as is the mean."""
    values = list(enumerate(np.random.default_rng(2).uniform(0, 90, 30)))
    better = [(number, value + 2) for number, value in reversed(values)]
    both = [score(model, found, task) for model, found in (("A", values), ("B", better)) for task in ("X", "Y")]
    assert (
        interval_markdown(both).splitlines()[-1]
        == "| B less A | +2.0 (+2.0 to +2.0)" + " | +2.0 (+2.0 to +2.0)" * 2 + " |"
    )
    lines = interval_markdown([each for each in both if each.task == "X"]).splitlines()
    assert lines[0] == "| 95% intervals | X |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| A", "| B", "| B less A"]
    low, high = map(float, lines[2].split(" | ")[1].rstrip(" |").split(" to "))
    assert high - low > 10


def test_the_scores_of_queries_are_scikit_learns(make_task):
    generator = np.random.default_rng(3)
    scores = generator.permuted(np.tile(np.arange(6.0), (6, 1)), axis=1)
    task = local_task(make_task("Judged", TEXTS, TEXTS))
    load(task)
    with noting_query_scores(task) as noted:
        result = mteb.evaluate(Known(scores), task, cache=None, co2_tracker=False, show_progress_bar=False)
    expected = {f"q{q}": ndcg_score([np.eye(6)[q]], [scores[q]], k=10) for q in range(6)}
    assert noted == {"test": pytest.approx(expected)}
    assert result.task_results[0].scores["test"][0]["main_score"] == pytest.approx(
        np.mean(list(expected.values())), abs=1e-5
    )
    assert "task_specific_scores" not in vars(task)


def test_results_keep_the_scores_of_queries(make_task, tmp_path, monkeypatch):
    """Of both splits, read back as they were measured; other metrics have none, which is said."""
    make_task("Animals", TEXTS, ["fox hill", "fox", "owl lake", "lake"], split="test_64")
    make_task("Animals", TEXTS, ["lake", "fox lake"], split="test_128")
    arguments = RetrievalArguments(model=["bm25"], output_dir=str(tmp_path / "r"), data_dir=str(tmp_path / "data"))
    first = evaluate_retrieval(arguments)
    for each, count in zip(first, (4, 2), strict=True):
        assert len(each.queries) == count
        assert each.value == pytest.approx(np.mean(list(each.queries.values())), abs=1e-3)
        assert set(each.queries.values()) == {0.0, 100.0}  # nDCG@1
    monkeypatch.setattr("eval.tasks.evaluation.mteb.evaluate", None)
    assert evaluate_retrieval(arguments) == first
    arguments.metrics = ["ndcg_at_1", "mrr_at_10"]
    main, other, *_ = evaluate_retrieval(arguments)
    assert (main.queries, other.queries) == (first[0].queries, {})
    with pytest.raises(UserError, match="--intervals: Animals keeps no mrr_at_10 of each query"):
        interval_markdown([main, other])
