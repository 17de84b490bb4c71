"""Documents come from folders, JSON lines, Parquet and the Hub alike, and what cannot be read is named."""

import datetime
import gzip
import json
import os
import sys
from pathlib import Path

import datasets
import fsspec
import pytest

from common.errors import UserError
from retrieval.documents import sources
from retrieval.documents.sources import Columns, read_documents

ROWS = [
    {"id": "a", "title": "Rent", "text": "The rent is due.", "year": 2024, "share": 0.5, "open": True, "by": None},
    {"id": "b", "title": "Roof", "text": "The roof is new. 😀", "year": 2025, "share": 1.5, "open": False, "by": ["x"]},
]
METADATA = [{key: row[key] for key in ("title", "year", "share", "open")} for row in ROWS]


def write_rows(path: Path, rows: list[dict]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.promise("R4")
@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "org/rows@en"])
def test_rows_are_the_same_documents_wherever_they_are(tmp_path, kind, monkeypatch):
    source = tmp_path / kind
    rows = ROWS if kind.startswith("rows.json") else [{**row, "by": ["x"]} for row in ROWS]
    if kind.endswith("parquet"):
        datasets.Dataset.from_list(rows).to_parquet(source)
    elif kind.startswith("rows"):
        write_rows(source, ROWS)
    else:
        loaded = {("org/rows@en", "validation"): datasets.Dataset.from_list(rows)}
        monkeypatch.setattr(sources, "load_hub_dataset", lambda name, split: loaded[name, split])
        source = kind
    documents = list(read_documents([source], split="validation"))
    assert [document.id for document in documents] == ["a", "b"]
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert [document.metadata for document in documents] == METADATA


@pytest.mark.promise("R4")
def test_columns_are_chosen(tmp_path):
    rows = [
        {"number": 7, "head": "Rent", "body": "Due.", "id": "a"},
        {"number": 8, "head": "", "body": "New.", "id": "b"},
    ]
    columns = Columns(("head", "body"), "number")
    documents = list(read_documents([write_rows(tmp_path / "rows.jsonl", rows)], columns))
    assert [(document.id, document.text) for document in documents] == [("7", "Rent\n\nDue."), ("8", "New.")]
    assert documents[0].metadata == {"id": "a"}
    unnamed = write_rows(tmp_path / "unnamed.jsonl", [{"text": "one"}, {"text": "two"}])
    assert [document.id for document in read_documents([unnamed])] == ["unnamed.jsonl:1", "unnamed.jsonl:2"]


def test_rows_without_ids_are_named_by_where_they_are_in_a_folder(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        write_rows(tmp_path / part / "rows.jsonl", [{"text": part}])
    (tmp_path / "a" / "package.json").write_text('{\n"name": "no rows"\n}')
    found = {document.id: document.text for document in read_documents([tmp_path])}
    assert found == {"a/rows.jsonl:1": "a", "b/rows.jsonl:1": "b"}
    named = write_rows(tmp_path / "a" / "package.json", [{"text": "rows"}])
    assert [document.id for document in read_documents([named])] == ["package.json:1"]


@pytest.mark.parametrize(
    ("package", "source", "told"),
    [("pyarrow", "rows.parquet", "the extra 'files'"), ("datasets", "org/rows", "pip install datasets")],
)
def test_a_package_of_rows_that_is_missing_is_named(tmp_path, monkeypatch, package, source, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.parquet").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=told):
        list(read_documents([source]))


@pytest.mark.promise("R4")
def test_a_date_is_metadata(tmp_path):
    rows = [{"text": "one", "day": datetime.date(2024, 5, 1), "at": datetime.datetime(2024, 5, 1, 12)}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (document,) = read_documents([tmp_path / "rows.parquet"])
    assert document.metadata == {"day": "2024-05-01", "at": "2024-05-01T12:00:00"}


@pytest.mark.promise("R4")
def test_a_folder_is_read_to_its_last_file_and_what_is_broken_is_named(tmp_path, caplog):
    folder = tmp_path / "docs"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.TXT").write_text("first")
    (folder / "b" / "c" / "two.txt").write_bytes("zweite\r\n\x00😀".encode())
    (folder / "b" / "broken.txt").write_bytes(b"\xff")
    (folder / "b" / "dangling.txt").symlink_to("nowhere")
    (folder / "b" / "loop").symlink_to(folder)
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"png")
    with open(os.fsencode(folder) + b"/\xff.txt", "w") as file:
        file.write("its name is not UTF-8")
    write_rows(folder / "rows.jsonl", [*ROWS, {"id": "c", "text": " \n"}])
    skipped = []
    documents = list(read_documents([folder], skipped=skipped))
    assert [document.id for document in documents] == ["a.TXT", "b/c/two.txt", "a", "b"]
    assert documents[1].text == "zweite\r\n\x00😀"
    assert documents[0].metadata == {"type": "txt"}
    told = {Path(skip.name).name: skip.reason for skip in skipped}
    assert told == {
        "broken.txt": "is not UTF-8 at byte 0; convert it",
        "dangling.txt": "cannot be read: No such file or directory",
        "rows.jsonl, row 3": "has no text",
        "\\udcff.txt": "has a name that is not UTF-8; rename it",
    }
    for skip in skipped:
        assert f"skipped: {skip}" in caplog.text
    assert "left out: 1 with .png" in caplog.text


@pytest.mark.promise("R4")
def test_a_folder_elsewhere_is_read_as_one_on_this_machine(tmp_path):
    folder = tmp_path / "docs"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "a.md").write_text("# A\n\ntext\n")
    (folder / "b" / "broken.txt").write_bytes(b"\xff")
    (folder / "b" / "picture.png").write_bytes(b"png")
    (folder / "b" / "left-out.json").write_text("{}")
    write_rows(folder / "b" / "rows.jsonl.gz", ROWS)
    write_rows(folder / "c.jsonl", [{"text": "of no name"}])
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "d.parquet")
    url = f"memory://{tmp_path.name}/docs"
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), f"/{tmp_path.name}/docs", recursive=True)
    here, there = [], []
    expected = list(read_documents([folder], skipped=here))
    assert [document.id for document in expected] == ["a.md", "a", "b", "c.jsonl:1", "a", "b"]
    assert list(read_documents([url], skipped=there)) == expected
    assert [skip.reason for skip in there] == [skip.reason for skip in here] == ["is not UTF-8 at byte 0; convert it"]
    assert there[0].name == f"{url}/b/broken.txt"
    for name in ("a.md", "b/rows.jsonl.gz", "c.jsonl", "d.parquet"):
        assert list(read_documents([f"{url}/{name}"])) == list(read_documents([folder / name]))


@pytest.mark.promise("R4")
@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("memory://nowhere", "holds none of the files that are read"),
        ("memory://of-urls/picture.png", "none of the files that are read: .txt, .md"),
        ("memory://of-urls/rows.jsonl", "memory://of-urls/rows.jsonl, row 1: is not JSON"),
        ("memory://of-urls/rows.parquet", "memory://of-urls/rows.parquet: is not readable Parquet"),
        ("nothing://bucket/rows.jsonl", "Protocol not known: nothing; give a path, or a URL"),
        ("oss://bucket/rows.jsonl", "Install ossfs"),
    ],
)
def test_a_url_that_cannot_be_read_is_one_sentence(url, told):
    memory = fsspec.filesystem("memory")
    for name in ("picture.png", "rows.jsonl", "rows.parquet"):
        memory.pipe(f"/of-urls/{name}", b"text")
    with pytest.raises(UserError, match=told):
        list(read_documents([url]))


@pytest.mark.promise("R4")
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing", None, "no such file or folder, and not the id of a Hub dataset"),
        ("picture.png", b"x", "none of the files that are read: .txt, .md"),
        ("rows.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "row 2: the column text is missing; it has body"),
        ("rows.jsonl", b'{"text": null}\n', "row 1: text is null instead of text"),
        ("rows.jsonl", b'{"text": "a", "id": 1.5}\n', "row 1: id is 1.5, not a string"),
        ("rows.parquet", b"PAR1 is not enough", "is not readable Parquet"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_sentence(tmp_path, name, content, told):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=told):
        list(read_documents([path]))


def test_a_folder_without_documents_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds none of the files that are read"):
        list(read_documents([tmp_path]))
