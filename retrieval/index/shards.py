"""Shards: documents with all that is kept of them, in one file that is written once and memory-mapped.

The file is in the format of safetensors. D documents, P passages, T token vectors, V words, d width of a vector:

- `text`, `ids`, `metadata`, `marks`: bytes, UTF-8 and JSON, of all documents one after another; `text_ends` and so on,
  `(D,)` int64, where each ends;
- `passages` `(P, 2)` int64, the characters of each passage in its document, and `passage_tokens` `(P, 2)` int64, the
  token vectors of its tokens among those of the document; `passage_ends` `(D,)` int64;
- `vectors` `(P, d)` float32, unit length;
- `codes` `(T, ...)` of token vectors, or `code_blocks` if they have one bit a dimension, those of each document as
  `TokenBits` has them; and `code_ends` `(D,)` int64, where the vectors of each document end;
- the postings of words; see `retrieval.index.words`.
"""

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from common.errors import reading
from common.files import atomic_file
from retrieval.documents.document import Document, Mark
from retrieval.index.token_bits import BLOCK, TokenBits
from retrieval.index.words import postings

_DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8}
_TEXTS = ("text", "ids", "metadata", "marks")


@dataclass(frozen=True)
class Record:
    """A document with all that is kept of it.

    Args:
        document: the document.
        passages: `(p, 2)` int64, first character of each passage and the one after its last.
        passage_tokens: `(p, 2)` int64, rows of `codes`; both 0 for a passage without token vectors.
        vectors: `(p, d)` float32 of the passages; None: they are not kept.
        codes: `(t, ...)` of its token vectors; None: they are not kept.
    """

    document: Document
    passages: np.ndarray
    passage_tokens: np.ndarray
    vectors: np.ndarray | None = None
    codes: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """The bytes that the record takes, nearly."""
        arrays = (self.passages, self.passage_tokens, self.vectors, self.codes)
        return len(self.document.text) + sum(array.nbytes for array in arrays if array is not None)


@dataclass
class ShardContent:
    """The records of a shard that is being written, in memory.

    Args:
        records: the documents.
        nbytes: that they take, nearly.
    """

    records: list[Record] = field(default_factory=list)
    nbytes: int = 0

    def add(self, record: Record) -> None:
        """Add a document."""
        self.records.append(record)
        self.nbytes += record.nbytes

    @property
    def tokens(self) -> int:
        """How many token vectors there are."""
        return sum(len(record.codes) for record in self.records if record.codes is not None)

    def write(self, path: Path, words: bool, bits: bool = False) -> None:
        """Write the shard, all of it or nothing.

        Args:
            path: of the file.
            words: whether documents will be searched by their words.
            bits: whether codes have one bit a dimension.
        """
        records = self.records
        documents = [record.document for record in records]
        arrays: dict[str, np.ndarray] = {}
        texts = {
            "text": [document.text for document in documents],
            "ids": [document.id for document in documents],
            "metadata": [json.dumps(dict(document.metadata), ensure_ascii=False) for document in documents],
            "marks": [json.dumps([[m.start, m.kind, m.value] for m in document.marks]) for document in documents],
        }
        for name, strings in texts.items():
            packed = [string.encode() for string in strings]
            arrays[name] = np.frombuffer(b"".join(packed), np.uint8)
            arrays[f"{name}_ends"] = _ends(packed)
        arrays["passages"] = np.concatenate([record.passages for record in records])
        arrays["passage_tokens"] = np.concatenate([record.passage_tokens for record in records])
        arrays["passage_ends"] = _ends([record.passages for record in records])
        for name, ends in (("vectors", None), ("codes", "code_ends")):
            kept = [array for record in records if (array := getattr(record, name)) is not None]
            if kept:
                # Before there is a codec, documents without tokens have rows of another width than codes.
                arrays[name] = np.concatenate([array for array in kept if len(array)] or kept[:1])
                arrays |= {} if ends is None else {ends: _ends(kept)}
        if bits and "codes" in arrays:
            del arrays["codes"]
            blocks = [TokenBits.pack(array).blocks for array in kept if len(array)]
            arrays["code_blocks"] = np.concatenate(blocks) if blocks else np.zeros((0, 0), np.uint8)
        if words:
            arrays |= postings([document.text for document in documents])
        with atomic_file(path) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)


def _ends(parts: Any) -> np.ndarray:
    """Return where each of some strings or arrays ends if they are put one after another, `(D,)` int64."""
    return np.cumsum([len(part) for part in parts], dtype=np.int64)


class Shard:
    """A shard that is read; its arrays stay on disk until they are used.

    Args:
        path: of the file.

    Raises:
        UserError: the file is damaged.
        FileNotFoundError: there is none.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file, reading(f"{path}", path):
            with safe_open(path, framework="numpy"):  # refuses a file whose header or size is wrong
                pass
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            start = 8 + int.from_bytes(self.map[:8], "little")
            header = json.loads(self.map[8:start])
            self.arrays: dict[str, np.ndarray] = {
                name: np.frombuffer(
                    self.map,
                    np.uint8,
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                    start + entry["data_offsets"][0],
                )
                .view(_DTYPES[entry["dtype"]])
                .reshape(entry["shape"])
                for name, entry in header.items()
                if name != "__metadata__"
            }
            self.path = path
            self.documents = len(self.arrays["ids_ends"])
            if "code_blocks" in self.arrays:
                counts = np.diff(self.arrays["code_ends"], prepend=0)
                self.block_ends = np.cumsum(np.concatenate([[0], -(-counts // BLOCK)]))

    def __len__(self) -> int:
        return self.documents

    def _string(self, name: str, place: int) -> str:
        ends = self.arrays[f"{name}_ends"]
        start = int(ends[place - 1]) if place else 0
        return self.arrays[name][start : int(ends[place])].tobytes().decode()

    def id(self, place: int) -> str:
        """Return the id of the document at a place."""
        return self._string("ids", place)

    def metadata(self, place: int) -> dict[str, Any]:
        """Return the metadata of the document at a place."""
        return json.loads(self._string("metadata", place))

    def document(self, place: int) -> Document:
        """Return the document at a place."""
        marks = tuple(Mark(*mark) for mark in json.loads(self._string("marks", place)))
        return Document(self.id(place), self._string("text", place), self.metadata(place), marks)

    def rows(self, name: str, place: int) -> slice:
        """Return the rows of a document in an array.

        Args:
            name: `passage` for those of passages, `code` for those of token vectors.
            place: of the document.
        """
        ends = self.arrays[f"{name}_ends"]
        return slice(int(ends[place - 1]) if place else 0, int(ends[place]))

    def tokens(self, place: int) -> np.ndarray | TokenBits:
        """Return the codes of the token vectors of a document, as they are stored."""
        rows = self.rows("code", place)
        if "codes" in self.arrays:
            return self.arrays["codes"][rows]
        blocks = slice(*self.block_ends[place : place + 2].tolist())
        return TokenBits(self.arrays["code_blocks"][blocks], rows.stop - rows.start)

    def codes(self, place: int) -> np.ndarray:
        """Return the codes of the token vectors of a document, `(t, ...)`."""
        tokens = self.tokens(place)
        return tokens.codes if isinstance(tokens, TokenBits) else tokens

    def record(self, place: int) -> Record:
        """Return a document with all that is kept of it."""
        passages = self.rows("passage", place)
        return Record(
            self.document(place),
            self.arrays["passages"][passages],
            self.arrays["passage_tokens"][passages],
            self.arrays["vectors"][passages] if "vectors" in self.arrays else None,
            self.codes(place) if "code_ends" in self.arrays else None,
        )

    def ids(self) -> Iterator[str]:
        """Return the ids of all documents, in their order."""
        return (self.id(place) for place in range(self.documents))
