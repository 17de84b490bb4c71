"""What retrieval costs: the bytes that are kept of a document, and the seconds a query that comparing takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Costs:
    """Costs of one search of a corpus.

    Attributes:
        bytes: what is kept of all documents.
        documents: how many these are.
        seconds: time to compare all queries with all documents, without encoding them; token vectors of documents are
            read from the disk and decoded in it.
        queries: how many these are.
    """

    bytes: float = 0
    documents: int = 0
    seconds: float = 0
    queries: int = 0

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Add the time that the block takes."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    @property
    def bytes_per_document(self) -> float:
        """Mean bytes that are kept of a document."""
        return self.bytes / max(1, self.documents)

    @property
    def seconds_per_query(self) -> float:
        """Seconds in which all queries are compared with all documents, divided by the number of queries."""
        return self.seconds / max(1, self.queries)
