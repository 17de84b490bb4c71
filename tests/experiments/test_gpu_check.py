"""The script of the GPU's checks: budgets, what is written when, and what stops."""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from common.errors import UserError
from experiments import gpu_check
from experiments.gpu.check import Check
from experiments.gpu_check import PARTS, Report, longest_time, parse_budgets, run_in_time, run_part

# A part that reports a check, starts a process of its own, and would go on for a minute.
SLOW_PART = """
import json, pathlib, subprocess, sys, time
path = pathlib.Path(sys.argv[1])
found = json.loads(path.read_text())
found["checks"].append({"name": "early", "passed": True, "detail": ""})
path.write_text(json.dumps(found))
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
path.with_name("child").write_text(str(child.pid))
time.sleep(60)
"""


@pytest.fixture
def report(tmp_path):
    report = Report(tmp_path / "checks.json")
    report.begin("a card, torch 2")
    return report


def is_running(pid: int) -> bool:
    with suppress(OSError):
        os.waitpid(pid, os.WNOHANG)
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_parts_take_four_minutes():
    assert longest_time(list(PARTS), parse_budgets([])) == 240
    assert longest_time(["flex", "memory"], {"flex": 7.0, "memory": 2.0}) == 9


def test_a_part_is_stopped_with_all_that_it_started_and_its_checks_are_kept(report):
    begin = time.monotonic()
    run_in_time({"slow": [sys.executable, "-S", "-c", SLOW_PART, str(report.path)]}, {"slow": 2.0}, report)
    assert time.monotonic() - begin < 30
    found = report.read()
    assert [check["name"] for check in found["checks"]] == ["early"]
    assert found["parts"]["slow"]["outcome"] == "cut short after its budget of 2 s"
    child = int(report.path.with_name("child").read_text())
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)


@pytest.mark.parametrize(("code", "outcome"), [(0, "finished"), (3, "ended with exit code 3")])
def test_how_a_part_ended_is_reported(report, code, outcome):
    run_in_time({"part": [sys.executable, "-S", "-c", f"raise SystemExit({code})"]}, {"part": 60.0}, report)
    assert report.read()["parts"]["part"]["outcome"] == outcome


def test_parts_that_do_not_measure_run_at_the_same_time(report):
    """Each waits for a file that the other one writes."""
    write_and_wait = (
        "import pathlib, sys, time\nown, other = map(pathlib.Path, sys.argv[1:])\nown.touch()\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    files = [str(report.path.with_name(name)) for name in ("one", "other")]
    commands = {
        name: [sys.executable, "-S", "-c", write_and_wait, *order]
        for name, order in (("one", files), ("other", files[::-1]))
    }
    run_in_time(commands, dict.fromkeys(commands, 60.0), report)
    assert {name: part["outcome"] for name, part in report.read()["parts"].items()} == dict.fromkeys(
        commands, "finished"
    )


def test_no_check_of_parts_at_the_same_time_is_lost(report):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: report.add(Check(str(number), True, "")), range(40)))
    assert {check["name"] for check in report.read()["checks"]} == set(map(str, range(40)))


def test_a_check_is_in_the_file_as_soon_as_it_ends_and_an_error_is_a_check_that_fails(report, capsys):
    def checks():
        yield Check("first", True, "as it should be")
        assert report.read()["checks"] == [{"name": "first", "passed": True, "detail": "as it should be"}]
        raise ValueError("no such\nkernel")

    run_part("part", checks(), report)
    assert report.read()["checks"][1] == {"name": "part", "passed": False, "detail": "ValueError: no such kernel"}
    assert capsys.readouterr().out.splitlines() == [
        "passed  first: as it should be",
        "FAILED  part: ValueError: no such kernel",
    ]


@pytest.mark.parametrize("passed", [True, False])
def test_the_exit_code_says_whether_every_check_passed_and_every_part_finished(report, monkeypatch, capsys, passed):
    def run_in_time(commands, budgets, report):
        ((name, command),) = commands.items()  # a part that measures runs alone
        assert command[1:3] == ["-m", "experiments.gpu_check"]
        assert (name, budgets[name]) in [("flex", 7.0), ("speed", PARTS["speed"].seconds)]
        report.add(Check(name, passed, ""))
        report.end_part(name, "finished", 1.0)

    monkeypatch.setattr(gpu_check, "run_in_time", run_in_time)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    arguments = gpu_check.Arguments(output=str(report.path.parent), parts=["flex", "speed"])
    if passed:
        gpu_check.run_all(arguments, parse_budgets(["flex=7"]), report)
    else:
        with pytest.raises(SystemExit, match="1"):
            gpu_check.run_all(arguments, parse_budgets(["flex=7"]), report)
    assert capsys.readouterr().out.splitlines()[-1] == ("2 of 2 checks passed" if passed else "  speed")
    assert list(json.loads(report.path.read_text())["parts"]) == ["flex", "speed"]


@pytest.mark.parametrize("text", ["flex", "flex=", "flex=-1", "flex=nan", "none=3"])
def test_a_budget_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match=r"^--budgets: '.*' is not part=seconds; the parts are kernels, foreign"):
        parse_budgets([text])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_script_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path)])
    with pytest.raises(UserError, match=r"^there is no CUDA device here, .*; run it on a GPU$"):
        gpu_check.main()
    assert not list(tmp_path.iterdir())
