"""Chunk alignment: late chunks of a student's reading learn a teacher's vectors of the texts of these chunks."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from common.errors import UserError
from common.provenance import computed_by
from modeling_longembed.encoding_tokens_longembed import special_tokens_around
from training.data.pairs.batches import PairBatch, PairTokenizer
from training.data.sources import Source, fingerprint
from training.engine.processes.distributed import own_share
from training.models.identity import tokenizer_identity
from training.teachers.embedding_teachers import Teacher

CODE = ("training.teachers.late_chunks", "modeling_longembed.encoding_tokens_longembed")  # what cuts a text


class LateChunks:
    """The texts of the chunks that `encode(..., late_chunk_tokens=size)` of the student makes of documents.

    Args:
        tokenize: the student's tokenizer, with its prompt and the length at which it cuts documents off.
        size: tokens of a chunk, special tokens and the prompt included.

    Raises:
        UserError: the tokenizer does not know the offsets of its tokens.
    """

    def __init__(self, tokenize: PairTokenizer, size: int) -> None:
        if not tokenize.tokenizer.is_fast:
            raise UserError("--late_chunk_tokens needs a fast tokenizer; save the model with its tokenizer.json")
        self.tokenize, self.size = tokenize, size
        self.limit, self.prompt = tokenize.limit("document"), tokenize.prompts.get("document", "")

    def __call__(self, texts: Iterable[str]) -> list[list[str]]:
        """Cut documents.

        Args:
            texts: documents.

        Returns:
            For each document the text of each of its chunks; empty where a chunk has nothing but special tokens, the
            prompt or blanks.
        """
        closing = len(special_tokens_around(self.tokenize.tokenizer)[1])
        return [list(self._cut(text, closing)) for text in texts]

    def _cut(self, text: str, closing: int) -> Iterator[str]:
        encoding = self.tokenize.tokenizer(self.prompt + text, truncation=False, verbose=False).encodings[0]
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2) - len(self.prompt)
        is_text = np.array([sequence is not None for sequence in encoding.sequence_ids], np.bool_) & (offsets[:, 1] > 0)
        if len(offsets) > self.limit:  # what comes after the text that is left is special
            is_text[max(0, self.limit - closing) :] = False
        for start in range(0, min(len(offsets), self.limit), self.size):
            own = offsets[start : start + self.size][is_text[start : start + self.size]]
            chunk = text[max(0, own[:, 0].min()) : own[:, 1].max()] if len(own) else ""
            yield "" if chunk.isspace() else chunk

    def column(self, source: Source, rows: Sequence[int]) -> Sequence[str]:
        """Return the texts of all chunks that have one, as a column of a table on disk.

        Args:
            source: the documents, in its first column.
            rows: which of its rows are cut.
        """
        chosen, text = source.rows.select(rows), source.columns[0]

        def cut(texts: list[str]) -> dict[str, list[str]]:
            return {"chunk": [chunk for chunk in chain.from_iterable(self(texts)) if chunk]}

        cut_off = (self.size, self.limit, self.prompt, tokenizer_identity(self.tokenize.tokenizer))
        table = chosen.select_columns(text).map(
            cut,
            input_columns=text,
            remove_columns=text,
            batched=True,
            batch_size=64,
            features=datasets.Features({"chunk": datasets.Value("large_string")}),
            new_fingerprint=fingerprint(
                chosen._fingerprint,
                text,
                *map(str, cut_off),
                json.dumps(computed_by(*CODE, libraries=("transformers", "tokenizers"))),
            ),
            desc=f"cutting {source.name} into chunks",
        )
        column: Any = table["chunk"]
        return column


class ChunkTeacher:
    """A teacher that gives its vectors of the texts of late chunks.

    Args:
        teacher: the teacher, whose model is in memory until it has read whole texts.
        late_chunks: cuts the texts.

    Attributes:
        width: width of a vector.
        identity: what the vectors depend on besides the texts.
    """

    def __init__(self, teacher: Teacher, late_chunks: LateChunks) -> None:
        self.teacher, self.late_chunks = teacher, late_chunks
        self.width, self.identity = teacher.width, teacher.identity

    def read_all(self, sources: Iterable[Source]) -> None:
        """Embed the chunks of the texts of all sources that are not cached yet; the processes share the texts.

        Args:
            sources: the training and the held-out data.

        Raises:
            UserError: the file is not a cache of vectors, or the disk is full.
        """
        for source in sources:
            self.teacher.fill(self.late_chunks.column(source, own_share(len(source.rows))), "chunks")

    def read(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Read the vectors of all chunks of a batch that have a text.

        Args:
            batch: a batch that holds the texts of its chunks.

        Returns:
            Float32 vectors `(chunks, t)`, and whether each chunk fits into the teacher's window, `(chunks,)`.

        Raises:
            UserError: a vector is no longer in the cache.
        """
        assert batch.chunk_texts is not None
        return self.teacher.vectors([text for text in chain.from_iterable(batch.chunk_texts) if text])
