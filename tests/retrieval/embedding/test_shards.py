"""Processes that embed shards: each document once, whatever was killed, with the vectors of `encode`."""

from collections import Counter

import numpy as np
import pytest

from common.errors import UserError
from retrieval.documents.document import Document, Mark
from retrieval.documents.sources import read_documents
from retrieval.documents.storage import Storage
from retrieval.embedding import plan as plan_module
from retrieval.embedding.embedded import Embedded
from retrieval.embedding.plan import begin
from retrieval.embedding.shards import embed_shards
from retrieval.index import index as index_module
from retrieval.index.index import Index
from retrieval.index.manifest import Settings
from retrieval.index.reading import DocumentReader
from tests.retrieval.conftest import make_documents
from tests.retrieval.index.test_killed import kill_before

pa = pytest.importorskip("pyarrow", reason="the extra 'files' is not installed")

WORDS = Settings("document", ("words",), "binary", None)  # of which nothing is computed
VECTORS = Settings("late:8", ("vector", "words"), "binary", None)
ALL = Settings("late:8", ("vector", "tokens", "words"), "binary", None)


@pytest.fixture(autouse=True)
def _without_hashes(monkeypatch):
    """The model is always the same; to see that takes most of the time."""
    for module in (plan_module, index_module):
        monkeypatch.setattr(
            module, "describe_model", lambda model: {"name": "model", "hidden_size": 32, "probe": [1.0]}
        )
        monkeypatch.setattr(module, "check_model", lambda *_: None)


def embed(folder, documents, model, rank=0, world=1, settings=VECTORS, shard_documents=4) -> bool:
    output, reader = Storage(folder), DocumentReader(model, settings)
    plan = begin(output, model, reader, documents, shard_documents, "given")
    return embed_shards(output, plan, documents, reader, rank, world)


def ids_of(folder) -> Counter:
    return Counter(record.document.id for record in Embedded(folder).records())


@pytest.mark.promise("I9")
@pytest.mark.parametrize("where", ["path", "file", "memory"])
def test_the_vectors_are_those_of_encode_on_any_file_system(tmp_path, tiny_model, in_float32, where):
    documents = make_documents(10)
    documents[3] = Document("émeu 🐦", "river\r\nstone", {"year": 2024, "new": True}, (Mark(5, "page", "2"),))
    place = {"path": f"{tmp_path}/out", "file": f"file://{tmp_path}/out", "memory": f"memory://{tmp_path.name}/out"}[
        where
    ]
    assert embed(place, documents, tiny_model)
    found = list(Embedded(place).records())
    assert [record.document for record in found] == documents
    for record in found:
        expected = tiny_model.encode(record.document.text, late_chunk_tokens=8, normalize=True)
        np.testing.assert_allclose(record.vectors, expected, atol=1e-5)
        text = record.document.text
        assert "".join(text[start:end] for start, end in record.passages.tolist()) == text


@pytest.mark.promise("I9")
def test_killed_at_any_write_each_document_is_there_once_and_the_rest_is_not_read_again(tmp_path, tiny_model):
    documents, folder = make_documents(6), tmp_path / "out"
    done: dict = {}
    moment = 1
    while kill_before(moment, lambda: embed(folder, documents, tiny_model, settings=WORDS)):
        assert {path: path.stat().st_mtime_ns for path in done} == done
        done = {path: path.stat().st_mtime_ns for path in folder.glob("done/0*")}
        moment += 1  # each goes on with what the one before has left
        if not (folder / "complete.json").exists():
            with pytest.raises(UserError, match=r"holds no embedded documents|not all documents are embedded"):
                Embedded(folder)
    assert moment > 10
    assert ids_of(folder) == Counter(document.id for document in documents)
    assert not list(folder.rglob(".*tmp-*"))


@pytest.mark.promise("I9")
def test_processes_share_the_documents_out_however_many_there_are_in_each_run(tmp_path, tiny_model, monkeypatch):
    documents, folder = make_documents(22), tmp_path / "out"  # 6 shards
    assert not embed(folder, documents, tiny_model, rank=1, world=3)
    assert sorted(path.name for path in folder.glob("done/*")) == ["000001.json", "000004.json"]
    assert not embed(folder, documents, tiny_model, rank=0, world=2)
    assert embed(folder, documents, tiny_model, rank=1, world=2)
    assert ids_of(folder) == Counter(document.id for document in documents)
    assert [record.document for record in Embedded(folder).records()] == documents

    def read_again(*_):
        raise AssertionError

    monkeypatch.setattr(DocumentReader, "_read", read_again)
    assert embed(folder, documents, tiny_model)


@pytest.mark.promise("I9")
@pytest.mark.parametrize("precision", ["binary", "float16", "int8"])
def test_an_index_of_embedded_documents_is_the_one_that_is_built_of_them(tmp_path, tiny_model, in_float32, precision):
    documents = make_documents(6)
    settings = Settings("late:8", ("vector", "tokens", "words"), precision, None)
    for rank in (1, 0):
        embed(tmp_path / "out", documents, tiny_model, rank, 2, settings)
    merged = Index.merge(tmp_path / "merged", tmp_path / "out", shard_mb=0.005)
    built = Index.build(tmp_path / "built", documents, tiny_model, segments="late:8", token_precision=precision)
    assert len(merged.snapshot.shards) > 1
    assert len(built.snapshot.shards) == 1
    one = [built.snapshot.shards[0].record(place) for place in range(6)]
    other = [shard.record(place) for shard in merged.snapshot.shards for place in range(len(shard))]
    for mine, theirs in zip(other, one, strict=True):
        assert mine.document == theirs.document
        np.testing.assert_array_equal(mine.passages, theirs.passages)
        np.testing.assert_array_equal(mine.passage_tokens, theirs.passage_tokens)
        np.testing.assert_allclose(mine.vectors, theirs.vectors, atol=1e-5)
        assert mine.codes.dtype == theirs.codes.dtype
        assert (mine.codes != theirs.codes).mean() < 0.01  # a sign of what is nearly 0 may be either
    merged._model = tiny_model
    for query in ("river stone", "winter garden paper"):
        expected = {hit.id: hit.score for hit in built.search(query)}
        assert {hit.id: hit.score for hit in merged.search(query)} == pytest.approx(expected, abs=0.01)


@pytest.mark.promise("I9")
def test_a_merge_that_is_killed_at_any_write_goes_on(tmp_path, tiny_model):
    documents, folder = make_documents(3), tmp_path / "index"
    embed(tmp_path / "out", documents, tiny_model, settings=WORDS)
    moment = 2
    while kill_before(moment, lambda: Index.merge(folder, tmp_path / "out", shard_mb=1e-4)):
        if (folder / "manifest.json").exists():
            break
        moment += 3
    assert moment > 10
    with Index.open(folder) as index:
        assert sorted(index.snapshot.places()) == sorted(document.id for document in documents)


@pytest.mark.promise("I9")
def test_what_would_mix_documents_is_refused_in_a_sentence(tmp_path, tiny_model, monkeypatch):
    documents, folder = make_documents(10), tmp_path / "out"
    embed(folder, documents, tiny_model)
    before = ids_of(folder)
    others = [Document("other", "text"), *documents[1:]]
    for given, options, told in (
        (documents, {"shard_documents": 5}, r"other --shard_documents \(4 instead of 5\)"),
        (documents, {"settings": ALL}, "other settings"),
        (others, {}, "the documents of shard 0 are others"),
        (documents[:4], {}, "has 3 shards, and there are documents for 1 only"),
    ):
        with pytest.raises(UserError, match=told):
            embed(folder, given, tiny_model, **options)
    assert ids_of(folder) == before
    file = folder / "documents" / "000001.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"000001.parquet: it has .* bytes instead of"):
        Embedded(folder)
    with pytest.raises(UserError, match="holds no embedded documents"):
        Index.merge(tmp_path / "index", tmp_path)
    with pytest.raises(UserError, match=r"s4://bucket: .*; give a path, or a URL that fsspec can open"):
        Storage("s4://bucket")
    embed(tmp_path / "twice", [documents[0], documents[0]], tiny_model)
    with pytest.raises(UserError, match="two documents have the id"):
        Index.merge(tmp_path / "index", tmp_path / "twice")


@pytest.mark.promise("R5")
def test_parquet_is_read_by_url(tmp_path):
    for url in (f"file://{tmp_path}/rows", f"memory://{tmp_path.name}/rows"):
        storage = Storage(url)
        for name, ids in (("b/2.parquet", [3]), ("1.parquet", [1, 2])):
            with storage.file(name) as path:
                pa.parquet.write_table(pa.table({"id": ids, "text": [f"text {one}" for one in ids]}), path)
        storage.write("readme.bin", b"no rows")
        found = [(document.id, document.text) for document in read_documents([url])]
        assert found == [("1", "text 1"), ("2", "text 2"), ("3", "text 3")]
        assert [document.id for document in read_documents([f"{url}/1.parquet"])] == ["1", "2"]
        with pytest.raises(UserError, match="holds none of the files"):
            list(read_documents([f"{url}/none"]))
