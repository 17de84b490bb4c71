"""Tokenised texts: a source is tokenised once, and its tokens are kept in the cache of `datasets`, beside its texts.

Two kinds of columns are derived from a source in this way: the token ids that masked language models train on, and the
places of the tokens in the text, from which pairs are cut. Both are memory-mapped, and shared by all processes and all
later runs on the same texts with the same tokenizer.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.provenance import computed_by
from modeling_longembed.encoding_longembed import divide_into_windows
from training.data.document import Document
from training.data.documents.next_sentence import Segment
from training.data.sources import OFFSET_COLUMNS, Source, fingerprint
from training.models.identity import tokenizer_identity

CODE = ("training.data.documents.token_store", "training.data.document")  # what turns a text into tokens
# Characters of the texts that are tokenised together. What a tokenizer returns takes many times their memory.
CHARACTERS_AT_ONCE = 200_000
ID_COLUMNS = {"input_ids": "int32", "starts_word": "bool"}


class TokenizedDocuments:
    """The documents of a source as token ids without special tokens; documents without tokens are left out.

    Args:
        rows: one document per row, with the columns `input_ids` and `starts_word`.
        name: name of the source.
        weight: how often an epoch goes through the documents.
    """

    def __init__(self, rows: datasets.Dataset, name: str, weight: float = 1.0) -> None:
        self.rows, self.name, self.weight = rows, name, weight
        lengths = pyarrow.compute.list_value_length(rows.data.column("input_ids"))
        self.lengths: np.ndarray = lengths.to_numpy().astype(np.int64)  # (documents,), in tokens
        self.total = int(self.lengths.sum())

    def read(self, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """Read the tokens of a segment.

        Args:
            segment: the document, and where in it the segment starts and stops.

        Returns:
            The token ids, `(n,)` int64, and which of them start a word, `(n,)` bool.
        """
        columns = (self.rows.data.column(name)[segment.document].values for name in ID_COLUMNS)
        size = segment.stop - segment.start
        ids, starts_word = (c.slice(segment.start, size).to_numpy(zero_copy_only=False) for c in columns)
        return ids.astype(np.int64), starts_word

    def content(self) -> str:
        """Return a hash of the tokens, and the number of the documents."""
        digest = hashlib.blake2b(self.lengths.tobytes(), digest_size=8)
        for chunk in self.rows.data.column("input_ids").chunks:
            digest.update(chunk.flatten().to_numpy().tobytes())
        return f"{len(self.lengths)} documents with the hash {digest.hexdigest()}"

    def token_counts(self, vocab_size: int) -> Tensor:
        """Count how often each token occurs: `(vocab_size,)` int64. Special tokens are not in the documents."""
        counts = np.zeros(vocab_size, np.int64)
        for chunk in self.rows.data.column("input_ids").chunks:  # the whole column need not fit into memory
            counts += np.bincount(chunk.flatten().to_numpy(), minlength=vocab_size)
        return torch.from_numpy(counts)


def tokenize_documents(source: Source, tokenizer: PreTrainedTokenizerBase) -> TokenizedDocuments:
    """Tokenise the documents of a source, or read the tokens that an earlier run has left in the cache.

    Args:
        source: texts, in its first column.
        tokenizer: the model's.

    Returns:
        The documents that have tokens.

    Raises:
        UserError: no document has any.
    """

    def read(texts: list[str]) -> dict[str, list[Any]]:
        tokens, starts = list[np.ndarray](), list[np.ndarray]()
        for part in divide_into_windows(texts, CHARACTERS_AT_ONCE):
            encoded = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for number, ids in enumerate(encoded["input_ids"]):
                if ids:
                    tokens.append(np.array(ids, np.int32))
                    starts.append(word_starts(tokenizer, ids, encoded.encodings, number))
        return {"input_ids": tokens, "starts_word": starts}

    rows = _map_texts(source, tokenizer, read, ID_COLUMNS)
    if not len(rows):
        raise UserError(f"{source.name}: its texts hold no token that the tokenizer knows; give other texts")
    return TokenizedDocuments(rows, source.name, source.weight)


def with_token_offsets(source: Source, tokenizer: PreTrainedTokenizerBase) -> Source:
    """Return the source with the columns `OFFSET_COLUMNS`, which say where in a document its tokens are."""

    def read(texts: list[str]) -> dict[str, list[Any]]:
        documents = [Document.read(text, tokenizer) for text in texts]
        columns = zip(*((*document.offsets.T, document.words) for document in documents), strict=True)
        return dict(zip(OFFSET_COLUMNS, map(list, columns), strict=True))

    tokens = _map_texts(source, tokenizer, read, dict.fromkeys(OFFSET_COLUMNS, "int32"))
    return replace(source, rows=datasets.concatenate_datasets([source.rows, tokens], axis=1))


def _map_texts(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    read: Callable[[list[str]], dict[str, list[Any]]],
    columns: dict[str, str],
) -> datasets.Dataset:
    """Derive columns of lists, of the given types, from the texts of a source; the result is cached."""
    text = source.columns[0]
    return source.rows.select_columns(text).map(
        read,
        input_columns=text,
        remove_columns=text,
        batched=True,
        batch_size=64,
        features=datasets.Features({name: datasets.List(datasets.Value(kind)) for name, kind in columns.items()}),
        new_fingerprint=fingerprint(
            source.rows._fingerprint,
            text,
            tokenizer_identity(tokenizer),
            json.dumps(computed_by(*CODE, libraries=("transformers", "tokenizers"))),
            *columns,
        ),
        desc=f"tokenising {source.name}",
    )


def word_starts(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], encodings: Any = None, number: int = 0
) -> np.ndarray:
    """Find the tokens that start a word.

    Args:
        tokenizer: the tokenizer of the text.
        tokens: `n` token ids of the text.
        encodings: what a fast tokenizer says about a batch of texts; None for another one, whose words are recognised
            by WordPiece's `##`.
        number: of the text in the batch.

    Returns:
        `(n,)` bool.
    """
    if encodings is None:
        words = tokenizer.convert_ids_to_tokens(list(tokens))
        return np.array([not word.startswith("##") for word in words], np.bool_)
    words = encodings[number].word_ids
    return np.array([place == 0 or word is None or word != words[place - 1] for place, word in enumerate(words)])
