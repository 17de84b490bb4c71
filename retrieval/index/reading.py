"""Documents to records: one reading of a document gives the vectors of its passages and those of its tokens.

A document that is longer than the context of the model is read in pieces, so that nothing of it is left out.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from modeling_longembed.encoding_choices_longembed import EncodingChoices
from modeling_longembed.encoding_longembed import (
    CHARACTERS_PER_BATCH_TOKEN,
    divide_into_windows,
    encode_rows,
    tokenize_texts,
)
from modeling_longembed.output_token_codes_longembed import TokenCodec
from retrieval.documents.document import Document
from retrieval.index.manifest import Settings
from retrieval.index.shards import Record
from retrieval.segments import Reading, Segmenter

# What the prompts of either side are called.
DOCUMENT_PROMPTS, QUERY_PROMPTS = ("document", "passage", "corpus"), ("query",)
# Which vectors `encode` is asked for, by whether passages and tokens have some from the reading of a document.
OUTPUTS = {(True, True): "both", (True, False): "vector", (False, True): "tokens"}


def prompt_of(model: Any, names: Sequence[str]) -> str | None:
    """Return the first of some names that is a prompt of the model; None if it has none of them."""
    return next((name for name in names if name in model.config.prompts), None)


class DocumentReader:
    """Read documents with a model.

    Args:
        model: a model of ours.
        settings: what is kept of a document.
        batch_tokens: tokens in one forward pass.
        on_read: is called after each forward pass with the number of characters, nearly, that it read.

    Attributes:
        tokens_read: how many tokens the model has read so far.

    Raises:
        UserError: the segments are none that there are, or the tokenizer does not tell the characters of a token.
        ValueError: the model does not have such token vectors.
    """

    def __init__(
        self,
        model: Any,
        settings: Settings,
        batch_tokens: int = 16_384,
        on_read: Callable[[float], None] = lambda _: None,
    ):
        self.model, self.settings, self.batch_tokens, self.on_read = model, settings, batch_tokens, on_read
        self.tokens_read = 0
        self.prompt_name = prompt_of(model, DOCUMENT_PROMPTS)
        _, self.prompt = EncodingChoices(prompt_name=self.prompt_name).prompt(model.config)
        context = model.config.max_position_embeddings
        self.segmenter = Segmenter(settings.segments, model.encode_tokenizer, context=context, prompt=self.prompt)
        # Token vectors are read as float32 until a codec has been fitted to a sample.
        self.codec = TokenCodec("float32")
        parts = settings.parts
        kind, _, size = settings.segments.partition(":")
        self.chunk_tokens = int(size) if kind == "late" and "vector" in parts else None
        self.output = OUTPUTS.get((self.chunk_tokens is not None, "tokens" in parts))
        # How often the model reads the text of a document: at once, passages apart, both, or not at all.
        self.times = (self.output is not None) + ("vector" in parts and self.chunk_tokens is None)
        if self.output is not None:
            self._choices(self.output).check(model.config)

    def __call__(self, documents: Iterable[Document]) -> Iterator[Record]:
        """Read documents some at a time, whatever their number.

        Args:
            documents: the documents.

        Yields:
            What is kept of each, in their order.
        """
        window: list[Document] = []
        size = 0
        for document in documents:
            window.append(document)
            size += len(document.text)
            if size >= CHARACTERS_PER_BATCH_TOKEN * self.batch_tokens:
                yield from self._read(window)
                window, size = [], 0
        yield from self._read(window)

    def _read(self, documents: Sequence[Document]) -> Iterator[Record]:
        """Read documents whose vectors are in memory together; yield a record of each."""
        readings = [self.segmenter.read(document.text) for document in documents]
        rows = [array("i", reading.ids.tolist()) for parts in readings for reading in parts]
        found: Iterator[Any] = iter([])
        if self.output is not None:
            self.tokens_read += sum(map(len, rows))
            share = sum(len(document.text) for document in documents) / max(1, len(rows)) / self.times
            found = iter(
                encode_rows(self.model, rows, self._choices(self.output), lambda count: self.on_read(count * share))
            )
        segments = [
            _pairs(self.segmenter(document.text, parts)) for document, parts in zip(documents, readings, strict=True)
        ]
        apart: Iterator[np.ndarray] = iter([])
        if "vector" in self.settings.parts and self.chunk_tokens is None:
            apart = self._vectors_of_segments(documents, segments)
        for document, parts, spans in zip(documents, readings, segments, strict=True):
            outputs = [] if self.output is None else [next(found) for _ in parts]
            vectors = codes = None
            if self.chunk_tokens is not None:
                vectors = torch.cat([passages for passages, _ in outputs]).numpy()
            elif "vector" in self.settings.parts:
                vectors = next(apart)
                self.on_read(len(document.text) / self.times)
            if "tokens" in self.settings.parts:
                codes = torch.cat([tokens for _, tokens in outputs]).numpy()
            # Special tokens alone are a late chunk too, but no passage of the document.
            filled = (spans[:, 1] > spans[:, 0]) & any(reading.is_text.any() for reading in parts)
            spans = spans[filled]
            vectors = None if vectors is None else vectors[filled]
            yield Record(document, spans, self._rows_of_tokens(parts, spans), vectors, codes)

    def _choices(self, output: str) -> EncodingChoices:
        options: dict[str, Any] = {}
        if output != "vector":
            options = {"is_query": False, "token_dim": self.settings.token_dim, "token_precision": self.codec}
        if output != "tokens":
            options |= {"normalize": True, "late_chunk_tokens": self.chunk_tokens}
        return EncodingChoices(self.prompt_name, self.batch_tokens, output_value=output, **options)

    def _rows_of_tokens(self, readings: Sequence[Reading], spans: np.ndarray) -> np.ndarray:
        """Return which of the token vectors of a document are of tokens that begin in a passage, `(p, 2)`."""
        if "tokens" not in self.settings.parts:
            return np.zeros_like(spans)
        device = self.model.device
        ids = torch.from_numpy(np.concatenate([reading.ids for reading in readings])).to(device)
        left_out = self.model.left_out_tokens(device)
        kept = self.model.token_output.has_vector(ids, left_out, "document").cpu().numpy()
        is_text = np.concatenate([reading.is_text for reading in readings])
        starts = np.concatenate([reading.offsets[:, 0] for reading in readings])[is_text]
        # How many token vectors there are before each token of the text, and in all.
        before = np.append((np.cumsum(kept) - kept)[is_text], kept.sum())
        return before[np.searchsorted(starts, spans)].astype(np.int64)

    def _vectors_of_segments(
        self, documents: Sequence[Document], segments: Sequence[np.ndarray]
    ) -> Iterator[np.ndarray]:
        """Encode segments as texts of their own; yield the vectors `(p, d)` of each document."""
        texts = (
            document.text[start:end]
            for document, spans in zip(documents, segments, strict=True)
            for start, end in spans.tolist()
        )
        windows = divide_into_windows(texts, CHARACTERS_PER_BATCH_TOKEN * self.batch_tokens)
        found = torch.zeros(0, self.model.config.hidden_size)
        for spans in segments:
            while len(found) < len(spans):
                rows = [array("i", ids) for ids in tokenize_texts(self.model, next(windows), self.prompt)]
                self.tokens_read += sum(map(len, rows))
                read = encode_rows(self.model, rows, self._choices("vector"), lambda _: None)
                found = torch.cat([found, *(vector for vector, _ in read)])
            yield found[: len(spans)].numpy()
            found = found[len(spans) :]


def document_reader(
    model: Any, settings: Settings, batch_tokens: int = 16_384, on_read: Callable[[float], None] = lambda _: None
) -> DocumentReader:
    """Return a `DocumentReader` for settings that a user has chosen.

    Args:
        model: a model of ours.
        settings: what is kept of a document.
        batch_tokens: tokens in one forward pass.
        on_read: as of `DocumentReader`.

    Raises:
        UserError: the segments are none that there are, or the model does not have such token vectors.
    """
    try:
        return DocumentReader(model, settings, batch_tokens, on_read)
    except ValueError as error:
        raise UserError(str(error)) from None


def _pairs(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    return np.array(list(pairs), np.int64).reshape(-1, 2)


class QueryReader:
    """Read queries with a model.

    Args:
        model: a model of ours.
        settings: what is kept of a document.
        batch_tokens: tokens in one forward pass.
    """

    def __init__(self, model: Any, settings: Settings, batch_tokens: int = 16_384):
        self.model, self.settings, self.batch_tokens = model, settings, batch_tokens

    def __call__(self, query: str, parts: Sequence[str]) -> tuple[np.ndarray | None, torch.Tensor | None]:
        """Read a query.

        Args:
            query: the text; what is beyond the context of the model is cut off.
            parts: what is asked for.

        Returns:
            Its vector `(d,)` float32 and its token vectors `(t, k)`; None for what is not asked for.
        """
        output = OUTPUTS.get(("vector" in parts, "tokens" in parts))
        if output is None:
            return None, None
        options: dict[str, Any] = {} if output == "tokens" else {"normalize": True}
        if output != "vector":
            options |= {"is_query": True, "token_dim": self.settings.token_dim}
        found = self.model.encode(
            query,
            prompt_name=prompt_of(self.model, QUERY_PROMPTS),
            batch_tokens=self.batch_tokens,
            output="torch",
            output_value=output,
            **options,
        )
        vector, tokens = found if output == "both" else (found, found)
        return None if output == "tokens" else vector.numpy(), None if output == "vector" else tokens
