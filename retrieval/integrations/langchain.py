"""A retriever of LangChain over an index of ours; it needs the extra `langchain`."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError
from retrieval.index.index import Index
from retrieval.integrations.passages import find_passages, passage_id, passage_metadata

try:
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
except ImportError as error:
    raise UserError(f"the retriever of LangChain needs the extra 'langchain' ({error.name} is missing)") from None


class LongembedRetriever(BaseRetriever):
    """Find the passages of long documents that answer a question.

    `invoke` and the other calls of LangChain take the same options, for one search: `invoke(query, filters={...})`.

    Args:
        index: what is searched.
        k: most documents.
        passages: most passages of each document, of which each is a `Document` of LangChain.
        candidates: documents that vectors and BM25 find each.
        weight: of the model beside BM25; None: that of the index.
        parts: ways to score; None: all that the index has.
        filters: what the metadata of documents must be; see `retrieval.index.filters`.
    """

    index: Index
    k: int = 10
    passages: int = 3
    candidates: int = 100
    weight: float | None = None
    parts: Sequence[str] | None = None
    filters: Mapping[str, Any] | None = None

    def _get_relevant_documents(self, query: str, *, run_manager: Any = None, **options: Any) -> list[Document]:
        return [
            Document(page_content=passage.text, metadata=passage_metadata(hit, passage), id=passage_id(hit, passage))
            for hit, passage in find_passages(self.index, query, self, options)
        ]

    async def _aget_relevant_documents(self, query: str, *, run_manager: Any = None, **options: Any) -> list[Document]:
        return await asyncio.to_thread(self._get_relevant_documents, query, **options)
