"""What precedes a training: the search for the token budget, and a rehearsal that ends the script."""

import json

import pytest

from common.arguments import parse
from common.errors import UserError
from common.errors import run as run_script
from training.engine import run
from training.engine.rehearsal import Probe
from training.engine.run import FOUND, RunArguments, find_batch_tokens


def test_each_try_is_a_process_and_the_result_is_remembered(
    train_contrastive, monkeypatch, out_of_memory_above, tmp_path
):
    tried = []

    def probe(command):
        assert command[-4:-1] == ["--rehearse", "only", "--batch_tokens"]
        tried.append(int(command[-1]))
        return Probe(tried[-1] <= 96, min(tried[-1], 200), answer="no")

    monkeypatch.setattr(run, "run_probe", probe)
    seen = out_of_memory_above(10_000)
    output = train_contrastive("--find_batch_tokens --batch_tokens 64 --resume_from_checkpoint last")
    assert tried == [64, 128]
    assert max(seen) == 64
    assert json.loads((output / FOUND).read_text()) == {"batch_tokens": 64}
    train_contrastive("--find_batch_tokens --batch_tokens 64 --resume_from_checkpoint last")
    assert tried == [64, 128]  # a run that goes on computes in the same chunks


@pytest.mark.parametrize(("limit", "fits"), [(100, True), (0.05, False)])
def test_rehearse_only_tells_and_writes_nothing(train_contrastive, tmp_path, capsys, limit, fits):
    with pytest.raises(SystemExit) as caught:
        train_contrastive(f"--rehearse only --find_batch_tokens --batch_tokens 150 --memory_limit_gib {limit}")
    assert caught.value.code == 0
    found = Probe(**json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert (found.fits, found.tokens) == (fits, 150)
    assert found.peak_gib > 0.05
    assert found.answer.startswith("out of memory") != fits
    assert not (tmp_path / "out").exists()


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--memory_limit_gib.*: -1: must be more than 0"):
        parse(RunArguments, argv=["--output_dir", str(tmp_path), "--memory_limit_gib=-1"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = RunArguments(output_dir=str(tmp_path), find_batch_tokens=True)
    with pytest.raises(UserError, match="works in one process"):
        find_batch_tokens(arguments, 64, "script.py", [])


def test_a_script_that_is_out_of_memory_ends_with_2(train_contrastive, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: train_contrastive("--memory_limit_gib 0.1"))
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert errors.strip().splitlines()[-1].startswith("error: out of memory: a peak of")
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
