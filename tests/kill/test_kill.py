"""A sample of `make kill-test`, and that it notices another end."""

import dataclasses
import json

import pytest

from eval.report.results import Score, as_markdown
from tests.forked import run_forked
from tests.kill.run import content, kill_and_go_on, left_alone
from tests.tiny_inputs import write_inputs


@pytest.fixture(scope="module")
def inputs_of_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill") / "inputs"
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("workload", ["questions", pytest.param("contrastive", marks=pytest.mark.slow)])
def test_killed_runs_end_like_those_left_alone(workload, inputs_of_runs, tmp_path):
    reference = left_alone(workload, inputs_of_runs, tmp_path / "alone")
    killed, different = kill_and_go_on(workload, reference, 2, "sample", inputs_of_runs, tmp_path / "killed")
    assert killed
    assert not different
    name = next(iter(reference.content))
    other = dataclasses.replace(reference, content=reference.content | {name: "another", "more": ""})
    assert kill_and_go_on(workload, other, 0, "sample", inputs_of_runs, tmp_path / "other") == (
        0,
        sorted((name, "more")),
    )


def test_times_are_no_difference_and_scores_are(tmp_path):
    def written(seconds: float, score: float) -> dict[str, str]:
        """What an evaluation writes that took this long."""
        task = Score("model", "Words", "test", score, None, 1000.0, seconds)
        cost = {"task": "Words", "split": "test", "bytes_per_document": 1000.0, "seconds_per_query": seconds}
        (tmp_path / "table.md").write_text(as_markdown([task]))
        (tmp_path / "costs.jsonl").write_text(json.dumps(cost))
        return content(tmp_path)

    assert written(0.001, 50.0) == written(2.0, 50.0)
    assert written(0.001, 50.0)["table.md"] != written(0.001, 51.0)["table.md"]


def test_a_process_that_is_killed_before_it_writes_has_said_nothing(tmp_path):
    ended = run_forked(lambda: None, 0, tmp_path / "log")
    assert (ended.code, ended.stderr) in [(-9, ""), (0, "")]  # it may have ended before
