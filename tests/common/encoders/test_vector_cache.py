"""The cache of vectors: a put is stored whole or not at all, and a damaged file is reported in one sentence."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from common.encoders.vector_cache import VectorCache
from common.errors import UserError


def test_the_cache_returns_what_was_put_and_only_that(tmp_path):
    cache = VectorCache(tmp_path / "v.sqlite")
    matrices = {i.to_bytes(2, "big"): np.random.default_rng(i).standard_normal((1 + i % 3, 4)) for i in range(1200)}
    cache.put(matrices)
    found = VectorCache(tmp_path / "v.sqlite").get([*matrices, b"absent"])
    assert found.keys() == matrices.keys()
    for key, matrix in matrices.items():
        np.testing.assert_array_equal(found[key], matrix.astype(np.float32))


def test_a_put_that_is_killed_leaves_nothing_or_all(tmp_path):
    path = tmp_path / "v.sqlite"
    script = (
        "import sys, numpy as np\n"
        "from common.encoders.vector_cache import VectorCache\n"
        "cache = VectorCache(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "for n in range(10**9):\n"
        "    cache.put({b'%d-%d' % (n, i): np.full((2, 64), n, np.float32) for i in range(200)})\n"
    )
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            while not VectorCache(path).get([b"2-0"]):
                pass
            os.kill(process.pid, signal.SIGKILL)
    cache = VectorCache(path)
    put = 0
    for n in range(10_000):
        found = cache.get([b"%d-%d" % (n, i) for i in range(200)])
        assert len(found) in (0, 200)
        assert all((matrix == n).all() for matrix in found.values())
        put += bool(found)
        if not found:
            break
    assert put >= 3


def test_a_file_that_is_no_cache_is_reported(tmp_path):
    (tmp_path / "v.sqlite").write_text("not a database" * 100)
    with pytest.raises(UserError, match=r"cannot use .*v.sqlite as the cache"):
        VectorCache(tmp_path / "v.sqlite")


def test_a_cache_that_another_process_keeps_writing_is_not_to_be_deleted(tmp_path, monkeypatch):
    connect = sqlite3.connect
    with contextlib.closing(connect(tmp_path / "v.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0))
        with pytest.raises(UserError, match=r"v.sqlite .*locked\); another process is writing; start again"):
            VectorCache(tmp_path / "v.sqlite")
        other.execute("ROLLBACK")
        cache = VectorCache(tmp_path / "v.sqlite")
        other.execute("BEGIN EXCLUSIVE")
        for use, value in (("get", [b"a"]), ("put", {b"a": np.ones((1, 2))})):
            with pytest.raises(UserError, match=r"v.sqlite, the cache .*locked\); another process is writing; start"):
                getattr(cache, use)(value)


def test_a_cache_that_cannot_be_made_or_read_is_reported(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot make .*file, the folder of the cache of vectors .*; name another"):
        VectorCache(tmp_path / "file" / "v.sqlite")
    keys = [bytes([n]) for n in range(100)]
    VectorCache(tmp_path / "v.sqlite").put({key: np.ones((1, 200)) for key in keys})
    with open(tmp_path / "v.sqlite", "r+b") as file:
        file.seek(4096)  # behind the first page, which says what the file holds
        file.write(b"\xff" * 8192)
    for read in ("get", "rows"):
        with pytest.raises(UserError, match=r"cannot read .*v.sqlite, the cache .*malformed.*; delete it"):
            getattr(VectorCache(tmp_path / "v.sqlite"), read)(keys)
