"""The measurement of many vectors: the vectors that are computed when they are read, and what is compared."""

import json

import faiss
import numpy as np
import pytest

from common.errors import UserError
from experiments import vector_search
from experiments.vector_search import Arguments, Clusters, measure, measure_all
from retrieval.index import vectors


def test_a_vector_is_the_same_however_it_is_read():
    whole = Clusters(100, 8)
    rows = whole[:]
    assert rows.shape == (100, 8)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(whole.part(40, 60)[5:7], rows[65:67])
    np.testing.assert_array_equal(whole[np.array([3, 70])], rows[[3, 70]])
    np.testing.assert_allclose(whole @ rows[0], rows @ rows[0], rtol=1e-5)
    assert len(np.unique(rows, axis=0)) == 100


@pytest.fixture
def in_this_process(monkeypatch):
    """Measure in this process; return the steps that were measured."""
    steps = []

    def run_module(module, job, threads, name):
        steps.append(f"{job['step']} {job.get('name', '')}".strip())
        return json.loads(json.dumps(measure(json.loads(json.dumps(job)))))

    monkeypatch.setattr(vector_search, "run_module", run_module)
    return steps


def test_indexes_are_compared_with_the_flat_index_of_faiss_and_measured_once(tmp_path, in_this_process, monkeypatch):
    monkeypatch.setattr(vectors, "FEW", 0)  # few documents would be compared one by one
    random = np.random.default_rng(0)
    rows, queries = (random.standard_normal((count, 8)).astype(np.float32) for count in (1000, 20))
    for name, found in (("vectors", rows), ("queries", queries)):
        np.save(tmp_path / name, found / np.linalg.norm(found, axis=1, keepdims=True))
    arguments = Arguments(
        vectors=[f"{tmp_path}/vectors.npy"],
        queries=f"{tmp_path}/queries.npy",
        kinds=["flat", "IVF10,Flat"],
        nprobes=[1, 10, 20],
        output_dir=str(tmp_path / "results"),
    )
    flat, lists = measure_all(arguments)
    assert in_this_process == ["truth", "search flat", "build IVF10,Flat", "search IVF10,Flat"]
    assert [row["recall"] for row in flat["rows"]] == [1]
    by_lists = {row["nprobe"]: row["recall"] for row in lists["rows"]}
    assert by_lists[10] == 1
    assert by_lists[1] < 0.9
    assert 20 not in by_lists
    index = faiss.IndexFlatIP(8)
    index.add(np.load(tmp_path / "vectors.npy"))
    _, expected = index.search(np.load(tmp_path / "queries.npy"), 10)
    np.testing.assert_array_equal(np.load(tmp_path / "results" / "truth.npy"), expected)
    assert measure_all(arguments) == [flat, lists]
    assert len(in_this_process) == 4
    assert not (tmp_path / "results" / "index").exists()
    assert (tmp_path / "results" / "table.md").read_text().count("IVF10,Flat") == len(by_lists)


def test_options_that_name_no_vectors_or_no_index_are_refused(tmp_path):
    with pytest.raises(UserError, match="give --count, or --vectors with --queries"):
        measure_all(Arguments(output_dir=str(tmp_path)))
    with pytest.raises(UserError, match="--kinds tree: give flat"):
        vector_search.named("tree", 1000, 8)
