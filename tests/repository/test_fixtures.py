"""The names of fixtures: one name, one meaning."""

import ast
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parents[1]


def fixtures_by_name() -> dict[str, list[Path]]:
    """Fixture name -> the files that define a fixture of this name."""
    files = defaultdict(list)
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("fixture" in ast.dump(d) for d in node.decorator_list):
                files[node.name].append(path)
    return files


def test_a_fixture_of_a_conftest_is_defined_nowhere_else():
    """A reader who looks a fixture up finds one; a test gets the same object whichever folder it stands in."""
    shared = {name: paths for name, paths in fixtures_by_name().items() if any(p.name == "conftest.py" for p in paths)}
    assert "minilm" in shared
    assert {name: paths for name, paths in shared.items() if len(paths) > 1} == {}
