"""Which checkpoint a run goes on from, and what is said of one that it cannot."""

import json

import pytest
import torch

from common.errors import UserError
from training.engine.checkpoints.folders import (
    COMPLETE,
    STATE,
    WEIGHTS,
    Progress,
    find_checkpoint,
    remove_later,
    remove_old,
    save_checkpoint,
)


def save(folder, step: int) -> None:
    progress = Progress(step=step, batches=2 * step, world_size=1, settings={"seed": 1}, window=[{"loss": 0.1 + step}])
    save_checkpoint(folder, progress, {"weight": torch.full((2, 3), float(step))}, {"random": [1, (2, None)]})


def test_comes_back_as_it_was(tmp_path):
    save(tmp_path, 3)
    checkpoint = find_checkpoint(tmp_path, "last")
    parameters, state = checkpoint.load()
    assert parameters["weight"].equal(torch.full((2, 3), 3.0))
    assert state == {"random": [1, (2, None)]}
    assert checkpoint.progress.window == [{"loss": 3.1}]
    complete = json.loads((checkpoint.path / COMPLETE).read_text())
    assert torch.__version__.startswith(complete["versions"]["torch"])  # the package's own has no "+cu128"
    assert {"step", "batches", "world_size", "settings", "sha256"} <= complete.keys()


def test_the_newest_is_taken_by_number_and_older_ones_go(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step)
        remove_old(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-100"]
    assert find_checkpoint(tmp_path, "last").progress.step == 100
    remove_old(tmp_path, 100, keep=None)
    remove_old(tmp_path, 10, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-100"]
    remove_later(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]


def test_an_earlier_version_counted_batches_by_epochs(tmp_path):
    save(tmp_path, 3)
    file = tmp_path / "step-3" / COMPLETE
    complete = json.loads(file.read_text())
    assert find_checkpoint(tmp_path, "last").progress.batches_done(5) == 6
    del complete["batches"]
    for settings, batches in ((None, 15), ({"gradient_accumulation_steps": 4}, 12)):
        file.write_text(json.dumps(complete | {"epoch": 1, "offset": 2, "settings": settings}))
        assert find_checkpoint(tmp_path, "last").progress.batches_done(5) == batches


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.unlink()])
@pytest.mark.parametrize("name", [WEIGHTS, STATE, COMPLETE])
def test_a_damaged_one_is_skipped_with_a_sentence(tmp_path, capsys, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-2" / name)
    assert find_checkpoint(tmp_path, "last").progress.step == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(tmp_path / "step-2") in said
    with pytest.raises(UserError, match=name):
        find_checkpoint(tmp_path, str(tmp_path / "step-2"))


def test_none_at_all(tmp_path):
    assert find_checkpoint(tmp_path / "nowhere", "last") is None
    with pytest.raises(UserError, match="is no complete checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "step-7"))
