"""The speed of searches, at a tiny size."""

import sys

import pytest

from experiments import search_speed


@pytest.mark.parametrize("tokens", [300, 20])
def test_the_table_has_all_rows_and_bits_lose_nothing(tmp_path, monkeypatch, tokens):
    options = f"--documents 3 --tokens {tokens} --token_dim 16 --query_tokens 4 2 --repeats 2"
    monkeypatch.setattr(sys, "argv", ["x", *options.split(), "--output", str(tmp_path / "table.md")])
    search_speed.main()
    table = (tmp_path / "table.md").read_text()
    assert [line.split("|")[2].strip() for line in table.splitlines() if "with 3 passages" in line] == ["4", "2"]
    assert table.count("0.00% are too small") == 2
