"""The scripts of `eval` run where the home of the user cannot be written to."""

import os
import runpy
from pathlib import Path

import mteb
import pytest

import eval as evaluation


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home that is a file."""
    home = tmp_path / "home"
    home.touch()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MTEB_CACHE", "")  # so that what is written into it is taken back
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return home


@pytest.mark.parametrize("name", ["", "home/cache"])
def test_the_cache_of_mteb_moves_away_from_a_place_that_cannot_be_written_to(name, home, tmp_path, monkeypatch):
    monkeypatch.setenv("MTEB_CACHE", name and str(tmp_path / name))
    with pytest.raises(NotADirectoryError):
        mteb.ResultCache()  # what mteb does when it is imported
    runpy.run_path(evaluation.__file__)
    assert mteb.ResultCache().cache_path == tmp_path / "mteb"


def test_the_cache_of_mteb_stays_where_it_can_be_written_to(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    runpy.run_path(evaluation.__file__)
    assert mteb.ResultCache().cache_path == tmp_path / "cache"
    monkeypatch.setenv("MTEB_CACHE", "")
    home.unlink()
    runpy.run_path(evaluation.__file__)
    assert os.environ["MTEB_CACHE"] == ""
    assert mteb.ResultCache().cache_path == Path(home, ".cache", "mteb")
