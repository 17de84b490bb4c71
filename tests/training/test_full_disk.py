"""A disk that is full, simulated by a limit on the size of a file: one sentence, and nothing half-written."""

import os
import resource
import shutil
import sys

import datasets
import pytest

from common.encoders.vector_cache import VectorCache
from common.errors import UserError, run
from tests.forked import run_forked
from tests.fuzz.run import half_written
from tests.tiny_inputs import COMMANDS, write_inputs
from training import contrastive


@pytest.fixture(scope="module")
def small_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk") / "in"
    write_inputs(folder)
    return folder


# The cache of the data, the weights of a checkpoint, its training state.
@pytest.mark.parametrize("largest", [1_000, 30_000, 110_000])
def test_training_stops_with_one_sentence(small_inputs, tmp_path, largest):
    shutil.copytree(small_inputs, tmp_path / "in")

    def work():
        os.chdir(tmp_path)
        sys.argv = ["contrastive.py", *COMMANDS["training.contrastive"].split(), "--report_to", "none"]
        datasets.config.HF_DATASETS_CACHE = str(tmp_path / "datasets")
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        run(contrastive.main)

    ended = run_forked(work, 120, tmp_path / "log")
    told = ended.stderr.splitlines()[-1]
    assert ended.code == 2, ended.stderr
    assert told.startswith("error: ")
    assert "cannot be used" in told
    assert "Traceback" not in ended.stderr
    wrong = [name for name in half_written(tmp_path) if name.startswith("out/")]
    assert not wrong


def test_the_cache_of_vectors_says_to_make_room_and_a_file_of_another_kind_to_delete_it(tmp_path):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
        run(lambda: VectorCache(tmp_path / "vectors.sqlite") and None)

    ended = run_forked(work, 60, tmp_path / "log")
    assert ended.code == 2
    assert "make room, or name another place" in ended.stderr
    (tmp_path / "other.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match=r"not a database.*delete it"):
        VectorCache(tmp_path / "other.sqlite")
