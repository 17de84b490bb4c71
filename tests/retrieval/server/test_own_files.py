"""Files of visitors: an index for each session, of which nothing stays behind."""

import base64
import json
import time
from pathlib import Path

import pytest

from common.errors import UserError
from retrieval.documents.document import Document
from retrieval.index.index import Index
from retrieval.server.limits import OwnLimits
from retrieval.server.own_files import OwnFiles

pytestmark = pytest.mark.promise("S5")


def sent(*files: tuple[str, bytes]) -> str:
    return json.dumps([(name, base64.b64encode(data).decode()) for name, data in files])


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Return a function that lists the folders of visitors, which are made here."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return lambda: [path.name for path in tmp_path.iterdir()]


@pytest.fixture
def own_files(index, folders):
    made = OwnFiles(index, OwnLimits(own_mb=0.01, own_visitors=2))
    yield made
    made.close()
    assert not folders()


def test_an_own_index_is_what_an_index_of_the_same_documents_is(own_files, tiny_model, tmp_path_factory, in_float32):
    progress: list[float] = []
    own = own_files.build("one", sent(("a.txt", b"river stone"), ("b.md", b"# Bread\n\nwinter")), progress.append)
    assert (own.names, own.skipped) == (["a.txt", "b.md"], [])
    assert progress == sorted(progress)
    assert progress[-1] == pytest.approx(1)
    documents = [Document("a.txt", "river stone"), own.index.document("b.md")]
    with Index.build(tmp_path_factory.mktemp("other"), documents, tiny_model, segments="late:8") as other:
        for hit, expected in zip(own.index.search("stone"), other.search("stone"), strict=True):
            assert (hit.id, hit.score) == (expected.id, pytest.approx(expected.score))
    assert own_files.index("two") is None


def test_a_name_is_no_path(own_files, folders, tmp_path):
    names = ["../../escaped.txt", "/etc/passwd.txt", "C:\\up.txt", "nul\0.txt", "<script>.txt"]
    own = own_files.build("../../session", sent(*((name, b"stone") for name in names)))
    assert own.names == names
    assert folders() == [Path(own.folder.name).name]
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name or "session" in path.name]


def test_files_are_removed_when_others_come_when_the_session_ends_and_after_a_while(own_files, folders):
    own_files.build("one", sent(("a.txt", b"stone")))
    (first,) = folders()
    index = own_files.build("one", sent(("b.txt", b"river"))).index
    assert [first] != folders()
    assert len(folders()) == 1
    own_files.remove("one")
    assert not folders()
    assert own_files.index("one") is None
    assert [hit.id for hit in index.search("river")] == ["b.txt"]  # a search that had begun
    own_files.limits.own_minutes = 0.002
    own_files.build("one", sent(("b.txt", b"river")))
    deadline = time.monotonic() + 20
    while folders() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not folders()


def test_what_is_being_built_ends_with_the_session(own_files, folders):
    with pytest.raises(UserError, match="the page was closed"):
        own_files.build("one", sent(("a.txt", b"stone")), lambda part: own_files.remove("one"))
    assert not folders()


def test_more_visitors_than_there_is_room_for_are_refused(own_files):
    for session in ("one", "two"):
        own_files.build(session, sent(("a.txt", b"stone")))
    with pytest.raises(UserError, match="2 others have files here"):
        own_files.build("three", sent(("a.txt", b"stone")))
    own_files.build("two", sent(("b.txt", b"river")))
    own_files.remove("one")
    own_files.build("three", sent(("a.txt", b"stone")))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("[]", "no files were chosen"),
        ("{", "something else than files"),
        ("[" * 20_000, "something else than files"),
        ("9" * 10_000, "something else than files"),
        ('[["a.txt", "%%%"]]', "something else than files"),
        ("[[]]", "something else than files"),
        ('[["a.txt", 5]]', "something else than files"),
        ('[["a.txt"]]', "something else than files"),
        ('[{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]', "something else than files"),
        ('[{"path": "/etc/passwd", "meta": "meta"}]', "something else than files"),
        (sent(("a.pdf", b"%PDF-1.7")), r"a\.pdf is none of the files that are read here: \.txt, \.md$"),
        (sent(("a.txt", b"\xff\xfe\xff"), ("b.txt", b"  ")), r"a\.txt is not .*; b\.txt has no text"),
        (sent(*[("a.txt", b"a")] * 101), "101 files were chosen"),
        (sent(("a.txt", b"a" * 20_000)), "more than 0.01 MiB together"),
        (sent(("a.txt", b"a" * 5000), ("b.txt", b"a" * 6000)), "more than 0.01 MiB together"),
        (sent(("a.txt", b"a"), ("a.txt", b"b")), "two documents have the id"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_and_leaves_nothing(own_files, folders, data, told):
    with pytest.raises(UserError, match=told):
        own_files.build("one", data)
    assert not folders()
    assert own_files.index("one") is None
