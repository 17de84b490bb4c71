"""`pytest --promises`, run on a suite whose outcomes are known."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.forked import run_forked

TESTS = Path(__file__).parents[1]
SUITE = """
import pytest

@pytest.mark.promise("A1")
def test_kept(): pass

@pytest.mark.promise("A1")
@pytest.mark.parametrize("i", range(3))
def test_kept_thrice(i): pass

@pytest.mark.promise("A1", "B2")
def test_cannot_tell(): pytest.skip("why")

@pytest.mark.promise("C10")
def test_kept_too(): pass

@pytest.mark.promise("C10")
def test_broken(): assert False

@pytest.fixture
def broken(): raise ValueError

@pytest.mark.promise("C9")
def test_never_ran(broken): pass

@pytest.mark.promise("D1")
@pytest.mark.xfail
def test_expected_to_break(): assert False
"""
TABLE = "".join(f"| {promise} | property of {promise} | exact |\n" for promise in ("A1", "B2", "C9", "C10", "D1", "E1"))


def test_each_promise_is_reported_and_the_last_line_is_pytests(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "promises.md").write_text(TABLE)
    shutil.copy(TESTS / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_suite.py").write_text(SUITE)

    def run_suite():
        os.chdir(tmp_path)
        sys.exit(pytest.main(["-q", "--promises", "-p", "no:cacheprovider", "tests"]))

    assert run_forked(run_suite, seconds=300, log=tmp_path / "log").code == pytest.ExitCode.TESTS_FAILED
    lines = (tmp_path / "log").read_text().splitlines()
    report = [re.split(r"\s{2,}", line.strip()) for line in lines[lines.index(f"{' promises ':=^80}") + 1 : -4]]
    by_id = {" ".join(fields).split()[0]: " ".join(fields) for fields in report}
    assert list(by_id) == ["A1", "B2", "C9", "C10", "D1", "E1"]
    assert by_id["A1"] == "A1 passed 4 passed, 1 skipped property of A1"
    assert by_id["B2"] == "B2 skipped 1 skipped property of B2"
    assert by_id["C9"] == "C9 failed 1 failed property of C9"
    assert by_id["C10"] == "C10 failed 1 failed, 1 passed property of C10"
    assert by_id["D1"].startswith("D1 failed")
    assert by_id["E1"] == "E1 not covered property of E1"
    assert "1 failed" in lines[-1]
    assert "passed" in lines[-1]


def test_every_id_in_the_tests_is_a_promise_of_the_page():
    known = set(re.findall(r"^\| ([A-Z]\d+) \|", (TESTS.parent / "docs" / "promises.md").read_text(), re.MULTILINE))
    for path in TESTS.rglob("test_*.py"):
        if path != Path(__file__):
            for arguments in re.findall(r"mark\.promise\(([^)]*)\)", path.read_text(encoding="utf-8")):
                assert set(re.findall(r"[\"'](.*?)[\"']", arguments)) <= known, path
