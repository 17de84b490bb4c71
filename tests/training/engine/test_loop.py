"""A run that is killed, again and again, ends as one that was left alone: the same bytes."""

import random
import signal
import time
from pathlib import Path

import pytest

from common.files import sha256_file
from tests.fresh_processes import fresh_processes, with_fresh_processes
from tests.training.tiny_training import SCRIPTS, losses, train_until_killed
from training.engine.checkpoints.folders import COMPLETE, WEIGHTS

STEPS = 12


@pytest.fixture(scope="module")
def processes():
    return fresh_processes()


# The tests of a script stay in one process of pytest-xdist: the undisturbed run is made once. The scripts share the
# loop: the fast tests kill one of them.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            name,
            marks=[with_fresh_processes]
            if name == "contrastive"
            else [pytest.mark.xdist_group(f"loop_{name}"), pytest.mark.slow],
        )
        for name in SCRIPTS
    ],
)
def script(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def run_options(script, inputs) -> list[str]:
    """Pretraining changes its sequence length in the middle; its chunks are what others accumulate."""
    (model, data), own = inputs[script], SCRIPTS[script]
    accumulation = "--gradient_accumulation_steps 2 " if script == "contrastive" else ""
    return (
        f"--model_name_or_path {model} --train_data {data} {data}:0.5 --eval_data {data} "
        f"{own.options.format(model=model)} "
        f"{own.size} {own.sizes[0] // 2} {accumulation} --max_steps {STEPS} "
        "--learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps 3 --logging_steps 3 --save_steps 2 "
        "--eval_steps 4 --dataloader_num_workers 0"
    ).split()


@pytest.fixture(scope="module")
def undisturbed(processes, script, run_options, tmp_path_factory) -> Path:
    """The output folder of a run that was left alone. The model has dropout."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(processes, script, [*run_options, "--output_dir", str(folder)]) == 0
    return folder


def start(processes, script: str, argv: list[str], calls: int | None = None):
    process = processes.Process(target=train_until_killed, args=(script, argv, calls))
    process.start()
    return process


def run(processes, script: str, argv: list[str], calls: int | None = None) -> int:
    process = start(processes, script, argv, calls)
    process.join(600)
    return process.exitcode


def assert_same_end(folder: Path, undisturbed: Path) -> None:
    assert losses(folder) == losses(undisturbed)
    for name in ("final/model.safetensors", f"checkpoints/step-{STEPS}/{WEIGHTS}"):
        assert sha256_file(folder / name) == sha256_file(undisturbed / name)
    assert not [path for path in folder.rglob("*") if ".tmp-" in path.name]


@pytest.mark.promise("M3")
def test_killed_inside_file_operations(processes, script, run_options, undisturbed, tmp_path):
    """The kill comes before the n-th fsync or rename: in a checkpoint's files, its folder, its rename, after it."""
    argv = [*run_options, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "last"]
    for calls in (3, 9, 5, 14, 7, 11):
        assert run(processes, script, argv, calls) == -signal.SIGKILL
        for step in tmp_path.glob("checkpoints/step-*"):
            assert (step / COMPLETE).is_file()
    assert run(processes, script, argv) == 0
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.slow
def test_killed_from_outside_at_any_moment(processes, script, run_options, undisturbed, tmp_path):
    """Wherever the kill falls, also after the end: the moments that matter are hit one by one in the test above."""
    argv = [*run_options, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "last"]
    draw = random.Random(0)
    for _ in range(4):
        process = start(processes, script, argv)
        while not (tmp_path / "metrics.jsonl").exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.5))
        process.kill()  # unlike os.kill, content with a process that has just ended
        process.join(600)
    assert run(processes, script, argv) == 0
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_worker_that_tokenises_ahead_changes_nothing(processes, script, run_options, undisturbed, tmp_path):
    argv = [*run_options, "--output_dir", str(tmp_path), "--dataloader_num_workers", "1"]
    assert run(processes, script, argv) == 0
    assert_same_end(tmp_path, undisturbed)
