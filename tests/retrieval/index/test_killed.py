"""A writer that is killed at any write leaves the index as it was or as it was to be."""

import os
import signal

import pytest

from common.errors import UserError
from retrieval.documents.document import Document
from retrieval.index import index as index_module
from retrieval.index import shards
from retrieval.index.index import Index
from retrieval.index.manifest import Manifest
from retrieval.index.snapshot import Snapshot

# What changes the disk, of `os`; shards are written by safetensors.
CHANGES = ("fsync", "mkdir", "replace", "unlink", "rmdir")


def kill_before(moment: int, work) -> bool:
    """Run a function in a process that kills itself before its n-th change of the disk; return whether it did."""
    child = os.fork()
    if child == 0:
        left = moment

        def counted(change):
            def count(*args, **kwargs):
                nonlocal left
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **kwargs)

            return count

        try:
            for name in CHANGES:
                setattr(os, name, counted(getattr(os, name)))
            shards.save_file = counted(shards.save_file)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.fixture(autouse=True)
def _without_hashes(monkeypatch):
    """The model is always the same; to see that takes most of the time."""
    monkeypatch.setattr(index_module, "describe_model", lambda model: {"name": "model", "hidden_size": 32})
    monkeypatch.setattr(index_module, "check_model", lambda *_: None)


def texts_of(folder) -> dict[str, str]:
    snapshot = Snapshot.open(folder)
    return {key: snapshot.document(number).text for key, number in snapshot.places().items()}


def files(folder) -> set:
    return {path.relative_to(folder) for path in folder.glob("*/*")}


@pytest.mark.promise("I6")
def test_killed_at_any_write_the_old_index_or_the_new_is_there(tmp_path, tiny_model):
    documents = [Document(f"d{number}", f"river {number}") for number in range(3)]
    folder = tmp_path / "index"
    index = Index.build(folder, documents, tiny_model, parts=["words"], segments="document")
    old = {document.id: document.text for document in documents}
    added = old | {"d1": "winter", "new": "night"}
    new = {key: text for key, text in added.items() if key != "d0"}
    states = []

    def change():
        index.add([Document("d1", "winter"), Document("new", "night")])
        index.delete(["d0"])
        index.compact()

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    moment = 1
    while kill_before(moment, change):
        state = texts_of(folder)
        assert state in (old, added, new)
        states.append([old, added, new].index(state))
        for path, content in before.items():  # as it was, beside what the killed one has left
            path.write_bytes(content)
        moment += 1
    assert moment > 20
    assert states == sorted(states)
    assert set(states) == {0, 1, 2}
    assert texts_of(folder) == new
    assert files(folder) == Manifest.read(folder).files
    assert not [path for path in folder.iterdir() if ".tmp-" in path.name]


@pytest.mark.promise("I6")
def test_a_build_that_is_killed_at_any_write_goes_on(tmp_path, tiny_model):
    documents = [Document(f"d{number}", f"river {number}") for number in range(3)]
    folder, whole = tmp_path / "index", {document.id: document.text for document in documents}

    def build():
        Index.build(folder, documents, tiny_model, parts=["words"], segments="document", shard_mb=1e-5)

    moment = 1
    while kill_before(moment, build):
        if (folder / "manifest.json").exists():
            break
        with pytest.raises(UserError, match=r"holds no index|this index is not finished"):
            Index.open(folder)
        moment += 1  # each goes on with what the one before has left
    assert moment > 10
    assert texts_of(folder) == whole
    assert len(Manifest.read(folder).shards) == 3
