"""The configurations of training/accelerate, launched: each trains as one process with the whole batch does.

The weights at the end are the trace of the gradients. Processes have chunks in different numbers, so one that waits for
another would wait for ever: a launch has a limit. The runs that are compared compute in float64 (see launched_runs.py),
where a difference is a mistake and no rounding that the steps before have amplified.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from common.files import sha256_file
from tests.training.double_precision import double_precision
from tests.training.tiny_training import SCRIPTS
from training.engine.checkpoints.folders import WEIGHTS

TRAINING = Path(__file__).parents[3] / "training"
# Parallel test processes would each make the runs of this file again.
pytestmark = pytest.mark.xdist_group("launches")

COMPARED = {"step", "loss", "grad_norm", "accuracy", "token_count", "pair_count", "prediction_count", "eval_loss"}
COMPARED |= {"eval_ndcg_at_10", "eval_accuracy", "next_sentence_loss", "eval_next_sentence_accuracy"}
OPTIONS = {
    "compression": "",
    "contrastive": "--gradient_accumulation_steps 2",
    "distillation": "",
    "pretraining": "",
    "temperature": "--learnable_temperature",
    "lora": "--tuning longlora --gradient_checkpointing",
}
# The checkpoint of a run under the first configuration goes on under the second.
RESUMED = [
    ("single", "ddp"),
    ("ddp", "single"),
    ("ddp", "ddp"),
    ("single", "fsdp2"),
    ("fsdp2", "single"),
    ("ddp", "fsdp2"),
    ("fsdp2", "fsdp2"),
]


def launch(config: str, program: list[str]) -> str:
    """Run a program under a configuration; return what it says on stderr."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(TRAINING / "accelerate" / f"{config}.yaml"), *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def options_of(inputs):
    """Return a function that gives the options of a run."""

    def options(config: str, name: str, folder: Path, more: str = "") -> list[str]:
        script = name if name in SCRIPTS else "contrastive"
        (model, data), own = inputs[script], SCRIPTS[script]
        processes = 1 if config == "single" else 2
        given = f"--model_name_or_path {model} --train_data {data} --eval_data {data} {own.options.format(model=model)}"
        given += " --dropout 0 --learning_rate 1e-3 --logging_steps 1 --max_steps 4 --save_steps 2"
        given += f" {own.size} {own.sizes[0] // processes} --output_dir {folder} {OPTIONS[name]} {more}"
        return given.split()

    return options


@pytest.fixture(scope="module")
def finished(options_of, tmp_path_factory):
    """Return a function that gives the output folder of a finished run, which has checkpoints of steps 2 and 4.

    One launch a configuration makes all its runs, and goes on from checkpoints of the configurations before it; the
    last launch goes on under `single`. A run that goes on has the name of the configuration that it began under.
    """
    root = tmp_path_factory.mktemp("launches")

    def run(config: str, name: str) -> dict:
        more = ""
        if name not in OPTIONS:
            more = f"--resume_from_checkpoint {root}/{name}/contrastive/checkpoints/step-2"
            more += " --allow_reshard" if name != config else ""
        kind = name if name in OPTIONS else "contrastive"
        options = options_of(config, kind, root / config / name, more)
        return {"script": kind if kind in SCRIPTS else "contrastive", "options": options}

    def launch_runs(config: str, names: list[str]) -> None:
        (root / "runs.json").write_text(json.dumps([run(config, name) for name in names]))
        said = launch(config, ["--module", "tests.training.engine.launched_runs", str(root / "runs.json")])
        for name in names:
            assert (root / config / name / "final").is_dir(), said
            if name not in OPTIONS:
                assert f"going on from {root}/{name}/contrastive/checkpoints/step-2" in said

    def resumed(config: str, *before: str) -> list[str]:
        return [first for first, second in RESUMED if second == config and first in before]

    launch_runs("single", list(OPTIONS))
    launch_runs("ddp", [*OPTIONS, *resumed("ddp", "single", "ddp")])
    launch_runs("fsdp2", [*OPTIONS, *resumed("fsdp2", "single", "ddp", "fsdp2")])
    launch_runs("single", resumed("single", "ddp", "fsdp2"))
    return lambda config, name="contrastive": root / config / name


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(line: dict, expected: dict, rel: float) -> None:
    assert line.keys() == expected.keys()
    names = expected.keys() & COMPARED
    assert {name: line[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=rel)


def assert_same_run(folder: Path, expected: Path, first: int = 0) -> None:
    """Metrics of the steps after `first`, and the weights at the end."""
    lines, of_one = lines_of(folder), [line for line in lines_of(expected) if line["step"] > first]
    assert len(lines) == len(of_one) > 0
    for line, one in zip(lines, of_one, strict=True):
        assert_same_metrics(line, one, rel=1e-6)  # held-out metrics and teachers' vectors are float32
    weights, of_one = (load_file(run / "final" / "model.safetensors") for run in (folder, expected))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float64}
    torch.testing.assert_close(weights, of_one, atol=1e-7, rtol=1e-6)


@pytest.mark.promise("C9")
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.slow
def test_two_processes_train_as_one(config, name, finished):
    assert_same_run(finished(config, name), finished("single", name))


@pytest.mark.promise("C9")
def test_a_launched_script_trains_as_one_process(options_of, tmp_path):
    """The command of the guide, in float32: the first step, before which no step has amplified a rounding error."""
    two, one = tmp_path / "two", tmp_path / "one"
    script = str(TRAINING / "contrastive.py")
    launch("ddp", [script, *options_of("ddp", "contrastive", two, "--max_steps 1 --eval_steps 2")])
    SCRIPTS["contrastive"].main(options_of("single", "contrastive", one, "--max_steps 1 --eval_steps 2"))
    assert_same_metrics(lines_of(two)[0], lines_of(one)[0], rel=1e-4)
    weights = load_file(two / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize(("before", "after"), [pair for pair in RESUMED if pair[0] != pair[1]])
@pytest.mark.slow
def test_a_checkpoint_goes_on_under_another_configuration(before, after, finished):
    """It holds whole tensors, so that it does not matter how the run was split; without dropout the run is the same."""
    assert_same_run(finished(after, before), finished("single"), first=2)


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
@pytest.mark.slow
def test_two_processes_go_on_to_the_same_bytes(config, finished):
    for name in (f"checkpoints/step-4/{WEIGHTS}", "final/model.safetensors"):
        assert sha256_file(finished(config, config) / name) == sha256_file(finished(config) / name)


def go_on_as_one_process(options: list[str]) -> None:
    """Run the script in this process with the weights of `launched_runs`; it is refused before it trains."""
    with double_precision():
        SCRIPTS["contrastive"].main(options)


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
@pytest.mark.slow
def test_another_number_of_processes_has_to_be_allowed(config, finished, options_of, tmp_path):
    more = f"--resume_from_checkpoint {finished(config) / 'checkpoints' / 'step-2'}"
    sentence = "step-2: was made by 2 processes, now there are 1; launch as before, or add --allow_reshard"
    with pytest.raises(UserError, match=sentence):
        go_on_as_one_process(options_of("single", "contrastive", tmp_path, more))


@pytest.mark.slow
def test_another_batch_is_refused_however_many_processes(finished, options_of, tmp_path):
    """The processes may change, the pairs of a whole batch may not."""
    more = f"--resume_from_checkpoint {finished('ddp') / 'checkpoints' / 'step-2'} --allow_reshard"
    sentence = "step-2: was made with --per_device_train_batch_size 8 over all processes, now it is 4 over all"
    with pytest.raises(UserError, match=sentence):
        go_on_as_one_process(options_of("single", "contrastive", tmp_path, f"{more} --per_device_train_batch_size 4"))
