"""An index as it is at one moment: the files that one manifest names, opened for reading.

It stays what it is while a writer works, because files never change, and those that are removed stay mapped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from retrieval.documents.document import Document
from retrieval.index.approximate import INDEX
from retrieval.index.codec import read_codec
from retrieval.index.filters import matches
from retrieval.index.manifest import CODECS, SHARDS, VECTORS, Manifest
from retrieval.index.shards import Shard
from retrieval.index.token_bits import TokenBits
from retrieval.index.vectors import VectorScores
from retrieval.index.words import WordScores


class Snapshot:
    """The documents of an index, numbered over all shards, and what scores them.

    Args:
        folder: of the index.
        manifest: which files are read.

    Raises:
        UserError: a file is damaged.
        FileNotFoundError: a file is not there.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.shards = []
        for entry in manifest.shards:
            path = folder / SHARDS / entry.name
            if path.stat().st_size != entry.size:
                raise UserError(
                    f"{path}: it has {path.stat().st_size:,} bytes instead of {entry.size:,}; copy the index again"
                )
            self.shards.append(Shard(path))
        self.first_document = np.cumsum([0, *map(len, self.shards)])
        self.alive = [np.ones(len(shard), bool) for shard in self.shards]
        for kept, entry in zip(self.alive, manifest.shards, strict=True):
            kept[list(entry.deleted)] = False
        self.all_alive = np.concatenate([*self.alive, np.zeros(0, bool)])
        parts = manifest.settings.parts
        arrays = [shard.arrays for shard in self.shards]
        self.words = WordScores(arrays, self.alive) if "words" in parts else None
        self.codec = None if manifest.codec is None else read_codec(folder / CODECS / manifest.codec)
        self.vectors: VectorScores | None = None
        if "vector" in parts:
            found = manifest.vectors
            approximate = None if found is None else folder / VECTORS / found.name
            if approximate is not None and not (approximate / INDEX).exists():
                raise FileNotFoundError(approximate)
            self.vectors = VectorScores(
                [shard.arrays["vectors"] for shard in self.shards],
                [shard.arrays["passage_ends"] for shard in self.shards],
                approximate,
                0 if found is None else len(found.shards),
                0 if found is None else found.nprobe,
            )
        self._metadata: list[dict[str, Any]] | None = None
        self._places: dict[str, int] | None = None

    @classmethod
    def open(cls, folder: Path) -> "Snapshot":
        """Open what the manifest names; if a writer replaces it meanwhile, what the new one names.

        Raises:
            UserError: there is no index, or it is damaged.
        """
        manifest = Manifest.read(folder)
        while True:
            try:
                return cls(folder, manifest)
            except (FileNotFoundError, UserError) as error:
                before, manifest = manifest, Manifest.read(folder)
                if manifest != before:
                    continue
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{folder}: {error.filename or error} is missing; copy the index again") from None

    def __len__(self) -> int:
        return int(self.all_alive.sum())

    def locate(self, number: int) -> tuple[Shard, int]:
        """Return the shard of a document and its place there."""
        shard = int(np.searchsorted(self.first_document, number, side="right")) - 1
        return self.shards[shard], number - int(self.first_document[shard])

    def document(self, number: int) -> Document:
        """Return a document by its number."""
        shard, place = self.locate(number)
        return shard.document(place)

    def tokens(self, number: int) -> np.ndarray | TokenBits:
        """Return the codes of the token vectors of a document, as they are stored."""
        shard, place = self.locate(number)
        return shard.tokens(place)

    def allowed(self, filters: Mapping[str, Any] | None) -> np.ndarray:
        """Return which documents are not deleted and match all filters, `(D,)` bool."""
        if not filters:
            return self.all_alive
        if self._metadata is None:  # read once, with the first filter
            self._metadata = [shard.metadata(place) for shard in self.shards for place in range(len(shard))]
        return self.all_alive & np.fromiter((matches(filters, found) for found in self._metadata), bool)

    def places(self) -> dict[str, int]:
        """Return the number of each document that is not deleted, by its id."""
        if self._places is None:
            ids = (one for shard in self.shards for one in shard.ids())
            self._places = {one: number for number, one in enumerate(ids) if self.all_alive[number]}
        return self._places
