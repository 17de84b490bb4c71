"""Resumable results: rows are found by their case, whatever the order of its fields, and survive a new process."""

import json

import pytest

from common.errors import UserError
from common.records import Records


def test_a_row_is_found_by_its_case_and_replaced_by_a_later_one(tmp_path):
    path = tmp_path / "results.json"
    records = Records(path)
    assert records.find({"a": 1, "b": 2}) is None
    records.add({"a": 1, "b": 2}, value=3)
    records.add({"a": 1, "b": 3}, value=4)
    records.add({"b": 2, "a": 1}, value=5)
    again = Records(path)
    assert again.find({"b": 2, "a": 1})["value"] == 5
    assert [row["value"] for row in json.loads(path.read_text())] == [5, 4]


@pytest.mark.parametrize("content", ["{", "[1]", '[{"value": 1}]', '[{"case": 3}]'])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="holds no results of this script"):
        Records(tmp_path / "results.json")
