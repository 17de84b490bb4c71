"""The manifest of an index: which files it consists of, and what its documents were read with.

Every file that it names is whole and never changes again. A change of the index writes new files and then replaces the
manifest, so that a process that is killed leaves the old index or the new one.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from common.errors import UserError
from common.files import atomic_write
from retrieval.index.approximate import WAYS

# Version 1 had other codes of token vectors, which are still read.
FORMAT, VERSION, VERSIONS = "longembed-index", 2, (1, 2)
# What the folder of an index holds.
MANIFEST, UNFINISHED, LOCK = "manifest.json", "building.json", "lock"
SHARDS, VECTORS, CODECS = "shards", "vectors", "codecs"
# What can be kept of a document, and how its token vectors can be kept.
PARTS = ("vector", "tokens", "words")
TOKEN_PRECISIONS = ("float32", "float16", "int8", "binary", "residual1", "residual2")


@dataclass(frozen=True)
class Settings:
    """What is kept of a document.

    Args:
        segments: how documents are divided into passages, such as `late:254`.
        parts: `vector`, `tokens` and `words`, or some of them.
        token_precision: kind of the codes of token vectors.
        token_dim: number of leading dimensions of token vectors; None: all.
        vector_search: how more vectors of passages are searched than are compared one by one: `lists` or `graph`.
    """

    segments: str
    parts: tuple[str, ...]
    token_precision: str
    token_dim: int | None
    vector_search: str = "lists"

    def checked(self) -> "Settings":
        """Return the settings.

        Raises:
            UserError: the precision is none of `TOKEN_PRECISIONS`, or the search of vectors none of `WAYS`.
        """
        if self.vector_search not in WAYS:
            raise UserError(f"vector_search {self.vector_search!r}: choose from {', '.join(WAYS)}")
        if self.token_precision not in TOKEN_PRECISIONS:
            raise UserError(f"token_precision {self.token_precision!r}: choose from {', '.join(TOKEN_PRECISIONS)}")
        return self


def checked_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """Return parts in the order of `PARTS`.

    Args:
        parts: some of them.

    Raises:
        UserError: there are none, or one is none of `PARTS`.
    """
    chosen = {parts} if isinstance(parts, str) else set(parts)
    if not chosen or not chosen <= set(PARTS):
        raise UserError(f"parts {', '.join(sorted(chosen)) or '(none)'}: choose from {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in chosen)


@dataclass(frozen=True)
class ShardEntry:
    """A shard, as the manifest names it.

    Args:
        name: of its file.
        size: bytes of the file.
        documents: how many it holds.
        passages: of these documents.
        tokens: token vectors of these documents.
        deleted: places of documents that have been deleted or replaced, in ascending order.
    """

    name: str
    size: int
    documents: int
    passages: int
    tokens: int
    deleted: tuple[int, ...] = ()


@dataclass(frozen=True)
class VectorsEntry:
    """An approximate index of passage vectors, as the manifest names it.

    Args:
        name: of its folder.
        kind: faiss's name of it.
        reason: why this kind was chosen.
        nprobe: how far a search looks: the number of lists that it reads, or, in a graph, of candidates.
        shards: the shards whose vectors it holds, in their order.
    """

    name: str
    kind: str
    reason: str
    nprobe: int
    shards: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What an index consists of.

    Args:
        settings: what is kept of a document.
        model: what the documents were read with; see `retrieval.index.identity`.
        codec: name of the file with the codec of the token vectors; None: there are none yet.
        shards: in the order in which their documents count.
        vectors: the approximate index of passage vectors; None: all are compared.
        weight: of the model beside BM25, 0 to 1, in a search that names none.
        format: what kind of file this is.
        version: of the format.
    """

    settings: Settings
    model: Mapping[str, Any]
    codec: str | None = None
    shards: tuple[ShardEntry, ...] = ()
    vectors: VectorsEntry | None = None
    weight: float = 0.5
    format: str = field(default=FORMAT, init=False)
    version: int = field(default=VERSION, init=False)

    @classmethod
    def read(cls, folder: Path, name: str = MANIFEST) -> "Manifest":
        """Read the manifest of an index.

        Args:
            folder: of the index.
            name: of the file.

        Raises:
            UserError: there is none, or it is damaged or of another program or version.
        """
        path = folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if (folder / UNFINISHED).exists():
                raise UserError(
                    f"{folder}: this index is not finished; start the command that builds it again, which goes on "
                    "where it stopped"
                ) from None
            raise UserError(f"{folder} holds no index: it has no {MANIFEST}; build one with retrieval.build") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: the manifest is damaged ({error}); copy the index again, or build it") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path} is no manifest of an index of ours; name the folder of an index")
        if content.get("version") not in VERSIONS:
            raise UserError(
                f"{path}: the index has version {content.get('version')}, and this program reads versions to "
                f"{VERSION}; build it again"
            )
        try:
            vectors = content["vectors"]
            return cls(
                Settings(**{**content["settings"], "parts": tuple(content["settings"]["parts"])}),
                content["model"],
                content["codec"],
                tuple(ShardEntry(**{**entry, "deleted": tuple(entry["deleted"])}) for entry in content["shards"]),
                None if vectors is None else VectorsEntry(**{**vectors, "shards": tuple(vectors["shards"])}),
                float(content["weight"]),
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: the manifest is damaged ({error!r}); copy the index again") from None

    def write(self, folder: Path, name: str = MANIFEST) -> None:
        """Write the manifest in place of the one that is there, all of it or nothing."""
        atomic_write(folder / name, json.dumps(asdict(self), indent=1))

    def without(self, deleted: Mapping[str, set[int]]) -> "Manifest":
        """Return the manifest with more documents deleted: for the name of a shard, places in it."""
        shards = (
            replace(entry, deleted=tuple(sorted({*entry.deleted, *deleted.get(entry.name, ())})))
            for entry in self.shards
        )
        return replace(self, shards=tuple(shards))

    @property
    def files(self) -> set[Path]:
        """The files and folders that the manifest names, relative to the folder of the index."""
        found = {Path(SHARDS, entry.name) for entry in self.shards}
        found |= set() if self.codec is None else {Path(CODECS, self.codec)}
        return found | (set() if self.vectors is None else {Path(VECTORS, self.vectors.name)})


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Let one process at a time write; the system ends the claim of a process that has ended in whatever way.

    A folder that holds no more than the claim afterwards, because what was to be written was refused, is removed.

    Raises:
        UserError: another writer is at work, or nothing can be written there.
    """
    with _claim(folder):
        try:
            yield
        finally:
            for kind in (SHARDS, VECTORS, CODECS):
                with suppress(OSError):  # most often because there are files in it
                    (folder / kind).rmdir()
            with suppress(OSError):  # another process may claim the folder after the first of the two
                if [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()


def _claim(folder: Path) -> IO[str]:
    """Make the folder if it is not there, and return its file `lock`, which is locked until it is closed."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / LOCK, "a")  # noqa: SIM115 (the caller closes it)
        except OSError as error:
            raise UserError(f"{folder}: the index cannot be written ({error.strerror}); name another place") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                return file
        except FileNotFoundError:
            pass  # another process has removed the folder since the file was opened
        except BlockingIOError:
            file.close()
            raise UserError(f"{folder}: another process is writing this index; try again when it has ended") from None
        except OSError as error:
            file.close()
            raise UserError(f"{folder}: the file system has no locks ({error.strerror}); copy the index") from None
        file.close()


def new_name(number: int, ending: str = "") -> str:
    """Return a name that no file has had before, so that a reader of an older manifest never finds another file.

    Args:
        number: what the name begins with, for the eye.
        ending: of the name.
    """
    return f"{number:06}-{secrets.token_hex(4)}{ending}"
