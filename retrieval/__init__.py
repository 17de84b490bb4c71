"""Retrieval: from a folder of long documents to the passage that answers a question."""

from retrieval.documents.document import Document, Mark
from retrieval.index.index import Index
from retrieval.ranking import Hit, Passage

__all__ = ["Document", "Hit", "Index", "Mark", "Passage"]
