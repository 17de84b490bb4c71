"""The model folder is loaded by transformers from the Hub: no import in it may be one that its loader misreads."""

import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

FOLDER = Path(__file__).parents[2] / "modeling_longembed"
FILES = sorted(FOLDER.rglob("*.py"))
ALLOWED = {"torch", "transformers", *sys.stdlib_module_names}


def test_the_folder_is_flat():
    assert FILES
    assert {path.parent for path in FILES} == {FOLDER}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_as_the_loader_sees_them(path):
    # transformers finds imports with regular expressions over the text, docstrings included: what it reports here is
    # what it will refuse to load without, or will look for beside the file on the Hub.
    assert set(get_imports(path)) <= ALLOWED
    siblings = {sibling.stem for sibling in FILES}
    assert set(get_relative_imports(path)) <= siblings


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_form_of_import_that_the_loader_misses(path):
    # `from . import x` and `from .folder.x import y` are Python, but the loader does not copy the files they need.
    relative = re.findall(r"^\s*from\s+(\.\S*)\s+import", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(re.fullmatch(r"\.\w+", name) for name in relative), relative


@pytest.mark.parametrize("entry", ["modeling_longembed.py", "configuration_longembed.py"])
def test_the_loader_finds_every_file_that_an_entry_needs(entry):
    needed, queue = set(), [FOLDER / entry]
    while queue:
        path = queue.pop()
        if path not in needed:
            needed.add(path)
            names = re.findall(r"^\s*from\s+\.(\w+)\s+import", path.read_text(encoding="utf-8"), re.MULTILINE)
            queue += [FOLDER / f"{name}.py" for name in names]
    found = {Path(file) for file in get_relative_import_files(FOLDER / entry)}
    assert found | {FOLDER / entry} == needed
