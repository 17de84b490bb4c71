"""`common.files`: a file or folder has the old content or the new, even after SIGKILL."""

import errno
import gzip
import hashlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.files import (
    _temporary,
    atomic_folder,
    atomic_write,
    check_output,
    remove_leftovers,
    sha256_file,
    write_jsonl,
)

ROOT = Path(__file__).parents[2]


def everything_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@given(st.binary(max_size=3 << 20) | st.text())
def test_write_then_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("write") / "new" / "file"
    atomic_write(path, data)
    assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert everything_under(path.parent) == ["file"]


def test_a_written_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    atomic_write(tmp_path / "atomic", "x")
    plain, atomic = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic"))
    assert atomic == plain


def test_failed_write_keeps_the_old_file(tmp_path):
    atomic_write(tmp_path / "file", "old")
    with pytest.raises(TypeError):
        atomic_write(tmp_path / "file", 3)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        atomic_write(tmp_path / "folder", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert everything_under(tmp_path) == ["file", "folder"]


def test_folder_appears_whole_and_replaces(tmp_path):
    target = tmp_path / "parent" / "model"
    for generation in ("first", "second"):
        with atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / generation).write_text(generation)
            assert not (target / "sub" / generation).exists()
        assert everything_under(target.parent) == ["model", "model/sub", f"model/sub/{generation}"]


def test_error_in_the_block_keeps_the_old_folder(tmp_path):
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "old").touch()
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "model") as folder:
        (folder / "new").touch()
        (folder / "absent").unlink()
    assert everything_under(tmp_path) == ["model", "model/old"]


# Writes two generations; in the second it kills itself just before its n-th call of a function that touches the disk
# (the profiler sees every call of a C function, `write` on an open file too).
WRITER = """
import os, signal, sys
from common.errors import UserError
from common.files import atomic_folder, atomic_write

def write(generation):
    atomic_write(sys.argv[1] + "/file", generation * 20_000)
    with atomic_folder(sys.argv[1] + "/folder") as folder:
        for part in "ab":
            (folder / part).write_text(generation * 20_000)

calls_left = int(sys.argv[2])
DISK = {"open", "write", "close", "__exit__", "fsync", "mkdir", "replace", "rename", "unlink", "remove", "rmdir"}

def kill(frame, event, function):
    global calls_left
    if event == "c_call" and function.__name__ in DISK:
        calls_left -= 1
        if calls_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

write("1")
sys.setprofile(kill)
write("2")
"""


def test_killed_at_any_moment_nothing_is_half_written(tmp_path):
    generations = set()
    for moment in range(1, 1000):
        # -S: no site-packages to look through, there are dozens of moments
        code = subprocess.run([sys.executable, "-S", "-c", WRITER, str(tmp_path), str(moment)], cwd=ROOT).returncode
        contents = [(tmp_path / "file").read_text()]
        folder = tmp_path / "folder"
        if folder.exists():  # it is absent between the two renames that replace it
            contents += [(folder / part).read_text() for part in "ab"]
            assert contents[1] == contents[2]
            assert everything_under(folder) == ["a", "b"]
        assert {len(content) for content in contents} == {20_000}
        assert all(len(set(content)) == 1 for content in contents)
        generations.add((contents[0][0], contents[-1][0]))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert moment > 20
    assert code == 0, "the writer never reached its end"
    assert generations == {("1", "1"), ("2", "1"), ("2", "2")}
    assert everything_under(tmp_path) == ["file", "folder", "folder/a", "folder/b"]  # what the killed left is cleared


def test_the_temporary_files_of_a_living_writer_are_left_alone(tmp_path):
    with atomic_folder(tmp_path / "model") as mine:
        (mine / "weights").write_text("mine")
        with atomic_folder(tmp_path / "model") as other:
            (other / "weights").write_text("other")
        assert (mine / "weights").read_text() == "mine"
    assert (tmp_path / "model" / "weights").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_are_whole_or_as_they_were(tmp_path, monkeypatch, name):
    """Read back with pandas; the same rows give the same bytes, and rows that fail half-way leave the old file."""
    rows = [{"text": "naïve ☃\nline"}, {"text": ""}]
    write_jsonl(tmp_path / "new" / name, rows)
    assert pandas.read_json(tmp_path / "new" / name, lines=True).to_dict("records") == rows
    before = (tmp_path / "new" / name).read_bytes()

    def fail():
        yield {"text": "another"}
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        write_jsonl(tmp_path / "new" / name, fail())
    assert (tmp_path / "new" / name).read_bytes() == before
    assert os.listdir(tmp_path / "new") == [name]
    monkeypatch.setattr(gzip.time, "time", lambda: 0.0)  # another day
    write_jsonl(tmp_path / "other" / name, rows)
    assert (tmp_path / "other" / name).read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="this system has no files without a name")
@pytest.mark.parametrize(("kind", "name"), [("folder", "out"), ("folder", "deep/er/out"), ("file", "out.json")])
def test_trying_an_output_makes_nothing_that_a_kill_could_leave(tmp_path, monkeypatch, kind, name):
    """A trial folder in the parent would stay for ever: the next run tries the output folder itself."""
    monkeypatch.setattr(os, "mkdir", lambda *_, **__: pytest.fail("a folder is made"))
    check_output(tmp_path / name, "output", kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "name", "complaint"),
    [
        ("file", "folder", r"--output .*/folder: is a folder; name a file in it"),
        ("folder", "file", r"--output .*/file: is no folder; name another place"),
        ("folder", "file/out", r"--output .*/file/out: .*/file is no folder; name another place"),
        ("file", "file/out.json", r"--output .*/file/out\.json: .*/file is no folder; name another place"),
    ],
)
def test_what_stands_where_an_output_is_to_go_is_named(tmp_path, kind, name, complaint):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"^{complaint}$"):
        check_output(tmp_path / name, "output", kind)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_is_tried_also_where_files_need_names(tmp_path, monkeypatch):
    def without_nameless_files(path, flags, *mode):
        raise OSError(errno.EOPNOTSUPP, "not supported", str(path))

    monkeypatch.setattr(os, "open", without_nameless_files)
    check_output(tmp_path / "out", "output")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "mkdir", lambda path, *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read only", path)))
    with pytest.raises(UserError, match=r"^--output .*out: cannot be written \(read only\); name another place$"):
        check_output(tmp_path / "out", "output")


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path):
    """Whatever they were to become; a kill of the second of two writes leaves one beside a file that is whole."""
    child = os.fork()
    if child == 0:
        _temporary(tmp_path / "file").touch()
        _temporary(tmp_path / "a\nfolder").mkdir()
        os._exit(0)
    os.waitpid(child, 0)
    own = _temporary(tmp_path / "file")
    own.touch()
    (tmp_path / ".file.tmp-of-a-user").touch()
    assert len(list(tmp_path.iterdir())) == 4
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {own.name, ".file.tmp-of-a-user"}
