"""Text files that a visitor of the page brings along: an index for their session alone, which is removed after it.

Nothing that a visitor sends is a path: the name of a file is what its document is called.
"""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Timer

from common.errors import UserError
from retrieval.documents.document import Document
from retrieval.documents.formats import UnreadableFile, read_data
from retrieval.documents.sources import Skipped, to_document
from retrieval.index.index import Index
from retrieval.server.limits import OwnLimits

SUFFIXES = (".txt", ".md")
MAX_FILES = 100
# Characters of the name of a file.
MAX_NAME = 200
# Tokens of a forward pass. Others search meanwhile, in the worker's thread.
BATCH_TOKENS = 4096
NO_FILES = "no files were chosen"


@dataclass(eq=False)
class Own:
    """The files of a session.

    Args:
        folder: of their index.
        names: of the files.
        skipped: files that could not be read.
        index: what is searched; None while it is built.
        timer: removes it.
    """

    folder: TemporaryDirectory
    names: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    index: Index | None = None
    timer: Timer | None = None


class OwnFiles:
    """The indexes of visitors' files, one a session.

    Args:
        served: the index that is served; theirs are of the same model and settings.
        limits: how much they may bring.
    """

    def __init__(self, served: Index, limits: OwnLimits | None = None):
        self.served, self.limits = served, limits or OwnLimits()
        self._owned: dict[str, Own] = {}
        self._lock, self._closed = Lock(), False

    @property
    def most_bytes(self) -> int:
        """Bytes that the files of a visitor may have together."""
        return int(self.limits.own_mb * 2**20)

    def build(self, session: str | None, sent: str, on_progress: Callable[[float], None] = lambda _: None) -> Own:
        """Build the index of a session; what it had before is removed.

        Args:
            session: names the session, and no file; None, which the page never sends, is refused.
            sent: JSON of the files: a list of pairs of a name and the Base64 of what is in the file.
            on_progress: is called with the part that has been read, 0 to 1.

        Returns:
            The files and their index.

        Raises:
            UserError: they are too many or too large, none can be read, too many visitors have files, or the session
                has ended meanwhile.
        """
        files = _files(sent, self.most_bytes)
        if session is None:
            raise UserError("the page has no session; load it again")
        self.remove(session)
        with self._lock:
            if self._closed:
                raise UserError("the server is shutting down")
            if len(self._owned) >= self.limits.own_visitors:
                raise UserError(f"{len(self._owned)} others have files here, which is the limit; try again later")
            own = Own(TemporaryDirectory(prefix="longembed-own-", ignore_cleanup_errors=True))
            self._owned[session] = own
        try:
            documents = list(_documents(files, own.skipped))
            if not documents:
                raise UserError("; ".join(map(str, own.skipped)))
            own.names = [document.id for document in documents]
            characters, read = sum(len(document.text) for document in documents), 0.0

            def on_read(count: float) -> None:
                nonlocal read
                read += count
                self._check(session, own)
                on_progress(min(1.0, read / characters))

            settings = self.served.manifest.settings
            index = Index.build(
                Path(own.folder.name) / "index",
                documents,
                self.served.model,
                segments=settings.segments,
                parts=settings.parts,
                token_precision=settings.token_precision,
                token_dim=settings.token_dim,
                batch_tokens=BATCH_TOKENS,
                on_read=on_read,
            )
            with self._lock:
                self._check(session, own)
                own.index = index
                self._restart(session, own)
        except BaseException:
            with self._lock:
                if self._owned.get(session) is own:
                    del self._owned[session]
            own.folder.cleanup()
            raise
        return own

    def index(self, session: str | None) -> Index | None:
        """Return the index of a session, which is then kept for longer; None if it has none.

        Args:
            session: as in `build`.
        """
        session = session or ""
        with self._lock:
            own = self._owned.get(session)
            if own is None or own.index is None:
                return None
            self._restart(session, own)
            return own.index

    def remove(self, session: str | None) -> None:
        """Remove the index of a session, if it has one; if it is being built, that ends soon.

        A search that is under way goes on, since the files stay mapped.

        Args:
            session: as in `build`.
        """
        with self._lock:
            own = self._owned.pop(session or "", None)
        if own is None:
            return
        if own.timer is not None:
            own.timer.cancel()
        if own.index is not None:
            own.folder.cleanup()

    def close(self) -> None:
        """Remove all of them, and build no more."""
        self._closed = True
        for session in list(self._owned):
            self.remove(session)

    def _check(self, session: str, own: Own) -> None:
        if self._owned.get(session) is not own:
            raise UserError("the page was closed, or other files were chosen")

    def _restart(self, session: str, own: Own) -> None:
        """Put off the removal of an index; the caller holds the lock."""
        if own.timer is not None:
            own.timer.cancel()
        own.timer = Timer(60 * self.limits.own_minutes, self.remove, [session])
        own.timer.daemon = True
        own.timer.start()


def _files(sent: str, most_bytes: int) -> list[tuple[str, bytes]]:
    """Return the names of files and what is in them.

    Raises:
        UserError: they are not what the page sends, or too many or too large.
    """
    too_large = UserError(f"the files have more than {most_bytes / 2**20:.3g} MiB together; choose fewer")
    # Base64 has four characters for three bytes; names come on top.
    if len(sent) > most_bytes * 4 // 3 + MAX_FILES * (6 * MAX_NAME + 16):
        raise too_large
    try:
        found = json.loads(sent)
        if not all(isinstance(pair, list) and all(isinstance(part, str) for part in pair) for pair in found):
            raise TypeError
        files = [(name[-MAX_NAME:], base64.b64decode(data, validate=True)) for name, data in found]
    except (ValueError, TypeError, RecursionError):
        raise UserError("the page sent something else than files; load it again") from None
    if not files:
        raise UserError(NO_FILES)
    if len(files) > MAX_FILES:
        raise UserError(f"{len(files)} files were chosen, and {MAX_FILES} are read; choose fewer")
    if sum(len(data) for _, data in files) > most_bytes:
        raise too_large
    return files


def _documents(files: list[tuple[str, bytes]], skipped: list[Skipped]) -> Iterator[Document]:
    for name, data in files:
        suffix = Path(name).suffix.lower()
        try:
            if suffix not in SUFFIXES:
                raise UnreadableFile(f"is none of the files that are read here: {', '.join(SUFFIXES)}")
            yield to_document(name, suffix, read_data(data, suffix))
        except UnreadableFile as error:
            skipped.append(Skipped(name, str(error)))
