"""JSON lines: what is read, and that every error names the file and the row."""

import gzip
import json

import pytest

from common.errors import UserError
from common.jsonl import read_jsonl, read_text_columns

ROWS = [{"id": 1, "text": "naïve"}, {"id": "b", "text": "c"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_come_with_the_number_of_their_line(tmp_path, name):
    content = "\n\n".join(map(json.dumps, ROWS)).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_jsonl(path)) == [(1, ROWS[0]), (3, ROWS[1])]
    assert list(read_text_columns(path, "text", "id")) == [(1, ("naïve", "1")), (3, ("c", "b"))]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"id": 1, "text": ', "row 1: is not JSON: .*; write one JSON object per line"),
        (b'{"id": 1, "text": "\xff"}', "row 1: is not JSON"),
        (b'\n["a"]', "row 2: is a JSON list; write an object"),
        (b'{"id": 1}', "row 1: the column text is missing; it has id"),
        (b'{"id": 1, "text": 2}', "row 1: text is 2, not a string"),
        (b'{"id": 1.5, "text": "a"}', "row 1: id is 1.5, not a string"),
        (b"[" * 100_000, "row 1: is nested too deep; write one JSON object per line"),
        (b'{"id": ' + b"1" * 5000 + b', "text": "a"}', "row 1: is not JSON: Exceeds the limit"),
        (b'{"id": 1, "text": "\\ud800"}', "row 1: text has half a surrogate pair"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, content, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        list(read_text_columns(path, "id", "text"))
    assert str(caught.value).startswith(str(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl: cannot be read: .*No such file"):
        list(read_jsonl(tmp_path / "nothing.jsonl"))
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:-9])
    with pytest.raises(UserError, match=r"torn\.jsonl\.gz: cannot be read"):
        list(read_jsonl(tmp_path / "torn.jsonl.gz"))
