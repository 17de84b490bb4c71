"""Rows of features: the files they come from, what is refused, and the batches."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from common.errors import UserError
from tests.training.tiny_training import write_jsonl
from training.data.modality_features import FeatureBatches, read_features


def rows(count: int = 12, labels: int = 3) -> list[dict]:
    draw = np.random.default_rng(0)
    return [
        {"features": draw.normal(size=(int(draw.integers(1, 6)), 4)).tolist(), "label": f"class {number % labels}"}
        for number in range(count)
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_come_back_as_they_were_written(tmp_path, suffix):
    written, path = rows(), tmp_path / f"features.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, written)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(written), path)
    source = read_features(str(path), longest=5)
    assert (source.width, source.longest) == (4, max(len(row["features"]) for row in written))
    for number, row in enumerate(written):
        np.testing.assert_array_equal(source.features(number), np.array(row["features"], dtype=np.float32))
    names = [row["label"] for row in written]
    assert (source.label[:, None] == source.label).tolist() == [[one == other for other in names] for one in names]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_another_file_of_the_same_size_and_time_is_read(tmp_path, suffix):
    path = tmp_path / f"features.{suffix}"

    def read(first: float) -> tuple[int, list, str]:
        written = [{"features": [[first, 2.5]], "label": number % 2} for number in range(4)]
        if suffix == "jsonl":
            write_jsonl(path, written)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(written), path)
        os.utime(path, ns=(10**18, 10**18))
        source = read_features(str(path), longest=5)
        return path.stat().st_size, source.features(3).tolist(), source.content()

    (size, one, name), (other_size, another, other_name) = read(1.5), read(3.5)
    assert size == other_size
    assert (one, another) == ([[1.5, 2.5]], [[3.5, 2.5]])
    assert name != other_name
    assert read(1.5) == (size, one, name)  # the first content is still there


def test_a_single_vector_is_a_row_of_one(tmp_path):
    path = write_jsonl(tmp_path / "features.jsonl", [{"features": [1, 2, 3], "label": n % 2} for n in range(4)])
    assert read_features(str(path), longest=1).features(0).tolist() == [[1.0, 2.0, 3.0]]


WRONG = {
    "ragged": ({"features": [[1, 2], [3]]}, "row 3: features are no list of vectors of the same length"),
    "text": ({"features": "1 2"}, "row 3: features are no list"),
    "empty": ({"features": []}, "row 3: features are no list"),
    "too deep": ({"features": [[[1, 2]]]}, "row 3: features are no list"),
    "another width": ({"features": [[1, 2, 3]]}, "row 3: features has vectors of 3 numbers, the rows before it of 2"),
    "too long": ({"features": [[1, 2]] * 6}, "row 3: features has 6 vectors, more than the model's context of 5"),
    "infinite": ({"features": [[1, float("inf")]]}, "row 3: features holds a number that is not finite"),
    "label": ({"label": 1.5}, "row 3: label is float; it names the class"),
    "alone": ({"label": "other"}, "the label 'other' is in row 3 alone"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_named(tmp_path, name):
    change, sentence = WRONG[name]
    good = [{"features": [[n, 1], [2, 3]], "label": n % 2} for n in range(6)]
    path = write_jsonl(tmp_path / "features.jsonl", [*good[:2], good[2] | change, *good[3:]])
    with pytest.raises(UserError, match=r"features\.jsonl") as caught:
        read_features(str(path), longest=5)
    assert sentence in str(caught.value)


def test_a_file_without_usable_rows_is_named(tmp_path):
    good = {"features": [[1, 2]], "label": 0}
    cases = {
        "no such file": tmp_path / "absent.jsonl",
        "the column label is missing": write_jsonl(tmp_path / "missing.jsonl", [{"features": [[1, 2]]}] * 4),
        "every label is '0'": write_jsonl(tmp_path / "one.jsonl", [good] * 4),
        "vectors of a single number": write_jsonl(tmp_path / "narrow.jsonl", [{"features": [[1]], "label": 0}] * 4),
        "not readable Parquet": _text(tmp_path / "broken.parquet"),
        "holds no rows": _empty(tmp_path / "empty.parquet"),
    }
    for sentence, path in cases.items():
        with pytest.raises(UserError, match=sentence):
            read_features(str(path), longest=5)


def _text(path: Path) -> Path:
    path.write_text(json.dumps({}))
    return path


def _empty(path: Path) -> Path:
    schema = pyarrow.schema([("features", pyarrow.list_(pyarrow.list_(pyarrow.float32()))), ("label", pyarrow.int64())])
    pyarrow.parquet.write_table(schema.empty_table(), path)
    return path


@pytest.fixture
def feature_source(tmp_path):
    return read_features(str(write_jsonl(tmp_path / "features.jsonl", rows(20))), longest=5)


def batches(source, **changes) -> FeatureBatches:
    return FeatureBatches(source, **({"batch_size": 6, "batch_tokens": 9, "seed": 3} | changes))


def test_each_row_comes_once_an_epoch_with_another_one_of_its_label(feature_source):
    of_ten = batches(feature_source, batch_size=10)
    for index in range(0, 6, 2):
        pairs = of_ten.global_rows(index) + of_ten.global_rows(index + 1)
        assert sorted(row for row, _ in pairs) == list(range(20))
        assert all(row != other and feature_source.label[row] == feature_source.label[other] for row, other in pairs)
    others = {other for index in range(40) for row, other in of_ten.global_rows(index) if row == 0}
    assert others == {
        row for row in range(1, 20) if feature_source.label[row] == feature_source.label[0]
    }  # each of them, in time


def test_a_batch_depends_on_the_seed_and_its_number_alone(feature_source):
    one, again, other = batches(feature_source), batches(feature_source), batches(feature_source, seed=4)
    expected = [one.global_rows(index) for index in range(8)]
    assert [again.global_rows(index) for index in reversed(range(8))] == expected[::-1]
    assert [other.global_rows(index) for index in range(8)] != expected
    assert len({one[index].seed for index in range(8)}) == 8


def test_processes_share_a_batch_out(feature_source):
    whole = batches(feature_source)
    for index in range(4):
        parts = [batches(feature_source, batch_size=3, rank=rank, world_size=2)[index] for rank in range(2)]
        assert torch.equal(torch.cat([part.label for part in parts]), whole[index].label)
        assert parts[0].seed != parts[1].seed


def test_chunks_hold_the_rows_in_their_order_within_the_budget(feature_source):
    several = batches(feature_source)
    for index in range(4):
        batch, expected = several[index], [row for pair in several.global_rows(index) for row in pair]
        vectors = torch.cat([chunk.features[0] for chunk in batch.chunks])
        np.testing.assert_array_equal(vectors, np.concatenate([feature_source.features(row) for row in expected]))
        lengths = torch.cat([chunk.cu_seq_lens_q.diff() for chunk in batch.chunks]).tolist()
        assert lengths == [len(feature_source.features(row)) for row in expected]
        assert all(chunk.features.shape[1] <= 9 for chunk in batch.chunks)
        assert all(chunk.max_length_q == chunk.cu_seq_lens_q.diff().max() for chunk in batch.chunks)
        assert len(batch.chunks) > 1


def test_the_heaviest_batch_has_the_longest_rows(feature_source):
    of_six = batches(feature_source, batch_tokens=10**6)
    heaviest = of_six.heaviest().chunks[0].features.shape[1]
    assert heaviest >= max(of_six[index].chunks[0].features.shape[1] for index in range(10))
    assert heaviest > of_six[0].chunks[0].features.shape[1]


def test_too_few_rows_for_a_batch_are_refused(feature_source):
    with pytest.raises(UserError, match="20 rows, fewer than a batch of 24"):
        batches(feature_source, batch_size=12, world_size=2)
