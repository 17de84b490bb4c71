"""Sources: every file format gives the same rows, and a mistake is one sentence with file, row and column."""

import gzip
import io
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from common.errors import UserError
from tests.training.tiny_training import WORDS, random_pairs, write_jsonl
from training.data.pairs.streams import Reader, open_streams
from training.data.sources import PAIRS, TEXTS, Columns, read_sources

PAIR = {"anchor": "a", "positive": "b"}


def texts(path) -> list[list[str]]:
    (source,) = read_sources([str(path)])
    return source.texts(list(range(len(source.rows))))


def parquet(columns: dict) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, compression="zstd", use_dictionary=False)
    return sink.getvalue()


def zipped(content: bytes) -> bytes:
    """Compress without the time of day: it would give a parametrised test another name in every process."""
    return gzip.compress(content, mtime=0)


def damaged(content: bytes) -> bytes:
    """Overwrite pages of the first column with zeros; the footer stays readable."""
    return content[:30] + bytes(40) + content[70:]


def test_every_format_gives_the_same_rows(tmp_path):
    rows = random_pairs(20, negatives=2)
    # A text that looks like a date, or holds what is no ASCII, is a text.
    rows[0] |= {"anchor": "2020-01-01", "positive": "naïve \u2028 \U0001f600"}
    expected = [[row[name] for row in rows] for name in ("anchor", "positive", "negative_0", "negative_1")]
    lines = write_jsonl(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "0.jsonl", rows[:7])
    write_jsonl(folder / "1.jsonl", [{"more": 1, **row} for row in rows[7:]])
    # What newer writers keep texts in.
    views = pyarrow.table({name: pyarrow.array([row[name] for row in rows], "string_view") for name in rows[0]})
    pyarrow.parquet.write_table(views, tmp_path / "views.parquet")
    assert pyarrow.parquet.read_schema(tmp_path / "views.parquet").field("anchor").type == "string_view"
    for name in ("pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet", "views.parquet", "folder"):
        assert texts(tmp_path / name) == expected, name


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet", "folder"])
def test_a_file_that_is_replaced_by_one_of_the_same_size_and_time_is_read_anew(tmp_path, name):
    """Whatever the files say is read, whatever the file system says; what is derived from it has another name, too."""

    def write(word: str):
        rows = [{"anchor": f"{word} {number}", "positive": word} for number in range(3)]
        path = tmp_path / name
        file = path / "1.jsonl" if name == "folder" else path
        file.parent.mkdir(exist_ok=True)
        if name == "pairs.parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        else:
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            file.write_bytes(zipped(content) if name.endswith(".gz") else content)
        os.utime(file, ns=(10**18, 10**18))
        (source,) = read_sources([str(path)])
        return file.stat().st_size, source.texts([0, 1, 2])[1], source.rows._fingerprint

    (size, first, one), (other_size, second, another) = write("one"), write("two")
    assert size == other_size
    assert (first, second) == (["one"] * 3, ["two"] * 3)
    assert one != another
    assert write("one") == (size, first, one)  # the first content is still there


LABELLED = Columns(("anchor",), None, "texts", classes=("label",))


@pytest.mark.parametrize("labels", [[3, 3, 5], ["law", "law", "music"]])
def test_classes_are_integers_or_texts(tmp_path, labels):
    rows = [{"anchor": word, "label": label} for word, label in zip("abc", labels, strict=True)]
    lines = write_jsonl(tmp_path / "rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in (lines, tmp_path / "rows.parquet"):
        (source,) = read_sources([str(path)], LABELLED)
        assert source.texts([0, 2]) == [["a", "c"]]
        assert source.classes_of([0, 2]) == {"label": [str(labels[0]), str(labels[2])]}


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        (None, "row 2: label is null; it names the class"),
        (1.5, "row 2: label is float; it names the class"),
        (True, "row 2: label is bool; it names the class"),
    ],
)
def test_a_value_that_names_no_class_is_refused(tmp_path, label, complaint):
    rows = [{"anchor": "a", "label": 1}, {"anchor": "b", "label": label}]
    with pytest.raises(UserError, match=complaint):
        read_sources([str(write_jsonl(tmp_path / "rows.jsonl", rows))], LABELLED)
    column = pyarrow.array([label, label])
    table = pyarrow.table({"anchor": ["a", "b"], "label": column})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=complaint.replace("row 2", "row 1")):
        read_sources([str(tmp_path / "rows.parquet")], LABELLED)
    with pytest.raises(UserError, match="the column label is missing; it has anchor"):
        read_sources([str(write_jsonl(tmp_path / "none.jsonl", [{"anchor": "a"}]))], LABELLED)


def test_weights_and_a_colon_in_a_name(tmp_path):
    path = write_jsonl(tmp_path / "a:b.jsonl", [PAIR])
    assert [source.weight for source in read_sources([f"{path}:2.5", str(path), f"{path}:3"])] == [2.5, 1.0, 3.0]
    with pytest.raises(UserError, match="weight of 0"):
        read_sources([f"{path}:0"])


def test_a_changed_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    assert texts(path) == [["a"], ["b"]]
    write_jsonl(path, [{"anchor": "changed", "positive": "too"}])
    assert texts(path) == [["changed"], ["too"]]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([PAIR, {"anchor": 3, "positive": "b"}], r"row 2: anchor is int instead of text"),
        ([PAIR, PAIR, {"anchor": "a", "positive": None}], r"row 3: positive is null instead of text"),
        ([PAIR, {"anchor": ["a"], "positive": "b"}], r"row 2: anchor is list instead of text"),
        ([PAIR, {"anchor": "a"}], r"row 2: the column positive is missing"),
        ([{"anchor": "a", "text": "b"}], r"the column positive is missing; it has anchor, text"),
        ([PAIR, {"anchor": " ", "positive": "b"}], r"row 2: anchor is empty"),
        ([PAIR, ["a", "b"]], r"row 2: is a JSON list"),
        ([PAIR, PAIR, {"anchor": "a", "other": "b"}, PAIR], r"row 3: the column positive is missing"),
        ([PAIR, {"anchor": float("nan"), "positive": "b"}], r"row 2: anchor is float instead of text"),
        ([PAIR, {"anchor": "", "positive": "b"}], r"row 2: anchor is empty"),
        ([PAIR, {"anchor": "a \ud83d b", "positive": "b"}], r"row 2: anchor holds half a character"),
        ([PAIR, PAIR | {"negative_1": "c"}], r"row 2: has the column negative_1, which the first row lacks"),
        ([PAIR | {"negative_1": "c"}, PAIR], r"row 2: the column negative_1 is missing, which the first row has"),
        ([PAIR | {"negative_1": "c"}, PAIR | {"negative_2": "c"}], r"row 2: the column negative_1 is missing"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, lines, complaint):
    path = write_jsonl(tmp_path / "pairs.jsonl", lines)
    with pytest.raises(UserError, match=complaint) as caught:
        read_sources([str(path)])
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("pairs.jsonl", b"", "is empty"),
        ("pairs.jsonl", b"\n \n", "holds no rows"),
        ("pairs.jsonl", json.dumps(PAIR).encode() + b'\n{"anchor": "a", "pos', "row 2: is not JSON"),
        ("pairs.jsonl", json.dumps(PAIR).encode() + b'\n{"anchor": "\xff"}', "row 2: is not JSON"),
        ("pairs.jsonl.gz", b"no gzip at all", "cannot be read: Not a gzipped file"),
        ("pairs.jsonl.gz", zipped(json.dumps(PAIR).encode() * 999)[:-9], "cannot be read"),
        ("pairs.jsonl.gz", zipped(bytes(9999))[:20] + b"\xff" * 20, "cannot be read"),
        ("pairs.parquet", b"PAR1 no parquet", "is not readable Parquet"),
        ("pairs.parquet", parquet({"anchor": ["a"] * 99, "positive": ["b"] * 99})[:-40], "is not readable Parquet"),
        ("pairs.parquet", damaged(parquet({"anchor": WORDS, "positive": WORDS})), "is not readable Parquet"),
        ("pairs.csv", b"anchor,positive", "no .jsonl, .jsonl.gz or .parquet file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        read_sources([str(path)])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"anchor": ["a", None], "positive": ["b", "c"]}, "row 2: anchor is null"),
        ({"anchor": ["a", "b"], "positive": [1, 2]}, "row 1: positive is int instead of text"),
        ({"anchor": ["a", "b"], "positive": [1.5, float("nan")]}, "row 1: positive is float instead of text"),
        ({"anchor": ["a", "b", "c"], "positive": ["b", "c", " "]}, "row 3: positive is empty"),
        ({"anchor": ["a"]}, "column positive is missing"),
        ({"anchor": pyarrow.array([], "string"), "positive": pyarrow.array([], "string")}, "holds no pairs"),
    ],
)
def test_a_wrong_row_of_parquet_is_named(tmp_path, columns, complaint):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match=complaint):
        read_sources([str(tmp_path / "pairs.parquet")])


def test_the_file_of_a_folder_that_lacks_a_column_is_named(tmp_path):
    (tmp_path / "0.parquet").write_bytes(parquet({"anchor": ["a"], "positive": ["b"], "more": [1]}))
    (tmp_path / "1.parquet").write_bytes(parquet({"positive": ["c"], "anchor": ["d"]}))
    assert texts(tmp_path) == [["a", "d"], ["b", "c"]]
    (tmp_path / "2.parquet").write_bytes(parquet({"anchor": ["a"], "more": ["b"]}))
    with pytest.raises(UserError, match=r"2.parquet: the column positive is missing; it has anchor, more"):
        read_sources([str(tmp_path)])
    (tmp_path / "2.parquet").unlink()
    (tmp_path / "0.parquet").write_bytes(parquet({"anchor": ["a"], "positive": ["b"], "negative_1": ["c"]}))
    with pytest.raises(UserError, match=r"1.parquet: the column negative_1 is missing"):
        read_sources([str(tmp_path)])


WITHOUT, WITH = PAIR, PAIR | {"negative_1": "c"}


FORMS = ["jsonl", "parquet", "jsonl folder", "parquet folder"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rows", [(WITHOUT, WITH), (WITH, WITHOUT)])
@pytest.mark.parametrize(
    ("form", "on_hub"),
    [*((form, False) for form in FORMS), *((form, True) for form in [*FORMS, "csv", "csv folder"])],
)
def test_no_negative_is_dropped_or_made_up(tmp_path, monkeypatch, rows, form, on_hub, streaming):
    """Wherever a column begins or ends, in whatever format: a sentence that names it, instead of fewer texts."""
    kind, *folder = form.split()
    for number, part in enumerate([rows[:1], rows[1:]] if folder else [rows]):
        columns = list(dict.fromkeys(column for row in part for column in row))
        path = tmp_path / f"{number}.{kind}"
        if kind == "jsonl":
            write_jsonl(path, part)
        elif kind == "csv":
            lines = [columns, *([row.get(column, "") for column in columns] for row in part)]
            path.write_text("".join(",".join(line) + "\n" for line in lines))
        else:
            path.write_bytes(parquet({column: [row.get(column) for row in part] for column in columns}))
    name = str(tmp_path)
    if on_hub:
        load = datasets.load_dataset
        monkeypatch.setattr(datasets, "load_dataset", lambda _, *args, **options: load(str(tmp_path), *args, **options))
        name = "org/name"
    with pytest.raises(UserError, match="negative_1") as caught:
        if streaming:
            reader = Reader(open_streams([name], PAIRS)[0], 0)
            for _ in range(2):
                next(reader)
        else:
            read_sources([name])
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize("name", ["missing.jsonl", "some/missing.jsonl", "no such thing", "org/unknown-dataset"])
def test_a_missing_source_is_named(name):
    with pytest.raises(UserError, match=name):
        read_sources([name])


def test_a_folder_without_data_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"no \.jsonl, \.jsonl\.gz or \.parquet file"):
        read_sources([str(tmp_path)])


def test_texts_are_read_by_their_column(tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "2020-01-01", "title": "t"}, {"text": "b", "title": "u"}])
    (source,) = read_sources([f"{path}:2"], TEXTS)
    assert (source.columns, source.weight, source.texts([0, 1])) == (("text",), 2.0, [["2020-01-01", "b"]])
    (source,) = read_sources([str(path)], Columns(("title",), None, "texts"))
    assert source.texts([1, 0]) == [["u", "t"]]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([{"text": "a"}, {"text": None}], r"row 2: text is null instead of text"),
        ([{"text": "a"}, {"text": 3}], r"row 2: text is int instead of text"),
        ([{"text": "a"}, {"text": " "}], r"row 2: text is empty"),
        ([{"text": "a"}, {"body": "b"}], r"row 2: the column text is missing"),
        ([PAIR], r"the column text is missing; it has anchor, positive"),
        ([], r"is empty; give JSON lines with text"),
    ],
)
def test_a_wrong_text_is_named(tmp_path, lines, complaint):
    path = write_jsonl(tmp_path / "texts.jsonl", lines)
    with pytest.raises(UserError, match=complaint) as caught:
        read_sources([str(path)], TEXTS)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
