"""The retriever of LlamaIndex gives the passages of `Index.search`, through all of LlamaIndex's calls."""

import asyncio
import sys

import pytest

from common.errors import UserError
from tests.retrieval.conftest import WORDS

pytest.importorskip("llama_index.core", reason="needs llama-index-core, of the extra llama-index")

from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import MetadataMode, NodeRelationship, QueryBundle

from retrieval.integrations.llama_index import LongembedRetriever


@pytest.mark.promise("R6")
def test_the_passages_are_those_of_a_search(index_with_pages):
    found = LongembedRetriever(index_with_pages, k=4, passages=2).retrieve("river stone")
    hits = index_with_pages.search("river stone", 4, passages=2)
    pairs = [(hit, passage) for hit in hits for passage in hit.passages]
    assert [one.text for one in found] == [passage.text for _, passage in pairs]
    assert [one.score for one in found] == [hit.score for hit, _ in pairs]
    assert [one.node.relationships[NodeRelationship.SOURCE].node_id for one in found] == [hit.id for hit, _ in pairs]
    assert [(one.node.start_char_idx, one.node.end_char_idx) for one in found] == [
        (passage.start, passage.end) for _, passage in pairs
    ]
    assert len({one.node_id for one in found}) == len(found) > 4


@pytest.mark.promise("R6")
def test_what_is_known_of_a_passage_comes_with_it(index_with_pages):
    retriever = LongembedRetriever(index_with_pages, passages=1, parts=["words"], filters={"number": 100})
    (hit,) = index_with_pages.search("paper music", parts=["words"], passages=1, filters={"number": 100})
    (found,) = retriever.retrieve("paper music")
    assert (found.node_id, found.text) == ("lease.pdf:31-61", "paper music house train north.")
    assert found.metadata == {
        "number": 100,
        "document": "lease.pdf",
        "start": 31,
        "end": 61,
        "page": "2",
        "heading": "The stone",
        "score": hit.score,
        "passage_score": hit.passages[0].score,
        "parts": {"words": hit.parts["words"]},
    }
    assert found.node.get_metadata_str(MetadataMode.LLM).splitlines() == [
        "number: 100",
        "document: lease.pdf",
        "page: 2",
        "heading: The stone",
    ]


@pytest.mark.promise("R6")
def test_llama_indexs_other_calls_give_the_same(index_with_pages):
    retriever = LongembedRetriever(index_with_pages, k=3)
    expected = [retriever.retrieve(question) for question in WORDS[:6]]

    async def all_at_once():
        return await asyncio.gather(*(retriever.aretrieve(QueryBundle(question)) for question in WORDS[:6]))

    assert asyncio.run(all_at_once()) == expected
    assert retriever.retrieve("") == []
    cutoff = expected[0][0].score
    engine = RetrieverQueryEngine.from_args(
        retriever, MockLLM(), node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=cutoff)]
    )
    answer = engine.query(WORDS[0])
    assert answer.source_nodes == [one for one in expected[0] if one.score >= cutoff]
    assert answer.source_nodes[0].text.strip() in str(answer)


@pytest.mark.promise("R6")
def test_a_search_that_cannot_be_made_is_one_sentence(index_with_pages):
    for options, told in [({"passages": 0}, "give at least 1"), ({"filters": {"number": None}}, "filter number")]:
        with pytest.raises(UserError, match=told):
            LongembedRetriever(index_with_pages, **options).retrieve("river")
    with pytest.raises(UserError, match="half a surrogate pair"):
        LongembedRetriever(index_with_pages).retrieve("\ud83d")


@pytest.mark.promise("R6")
def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_index.core.retrievers", None)
    monkeypatch.delitem(sys.modules, "retrieval.integrations.llama_index")
    with pytest.raises(UserError, match="needs the extra 'llama-index'"):
        import retrieval.integrations.llama_index  # noqa: F401
