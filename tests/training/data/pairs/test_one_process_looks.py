"""What is left out and held out: found once, on the main process, and the same on all."""

import pickle
import sys
from collections import Counter

import numpy as np
import pytest
import torch.distributed as dist

from common.errors import UserError
from tests.training.tiny_training import random_documents, random_pairs, write_jsonl
from training.data import sources
from training.data.pairs import filters, reading, splitting
from training.data.pairs.batches import PairBatches, PairTokenizer
from training.data.pairs.reading import PairArguments, read_pairs
from training.data.sources import PAIRS, read_sources
from training.engine.processes import distributed

OPTIONS = {"near_duplicates": 0.5, "min_tokens": 12, "eval_split": 0.3}


@pytest.fixture
def process(monkeypatch):
    """Go on as one of two processes; what the main one sends is kept for the other."""
    sent: list[bytes] = []

    def become(rank: int) -> None:
        def send(values: list, src: int) -> None:
            assert src == 0
            if rank == src:
                sent.append(pickle.dumps(values))
            else:
                values[:] = pickle.loads(sent.pop(0))

        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "broadcast_object_list", send)

    return become


@pytest.fixture
def read(tmp_path, word_tokenizer):
    """Read two files of pairs, of which the second repeats a part of the first; returns also the lines logged."""
    rows = random_pairs(40, negatives=1)
    more = rows[::4] + random_pairs(9, 7, negatives=1)
    names = [write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", more)]
    leak = write_jsonl(tmp_path / "leak.jsonl", [{"text": row["positive"]} for row in rows[:5]])

    def read(files=names, **options):
        logged: list[str] = []
        tokenize = PairTokenizer(word_tokenizer, 40, 40, {})
        arguments = PairArguments(**({"check_leakage": str(leak)} | OPTIONS | options))
        return (*read_pairs(list(map(str, files)), arguments, PAIRS, tokenize, logged.append), logged)

    return read


def texts(parts) -> list:
    return [(part.name, part.columns, part.texts(list(range(len(part.rows))))) for part in parts]


def refuse(*args, **kwargs):
    raise AssertionError("another process does the work again")


@pytest.mark.parametrize("pairs", ["columns", "crops"])
def test_the_other_process_has_the_rows_of_the_main_one_without_looking(process, read, tmp_path, monkeypatch, pairs):
    pytest.importorskip("datasketch")
    options = {"pairs": pairs}
    if pairs == "crops":
        options["files"] = [write_jsonl(tmp_path / "documents.jsonl", random_documents(30) + random_documents(5))]
    alone = read(**options)
    process(0)
    *main, said = read(**options)
    assert len(said) >= 3
    process(1)
    for module, name in (
        (filters, "word_hashes"),
        (reading, "report_leakage"),
        (reading, "distinct"),
        (splitting, "_groups"),
    ):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    *other, heard = read(**options)
    assert [texts(part) for part in other] == [texts(part) for part in main] == [texts(part) for part in alone[:2]]
    assert not heard


def test_what_the_main_process_refuses_all_refuse(process, read):
    for rank in (0, 1):
        process(rank)
        with pytest.raises(UserError, match="documents have fewer than 500 tokens"):
            read(min_tokens=500, near_duplicates=0.0)


def test_a_check_of_no_files_is_refused_before_the_data_are_read(read, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "read_sources", refuse)
    with pytest.raises(UserError, match=r"--check_leakage .*nowhere: no \.jsonl"):
        read(check_leakage=str(tmp_path / "nowhere"))


def test_each_text_is_hashed_once(read, monkeypatch):
    pytest.importorskip("datasketch")
    seen, hashed = Counter(), sources.text_id

    def counted(text: str) -> int:
        seen[text] += 1
        return hashed(text)

    monkeypatch.setattr(sources, "text_id", counted)
    train, *_ = read(mixing_temperature=2.0)
    rows = [random_pairs(40, negatives=1), random_pairs(40, negatives=1)[::4] + random_pairs(9, 7, 1)]
    expected = Counter(text for part in rows for row in part for text in row.values())
    assert seen == expected
    made = PairBatches(train, PairTokenizer(None, 40, 40, {}), batch_size=2, batch_tokens=100, seed=0)
    made.describe()
    assert seen == expected
    assert not any(source.ids for source in made.sources)  # no worker gets a copy


def test_the_numbers_are_those_of_the_rows_that_a_source_has(tmp_path):
    first, second = (
        read_sources([str(write_jsonl(tmp_path / f"{seed}.jsonl", random_pairs(9, seed)))])[0] for seed in (0, 1)
    )

    def fresh(source) -> np.ndarray:
        columns = source.texts(list(range(len(source.rows))))
        return np.array([[sources.text_id(text) for text in column] for column in columns]).T

    for source in (first, first.select(np.array([7, 2, 4])), first.select(np.array([7, 2, 4])).select(np.array([1]))):
        source.text_ids(source.columns[1:])  # of a part of the columns before all of them
        np.testing.assert_array_equal(source.text_ids(source.columns), fresh(source))
    other = reading.replace(first, rows=second.rows)
    np.testing.assert_array_equal(other.text_ids(other.columns), fresh(second))
