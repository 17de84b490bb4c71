"""Changes of an index: documents are added, replaced, deleted, and shards are rewritten without what is deleted.

All is done by one writer at a time, who holds the lock. New files are written whole under names of their own; the
manifest is replaced last.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import atomic_file, atomic_folder, remove_leftovers
from modeling_longembed.output_token_codes_longembed import TokenCodec
from retrieval.documents.document import Document
from retrieval.index.approximate import EXACT_LIMIT, build_approximate, choose_kind
from retrieval.index.codec import fit_codec, read_codec, write_codec
from retrieval.index.manifest import CODECS, SHARDS, VECTORS, Manifest, ShardEntry, VectorsEntry, new_name
from retrieval.index.reading import DocumentReader
from retrieval.index.shards import Record, Shard, ShardContent
from retrieval.index.snapshot import Snapshot

Save = Callable[[Manifest], None]


class Writer:
    """What changes an index, whose lock the caller holds.

    Args:
        folder: of the index.
        shard_mb: MiB of a shard, nearly.
        memory: bytes that vectors may take in memory; None: half of the machine's.
    """

    def __init__(self, folder: Path, shard_mb: float = 256, memory: int | None = None):
        self.folder, self.shard_bytes, self.memory = folder, int(shard_mb * 2**20), memory

    def add(
        self,
        manifest: Manifest,
        documents: Iterable[Document] | Iterable[Record],
        reader: DocumentReader | None,
        save: Save = lambda _: None,
        whole: bool = False,
    ) -> Manifest:
        """Add documents; one with the id of another replaces it, and one that is there already is left as it is.

        Args:
            manifest: the index as it is.
            documents: the documents, or records of them.
            reader: reads them; None: they are records, whose codes are those of the manifest's codec.
            save: is called after each shard with the manifest so far.
            whole: whether documents that are in the manifest, but not among these, are deleted.

        Returns:
            The manifest with them.

        Raises:
            UserError: two of the documents have one id.
        """
        snapshot = Snapshot(self.folder, manifest)
        places, replaced = snapshot.places(), dict[str, set[int]]()
        seen: set[str] = set()

        def changed() -> Iterator[Any]:
            for item in documents:
                document = item.document if isinstance(item, Record) else item
                if document.id in seen:
                    raise UserError(f"two documents have the id {document.id!r}; give each an id of its own")
                seen.add(document.id)
                if document.id in places:
                    shard, place = snapshot.locate(places[document.id])
                    if shard.document(place) == document:
                        continue
                    replaced.setdefault(shard.path.name, set()).add(place)
                yield item

        new = changed()
        if reader is None:
            records: Iterator[Record] = new
        else:
            manifest, records = self._read(manifest, new, reader)
        for entry in self._shards(records, manifest):
            manifest = replace(manifest, shards=(*manifest.shards, entry)).without(replaced)
            save(manifest)
        if whole:
            for one in places.keys() - seen:
                shard, place = snapshot.locate(places[one])
                replaced.setdefault(shard.path.name, set()).add(place)
        return self.index_vectors(manifest.without(replaced))

    def delete(self, manifest: Manifest, ids: Iterable[str]) -> Manifest:
        """Delete documents.

        Args:
            manifest: the index as it is.
            ids: of the documents.

        Returns:
            The manifest without them.

        Raises:
            UserError: there is no document with one of the ids.
        """
        snapshot, deleted = Snapshot(self.folder, manifest), dict[str, set[int]]()
        places = snapshot.places()
        for one in ids:
            if one not in places:
                raise UserError(f"{self.folder} has no document with the id {one!r}; none was deleted")
            shard, place = snapshot.locate(places[one])
            deleted.setdefault(shard.path.name, set()).add(place)
        return manifest.without(deleted)

    def compact(self, manifest: Manifest) -> Manifest:
        """Write all shards anew without the documents that are deleted, in as few as they fill.

        Args:
            manifest: the index as it is.

        Returns:
            The manifest of the new shards.
        """
        snapshot = Snapshot(self.folder, manifest)
        records = (
            shard.record(place)
            for shard, kept in zip(snapshot.shards, snapshot.alive, strict=True)
            for place in kept.nonzero()[0].tolist()
        )
        new = replace(manifest, shards=tuple(self._shards(records, manifest)), vectors=None)
        return self.index_vectors(new)

    def tidy(self, manifest: Manifest) -> None:
        """Remove the files of the index that its manifest does not name."""
        remove_leftovers(self.folder)
        for kind in (SHARDS, VECTORS, CODECS):
            for path in (self.folder / kind).glob("*") if (self.folder / kind).is_dir() else ():
                if path.relative_to(self.folder) not in manifest.files:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def keep_codec(self, manifest: Manifest, codec: TokenCodec) -> Manifest:
        """Write the codec of token vectors, unless the index has it.

        Args:
            manifest: the index as it is.
            codec: the codec.

        Returns:
            The manifest with it.

        Raises:
            UserError: the index has another one.
        """
        if manifest.codec is not None:
            kept = read_codec(self.folder / CODECS / manifest.codec)
            same = kept.tables.keys() == codec.tables.keys()
            if not same or any(not torch.equal(kept.tables[name], codec.tables[name]) for name in kept.tables):
                raise UserError(f"{self.folder}: the codes of its token vectors are others; build another index")
            return manifest
        name = new_name(0, ".safetensors")
        with atomic_file(self.folder / CODECS / name) as temporary:
            write_codec(temporary, codec)
        return replace(manifest, codec=name)

    def _read(
        self, manifest: Manifest, documents: Iterator[Document], reader: DocumentReader
    ) -> tuple[Manifest, Iterator[Record]]:
        """Return the manifest with the codec of the documents' tokens, and their records, which are read one by one."""
        first: list[Record] = []
        if "tokens" in manifest.settings.parts:
            if manifest.codec is None:
                codec, first = fit_codec(documents, reader)
                manifest = manifest if codec is None else self.keep_codec(manifest, codec)
            if manifest.codec is not None:
                reader.codec = read_codec(self.folder / CODECS / manifest.codec)
        return manifest, chain(first, reader(documents))

    def _shards(self, records: Iterable[Record], manifest: Manifest) -> Iterator[ShardEntry]:
        """Write records as shards; yield the entry of each."""
        content, number = ShardContent(), len(manifest.shards)
        for record in records:
            content.add(record)
            if content.nbytes >= self.shard_bytes:
                yield self._write(content, manifest, number)
                content, number = ShardContent(), number + 1
        if content.records:
            yield self._write(content, manifest, number)

    def _write(self, content: ShardContent, manifest: Manifest, number: int) -> ShardEntry:
        name = new_name(number, ".safetensors")
        path = self.folder / SHARDS / name
        settings = manifest.settings
        content.write(path, "words" in settings.parts, settings.token_precision == "binary")
        passages = sum(len(record.passages) for record in content.records)
        return ShardEntry(name, path.stat().st_size, len(content.records), passages, content.tokens)

    def index_vectors(self, manifest: Manifest) -> Manifest:
        """Make the approximate index of passage vectors if they are many, and if many are not yet in it.

        Args:
            manifest: the index as it is.

        Returns:
            The manifest with it.
        """
        total = sum(entry.passages for entry in manifest.shards)
        covered = set() if manifest.vectors is None else set(manifest.vectors.shards)
        new = sum(entry.passages for entry in manifest.shards if entry.name not in covered)
        if "vector" not in manifest.settings.parts or new <= EXACT_LIMIT:
            return manifest
        shards = [Shard(self.folder / SHARDS / entry.name) for entry in manifest.shards]
        vectors = [shard.arrays["vectors"] for shard in shards]
        kind = choose_kind(total, vectors[0].shape[1], self.memory, manifest.settings.vector_search)
        name = new_name(len(shards))
        with atomic_folder(self.folder / VECTORS / name) as folder:
            nprobe = build_approximate(folder, vectors, kind, self.memory)
        names = tuple(entry.name for entry in manifest.shards)
        return replace(manifest, vectors=VectorsEntry(name, kind.name, kind.reason, nprobe, names))
