"""The example in the docstring of every loss runs and prints what it says."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

from training.objectives import losses

MODULES = [
    importlib.import_module(f"{losses.__name__}.{module.name}") for module in pkgutil.iter_modules(losses.__path__)
]


def public_examples(module: ModuleType) -> dict[str, doctest.DocTest]:
    """The examples of the module's own public functions and classes, by name; without methods."""
    found = doctest.DocTestFinder(exclude_empty=False).find(module)
    examples = {test.name.removeprefix(f"{module.__name__}."): test for test in found if test.name != module.__name__}
    return {name: test for name, test in examples.items() if "." not in name and not name.startswith("_")}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_examples_of_losses_run(module):
    for name, test in public_examples(module).items():
        assert test.examples, f"{name} has no example"
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert not results.failed, name
