"""What the server computes: vectors of texts and answers to queries, both by one worker, for programs and the page."""

from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling_longembed.encoding_choices_longembed import EncodingChoices
from modeling_longembed.encoding_longembed import encode_rows, tokenize_texts
from retrieval.index.index import Index
from retrieval.index.manifest import MANIFEST
from retrieval.ranking import Hit, best_passages
from retrieval.server.limits import OwnLimits
from retrieval.server.metrics import Metrics
from retrieval.server.own_files import OwnFiles
from retrieval.server.view import Found
from retrieval.server.worker import Worker

# Tokens that a search counts for in the queue, whatever its length: it takes about as long as reading so many.
SEARCH_TOKENS = 512
# Passages of a document that the page shows.
SHOWN = 3


class Service:
    """An index and its model behind a queue.

    Args:
        index: what is searched.
        batch_tokens: tokens in one forward pass.
        queue_tokens: tokens that may wait; requests beyond are refused.
        own_limits: what visitors of the page may bring along.

    Raises:
        UserError: the model of the index does not load.
    """

    def __init__(
        self,
        index: Index,
        batch_tokens: int = 16_384,
        queue_tokens: int = 1_000_000,
        own_limits: OwnLimits | None = None,
    ):
        self.index, self.model = index, index.model
        name = index.manifest.model["name"]
        self.name = Path(name).name if Path(name).is_absolute() else name
        # The first call sets up the tokenizer, after which threads can use it together.
        tokenize_texts(self.model, ["a"])
        self.metrics = Metrics()
        self.worker = Worker(batch_tokens, queue_tokens, self.metrics.batch_tokens.observe)
        self.metrics.watch(lambda: self.worker.waiting_tokens, lambda: len(self.index))
        self._opened = self._manifest_state()
        self.own_files = OwnFiles(index, own_limits)

    def tokenize(self, texts: list[str], prompt_name: str | None) -> list[array]:
        """Tokenize texts as `encode` does.

        Args:
            texts: any strings.
            prompt_name: of the prompt; None: the model's default.

        Returns:
            The token ids of each.

        Raises:
            ValueError: there is no such prompt, or a text is longer than the context or no proper text.
        """
        choices = EncodingChoices(prompt_name)
        choices.check(self.model.config)
        return [
            array("i", ids) for ids in tokenize_texts(self.model, texts, choices.prompt(self.model.config)[1], "error")
        ]

    def embed(self, rows: Sequence[array]) -> list[Future]:
        """Ask for the vectors of tokenized texts.

        Args:
            rows: the token ids of each text.

        Returns:
            For each a future of a tensor `(1, d)` that is not scaled; see `finish`.

        Raises:
            BusyError: the queue is full.
        """
        return self.worker.submit(self._embed, rows, [len(row) for row in rows])

    def _embed(self, rows: list[array]) -> list[Tensor]:
        choices = EncodingChoices(batch_tokens=self.worker.batch_tokens, normalize=False)
        return [vector for vector, _ in encode_rows(self.model, rows, choices, lambda _: None)]

    def finish(self, vectors: Sequence[Tensor], dimensions: int | None) -> Tensor:
        """Return vectors as `encode` does, `(n, dimensions)`.

        Args:
            vectors: `(1, d)` each, as `embed` gives them.
            dimensions: leading ones that are kept; None: all.
        """
        return EncodingChoices(truncate_dim=dimensions).finish_vectors(torch.cat(list(vectors)), self.model.config)

    def search(self, query: str, **options: Any) -> "Future[list[Hit]]":
        """Ask for a search.

        Args:
            query: the text.
            **options: of `Index.search`.

        Returns:
            A future of what `Index.search` returns or raises.

        Raises:
            BusyError: the queue is full.
        """
        return self._alone(lambda: self.index.search(query, **options))

    def look(self, query: str, k: int, own: Index | None = None) -> "Future[list[Found]]":
        """Ask for a search with what is shown of each document.

        Args:
            query: the text.
            k: most documents.
            own: another index of the same model, which is searched instead.

        Returns:
            A future of the documents, best first.

        Raises:
            BusyError: the queue is full.
        """

        def compute() -> list[Found]:
            index, found = self.index if own is None else own, []
            read = index.read_query(query)
            for hit in index.search(read, k, passages=0, weight=self.index.manifest.weight):
                passages = index.passages(read, hit.id)
                shown = replace(hit, passages=best_passages(passages, SHOWN))
                found.append(Found(shown, index.document(hit.id), passages))
            return found

        return self._alone(compute)

    def _alone(self, compute: Callable[[], Any]) -> "Future[Any]":
        """Put a search into the queue, which is computed alone, in the index as it is on disk then."""

        def work(_: list[None]) -> list[Any]:
            if (found := self._manifest_state()) != self._opened:  # another process has written
                self.index.refresh()
                self._opened = found
            return [compute()]

        return self.worker.submit(work, [None], [SEARCH_TOKENS])[0]

    def _manifest_state(self) -> tuple[int, int]:
        found = (self.index.folder / MANIFEST).stat()
        return found.st_ino, found.st_mtime_ns

    def close(self) -> None:
        """Compute what is waiting, accept nothing more, and remove the files of visitors."""
        self.own_files.close()
        self.worker.close()
