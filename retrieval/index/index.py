"""`Index`: long documents on disk, and the passages in them that answer a question."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from retrieval.documents.document import Document
from retrieval.embedding.embedded import Embedded
from retrieval.index.approximate import choose_kind
from retrieval.index.filters import check_filters
from retrieval.index.identity import check_model, describe_model, load_model
from retrieval.index.manifest import LOCK, MANIFEST, PARTS, UNFINISHED, Manifest, Settings, checked_parts, only_writer
from retrieval.index.reading import QueryReader, document_reader
from retrieval.index.snapshot import Snapshot
from retrieval.index.writing import Save, Writer
from retrieval.ranking import Hit, Passage, Query, best_passages, score_candidates, score_passages


class Index:
    """An index that is opened; made by `Index.build` or `Index.open`.

    It stays what it was when it was opened while others write; `refresh` makes it what it is now. One thread
    uses it at a time: tokenizer and model serve one.

    Args:
        folder: of the index.
        model: what queries and new documents are read with; None: what the index was built with, when it is needed.
        batch_tokens: tokens in one forward pass.
    """

    def __init__(self, folder: Path, model: Any = None, batch_tokens: int = 16_384):
        self.folder, self.batch_tokens = folder, batch_tokens
        self.snapshot = Snapshot.open(folder)
        self._model: Any = None
        if model is not None:
            self._set_model(model)

    @classmethod
    def build(
        cls,
        path: str | Path,
        documents: Iterable[Document],
        model: Any,
        *,
        segments: str = "late:254",
        parts: Sequence[str] = PARTS,
        token_precision: str = "binary",
        token_dim: int | None = None,
        vector_search: str = "lists",
        shard_mb: float = 256,
        memory: int | None = None,
        batch_tokens: int = 16_384,
        on_shard: Callable[[int], None] | None = None,
        on_read: Callable[[float], None] = lambda _: None,
    ) -> "Index":
        """Build an index of documents.

        After a kill, the same call goes on where it stopped: a document of the same id, text and metadata is not read
        again. The index can be opened when it is whole.

        Args:
            path: an empty folder, or a new one.
            documents: any number of documents, with different ids.
            model: a model of ours, its folder or its id on the Hub.
            segments: how documents are divided into passages; see `retrieval.segments`.
            parts: what documents are scored by: `vector`, one a passage; `tokens`, one a token; `words`, for BM25.
            token_precision: of token vectors: `float32`, `float16`, `int8`, `binary`, `residual1` or `residual2`; all
                but the first two are fitted to the first documents.
            token_dim: leading dimensions of token vectors that are kept; None: all.
            vector_search: how more than 100,000 vectors of passages are searched: by inverted `lists`, or by a `graph`
                (HNSW), which is in memory, faster to search and slower to build, where documents are rarely deleted.
            shard_mb: MiB of a shard, nearly, which are in memory while it is built.
            memory: bytes that the vectors of passages may take in memory; None: half of the machine's.
            batch_tokens: tokens in one forward pass.
            on_shard: is called after each shard with the number of documents so far.
            on_read: is called after each forward pass with the number of characters, nearly, that it read; what it
                raises ends the build.

        Returns:
            The index, opened.

        Raises:
            UserError: there is an index, an argument is none of what is allowed, or no document was given.
        """
        folder = Path(path)
        settings = Settings(segments, checked_parts(parts), token_precision, token_dim, vector_search).checked()
        loaded = load_model(model)
        reader = document_reader(loaded, settings, batch_tokens, on_read)

        def add(writer: Writer, manifest: Manifest, save: Save) -> Manifest:
            return writer.add(manifest, documents, reader, save, whole=True)

        def check(model: Mapping[str, Any]) -> None:
            check_model(loaded, model, str(folder))

        _write_new(Manifest(settings, describe_model(loaded)), Writer(folder, shard_mb, memory), check, add, on_shard)
        index = cls(folder, batch_tokens=batch_tokens)
        index._model = loaded
        return index

    @classmethod
    def merge(
        cls,
        path: str | Path,
        embedded: str | Path,
        *,
        vector_search: str = "lists",
        shard_mb: float = 256,
        memory: int | None = None,
        on_shard: Callable[[int], None] | None = None,
    ) -> "Index":
        """Make an index of what `retrieval.embed` has read, on however many machines; nothing is read by the model.

        After a kill, the same call goes on where it stopped.

        Args:
            path: a folder that holds no index.
            embedded: the output folder of `retrieval.embed`, or its URL.
            vector_search: as in `build`.
            shard_mb: as in `build`.
            memory: as in `build`.
            on_shard: as in `build`.

        Returns:
            The index, opened.

        Raises:
            UserError: there is an index, the embedded documents are unfinished or damaged, or two have one id.
        """
        found = Embedded(embedded)

        def check(model: Mapping[str, Any]) -> None:
            if model != found.plan.model:
                raise UserError(
                    f"{path} holds the beginning of an index of other embedded documents; remove the folder"
                )

        def add(writer: Writer, manifest: Manifest, save: Save) -> Manifest:
            if found.codec is not None:
                manifest = writer.keep_codec(manifest, found.codec)
            return writer.add(manifest, found.records(), None, save, whole=True)

        settings = replace(found.plan.settings, vector_search=vector_search).checked()
        begin = Manifest(settings, found.plan.model)
        _write_new(begin, Writer(Path(path), shard_mb, memory), check, add, on_shard)
        return cls(Path(path))

    @classmethod
    def open(cls, path: str | Path, model: Any = None, batch_tokens: int = 16_384) -> "Index":
        """Open an index.

        Args:
            path: its folder.
            model: a model of ours, its folder or its id on the Hub; None: the one that the index was built with, which
                is loaded when it is needed.
            batch_tokens: tokens in one forward pass.

        Returns:
            The index, as it is now.

        Raises:
            UserError: there is no index, it is damaged, or it was built with another model.
        """
        return cls(Path(path), model, batch_tokens)

    @property
    def model(self) -> Any:
        """The model, which is loaded when it is first needed.

        Raises:
            UserError: it is not where it was, or it is another one.
        """
        if self._model is None:
            name = self.snapshot.manifest.model["name"]
            try:
                self._set_model(name)
            except UserError as error:
                raise UserError(f"{self.folder} was built with {name}: {error}; name the model where it is") from error
        return self._model

    def _set_model(self, model: Any) -> None:
        loaded = load_model(model)
        check_model(loaded, self.snapshot.manifest.model, str(self.folder))
        self._model = loaded

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.snapshot)

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files and the model; the index cannot be used any more."""
        del self.snapshot
        self._model = None

    def refresh(self) -> None:
        """Read what others have written since the index was opened.

        Raises:
            UserError: it has been built again with another model than the one that is loaded, or is gone or damaged;
                the index stays what it was.
        """
        snapshot = Snapshot.open(self.folder)
        if self._model is not None and snapshot.manifest.model != self.manifest.model:
            check_model(self._model, snapshot.manifest.model, str(self.folder))
        self.snapshot = snapshot

    @property
    def manifest(self) -> Manifest:
        """What the index consists of and was built with."""
        return self.snapshot.manifest

    @property
    def vector_search(self) -> str:
        """How the vectors of passages are searched, and why, in a sentence."""
        if self.snapshot.vectors is None:
            return "the index has no vectors of passages"
        if self.manifest.vectors is not None:
            return self.manifest.vectors.reason
        count = sum(entry.passages for entry in self.manifest.shards)
        return choose_kind(count, self.manifest.model["hidden_size"]).reason

    def search(
        self,
        query: str | Query,
        k: int = 10,
        *,
        passages: int = 3,
        candidates: int = 100,
        weight: float | None = None,
        parts: Sequence[str] | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> list[Hit]:
        """Find the documents that answer a query, and where in them the answer is.

        Candidates are the nearest documents by the vectors of their passages and by BM25 together. Their score is
        `weight` times MaxSim over all their token vectors, and the rest times BM25, both scaled to 0 to 1 over the
        candidates. Without token vectors the best passage's cosine stands in the place of MaxSim; with token vectors
        alone all documents are candidates.

        Args:
            query: the text; what is beyond the context of the model is cut off. An empty one finds nothing. It may also
                be what `read_query` has returned for the same parts, so that it is not read once more.
            k: most documents that are returned.
            passages: most passages of each.
            candidates: number of documents that vectors and BM25 find each; at least k.
            weight: of the model, 0 to 1; None: that of the index, 0.5 unless it was tuned.
            parts: what is used: `vector`, `tokens` and `words`, or some of them; None: all that the index has.
            filters: limit the search to documents with such metadata; see `retrieval.index.filters`.

        Returns:
            The documents, best first.

        Raises:
            UserError: an argument is none of what is allowed, or the index does not have such a part.
        """
        _check_counts(k=k, passages=passages, candidates=candidates)
        if weight is not None and not 0 <= weight <= 1:
            raise UserError(f"weight {weight}: give the weight of the model beside BM25, from 0 to 1")
        check_filters(filters or {})
        used, read = self._used(parts), self.read_query(query, parts)
        if not read.text.strip() or not len(self):
            return []
        scores = score_candidates(self.snapshot, read, used, max(k, candidates), filters)
        combined = scores.combined(self.manifest.weight if weight is None else weight)
        hits = []
        for place in (-combined).argsort(kind="stable")[:k]:
            number = int(scores.numbers[place])
            shard, row = self.snapshot.locate(number)
            found = best_passages(score_passages(self.snapshot, read, used, number), passages) if passages else []
            own = {part: float(values[place]) for part, values in scores.parts.items()}
            hits.append(Hit(shard.id(row), float(combined[place]), own, found, shard.metadata(row)))
        return hits

    def passages(self, query: str | Query, id: str, parts: Sequence[str] | None = None) -> list[Passage]:
        """Score all passages of a document, to see where in it the answer is.

        Args:
            query: as in `search`.
            id: of the document.
            parts: as in `search`.

        Returns:
            The passages in the order of the text, which overlap if `segments` do. Where token vectors count, the score
            of a passage without any is minus infinity.

        Raises:
            UserError: there is no document with this id, or as in `search`.
        """
        return score_passages(self.snapshot, self.read_query(query, parts), self._used(parts), self._number(id))

    def read_query(self, query: str | Query, parts: Sequence[str] | None = None) -> Query:
        """Read a query with the model.

        Args:
            query: the text; one that was read is returned as it is.
            parts: what will be used; None: all that the index has.

        Raises:
            UserError: the query is no text, or the index does not have such a part.
        """
        used = self._used(parts)
        if isinstance(query, Query):
            return query
        if not isinstance(query, str):
            raise UserError(f"a query is a {type(query).__name__}; give a text")
        try:
            query.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the query has half a surrogate pair at character {error.start}; leave it out") from None
        if not query.strip() or used == ("words",):
            return Query(query)
        return Query(query, *QueryReader(self.model, self.manifest.settings, self.batch_tokens)(query, used))

    def _used(self, parts: Sequence[str] | None) -> tuple[str, ...]:
        has = self.manifest.settings.parts
        used = has if parts is None else checked_parts(parts)
        if missing := [part for part in used if part not in has]:
            raise UserError(f"{self.folder} was built without {missing[0]}; it has {', '.join(has)}")
        return used

    def document(self, id: str) -> Document:
        """Return a document of the index.

        Args:
            id: of the document.

        Raises:
            UserError: there is none with this id.
        """
        return self.snapshot.document(self._number(id))

    def _number(self, id: str) -> int:
        number = self.snapshot.places().get(id)
        if number is None:
            raise UserError(f"{self.folder} has no document with the id {id!r}")
        return number

    def add(self, documents: Iterable[Document], *, shard_mb: float = 256, memory: int | None = None) -> None:
        """Add documents. One with the id of another replaces it; one that is there already is not read again.

        All of them are added, or, if the process is killed, none.

        Args:
            documents: with different ids.
            shard_mb: as in `build`.
            memory: as in `build`.

        Raises:
            UserError: two documents have one id, or another process is writing.
        """

        def change(writer: Writer, manifest: Manifest) -> Manifest:
            return writer.add(manifest, documents, document_reader(self.model, manifest.settings, self.batch_tokens))

        self._write(change, shard_mb, memory)

    def delete(self, ids: Iterable[str]) -> None:
        """Delete documents: they are found no more, and take no space after `compact`.

        Args:
            ids: of the documents.

        Raises:
            UserError: there is none with one of the ids, or another process is writing.
        """
        chosen = [ids] if isinstance(ids, str) else list(ids)
        self._write(lambda writer, manifest: writer.delete(manifest, chosen))

    def compact(self, *, shard_mb: float = 256, memory: int | None = None) -> None:
        """Write the index anew without deleted documents and with few shards; no document is read again.

        Args:
            shard_mb: as in `build`.
            memory: as in `build`.

        Raises:
            UserError: another process is writing.
        """
        self._write(lambda writer, manifest: writer.compact(manifest), shard_mb, memory)

    def set_weight(self, weight: float) -> None:
        """Set the weight of the model beside BM25 for searches that name none.

        Args:
            weight: 0 to 1.

        Raises:
            UserError: it is not from 0 to 1, or another process is writing.
        """
        if not 0 <= weight <= 1:
            raise UserError(f"weight {weight}: give the weight of the model beside BM25, from 0 to 1")
        self._write(lambda _, manifest: replace(manifest, weight=float(weight)))

    def _write(
        self, change: Callable[[Writer, Manifest], Manifest], shard_mb: float = 256, memory: int | None = None
    ) -> None:
        """Change the index as it is now on disk, and open what it has become."""
        with only_writer(self.folder):
            self.refresh()
            writer = Writer(self.folder, shard_mb, memory)
            writer.tidy(self.manifest)
            changed = change(writer, self.manifest)
            changed.write(self.folder)
            self.snapshot = Snapshot(self.folder, changed)
            writer.tidy(changed)


def _check_place(folder: Path) -> None:
    """Raise an error if a folder holds what is no index: nothing of that may be taken for leftovers and removed."""
    other = {path.name for path in folder.iterdir() if ".tmp-" not in path.name} if folder.is_dir() else set()
    if other and other.isdisjoint({LOCK, MANIFEST, UNFINISHED}):
        raise UserError(f"{folder} holds {min(other)} and is no index; name an empty folder or a new one")


def _write_new(
    begin: Manifest,
    writer: Writer,
    check: Callable[[Mapping[str, Any]], None],
    add: Callable[[Writer, Manifest, Save], Manifest],
    on_shard: Callable[[int], None] | None,
) -> None:
    """Write an index where there is none, or go on with one whose writer was killed.

    Args:
        begin: the manifest without documents.
        writer: of the folder.
        check: raises a `UserError` if the model of the index that was begun is another one.
        add: adds all documents.
        on_shard: is called after each shard with the number of documents so far.
    """
    folder = writer.folder
    _check_place(folder)
    with only_writer(folder):
        if (folder / MANIFEST).exists():
            raise UserError(f"{folder} holds an index; add documents to it, or name another folder")
        if (folder / UNFINISHED).exists():
            begun = Manifest.read(folder, UNFINISHED)
            if begun.settings != begin.settings:
                raise UserError(
                    f"{folder} holds the beginning of an index with other settings ({begun.settings}); name "
                    "the same ones, or remove the folder"
                )
            check(begun.model)
            begin = begun
        writer.tidy(begin)

        def save(current: Manifest) -> None:
            nonlocal begin
            current.write(folder, UNFINISHED)
            begin = current
            if on_shard is not None:
                on_shard(sum(entry.documents - len(entry.deleted) for entry in current.shards))

        try:
            manifest = add(writer, begin, save)
            if not any(len(entry.deleted) < entry.documents for entry in manifest.shards):
                raise UserError(f"there is no document to index in {folder}; give at least one")
        except BaseException:
            writer.tidy(begin)
            raise
        manifest.write(folder)
        (folder / UNFINISHED).unlink()


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < (0 if name == "passages" else 1):
            raise UserError(f"{name} {count!r}: give a whole number of at least {0 if name == 'passages' else 1}")
