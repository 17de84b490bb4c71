"""The table of what embedding costs: plain arithmetic of measured rates."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments import embedding_cost


def test_the_hours_are_those_of_the_rate():
    assert embedding_cost.device_hours(10_000_000, 254, 1_000_000) * 3600 == pytest.approx(2540)
    table = embedding_cost.time_table([10_000_000], 254, [("a", 254_000), ("b", 254)], [1, 4])
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in table.splitlines()[2:]]
    assert rows == [
        ["10,000,000", "a", "254,000", "2.8", "2.8 h", "42 min"],  # 10,000 s
        ["10,000,000", "b", "254", "2,777.8", "115.7 days", "28.9 days"],
    ]


def test_the_files_are_those_that_were_measured_times_their_number():
    records = [SimpleNamespace(passages=np.zeros((count, 2))) for count in (30, 70)]  # 50 passages a document

    class Measured:
        files = [{"size": 150_000}, {"size": 50_000}]  # 2,000 bytes a passage

        def __len__(self) -> int:
            return len(records)

        def records(self):
            return iter(records)

    table = embedding_cost.size_table([1_000_000], 384, 64 * 10**9, Measured(), 1000)
    cells = [cell.strip() for cell in table.splitlines()[2].strip("| ").split("|")]
    assert cells[:4] == ["1,000,000", "2 GB", "2 GB", "20"]
    assert cells[4].startswith("IVF")


def test_reading_is_measured_in_characters(tmp_path):
    (tmp_path / "a.txt").write_text("river stone\n" * 100)
    assert embedding_cost.reading_rate([str(tmp_path)]) > 1000
