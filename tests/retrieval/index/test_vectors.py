"""Vectors of passages: what is compared in full, and the approximate indexes, against faiss's flat index."""

import faiss
import numpy as np
import pytest

from common.errors import UserError
from retrieval.index import approximate, vectors, writing
from retrieval.index.approximate import Kind, build_approximate, choose_kind
from retrieval.index.index import Index
from retrieval.index.vectors import VectorScores
from retrieval.index.writing import Writer
from tests.retrieval.conftest import make_documents

WIDTH = 16


@pytest.fixture(autouse=True)
def _lists_are_read(monkeypatch):
    """Few documents would be compared one by one."""
    monkeypatch.setattr(vectors, "FEW", 0)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def corpus():
    """Four shards of 60 documents of 0 to 9 passages around 20 centres, and queries near some of them."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((20, WIDTH))
    counts = [random.integers(0, 10, 60) for _ in range(4)]
    shards = [
        unit(centres[random.integers(0, 20, total)] + random.standard_normal((total, WIDTH)) / 2)
        for total in (int(rows.sum()) for rows in counts)
    ]
    queries = unit(centres[:8] + random.standard_normal((8, WIDTH)) / 2)
    return shards, [np.cumsum(rows) for rows in counts], queries


def documents_of(ends) -> np.ndarray:
    counts = np.concatenate([np.diff(rows, prepend=0) for rows in ends])
    return np.repeat(np.arange(len(counts)), counts)


@pytest.mark.promise("R2")
def test_comparing_all_is_the_flat_index_of_faiss(corpus):
    """By the inner product; by the distance too, which orders unit vectors alike."""
    shards, ends, queries = corpus
    scores, owners, allowed = VectorScores(shards, ends), documents_of(ends), np.ones(240, bool)
    rows = np.concatenate(shards)
    for flat in (faiss.IndexFlatIP(WIDTH), faiss.IndexFlatL2(WIDTH)):
        flat.add(rows)
        found, places = flat.search(queries, len(rows))
        for query, values, order in zip(queries, found, places, strict=True):
            documents, first = np.unique(owners[order], return_index=True)
            best = documents[np.argsort(first)][:10]
            assert set(scores.best(query, 10, allowed)) == set(best)
            cosines = values if flat.metric_type == faiss.METRIC_INNER_PRODUCT else 1 - values / 2
            expected = {document: cosines[place] for document, place in zip(documents, first, strict=True)}
            np.testing.assert_allclose(
                scores.of_documents(query, best), [expected[document] for document in best], atol=1e-5
            )


@pytest.mark.promise("R2")
@pytest.mark.parametrize(
    ("name", "recall"), [("IVF8,SQ8", 1), ("IVF8,RaBitQ", 0.9), ("IVF8,PQ8x4fs", 0.9), ("HNSW32,SQ8", 1)]
)
def test_looking_at_all_gives_what_comparing_all_gives(corpus, tmp_path, name, recall):
    """Built in blocks; the lists merged on disk and read from there; a later shard is compared in full."""
    shards, ends, queries = corpus
    lists = 8 if name.startswith("IVF") else 0
    build_approximate(tmp_path, shards[:3], Kind(name, lists, ""), memory=1)
    merged = ["lists.data"] if name in ("IVF8,SQ8", "IVF8,RaBitQ") else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [*merged, "lists.faiss"]
    exact = VectorScores(shards, ends)
    listed = VectorScores(shards, ends, tmp_path, covered=3, nprobe=lists or 1000)
    assert listed.approximate.metric_type == faiss.METRIC_INNER_PRODUCT
    assert listed.approximate.ntotal == sum(map(len, shards[:3]))
    allowed = np.random.default_rng(1).random(240) < 0.5
    for which in (np.ones(240, bool), allowed):
        hits = 0
        for query in queries:
            found, expected = (set(scores.best(query, 10, which).tolist()) for scores in (listed, exact))
            assert len(found) == 10
            assert which[list(found)].all()
            hits += len(found & expected)
        assert hits >= recall * 10 * len(queries)


@pytest.mark.promise("R2")
def test_enough_lists_are_read(corpus, tmp_path):
    shards, ends, queries = corpus
    (tmp_path / "all").mkdir()
    nprobe = build_approximate(tmp_path / "all", shards, Kind("IVF16,SQ8", 16, ""))
    assert 1 <= nprobe <= 16
    exact, listed = VectorScores(shards, ends), VectorScores(shards, ends, tmp_path / "all", 4, nprobe)
    allowed = np.ones(240, bool)
    hits = sum(len({*exact.best(q, 10, allowed)} & {*listed.best(q, 10, allowed)}) for q in queries)
    assert hits >= 0.95 * 10 * len(queries)


def test_the_few_documents_that_a_filter_leaves_are_found_whatever_lists_are_read(corpus, tmp_path, monkeypatch):
    shards, ends, queries = corpus
    build_approximate(tmp_path, shards, Kind("IVF16,SQ8", 16, ""))
    listed = VectorScores(shards, ends, tmp_path, 4, nprobe=1)
    allowed = np.arange(240) % 40 == 0
    having = {*documents_of(ends).tolist()} & {*np.flatnonzero(allowed).tolist()}
    assert len({*listed.best(queries[0], 10, allowed)}) < len(having)
    monkeypatch.setattr(vectors, "FEW", 20)
    assert {*listed.best(queries[0], 10, allowed)} == having


@pytest.mark.promise("R2")
def test_a_graph_looks_further_where_a_filter_leaves_few(corpus, tmp_path):
    shards, ends, queries = corpus
    build_approximate(tmp_path, shards, Kind("HNSW32,SQ8", 0, ""))
    exact, graph = VectorScores(shards, ends), VectorScores(shards, ends, tmp_path, 4, nprobe=16)
    allowed = np.arange(240) % 12 == 0
    hits = sum(len({*exact.best(q, 5, allowed)} & {*graph.best(q, 5, allowed)}) for q in queries)
    assert hits >= 0.95 * 5 * len(queries)


def test_the_kind_follows_from_the_number_of_vectors_and_the_memory():
    assert choose_kind(100_000, 384, 1).name == "exact"
    assert choose_kind(10_000_000, 384, 4 * 10**9).name == "IVF16384,SQ8"
    short = choose_kind(10_000_000, 384, 10**9)
    assert short.name == "IVF16384,PQ96x4fs"
    assert short.reason == (
        "10,000,000 vectors of 384 dimensions in 16384 lists with 1 bit a dimension take 0.6 GB of the 1.0 GB of "
        "memory, and 8 bits would take 3.9 GB"
    )
    least = choose_kind(10_000_000, 384, 10**8)
    assert least.name == "IVF16384,RaBitQ"  # whose lists can be memory-mapped
    assert least.reason.endswith("take 0.7 GB, more than the 0.1 GB of memory, and are read from the disk")
    assert choose_kind(10_000_000, 385, 10**9).name == "IVF16384,RaBitQfs"
    assert choose_kind(1_000_000, 384, 10**9, "graph").name == "HNSW32,SQ8"
    large = choose_kind(10_000_000, 384, 5 * 10**9, "graph")
    assert large.name == "IVF16384,SQ8"
    assert large.reason.endswith("of the 5.0 GB of memory, a graph would take 6.6 GB")


@pytest.mark.parametrize(("width", "name"), [(384, "SQ8"), (384, "PQ96x4fs"), (385, "RaBitQfs")])
def test_the_sizes_are_those_of_faiss(width, name):
    index = faiss.index_factory(width, f"IVF16384,{name}", faiss.METRIC_INNER_PRODUCT)
    size = 10_000_000 * (index.code_size + 8) + 4 * width * 16384
    assert choose_kind(10_000_000, width, size).name == f"IVF16384,{name}"
    assert choose_kind(10_000_000, width, size - 1).name != f"IVF16384,{name}"


def test_a_few_vectors_of_many_and_the_same_vector_many_times_can_be_divided_into_lists(tmp_path):
    """k-means gives a small cluster no list of its own, and lists may be empty."""
    random = np.random.default_rng(0)
    rows = np.repeat(unit(random.standard_normal((4, WIDTH))), [500, 3, 2, 1], axis=0)
    nprobe = build_approximate(tmp_path, [rows], Kind("IVF64,SQ8", 64, ""))
    found = VectorScores([rows], [np.arange(506) + 1], tmp_path, 1, nprobe)
    for row, members in ((0, range(500)), (500, range(500, 503)), (505, [505])):
        assert {*found.best(rows[row], 1, np.ones(506, bool))} <= {*members}


def test_an_index_of_many_passages_has_lists_and_answers_as_one_that_compares_all(
    tmp_path, tiny_model, monkeypatch, capfd
):
    documents = make_documents(60, 20)
    options = {"segments": "late:8", "parts": ["vector"], "shard_mb": 0.01}
    exact = Index.build(tmp_path / "exact", documents, tiny_model, **options)
    assert exact.manifest.vectors is None
    for module in (approximate, writing):
        monkeypatch.setattr(module, "EXACT_LIMIT", 30)
    monkeypatch.setattr(approximate, "LEAST_RECALL", 2)  # all lists are read
    monkeypatch.setattr(approximate, "LEAST_GAIN", -1)
    index = Index.build(tmp_path / "lists", documents[:40], tiny_model, **options)
    first = index.manifest.vectors
    assert first.kind == "IVF32,SQ8"
    assert first.nprobe == 32
    index.add(documents[40:50], shard_mb=0.01)  # too few for new lists
    assert index.manifest.vectors == first
    index.add(documents[50:], shard_mb=0.01)
    assert index.manifest.vectors.name != first.name
    assert {path.name for path in (index.folder / "vectors").iterdir()} == {index.manifest.vectors.name}
    for changed in (lambda _: None, lambda one: one.delete(["d3", "d5"]), lambda one: one.compact()):
        for one in (exact, index):
            changed(one)
        for filters in (None, {"number": {"<": 30}}):
            found = [
                {hit.id: hit.score for hit in one.search("river stone", 10, candidates=10, filters=filters)}
                for one in (exact, index)
            ]
            assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert Writer(index.folder).index_vectors(index.manifest) == index.manifest
    assert not capfd.readouterr().out


@pytest.mark.promise("R2", "I5")
def test_a_graph_returns_no_deleted_document_and_finds_what_is_nearest_of_the_others(tmp_path, tiny_model, monkeypatch):
    for module in (approximate, writing):
        monkeypatch.setattr(module, "EXACT_LIMIT", 30)
    documents = make_documents(20, 20)
    index = Index.build(tmp_path, documents, tiny_model, segments="late:8", parts=["vector"], vector_search="graph")
    assert index.manifest.vectors.kind == "HNSW32,SQ8"
    best = {one.id: max(found.score for found in index.passages("river stone", one.id)) for one in documents}
    for deleted in ([], sorted(best, key=best.get)[-3:]):
        if deleted:
            index.delete(deleted)
        remain = best.keys() - {*deleted}
        found = {hit.id: hit.score for hit in index.search("river stone", 5, candidates=20)}
        assert found == pytest.approx({one: best[one] for one in found}, abs=1e-5)
        assert sorted(found.values()) == pytest.approx(sorted(best[one] for one in remain)[-5:], abs=1e-5)
        assert {*found} <= remain
    index.compact()
    assert index.manifest.vectors.kind == "HNSW32,SQ8"
    assert {hit.id: hit.score for hit in index.search("river stone", 5, candidates=20)} == found


def test_a_way_to_search_vectors_that_is_none_is_refused(tmp_path, tiny_model):
    with pytest.raises(UserError, match="vector_search 'tree': choose from lists, graph"):
        Index.build(tmp_path, [], tiny_model, vector_search="tree")
