"""The retriever of LangChain gives the passages of `Index.search`, through all of LangChain's calls."""

import asyncio
import sys

import pytest

from common.errors import UserError
from tests.retrieval.conftest import WORDS

pytest.importorskip("langchain_core", reason="needs langchain-core, of the extra langchain")

from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda

from retrieval.integrations.langchain import LongembedRetriever


@pytest.mark.promise("R6")
def test_the_passages_are_those_of_a_search(index_with_pages):
    found = LongembedRetriever(index=index_with_pages, k=4, passages=2).invoke("river stone")
    hits = index_with_pages.search("river stone", 4, passages=2)
    assert [one.page_content for one in found] == [passage.text for hit in hits for passage in hit.passages]
    assert [one.metadata["document"] for one in found] == [hit.id for hit in hits for _ in hit.passages]
    assert len({one.id for one in found}) == len(found) > 4
    for one in found:
        about = one.metadata
        assert index_with_pages.document(about["document"]).text[about["start"] : about["end"]] == one.page_content


@pytest.mark.promise("R6")
def test_what_is_known_of_a_passage_comes_with_it(index_with_pages):
    (hit,) = index_with_pages.search("paper music", parts=["words"], passages=1, filters={"number": 100})
    retriever = LongembedRetriever(index=index_with_pages, passages=1, parts=["words"], filters={"number": 100})
    assert retriever.invoke("paper music") == [
        Document(
            page_content="paper music house train north.",
            id="lease.pdf:31-61",
            metadata={
                "number": 100,
                "document": "lease.pdf",
                "start": 31,
                "end": 61,
                "page": "2",
                "heading": "The stone",
                "score": hit.score,
                "passage_score": hit.passages[0].score,
                "parts": {"words": hit.parts["words"]},
            },
        )
    ]


@pytest.mark.promise("R6")
def test_langchains_other_calls_give_the_same(index_with_pages):
    retriever = LongembedRetriever(index=index_with_pages, k=3)
    questions = [*WORDS[:6], "", "river stone " * 9]
    expected = [retriever.invoke(question) for question in questions]
    assert expected[6] == []
    assert retriever.batch(questions) == expected
    assert asyncio.run(retriever.abatch(questions)) == expected
    assert (retriever | RunnableLambda(len)).invoke("river") == len(expected[0])
    assert retriever.invoke("river", k=1) == asyncio.run(retriever.ainvoke("river", k=1)) == expected[0][:3]
    assert {one.metadata["number"] for one in retriever.invoke("river", filters={"number": [2, 3]})} == {2, 3}


@pytest.mark.promise("R6")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"k": 0}, "k 0: give"),
        ({"passages": 0}, "give at least 1"),
        ({"filters": {"number": None}}, "filter number"),
        ({"size": 3}, "no option size; it has k, passages"),
    ],
)
def test_a_search_that_cannot_be_made_is_one_sentence(index_with_pages, options, told):
    with pytest.raises(UserError, match=told):
        LongembedRetriever(index=index_with_pages).invoke("river", **options)
    with pytest.raises(UserError, match="half a surrogate pair"):
        LongembedRetriever(index=index_with_pages).invoke("\ud83d")


@pytest.mark.promise("R6")
def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "langchain_core.retrievers", None)
    monkeypatch.delitem(sys.modules, "retrieval.integrations.langchain")
    with pytest.raises(UserError, match="needs the extra 'langchain'"):
        import retrieval.integrations.langchain  # noqa: F401
