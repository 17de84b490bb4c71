"""`Index`: what is found is what the model and bm25s give without an index, whatever was added and deleted before."""

import copy
import multiprocessing
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import minmax_scale

from common.bm25 import BM25Index
from common.errors import UserError
from retrieval.documents.document import Document, Mark
from retrieval.index import writing
from retrieval.index.index import Index
from retrieval.index.manifest import Manifest, only_writer
from retrieval.segments import Segmenter
from tests.retrieval.conftest import make_documents

pytestmark = pytest.mark.usefixtures("in_float32")

QUERIES = ["river stone house", "winter", "green paper music train", "bread"]


def scores_by_id(hits, part=None):
    return {hit.id: hit.score if part is None else hit.parts[part] for hit in hits}


@pytest.fixture
def build(tmp_path, tiny_model):
    def make(documents, name="index", **options):
        options = {"segments": "late:8", "token_precision": "float32", "shard_mb": 0.02, **options}
        return Index.build(tmp_path / name, documents, tiny_model, **options)

    return make


@pytest.mark.promise("I1")
def test_each_way_to_score_is_what_the_model_and_bm25s_give(build, tiny_model):
    documents = make_documents(20)
    texts = [document.text for document in documents]
    index = build(documents)
    assert len(index.manifest.shards) > 3
    passages = tiny_model.encode(texts, late_chunk_tokens=8, normalize=True)
    tokens = tiny_model.encode(texts, output_value="tokens", is_query=False)
    words = BM25Index(texts)
    for query in QUERIES:
        vector, of_query = tiny_model.encode(query, prompt_name="query", output_value="both", normalize=True)
        expected = {
            "vector": np.array([(rows @ vector).max() for rows in passages]),
            "tokens": tiny_model.similarity([of_query], tokens)[0].numpy(),
            "words": words.scores(query),
        }
        for part, values in expected.items():
            found = scores_by_id(index.search(query, 20, parts=[part], candidates=20))
            if part == "words":
                assert set(found) == {f"d{i}" for i in np.flatnonzero(values)}
            else:
                assert set(found) == {document.id for document in documents}
            assert found == pytest.approx({key: values[int(key[1:])] for key in found}, abs=1e-5)
            assert list(found) == sorted(found, key=found.get, reverse=True)
        hits = index.search(query, 20, candidates=20, weight=0.7)
        of_model, of_words = minmax_scale(np.stack([expected["tokens"], expected["words"]], 1)).T
        combined = 0.7 * of_model + 0.3 * of_words
        assert scores_by_id(hits) == pytest.approx({f"d{i}": value for i, value in enumerate(combined)}, abs=1e-5)
        for part, values in expected.items():
            of_part = {f"d{i}": value for i, value in enumerate(values)}
            assert scores_by_id(hits, part) == pytest.approx(of_part, abs=1e-5)


@pytest.mark.promise("I2")
@pytest.mark.parametrize("precision", ["float16", "int8", "binary", "residual2"])
def test_codes_are_compared_as_they_are_decoded(build, tiny_model, precision):
    documents = make_documents(12)
    index = build(documents, token_precision=precision)
    codec = index.snapshot.codec
    tokens = tiny_model.encode([document.text for document in documents], output_value="tokens", is_query=False)
    codes = [codec.encode(torch.from_numpy(rows)) for rows in tokens]
    query = tiny_model.encode("river green house", prompt_name="query", output_value="tokens")
    expected = tiny_model.similarity([query], codes, codec=codec)[0].tolist()
    found = scores_by_id(index.search("river green house", 12, parts=["tokens"]))
    assert found == pytest.approx({f"d{i}": value for i, value in enumerate(expected)}, abs=1e-4)
    name, multiple = ("code_blocks", 32) if precision == "binary" else ("codes", 1)
    stored = sum(shard.arrays[name].nbytes for shard in index.snapshot.shards)
    assert stored == codec.bytes_per_vector * sum(-(-len(rows) // multiple) * multiple for rows in tokens)


@pytest.mark.promise("I3")
@pytest.mark.parametrize(
    ("segments", "min_weight"),
    [("late:8", 0), ("late:8", 0.2), ("tokens:12/4", 0), ("sentences:10", 0), ("document", 0)],
)
def test_the_best_passage_is_the_one_with_the_largest_score(tmp_path, tiny_model, segments, min_weight):
    """By tokens: MaxSim of the tokens that begin in it; by vectors: the cosine of the vector that is kept of it."""
    documents = make_documents(6)
    if min_weight:  # frequent words have no vector
        tiny_model = copy.deepcopy(tiny_model)
        tiny_model.fit_query_token_weights([document.text for document in documents])
        tiny_model.config.token_min_weight = min_weight
    index = Index.build(tmp_path / "index", documents, tiny_model, segments=segments, token_precision="float32")
    texts = {document.id: document.text for document in documents}
    query = "river green house"
    of_query = tiny_model.encode(query, prompt_name="query", output_value="tokens")
    for hit in index.search(query, 6, parts=["tokens"], passages=1):
        vectors = tiny_model.encode(texts[hit.id], output_value="tokens", is_query=False)
        starts = tiny_model.token_spans(texts[hit.id], is_query=False).numpy()
        products = of_query @ vectors.T
        best = -np.inf
        for start, end in index.snapshot.shards[0].arrays["passages"].tolist():
            inside = (starts[:, 0] >= start) & (starts[:, 0] < end)
            if inside.any():
                best = max(best, products[:, inside].max(1).sum())
        (passage,) = hit.passages
        inside = (starts[:, 0] >= passage.start) & (starts[:, 0] < passage.end)
        assert passage.text == texts[hit.id][passage.start : passage.end]
        assert passage.score == pytest.approx(products[:, inside].max(1).sum(), abs=1e-5)
    for hit in index.search(query, 6, parts=["vector"], passages=1):
        assert hit.passages[0].score == pytest.approx(hit.score, abs=1e-6)
        if segments != "late:8":
            vector = tiny_model.encode(hit.passages[0].text, normalize=True)
            assert hit.score == pytest.approx(
                float(vector @ tiny_model.encode(query, prompt_name="query", normalize=True)), abs=1e-5
            )


def test_passages_do_not_overlap_and_say_page_and_heading(build):
    text = "river stone house. " * 40
    marks = (Mark(0, "page", "1"), Mark(0, "heading", "Rivers"), Mark(400, "page", "2"))
    index = build([Document("d", text, marks=marks)], segments="tokens:12/4")
    (hit,) = index.search("river stone", passages=9)
    spans = sorted((passage.start, passage.end) for passage in hit.passages)
    assert len(spans) > 3
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    assert {passage.page for passage in hit.passages} == {"1", "2"}
    assert {passage.heading for passage in hit.passages} == {"Rivers"}
    scores = [passage.score for passage in hit.passages]
    assert scores == sorted(scores, reverse=True)
    passages = index.passages("river stone", "d")
    assert [passage.start for passage in passages] == sorted(passage.start for passage in passages)
    assert set(hit.passages) <= set(passages)
    assert len(passages) > 2 * len(hit.passages)
    assert max(passage.score for passage in passages) == scores[0]
    with pytest.raises(UserError, match="has no document with the id 'e'"):
        index.passages("river", "e")


@pytest.mark.promise("I4")
def test_a_document_beyond_the_context_is_read_to_its_end(build, tiny_model):
    """The context has 256 tokens, the document 4,500 and three words that only its end has."""
    text = "stone cloud. " * 1500 + "the winter garden"
    index = build([*make_documents(5), Document("long", text)])
    hit = index.search("winter garden", 1, parts=["words"], passages=1, filters={"number": [9]})
    assert not hit
    (hit,) = index.search("winter garden", 1, parts=["words"], passages=1)
    shard, place = index.snapshot.locate(index.snapshot.places()["long"])
    spans = shard.arrays["passages"][shard.rows("passage", place)]
    assert spans[0, 0] == 0
    assert (spans[1:, 0] == spans[:-1, 1]).all()
    assert spans[-1, 1] == len(text)
    pieces = Segmenter("document", tiny_model.tokenizer, context=256).read(text)
    assert len(pieces) > 17
    tokens = tiny_model.encode([text[p.start : p.end] for p in pieces], output_value="tokens", is_query=False)
    np.testing.assert_allclose(shard.codes(place), np.concatenate(tokens), atol=1e-5)
    rows = shard.arrays["passage_tokens"][shard.rows("passage", place)]
    assert rows[0, 0] == 0
    assert (rows[1:, 0] == rows[:-1, 1]).all()
    assert rows[-1, 1] == len(shard.codes(place)) == len(tiny_model.tokenizer.tokenize(text))


def same_answers(one: Index, other: Index) -> None:
    for query in QUERIES:
        for parts in (None, ["vector"], ["tokens"], ["words"]):
            first, second = (index.search(query, 50, parts=parts) for index in (one, other))
            assert scores_by_id(first) == pytest.approx(scores_by_id(second), abs=1e-5)
            passages = [{hit.id: hit.passages for hit in hits} for hits in (first, second)]
            assert passages[0].keys() == passages[1].keys()
            for key, found in passages[0].items():
                expected = sorted(passages[1][key], key=lambda passage: passage.start)
                for a, b in zip(sorted(found, key=lambda passage: passage.start), expected, strict=True):
                    assert (a.start, a.end, a.text) == (b.start, b.end, b.text)


CHANGE = st.one_of(
    st.tuples(st.just("add"), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), st.integers(0, 3)),
    st.tuples(st.just("delete"), st.lists(st.integers(0, 9), min_size=1, max_size=2, unique=True), st.none()),
    st.tuples(st.just("compact"), st.none(), st.none()),
)


@pytest.mark.promise("I5")
@settings(max_examples=settings.default.max_examples // 4)
@given(changes=st.lists(CHANGE, min_size=1, max_size=5))
def test_any_changes_give_the_index_of_the_documents_that_remain(tmp_path_factory, tiny_model, changes):
    folder = tmp_path_factory.mktemp("changes")
    versions = [make_documents(10, 20, seed) for seed in range(4)]
    options = {"segments": "late:8", "token_precision": "float32", "shard_mb": 0.01}
    current = {document.id: document for document in versions[0][:5]}
    index = Index.build(folder / "changed", current.values(), tiny_model, **options)
    for kind, numbers, version in changes:
        if kind == "add":
            added = [versions[version][number] for number in numbers]
            index.add(added, shard_mb=0.01)
            current |= {document.id: document for document in added}
        elif kind == "delete":
            gone = [f"d{number}" for number in numbers if f"d{number}" in current]
            index.delete(gone)
            current = {key: value for key, value in current.items() if key not in gone}
        else:
            index.compact(shard_mb=0.01)
            assert not any(entry.deleted for entry in index.manifest.shards)
        assert len(index) == len(current)
    if current:
        same_answers(index, Index.build(folder / "fresh", current.values(), tiny_model, **options))
        same_answers(index, Index.open(folder / "changed", tiny_model))
    else:
        assert not index.search("river")
    assert {document.id: document for document in map(index.document, current)} == current


@pytest.mark.promise("I5")
def test_deleted_documents_never_return(build):
    index = build(make_documents(12))
    reader = Index.open(index.folder, index.model)
    gone = [hit.id for hit in index.search("river stone", 4)]
    index.delete(gone)
    for parts in (None, ["vector"], ["tokens"], ["words"]):
        assert not {hit.id for hit in index.search("river stone", 50, parts=parts)} & set(gone)
    with pytest.raises(UserError, match=r"has no document with the id 'd\d+'; none was deleted$"):
        index.delete([gone[0]])
    # Who has opened the index before goes on as if nothing had happened, also when the files are gone.
    index.compact()
    assert {hit.id for hit in reader.search("river stone", 4)} == set(gone)
    reader.refresh()
    assert not {hit.id for hit in reader.search("river stone", 50)} & set(gone)


def test_what_is_there_already_is_not_read_again(build, monkeypatch):
    documents = make_documents(6)
    index = build(documents)
    before = index.manifest
    monkeypatch.setattr(writing.ShardContent, "write", lambda *_: pytest.fail("a shard is written"))
    index.add(documents)
    assert index.manifest == before


def test_filters_limit_the_search(build):
    index = build(make_documents(20))
    for filters, numbers in (
        ({"number": 7}, {7}),
        ({"number": [2, 3, 99]}, {2, 3}),
        ({"number": {">=": 5, "<": 8}}, {5, 6, 7}),
        ({"number": {"!=": 4}}, {*range(20)} - {4}),
        ({"absent": 1}, set()),
        ({"number": "7"}, set()),
        ({"number": True}, set()),
    ):
        for parts in (None, ["vector"], ["tokens"]):
            found = {int(hit.id[1:]) for hit in index.search("river", 50, filters=filters, parts=parts, candidates=50)}
            assert found == numbers, filters
    with pytest.raises(UserError, match=r"^filter number: '=>' is no comparison; use <, <=, >, >=, !=$"):
        index.search("river", filters={"number": {"=>": 3}})


@pytest.mark.promise("I7")
def test_a_second_writer_is_refused_and_readers_are_not(build, tiny_model):
    index = build(make_documents(6))
    context = multiprocessing.get_context("fork")
    holding, done = context.Event(), context.Event()

    def hold():
        with only_writer(index.folder):
            holding.set()
            done.wait(60)

    process = context.Process(target=hold)
    process.start()
    holding.wait(60)
    for write in (lambda: index.delete(["d1"]), lambda: index.add([Document("x", "river")]), index.compact):
        with pytest.raises(UserError, match=r"another process is writing this index; try again when it has ended$"):
            write()
    assert len(Index.open(index.folder, tiny_model).search("river", 6)) == 6
    process.kill()  # its lock must not refuse for ever
    process.join()
    index.delete(["d1"])
    assert len(index) == 5


def test_the_second_of_two_writers_keeps_what_the_first_has_written(build):
    one = build(make_documents(4))
    other = Index.open(one.folder, one.model)
    one.add([Document("new", "river")])
    other.delete(["d1"])
    one.refresh()
    assert {hit.id for hit in one.search("river stone", 9, parts=["tokens"])} == {"d0", "d2", "d3", "new"}


def test_an_index_that_was_built_again_is_what_is_read_and_written_now(build, tiny_model):
    index = build(make_documents(4))
    shutil.rmtree(index.folder)
    build(make_documents(6), segments="document", parts=["words", "tokens"], token_precision="int8")
    index.add([Document("new", "river")])
    assert len(index) == 7
    assert scores_by_id(index.search("river", 9, parts=["tokens"]))["new"] > 0
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.embeddings.word_embeddings.weight[500] += 1
    shutil.rmtree(index.folder)
    Index.build(index.folder, make_documents(3), other)
    for change in (index.refresh, lambda: index.add([Document("newer", "stone")]), lambda: index.delete(["d1"])):
        with pytest.raises(UserError, match=r"has other weights; open the index with that model, or build it again$"):
            change()
        assert len(index.search("river", 9, parts=["tokens"])) == 7
    assert len(Index.open(index.folder, other)) == 3


def test_an_interrupted_build_goes_on_with_the_documents_that_are_missing(build, tmp_path, tiny_model):
    documents = make_documents(12)

    def stops():
        yield from documents[:9]
        raise KeyboardInterrupt

    begun = []
    with pytest.raises(KeyboardInterrupt):
        build(stops(), shard_mb=0.001, batch_tokens=1, on_shard=begun.append)
    assert begun
    with pytest.raises(UserError, match="this index is not finished; start the command that builds it again"):
        Index.open(tmp_path / "index", tiny_model)
    with pytest.raises(UserError, match="the beginning of an index with other settings"):
        build(documents, segments="document")
    again = []
    changed = [replace(documents[0], text="winter"), *documents[2:]]
    index = build(changed, shard_mb=0.001, batch_tokens=1, on_shard=again.append)
    assert len(again) < len(documents) - len(begun) + 2
    assert not (tmp_path / "index" / "building.json").exists()
    same_answers(index, build(changed, "fresh"))
    with pytest.raises(UserError, match=r"holds an index; add documents to it, or name another folder$"):
        build(documents)


def test_an_index_of_documents_without_words_or_tokens_can_be_searched(build):
    index = build([Document("empty", ""), Document("blank", " \n")], token_precision="binary")
    assert index.search("river") == []
    index.add([Document("full", "river stone")])
    for change in (lambda: None, index.compact):  # the first documents were kept before there was a codec
        change()
        assert index.search("river", 3)[0].id == "full"
        found = scores_by_id(index.search("river", 3, parts=["tokens"]))
        assert found.pop("full") != 0
        assert found == {"empty": 0, "blank": 0}
    index.delete(["full"])
    index.compact()
    assert len(index) == 2


def test_queries_of_all_kinds_are_defined(build):
    index = build(make_documents(5))
    assert index.search("") == index.search(" \n\t") == []
    assert len(index.search("river " * 20_000, 5)) == 5
    assert len(index.search("\0 \u2028 ~", 5)) == 5
    with pytest.raises(UserError, match=r"^the query has half a surrogate pair at character 2; leave it out$"):
        index.search("ab\ud83d")
    with pytest.raises(UserError, match=r"^k 0: give a whole number of at least 1$"):
        index.search("river", 0)
    with pytest.raises(UserError, match="weight 2: give the weight"):
        index.search("river", weight=2)
    with pytest.raises(UserError, match="parts colour: choose from vector, tokens, words"):
        index.search("river", parts=["colour"])


def test_parts_that_were_not_kept_cannot_be_asked_for(build):
    index = build(make_documents(5), parts=["words"])
    assert index.search("river stone", 3)[0].parts.keys() == {"words"}
    with pytest.raises(UserError, match=r"was built without tokens; it has words$"):
        index.search("river", parts=["tokens"])


def test_a_tuned_weight_is_kept(build):
    index = build(make_documents(9))
    index.set_weight(0.9)
    again = Index.open(index.folder, index.model)
    expected = scores_by_id(index.search("river stone", weight=0.9))
    assert scores_by_id(again.search("river stone")) == pytest.approx(expected)
    assert scores_by_id(again.search("river stone", weight=0.1)) != pytest.approx(expected)
    assert Manifest.read(index.folder).weight == 0.9
