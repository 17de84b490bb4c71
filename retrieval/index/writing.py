"""Changes of an index: documents are added, replaced, deleted, and shards are rewritten without what is deleted.

All is done by one writer at a time, who holds the lock. New files are written whole under names of their own; the
manifest is replaced last.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.encoders.kept_tokens import SAMPLE_DOCUMENTS, SAMPLE_VECTORS, UNFITTED
from common.errors import UserError
from common.files import atomic_file, atomic_folder, remove_leftovers
from modeling_longembed.output_token_codes_longembed import TokenCodec
from retrieval.documents.document import Document
from retrieval.index.approximate import EXACT_LIMIT, build_approximate, choose_kind
from retrieval.index.manifest import CODECS, SHARDS, VECTORS, Manifest, ShardEntry, VectorsEntry, new_name
from retrieval.index.reading import DocumentReader
from retrieval.index.shards import Record, Shard, ShardContent
from retrieval.index.snapshot import Snapshot, read_codec

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
        documents: Iterable[Document],
        reader: DocumentReader,
        save: Save = lambda _: None,
        whole: bool = False,
    ) -> Manifest:
        """Add documents; one with the id of another replaces it, and one that is there already is left as it is.

        Args:
            manifest: the index as it is.
            documents: the documents.
            reader: reads them.
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

        def changed() -> Iterator[Document]:
            for document in documents:
                if document.id in seen:
                    raise UserError(f"two documents have the id {document.id!r}; give each an id of its own")
                seen.add(document.id)
                if document.id in places:
                    shard, place = snapshot.locate(places[document.id])
                    if shard.document(place) == document:
                        continue
                    replaced.setdefault(shard.path.name, set()).add(place)
                yield document

        new = changed()
        records: Iterator[Record] = iter([])
        if "tokens" in manifest.settings.parts:
            if manifest.codec is None:
                name, records = self._fit_codec(new, manifest, reader)
                manifest = replace(manifest, codec=name)
            if manifest.codec is not None:
                reader.codec = read_codec(self.folder / CODECS / manifest.codec)
        for entry in self._shards(chain(records, reader(new)), manifest):
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

    def _fit_codec(
        self, documents: Iterator[Document], manifest: Manifest, reader: DocumentReader
    ) -> tuple[str | None, Iterator[Record]]:
        """Make the codec of token vectors, and fit it to the first documents if it depends on them.

        Returns:
            The name of its file, None if there was no token; and the records of the documents that have been read.
        """
        precision = manifest.settings.token_precision
        # Dimensions in the order of their importance, as of a head, vary the less the later; rotated, all vary alike.
        codec = TokenCodec(precision, rotate=precision == "binary" and reader.model.config.token_dim is not None)
        records: list[Record] = []
        sample: list[torch.Tensor] = []
        if precision in UNFITTED:
            config = reader.model.config
            sample = [torch.zeros(1, manifest.settings.token_dim or config.token_dim or config.hidden_size)]
        while not sample and (first := list(islice(documents, SAMPLE_DOCUMENTS))):
            read = list(reader(first))
            records += read
            found = (torch.from_numpy(record.codes) for record in read if record.codes is not None)
            sample += [codes[:: max(1, len(codes) // SAMPLE_VECTORS)] for codes in found if len(codes)]
        if not sample:
            return None, iter(records)
        codec.fit(torch.cat(sample))
        name = new_name(0, ".safetensors")
        state = codec.state()
        tables = {key: value.contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
        with atomic_file(self.folder / CODECS / name) as temporary:
            save_file(tables, temporary, {"kind": codec.kind, "dim": str(codec.dim)})
        coded = (
            replace(record, codes=codec.encode(torch.from_numpy(record.codes)).numpy())
            for record in records
            if record.codes is not None
        )
        return name, coded

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
