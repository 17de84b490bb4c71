"""A sample of `make fuzz`, and what it would not forgive."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from tests.fuzz import run
from tests.fuzz.__main__ import read_rows
from tests.fuzz.cases import Case, Edit, collect
from tests.tiny_inputs import COMMANDS, write_inputs

SAMPLE = ("training.contrastive", "eval.questions", "eval.synthetic")


@pytest.fixture(scope="module")
def good_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "inputs"
    write_inputs(folder)
    return folder


def test_bad_inputs_end_with_one_sentence(good_inputs, tmp_path):
    options = {script: run.options_of(script) for script in SAMPLE}
    cases = collect(good_inputs, options, number=0, count=8)
    assert len(cases) >= 4
    ends = {case: run.run_case(case, good_inputs, tmp_path / case.key) for case in cases[:4]}
    assert not {case: end for case, end in ends.items() if end.kind not in ("refused", "accepted", "void")}
    assert "refused" in {end.kind for end in ends.values()}


def test_the_same_number_draws_the_same_cases(good_inputs):
    options = {"eval.questions": run.options_of("eval.questions")}
    one, two, other = (collect(good_inputs, options, number, count=5) for number in (1, 1, 2))
    assert one == two != other
    assert [Case.from_text(case.as_text()) for case in one] == one


def crash():
    raise KeyError("absent")


def refuse():
    raise UserError("this is wrong; change it")


def leave_half():
    with open("half.json", "w") as file:
        file.write('{"a": ')
    refuse()


def refuse_in_python():
    raise UserError("'NoneType' object has no attribute 'x'")


def change_an_input():
    with open("in/pairs.jsonl", "a") as file:
        file.write("more")
    refuse()


def write_beside_an_input():
    Path("in/model/cache.json").write_text("{}")
    refuse()


def remove_an_input():
    Path("in/pairs.jsonl").unlink()
    refuse()


def print_a_traceback():
    import sys

    print("Traceback (most recent call last)", file=sys.stderr)


def print_twice():
    print("error: one")
    import sys

    print("error: one", file=sys.stderr)
    refuse()


@pytest.mark.parametrize(
    ("main", "kind", "words"),
    [
        (refuse, "refused", "this is wrong"),
        (lambda: None, "accepted", ""),
        (crash, "fault", "KeyError: 'absent'"),
        (leave_half, "fault", "half-written: half.json"),
        (refuse_in_python, "fault", "'NoneType' is not for a reader"),
        (print_twice, "fault", "without one sentence"),
        (change_an_input, "fault", "inputs changed: in/pairs.jsonl"),
        (remove_an_input, "fault", "inputs changed: in/pairs.jsonl"),
        (write_beside_an_input, "fault", "inputs changed: in/model/cache.json"),
        (print_a_traceback, "fault", "a traceback"),
        (lambda: time.sleep(60), "unfinished", ""),
    ],
)
def test_what_is_a_fault(monkeypatch, good_inputs, tmp_path, main, kind, words):
    monkeypatch.setattr(run, "main_of", lambda script: SimpleNamespace(main=main).main)
    command = tuple(COMMANDS["training.contrastive"].split())  # it names the inputs as what is read
    case = Case("training.contrastive", command, (Edit("in/questions.jsonl", "gone"),))
    outcome = run.run_case(case, good_inputs, tmp_path / "case", seconds=1.0 if kind == "unfinished" else 30.0)
    assert outcome.kind == kind
    assert words in outcome.detail
    assert not (tmp_path / "case").exists()


@pytest.mark.parametrize(
    ("added", "main", "kind"),
    [
        (("--output_dir=in/pairs.jsonl",), change_an_input, "refused"),
        (("--output_dir", "in/model"), write_beside_an_input, "refused"),
        (("--output_dir=in/model",), change_an_input, "fault"),
    ],
)
def test_a_case_may_name_an_input_as_the_place_to_write_to(monkeypatch, good_inputs, tmp_path, added, main, kind):
    monkeypatch.setattr(run, "main_of", lambda script: main)
    case = Case("training.contrastive", (*COMMANDS["training.contrastive"].split(), *added))
    assert run.run_case(case, good_inputs, tmp_path / "case").kind == kind


def test_a_run_that_was_killed_in_a_line_goes_on_twice(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": 1}\n{"ke')
    assert read_rows(path) == [{"key": 1}]
    with open(path, "a") as file:
        file.write('{"key": 2}\n')
    assert read_rows(path) == read_rows(path) == [{"key": 1}, {"key": 2}]
