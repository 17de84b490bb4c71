"""A retriever of LlamaIndex over an index of ours; it needs the extra `llama-index`."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError
from retrieval.index.index import Index
from retrieval.integrations.passages import NUMBERS, find_passages, passage_id, passage_metadata

try:
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode
except ImportError as error:
    raise UserError(f"the retriever of LlamaIndex needs the extra 'llama-index' ({error.name} is missing)") from None


class LongembedRetriever(BaseRetriever):
    """Find the passages of long documents that answer a question.

    Args:
        index: what is searched.
        k: most documents.
        passages: most passages of each document, of which each is a node; its score is that of the document.
        candidates: documents that vectors and BM25 find each.
        weight: of the model beside BM25; None: that of the index.
        parts: ways to score; None: all that the index has.
        filters: what the metadata of documents must be; see `retrieval.index.filters`.
        callback_manager: of LlamaIndex.
    """

    def __init__(
        self,
        index: Index,
        *,
        k: int = 10,
        passages: int = 3,
        candidates: int = 100,
        weight: float | None = None,
        parts: Sequence[str] | None = None,
        filters: Mapping[str, Any] | None = None,
        callback_manager: CallbackManager | None = None,
    ):
        super().__init__(callback_manager)
        self.index, self.k, self.passages, self.candidates = index, k, passages, candidates
        self.weight, self.parts, self.filters = weight, parts, filters

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(
                node=TextNode(
                    id_=passage_id(hit, passage),
                    text=passage.text,
                    metadata=passage_metadata(hit, passage),
                    start_char_idx=passage.start,
                    end_char_idx=passage.end,
                    relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=hit.id)},
                    excluded_llm_metadata_keys=list(NUMBERS),
                    excluded_embed_metadata_keys=list(NUMBERS),
                ),
                score=hit.score,
            )
            for hit, passage in find_passages(self.index, query_bundle.query_str, self)
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)
