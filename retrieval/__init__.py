"""Retrieval: from a folder of long documents to the passage that answers a question."""

from retrieval.documents.document import Document, Mark

__all__ = ["Document", "Mark"]
