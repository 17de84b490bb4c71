"""Results in the Hub's two formats: those that MTEB's own writers and huggingface_hub's readers know."""

import json
import warnings

import mteb
import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, eval_result_entries_to_yaml
from mteb._hf_integration.eval_result_model import HFEvalResults
from mteb.results import TaskResult

from common.errors import UserError
from eval.report.hub_results import as_scores, benchmark_entries, described, model_index, read_task_scores

PASSKEY = "LEMBPasskeyRetrieval"


def write_result(folder, model, task, splits, settings=None, revision=None, date=1.7e9):
    """Results of a model on a task, as an evaluation leaves them; the revision is that of MTEB's task."""
    place = folder / "results" / model.replace("/", "__") / str(hash(str(settings)))
    place.mkdir(parents=True, exist_ok=True)
    (place / "model_meta.json").write_text(json.dumps({"name": model, "experiment_kwargs": settings}))
    scores = {
        split: [{"main_score": value, "hf_subset": "default", "languages": ["eng-Latn"]}]
        for split, value in splits.items()
    }
    content = {
        "dataset_revision": revision or mteb.get_task(task).metadata.revision,
        "task_name": task,
        "mteb_version": "2.26.24",
        "scores": scores,
        "evaluation_time": 1.0,
        "kg_co2_emissions": None,
        "date": date,
    }
    (place / f"{task}.json").write_text(json.dumps(content))
    return place / f"{task}.json"


@pytest.fixture
def passkey(tmp_path):
    splits = mteb.get_task(PASSKEY).eval_splits
    return write_result(tmp_path, "local/tiny", PASSKEY, {split: 0.5 + n / 100 for n, split in enumerate(splits)})


@pytest.mark.promise("X8")
def test_benchmarks_are_written_as_mteb_writes_them(passkey, tmp_path):
    """Oracle: what `ModelMeta.push_eval_results` of MTEB would upload."""
    if not hasattr(TaskResult, "_to_hf_benchmark_result"):
        pytest.skip("this release of mteb writes no .eval_results")
    (scores,) = read_task_scores(tmp_path)
    entries = benchmark_entries([scores])[PASSKEY]
    ours = {entry.task_id: entry for entry in entries}
    theirs = {one.dataset.task_id: one for one in TaskResult.from_disk(passkey)._to_hf_benchmark_result().root}
    assert ours.keys() == theirs.keys()
    for name, one in theirs.items():
        assert ours[name].value == pytest.approx(one.value, abs=1e-3)
        assert (ours[name].dataset_id, ours[name].dataset_revision) == (one.dataset.id, one.dataset.revision)
        assert ours[name].date == one.to_dict()["date"]
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries))
    HFEvalResults.model_validate(yaml.safe_load(text))  # no field that MTEB's schema does not have


def test_a_part_of_the_splits_has_no_score_of_the_whole_task(tmp_path):
    write_result(tmp_path, "local/tiny", PASSKEY, {"test_256": 0.5})
    assert [entry.task_id for entry in benchmark_entries(read_task_scores(tmp_path))[PASSKEY]] == [
        f"{PASSKEY}_default_test_256"
    ]


@pytest.mark.promise("X8")
def test_the_model_index_is_that_of_mteb_and_survives_a_card(passkey, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = TaskResult.from_disk(passkey).get_hf_eval_results()
    ours = model_index(read_task_scores(tmp_path))
    fields = ("task_type", "dataset_type", "dataset_config", "dataset_split", "dataset_revision", "metric_type")
    key = lambda one: tuple(getattr(one, name) for name in fields)  # noqa: E731
    assert {key(one): one.metric_value for one in ours} == pytest.approx(
        {key(one): 100 * one.metric_value for one in theirs}
    )
    data = ModelCardData(model_name="org/tiny", eval_results=ours)
    read = ModelCard(f"---\n{data.to_yaml()}\n---\n# tiny\n").data
    assert sorted(read.eval_results, key=repr) == sorted(ours, key=repr)


def test_local_files_are_marked_and_are_no_benchmark(tmp_path):
    write_result(tmp_path, "local/tiny", "LEMBQMSumRetrieval", {"test": 0.5}, None, "local-123")
    scores = read_task_scores(tmp_path)
    (result,) = model_index(scores)
    assert isinstance(result, EvalResult)
    assert (result.dataset_type, result.dataset_revision) == ("local/LEMBQMSumRetrieval", "local-123")
    assert "local" in result.dataset_name
    assert benchmark_entries(scores) == {}


def test_the_newest_result_of_each_output_counts(tmp_path):
    tokens = {"output": "tokens", "token_precision": "binary", "hybrid_weight": 0.7}
    write_result(tmp_path / "old", "local/tiny", "Garden", {"test": 0.1}, None, "local-1", date=1e9)
    write_result(tmp_path / "new", "local/tiny", "Garden", {"test": 0.2}, None, "local-1", date=2e9)
    write_result(tmp_path / "new", "local/tiny", "Garden", {"test": 0.3}, tokens, "local-1")
    found = {score.model: score.value for score in as_scores(read_task_scores(tmp_path))}
    words = "a vector a token, precision=binary; with BM25, 0.7 to 0.3"
    assert found == {"tiny: one vector": 20.0, f"tiny: {words}": 30.0}
    assert described(tokens) == words


def test_no_results_are_told_in_a_sentence(passkey, tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        read_task_scores(tmp_path / "none")
    passkey.write_text("{")
    with pytest.raises(UserError, match="an evaluation writes them again"):
        read_task_scores(tmp_path)
