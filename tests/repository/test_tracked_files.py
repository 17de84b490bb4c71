"""Nothing that is committed belongs to one machine, and what must agree in several files agrees."""

import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def tracked_files() -> list[Path]:
    process = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        pytest.skip("not a git checkout")
    return [path for name in process.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_path_of_a_machine_and_no_private_host():
    private = re.compile(
        rb"(?<![\w.~-])/(?:root|work|home/\w+|Users/\w+|opt/\w+)/|"  # whose disk?
        rb"\b(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d+\b|"  # whose network?
        rb"--(?:extra-)?index-url|--find-links"
    )
    found = {}
    for path in tracked_files():
        if path != Path(__file__) and (match := private.search(path.read_bytes())):
            found[str(path.relative_to(ROOT))] = match.group().decode()
    assert not found


def test_no_large_file_is_tracked():
    """But for what is kept of a released model, whose size model_cards/difference.py limits."""
    large = [path for path in tracked_files() if path.stat().st_size > 1 << 20]
    assert not [str(path) for path in large if path.parents[1] != ROOT / "model_cards"]


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    return {normalised(requirement.name): str(requirement.specifier) for requirement in requirements}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def direct_requirements() -> dict[str, Requirement]:
    """Every third-party requirement of pyproject.toml, of the core and of the extras (flash needs a GPU to build)."""
    found = [Requirement(line) for line in requires("longembed")]
    return {
        normalised(requirement.name): requirement
        for requirement in found
        if requirement.name != "longembed" and "flash" not in str(requirement.marker)
    }


def test_every_requirement_is_pinned_within_its_bounds():
    constraints = pins("constraints.txt")
    for name, requirement in direct_requirements().items():
        assert constraints[name].startswith("=="), name
        assert requirement.specifier.contains(constraints[name][2:]), name


def test_lower_constraints_are_the_lower_bounds():
    bounds = {name: requirement.specifier for name, requirement in direct_requirements().items()}
    lower = {name: str(bound).replace(">=", "==") for name, bound in bounds.items() if str(bound).startswith(">=")}
    assert pins("constraints-lower.txt") == lower


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version("longembed")


def test_ci_calls_make_test():
    assert "make --no-print-directory test" in (ROOT / ".ci" / "run").read_text()
    assert sys.platform == "win32" or (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_workflow_calls_make_test_and_uploads_nothing():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    commands = {job: workflow["jobs"][job]["steps"][-1]["run"].split(" PYTHON=")[0] for job in workflow["jobs"]}
    assert commands == {"test": "make test", "test-all": "make test-all"}
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.13"]
    assert workflow["permissions"] == {"contents": "read"}
    assert "upload" not in text.replace("uploads nothing", "")
