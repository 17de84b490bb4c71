"""Hypothesis strategies of bad inputs: a command line, and what is done to the files that it names."""

import ast
import hashlib
import json
import shutil
import warnings
from argparse import Action
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.tiny_inputs import COMMANDS

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
MARK = "\u2603REPLACED"  # stands for raw JSON until the rest of its value has been written

# JSON values as text: many cannot be written by a library.
RAW_JSON = (
    "null", "true", "-1", "0", "1", "3.5", "1e999", "NaN",
    "1" * 5000, "1" * 30, '""', '" "', '"\\ud83d"', '"\\u0000"',
    '"3"', '"nan"', "[]", "{}", "[null]", '["a", "b"]', "[1, 2]", '{"a": 1}', "[" * 100_000 + "]" * 100_000, '"mean"',
    '"' + "river " * 20_000 + '"', '"../.."', '"in/model"', '"\\ufeff"', "[[0.5]]", "",
)  # fmt: skip
JSON_VALUES = st.sampled_from(RAW_JSON) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
).map(json.dumps)
LINES = (
    b"", b"\n\n\n", b"{}", b"[]", b"null", b"3", b'"text"', b"{", b"}", b"\xef\xbb\xbf{}", b"\xff\xfe{}", b"\x00",
    b"a,b,c", b"a\tb", b"{'text': 'a'}", b'{"text": "a"} {"text": "b"}', b'{"text": "a", "text": null}',
    b"[" * 100_000, b'{"a":' * 100_000, b'{"text": ' + b"1" * 5000 + b"}", b"\xe9t\xe9", b"<html>",
)  # fmt: skip
CONTENTS = (
    b"", b"\n", b" ", b"{}", b"[]", b"null", b"true", b"3", b'"x"', b"{", b"[" * 100_000, b"1" * 5000, b"\x00" * 100,
    b"\xff\xfe" + '{"a": 1}'.encode("utf-16-le"), b"\xef\xbb\xbf{}", b"\xe9t\xe9", b"PAR1", b"PAR1" * 4, b"\x1f\x8b",
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00", b"PK\x03\x04", b"SQLite format 3\x00", b"a: [", b"- a\n- b\n", b"a: b: c",
    b"%YAML 9\n---", b"!!python/object:os.system {}", b"&a [*a]", b"text,label\na,b\n", b"text\tlabel\na\tb\n",
    b"---\nlicense: other # note\n---\n", b"\x08" + b"\x00" * 7 + b"{}", b"\xff" * 8 + b"{}", LFS_POINTER,
)  # fmt: skip
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "-0.0", "0.5", "1.5", "1e999", "1e-999", "", " ", "three", "1_0", "1,0",
           "0x10", "None", "true", "-5", "7", "1e3", "\uff11", "2147483648", "1" * 25)  # fmt: skip
# No place outside the folder of a case that can be written to: root could.
WORDS = (
    "", " ", "-", "--", ".", "..", "/proc/none", "/proc/none/below", "a" * 300,
    "in", "in/model", "in/gone", "in/pairs.jsonl", "in/pairs.jsonl/below", "in/model/config.json", "in/tasks",
    "no/where", "org/name@x", "a/b/c", "\udcff", "%s", "{x}", "~", ":", "::", "bm25", "bm25:1", "truncate",
    "truncate:in/model:0",
    "truncate:in/model:16", "chunk-mean::16", "in/model@tokens:dim=0", "hybrid:in/model@chunks:16:2",
    "chunk-max:in/model:99999999999", "in/pairs.jsonl:nan",
    "in/pairs.jsonl:-1", "in/pairs.jsonl:inf", "in/pairs.jsonl:1e9", "in/documents.jsonl:1e-9",
    "in/questions.jsonl", "last", "none",
    "auto", "full", "block:size=0", "block:size=nan", "sliding:window", "sliding:window=-1", "float32",
    "bfloat16", "int8",
    "None", "16:0.5", "16:0.5,", "0:1", "16:nan", "nowhere:16", "a\nb", "\u202e", "https://example.org/x",
)  # fmt: skip
TEXTS = st.text(max_size=6).filter(lambda text: "/" not in text and "\0" not in text)
ENDLESS = {"max_steps", "num_train_epochs", "epochs", "draws", "windows", "documents", "trials", "workers", "depths"}
ENDLESS |= {"dataloader_num_workers", "save_steps", "logging_steps"}


@dataclass(frozen=True)
class Edit:
    """What is done to a file before the script reads it.

    Attributes:
        path: of the file, relative to the folder of the case.
        kind: name of a function below, without `edit_`.
        values: its other arguments.
    """

    path: str
    kind: str
    values: tuple[Any, ...] = ()

    def apply(self, folder: Path) -> None:
        """Edit the file in a folder; what is there no more, or has another format by now, is left as it is."""
        globals()[f"edit_{self.kind}"](folder / self.path, *self.values)


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        script: the module.
        words: its command line.
        edits: of the files that it reads.
    """

    script: str
    words: tuple[str, ...]
    edits: tuple[Edit, ...] = ()

    @property
    def key(self) -> str:
        """A name that is the same in every run."""
        return hashlib.blake2b(self.as_text().encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()

    def as_text(self) -> str:
        """Return it as a Python literal, which `from_text` reads."""
        return repr((self.script, self.words, tuple((edit.path, edit.kind, edit.values) for edit in self.edits)))

    @classmethod
    def from_text(cls, text: str) -> "Case":
        """Return the case that `as_text` wrote."""
        script, words, edits = ast.literal_eval(text)
        return cls(script, words, tuple(Edit(*edit) for edit in edits))


def edit_content(path: Path, content: bytes) -> None:
    """Replace all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def edit_cut(path: Path, share: float) -> None:
    """Keep the first part only, as a download that broke off does."""
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def edit_flip(path: Path, share: float, byte: int) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= byte
    path.write_bytes(data)


def edit_insert(path: Path, share: float, content: bytes) -> None:
    """Insert bytes, between lines where there are some."""
    data = path.read_bytes()
    place = data.find(b"\n", int(share * len(data))) + 1
    path.write_bytes(data[:place] + content + b"\n" + data[place:])


def edit_prefix(path: Path, content: bytes) -> None:
    """Put bytes in front."""
    path.write_bytes(content + path.read_bytes())


def edit_encoding(path: Path, name: str) -> None:
    """Write a text in another encoding, with a letter that is not in ASCII."""
    path.write_bytes((path.read_text(encoding="utf-8") + "\u00e9").encode(name))


def edit_gone(path: Path) -> None:
    """Remove it."""
    path.unlink()


def edit_folder(path: Path) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()


def edit_link(path: Path, target: str) -> None:
    """Put a link in its place that leads nowhere, to itself, or to something else."""
    path.unlink()
    path.symlink_to(target)


def edit_json(path: Path, place: Sequence[int], raw: str | None) -> None:
    """Replace or remove a value inside JSON, at any depth."""
    root = json.loads(path.read_text(encoding="utf-8"))
    inside: Any = root
    keys: list[Any] = []
    for number in place:
        keys = sorted(inside) if isinstance(inside, dict) else list(range(len(inside)))
        if not keys:
            return
        key = keys[number % len(keys)]
        if not isinstance(inside[key], dict | list) or not inside[key]:
            break
        if number != place[-1]:
            inside = inside[key]
    keys = sorted(inside) if isinstance(inside, dict) else list(range(len(inside)))
    key = keys[place[-1] % len(keys)]
    if raw is None:
        del inside[key]
    else:
        inside[key] = MARK
    path.write_text(json.dumps(root, ensure_ascii=False).replace(f'"{MARK}"', raw or ""), encoding="utf-8")


def edit_row(path: Path, number: int, column: int, raw: str | None) -> None:
    """Replace or remove a value of a row of JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[number % len(lines)])
    names = sorted(row)
    if raw is None:
        del row[names[column % len(names)]]
    else:
        row[names[column % len(names)]] = MARK
    lines[number % len(lines)] = json.dumps(row, ensure_ascii=False).replace(f'"{MARK}"', raw or "")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def edit_parquet(path: Path, source: str, column: int, kind: str) -> None:
    """Write the rows of JSON lines as Parquet, one column with another type."""
    rows = [json.loads(line) for line in (path.parent / source).read_text(encoding="utf-8").splitlines()]
    table = pyarrow.Table.from_pylist(rows)
    name = table.column_names[column % len(table.column_names)]
    texts = [str(value) for value in table[name].to_pylist()]
    types = {
        "string_view": lambda: pyarrow.array(texts, pyarrow.string_view()),
        "large_string": lambda: pyarrow.array(texts, pyarrow.large_string()),
        "binary": lambda: pyarrow.array([text.encode() for text in texts]),
        "not_utf8": lambda: pyarrow.array([b"\xff" for _ in texts]).view(pyarrow.string()),
        "dictionary": lambda: pyarrow.array(texts).dictionary_encode(),
        "null": lambda: pyarrow.nulls(len(texts)),
        "some_null": lambda: pyarrow.array([None, *texts[1:]]),
        "int": lambda: pyarrow.array(range(len(texts))),
        "float": lambda: pyarrow.array([float("nan")] * len(texts)),
        "list": lambda: pyarrow.array([[text] for text in texts]),
        "struct": lambda: pyarrow.array([{"a": text} for text in texts]),
        "bool": lambda: pyarrow.array([True] * len(texts)),
        "timestamp": lambda: pyarrow.array([0] * len(texts), pyarrow.timestamp("ns")),
        "decimal": lambda: pyarrow.array([1] * len(texts)).cast(pyarrow.decimal128(20)),
        "empty_text": lambda: pyarrow.array(["" for _ in texts]),
    }
    if kind == "no_rows":
        table = table.slice(0, 0)
    elif kind == "gone":
        table = table.drop_columns([name])
    elif kind == "twice":
        table = table.append_column(name, table[name])
    else:
        table = table.set_column(table.column_names.index(name), name, types[kind]())
    pyarrow.parquet.write_table(table, path)


PARQUET_KINDS = (
    "string_view", "large_string", "binary", "not_utf8", "dictionary", "null", "some_null", "int", "float", "list",
    "struct", "bool", "timestamp", "decimal", "empty_text", "no_rows", "gone", "twice",
)  # fmt: skip


def command_files(inputs: Path, script: str) -> list[str]:
    """List the files that the command line of a script names, and those in the folders that it names."""
    parts = {
        part.partition("@")[0]
        for word in COMMANDS[script].split()
        for part in word.split(":")
        if part.startswith("in/")
    }
    found = [path for part in sorted(parts) for path in files_at(inputs / part.removeprefix("in/"))]
    return [f"in/{path.relative_to(inputs)}" for path in found]


def files_at(path: Path) -> list[Path]:
    """List a file, or the files in a folder that are not code."""
    return sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".py") if path.is_dir() else [path]


def edits(path: str) -> st.SearchStrategy[Edit]:
    """Return edits of one file, after its format."""
    share = st.sampled_from((0.0, 0.01, 0.1, 0.5, 0.9, 0.999))
    choices = [
        st.builds(Edit, st.just(path), st.just("content"), st.tuples(st.sampled_from(CONTENTS))),
        st.builds(Edit, st.just(path), st.just("cut"), st.tuples(share)),
        st.builds(Edit, st.just(path), st.just("flip"), st.tuples(share, st.integers(1, 255))),
        st.builds(Edit, st.just(path), st.just("insert"), st.tuples(share, st.sampled_from(LINES))),
        st.builds(Edit, st.just(path), st.just("prefix"), st.tuples(st.sampled_from((b"\xef\xbb\xbf", b"\x00", b"x")))),
        st.sampled_from(
            [Edit(path, "gone"), Edit(path, "folder")]
            + [Edit(path, "link", (target,)) for target in ("nowhere", Path(path).name, "/dev/null", "/proc/self/mem")]
        ),
    ]
    raw = st.none() | JSON_VALUES
    if path.endswith(".json"):
        place = st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple)
        choices += [st.builds(Edit, st.just(path), st.just("json"), st.tuples(place, raw))] * 6
    if path.endswith(".jsonl"):
        values = st.tuples(st.integers(0, 30), st.integers(0, 3), raw)
        choices += [st.builds(Edit, st.just(path), st.just("row"), values)] * 4
    if path.endswith((".json", ".jsonl", ".md", ".yaml")):
        names = st.tuples(st.sampled_from(("utf-16", "latin-1", "utf-8-sig", "utf-32")))
        choices += [st.builds(Edit, st.just(path), st.just("encoding"), names)]
    return st.one_of(choices)


def edited_files(inputs: Path, script: str) -> st.SearchStrategy[Case]:
    """Return cases whose command line is good and one or two of whose files are not."""
    words = tuple(COMMANDS[script].split())
    edited = st.sampled_from(command_files(inputs, script)).flatmap(edits)
    return st.lists(edited, min_size=1, max_size=2).map(lambda some: Case(script, words, tuple(some)))


def other_data(inputs: Path, script: str) -> st.SearchStrategy[Case]:
    """Return cases with data in another format, or in a folder."""
    data = [word for word in COMMANDS[script].split() if word.endswith(".jsonl")]

    def case(name: str, word: str, edit: Edit) -> Case:
        words = [word if given == name else given for given in COMMANDS[script].split()]
        return Case(script, tuple(words), (edit,))

    def choices(name: str) -> st.SearchStrategy[Case]:
        parquet = st.tuples(st.integers(0, 3), st.sampled_from(PARQUET_KINDS)).map(
            lambda given: case(name, "in/data.parquet", Edit("in/data.parquet", "parquet", (Path(name).name, *given)))
        )
        names = (
            "a.jsonl.gz",
            "a.csv",
            "a.tsv",
            "a.txt",
            "a.json",
            "a.parquet",
            "a.zip",
            "folder/a.jsonl",
            "folder/.x",
            "a",
        )
        other = st.tuples(st.sampled_from(names), st.sampled_from((*CONTENTS, *LINES))).map(
            lambda given: case(
                name,
                f"in/{given[0]}".removesuffix("/a.jsonl").removesuffix("/.x"),
                Edit(f"in/{given[0]}", "content", (given[1],)),
            )
        )
        return parquet | other

    return st.sampled_from(sorted(set(data))).flatmap(choices) if data else edited_files(inputs, script)


def odd_arguments(actions: dict[str, Action], script: str) -> st.SearchStrategy[Case]:
    """Return cases with one or two bad words on the command line."""
    good = COMMANDS[script].split()

    def values(name: str) -> st.SearchStrategy[str]:
        numeric = actions[name].type not in (str, None)
        pool = st.sampled_from(NUMBERS) if numeric else st.sampled_from((*WORDS, *NUMBERS[:8])) | TEXTS
        if name in ENDLESS:
            pool = pool.filter(lambda value: len(value) < 4 and not value.startswith(("inf", "7", "1e")))
        return pool

    def given(name: str) -> st.SearchStrategy[tuple[str, ...]]:
        one = values(name).map(lambda value: (f"--{name}={value}",))
        two = st.lists(values(name), min_size=0, max_size=2).map(lambda some: (f"--{name}", *some))
        return st.one_of(one, one, one, two)

    option = st.sampled_from(sorted(actions)).flatmap(given)
    unknown = st.text(alphabet="abcdefghijklmnopqrstuvwxyz_-=", min_size=1, max_size=12).map(lambda x: (f"--{x}",))
    stray = st.sampled_from(WORDS).map(lambda word: (word,))
    more = st.lists(st.one_of(*[option] * 6, unknown, stray), min_size=1, max_size=2)
    added = more.map(lambda some: Case(script, (*good, *(word for words in some for word in words))))
    starts = [number for number, word in enumerate(good) if word.startswith("--")]

    def without(start: int) -> Case:
        stop = next((number for number in starts if number > start), len(good))
        return Case(script, (*good[:start], *good[stop:]))

    return st.one_of(*[added] * 8, st.sampled_from(starts).map(without))


def odd_recipes(actions: dict[str, Action], script: str) -> st.SearchStrategy[Case]:
    """Return cases with a bad recipe."""
    words = (*COMMANDS[script].split(), "--config", "in/recipe.yaml")
    yaml_values = st.sampled_from(
        ("nan", ".nan", ".inf", "-.inf", "[]", "{}", "[1, 2]", "{a: 1}", "null", "~", "2024-01-01", "yes", "no", "'1'",
         "''", "0o17", "1_000", "12:30:45", "!!binary aGk=", "|\n  a\n  b", "[[1]]", "*x", "&x 1", "\u00e9", "=",
         '"\\ud83d"', "1" * 5000, "{" * 2000 + "}" * 2000, "-1", "0", "0.5", "text")
    )  # fmt: skip
    keys = st.sampled_from([*sorted(actions), "config", "", "1", "null", "help", "learning_rat", "[a]", "a b", "? [a]"])
    line = st.tuples(keys, yaml_values).map(lambda pair: f"{pair[0]}: {pair[1]}\n".encode())
    content = st.lists(line, min_size=1, max_size=2).map(b"".join) | st.sampled_from(CONTENTS)
    edited = content.map(lambda data: Edit("in/recipe.yaml", "content", (data,)))
    return (edited | edits("in/recipe.yaml")).map(lambda edit: Case(script, words, (edit,)))


def collect(inputs: Path, actions: dict[str, dict[str, Action]], number: int, count: int) -> list[Case]:
    """Draw cases, the same for the same number.

    Args:
        inputs: folder of the good inputs.
        actions: the options of each script to try, by name.
        number: of the draw, the seed.
        count: about how many; duplicates are dropped.
    """
    found: dict[str, Case] = {}
    kinds = [
        st.sampled_from(sorted(actions)).flatmap(kind)
        for kind in (
            lambda script: edited_files(inputs, script),
            lambda script: edited_files(inputs, script),
            lambda script: other_data(inputs, script),
            lambda script: odd_arguments(actions[script], script),
            lambda script: odd_arguments(actions[script], script),
            lambda script: odd_recipes(actions[script], script),
        )
    ]

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(kinds))
    def draw(case: Case) -> None:
        found.setdefault(case.key, case)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw()
    return list(found.values())


def prepare(case: Case, inputs: Path, folder: Path) -> bool:
    """Copy the inputs into the folder of a case, and edit them; return whether that was possible."""
    shutil.copytree(inputs, folder / "in")
    try:
        for edit in case.edits:
            edit.apply(folder)
    except (OSError, ValueError, AttributeError, TypeError, IndexError, KeyError, ZeroDivisionError):
        return False  # an earlier edit has left nothing for this one
    return True
