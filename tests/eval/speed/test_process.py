"""Measurements in fresh processes: their memory is their own, and how their ends are reported."""

import os

import numpy as np
import pytest

from common.errors import UserError
from eval.speed.process import run_case
from modeling_longembed import LongEmbedModel
from tests.eval.speed.tiny_cases import tiny_case


def test_the_process_is_fresh_and_its_memory_its_own():
    ballast = np.ones(900 << 20, dtype=np.uint8)  # a process inherits the ru_maxrss of the one that starts it
    small = run_case(tiny_case(64, kernel="eager"), limit=200)
    assert ballast.all()
    assert small["pid"] != os.getpid()
    assert 0 <= small["peak"] - small["base"] < 14.4e6
    assert small["peak"] < 900 << 20


@pytest.mark.slow
def test_the_memory_of_a_case_is_that_of_its_scores():
    length, heads = 3000, 4
    large, small = (run_case(tiny_case(n, kernel="eager"), limit=200) for n in (length, 64))
    assert large["pid"] != small["pid"]
    scores = 4 * heads * length**2  # bytes of the weights of one layer, which eager attention holds at least once
    assert scores < large["peak"] - large["base"] < 8 * scores
    assert 0 <= small["peak"] - small["base"] < scores / 10


@pytest.mark.slow
def test_a_training_step_is_counted_with_gradients_and_moments():
    fields = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 2048}
    kept, recomputed = (
        run_case(tiny_case(512, mode="training", gradient_checkpointing=flag, **fields), limit=200)
        for flag in (False, True)
    )
    parameters = 4 * LongEmbedModel(tiny_case(512, **fields).config()).num_parameters()  # bytes
    for result in (kept, recomputed):
        assert result["base"] > 3 * parameters  # weights and both moments
        assert result["peak"] - result["base"] > parameters  # gradients
    assert recomputed["peak"] - recomputed["base"] < kept["peak"] - kept["base"]


def test_a_process_that_takes_too_long_is_stopped_and_said_so():
    assert run_case(tiny_case(64), limit=0.01) == {"outcome": "over limit"}


def test_a_process_that_fails_is_told_in_a_sentence_and_one_that_is_killed_was_out_of_memory(tmp_path, monkeypatch):
    """Stand-ins for Python: no process that we start fails by itself."""
    for name, script in (("fails", "echo 'ValueError: no' >&2; exit 1"), ("killed", "kill -9 $$")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "fails"))
    with pytest.raises(UserError, match=r"^own patterns at 64 tokens could not be measured: ValueError: no$"):
        run_case(tiny_case(64), limit=200)
    monkeypatch.setattr("sys.executable", str(tmp_path / "killed"))
    assert run_case(tiny_case(64), limit=200) == {"outcome": "out of memory"}
