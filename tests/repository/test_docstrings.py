"""Every public function, method and class says what it does, what it takes, what it returns and what it raises.

The source is read with `ast`; nothing is imported. Public is what has no leading underscore, at module level or in a
public class. Nested functions, special methods such as `__call__`, setters and overloads are left out.

The rules:

1. A module, class, function or method has a docstring, whose first line is a sentence that ends with a full stop.
   A method that overrides one of a base class needs none: the base class says what it does. Where the base class
   belongs to a library, the names of such methods are `LIBRARY_METHODS`. Rules 3 and 5 do not apply to the docstring
   of an override.
2. An `Args:` section has entries `name: description` (or `name, other: description`). It names existing parameters
   only, and all of them (`*args` and `**kwargs` may be left out). A class describes the parameters of its `__init__`.
3. A function of three or more parameters has `Args:`, or its docstring mentions each parameter by name.
   The same holds for a class whose `__init__` takes three or more.
4. A dataclass or named tuple of three or more fields describes each public field: in `Args:` or `Attributes:`, by
   `metadata={"help": ...}`, by a comment beside or above the field, or by its name in the docstring.
5. A function of three or more parameters that is annotated to return a value has `Returns:` or `Yields:`, or its first
   line begins with "Return" or "Yield".
6. A function whose own body contains `raise UserError(` or `raise ValueError(` has `Raises:`. For `__init__` and
   `__post_init__` it stands in the class.

To list what a folder (with its subfolders) or a file breaks: `python -m tests.repository.test_docstrings [PATH ...]`
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("modeling_longembed", "common", "training", "eval", "retrieval", "model_cards", "experiments")
# Methods that a library calls and defines the meaning of.
LIBRARY_METHODS = {
    "forward",
    "backward",
    "get_input_embeddings",
    "set_input_embeddings",
    "get_output_embeddings",
    "set_output_embeddings",
}
SECTIONS = r"Args|Attributes|Returns|Yields|Raises|Examples?|Sources?|References?|Notes?|Shapes?|Formula"
MANY = 3

Function = ast.FunctionDef | ast.AsyncFunctionDef


def folders() -> list[str]:
    """The folders of the packages that hold Python files."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted({path.parent.relative_to(ROOT).as_posix() for path in files})


def violations(path: Path) -> list[str]:
    """What breaks a rule in a Python file, as `file:line: name: what`."""
    source = path.read_text(encoding="utf-8")
    if not source.strip():
        return []
    lines, where = source.splitlines(), path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    module = ast.parse(source)
    found = [(1, "module", what) for what in first_line_violations(ast.get_docstring(module))]
    for node in module.body:
        if isinstance(node, Function) and is_public(node):
            found += [(node.lineno, node.name, what) for what in function_violations(node)]
        elif isinstance(node, ast.ClassDef) and is_public(node):
            found += [(node.lineno, node.name, what) for what in class_violations(node, lines)]
            for method in node.body:
                if isinstance(method, Function) and is_public(method):
                    name = f"{node.name}.{method.name}"
                    overrides = method.name in LIBRARY_METHODS or is_defined_by_a_base(node, method.name)
                    found += [(method.lineno, name, what) for what in function_violations(method, overrides)]
    return [f"{where}:{line}: {name}: {what}" for line, name, what in sorted(found)]


def is_public(node: Function | ast.ClassDef) -> bool:
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    return not node.name.startswith("_") and not decorators & {"overload", "setter", "deleter"}


def first_line_violations(docstring: str | None) -> list[str]:
    if not docstring:
        return ["has no docstring"]
    first = docstring.splitlines()[0].strip()
    return [] if first.endswith(".") else ["the first line of the docstring does not end with a full stop"]


def function_violations(node: Function, overrides: bool = False) -> list[str]:
    docstring = ast.get_docstring(node)
    if overrides and docstring is None:
        return []
    found, docstring = first_line_violations(docstring), docstring or ""
    named, every = parameters(node)
    found += section_violations(docstring, "Args", named, every)
    if not overrides and len(named) >= MANY:
        found += unmentioned(docstring, named)
        returns = ast.unparse(node.returns) if node.returns else "None"
        says = re.search(r"^(Returns|Yields):", docstring, re.MULTILINE) or re.match(r"Return|Yield", docstring)
        if returns not in ("None", "NoReturn") and not says:
            found.append("does not say what is returned (`Returns:`, or a first line that begins with 'Return')")
    return found + raises_violations(docstring, node)


def class_violations(node: ast.ClassDef, lines: list[str]) -> list[str]:
    docstring = ast.get_docstring(node) or ""
    found = first_line_violations(docstring)
    methods = {method.name: method for method in node.body if isinstance(method, Function)}
    for name in ("__init__", "__post_init__"):
        if name in methods:
            found += raises_violations(docstring, methods[name])
    if is_record(node):
        inherited = {field.target.id for base in base_classes(node) for field in record_fields(base)}
        own = record_fields(node)
        names = [field.target.id for field in own]
        undescribed = [field.target.id for field in own if not is_described(field, lines)]
        for section in ("Args", "Attributes"):
            found += section_violations(docstring, section, undescribed, {*names, *inherited, *attributes(node)})
        return found + (unmentioned(docstring, undescribed) if len(names) >= MANY else [])
    if "__init__" in methods:
        named, every = parameters(methods["__init__"])
        found += section_violations(docstring, "Args", named, every)
        if len(named) >= MANY:
            found += unmentioned(docstring, named)
    return found


def parameters(node: Function) -> tuple[list[str], set[str]]:
    """The parameters of a function but for `self`: without `*args` and `**kwargs`, and all of them."""
    arguments = node.args
    named = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    named = [name for name in named if name not in ("self", "cls", "ctx") and not name.startswith("_")]
    return named, {*named, *(extra.arg for extra in (arguments.vararg, arguments.kwarg) if extra)}


def section_violations(docstring: str, section: str, required: Iterable[str], allowed: Iterable[str]) -> list[str]:
    match = re.search(rf"^{section}:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    if not match:
        return []
    names: set[str] = set()
    for line in match[1].splitlines():
        if re.match(r" {4}\S", line):
            entry = re.match(r" {4}((?:`?\*{0,2}\w+`?(?: \([^)]*\))?(?:, |(?=:)))+):", line)
            if not entry:
                return [f"in `{section}:`, {line.strip()[:40]!r} is not 'name: description'"]
            names |= set(re.findall(r"\w+", re.sub(r"\([^)]*\)", "", entry[1])))
    unknown, missing = names - set(allowed), set(required) - names
    found = [f"`{section}:` names {', '.join(sorted(unknown))}, which it does not have"] if unknown else []
    return found + ([f"`{section}:` leaves out {', '.join(sorted(missing))}"] if missing else [])


def unmentioned(docstring: str, names: Iterable[str]) -> list[str]:
    missing = [name for name in names if not re.search(rf"\b{name}\b", docstring)]
    has_section = re.search(r"^(Args|Attributes):", docstring, re.MULTILINE)
    return [f"does not describe {', '.join(missing)}"] if missing and not has_section else []


def raises_violations(docstring: str, node: Function) -> list[str]:
    raised = {
        statement.exc.func.id
        for statement in own_nodes(node)
        if isinstance(statement, ast.Raise)
        and isinstance(statement.exc, ast.Call)
        and isinstance(statement.exc.func, ast.Name)
    }
    missing = raised & {"UserError", "ValueError"} and not re.search(r"^Raises:", docstring, re.MULTILINE)
    return [f"raises {', '.join(sorted(raised))} and has no `Raises:`"] if missing else []


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            yield child
            yield from own_nodes(child)


def is_record(node: ast.ClassDef) -> bool:
    """Whether a class gets its `__init__` from its fields: dataclasses and named tuples."""
    decorators = {ast.unparse(decorator).partition("(")[0].rpartition(".")[2] for decorator in node.decorator_list}
    return "dataclass" in decorators or "NamedTuple" in map(ast.unparse, node.bases)


def record_fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [
        statement
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not statement.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(statement.annotation)
    ]


def attributes(node: ast.ClassDef) -> set[str]:
    """Names that a class defines beside its fields: properties and class attributes."""
    names = {statement.name for statement in node.body if isinstance(statement, Function)}
    return names | {statement.target.id for statement in node.body if isinstance(statement, ast.AnnAssign)}


def is_described(field: ast.AnnAssign, lines: list[str]) -> bool:
    """Whether a field has a help text, or a comment on its last line or above it."""
    calls = (call for call in ast.walk(field) if isinstance(call, ast.Call))
    helped = any("help" in ast.unparse(call) for call in calls)
    beside = "#" in lines[field.end_lineno - 1][field.end_col_offset :]
    return helped or beside or lines[field.lineno - 2].strip().startswith("#")


def is_defined_by_a_base(node: ast.ClassDef, method: str) -> bool:
    """Whether a base class of this repository defines a method, by the names of the classes."""
    return any(
        isinstance(statement, Function) and statement.name == method
        for base in base_classes(node)
        for statement in base.body
    )


def base_classes(node: ast.ClassDef) -> Iterator[ast.ClassDef]:
    for name in (ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases):
        for base in all_classes().get(name, []):
            if base is not node:
                yield base
                yield from base_classes(base)


@cache
def all_classes() -> dict[str, list[ast.ClassDef]]:
    classes: dict[str, list[ast.ClassDef]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    classes.setdefault(node.name, []).append(node)
    return classes


def folder_violations(folder: str) -> list[str]:
    return [violation for path in sorted((ROOT / folder).glob("*.py")) for violation in violations(path)]


@pytest.mark.parametrize("folder", folders())
def test_public_docstrings_are_complete(folder):
    found = folder_violations(folder)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f():\n    'Do it'\n", "full stop"),
        ("def f():\n    pass\n", "no docstring"),
        ("def f(a, b, c):\n    'Do it.'\n", "does not describe a, b, c"),
        ("def f(a):\n    '''Do it.\n\n    Args:\n        b: no.\n    '''\n", "names b, which it does not have"),
        ("def f(a, b):\n    '''Do it.\n\n    Args:\n        a: yes.\n    '''\n", "leaves out b"),
        ("def f(a):\n    '''Do it.\n\n    Args:\n        words alone\n    '''\n", "is not 'name: description'"),
        ("def f(a, b, c) -> int:\n    'Add `a`, `b` and `c`.'\n", "what is returned"),
        ("def f():\n    'Do it.'\n    raise ValueError('no')\n", "no `Raises:`"),
        ("class A:\n    'A class.'\n    def f(self):\n        pass\n", "A.f: has no docstring"),
        ("class A:\n    'A class.'\n    def __init__(self):\n        raise UserError('no')\n", "A: raises UserError"),
        ("@dataclass\nclass A:\n    'A record.'\n    a: int\n    b: int\n    c: int\n", "does not describe a, b, c"),
        ("def _f():\n    pass\n", None),
        ("def f(a, b, c) -> int:\n    'Return the sum of a, b and c.'\n", None),
        ("def f():\n    'Do it.'\n    def g():\n        raise ValueError('no')\n", None),
        (
            "@dataclass\nclass A:\n    'Of `b`.'\n    a: int  # why\n    b: int\n    c: int = h(help='x')\n",
            None,
        ),
        ("class B:\n    'B.'\n    def forward(self, x):\n        return x\n", None),
    ],
)
def test_each_rule_finds_what_breaks_it(tmp_path, source, expected):
    path = tmp_path / "module.py"
    path.write_text(f"'A module.'\n{source}")
    found = violations(path)
    assert any(expected in line for line in found) if expected else not found


def main() -> None:
    paths = [Path(name).resolve() for name in sys.argv[1:] or PACKAGES]
    found = [
        violation
        for path in paths
        for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
        for violation in violations(file)
    ]
    print("\n".join([*found, f"{len(found)} found"]))


if __name__ == "__main__":
    main()
