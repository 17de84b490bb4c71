"""The configurations of training/accelerate, launched: each trains as one process with the whole batch does.

The weights at the end are the trace of the gradients. Processes have chunks in different numbers, so one that waits for
another would wait for ever: a launch has a limit.
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
from tests.training.tiny_training import SCRIPTS
from training.engine.checkpoints import WEIGHTS

TRAINING = Path(__file__).parents[3] / "training"
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


@pytest.fixture(scope="module")
def launch(inputs):
    """Run a script under a configuration; returns what it says on stderr."""

    def run(config: str, folder: Path, options: str = "", script: str = "contrastive") -> str:
        (model, data), own = inputs[script], SCRIPTS[script]
        processes = 1 if config == "single" else 2
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(TRAINING / "accelerate" / f"{config}.yaml"), str(TRAINING / f"{script}.py")]
        command += f"--model_name_or_path {model} --train_data {data} --eval_data {data}".split()
        command += own.options.format(model=model).split()
        command += f"--dropout 0 --learning_rate 1e-3 --logging_steps 1 --max_steps 4 --save_steps 2 {own.size}".split()
        command += [str(own.sizes[0] // processes), "--output_dir", str(folder), *options.split()]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        return done.stderr

    return run


@pytest.fixture(scope="module")
def finished(launch, tmp_path_factory):
    """The output folder of a run, made once; it has checkpoints of steps 2 and 4."""
    folders: dict[tuple[str, str], Path] = {}

    def folder(config: str, name: str = "contrastive") -> Path:
        if (config, name) not in folders:
            folders[config, name] = tmp_path_factory.mktemp(f"{config}-{name}")
            said = launch(config, folders[config, name], OPTIONS[name], name if name in SCRIPTS else "contrastive")
            assert (folders[config, name] / "final").is_dir(), said
        return folders[config, name]

    return folder


def assert_same_run(folder: Path, expected: Path, first: int = 0) -> None:
    """Metrics of the steps after `first`, and the weights at the end."""
    lines, of_one = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (folder, expected)
    )
    of_one = [line for line in of_one if line["step"] > first]
    assert len(lines) == len(of_one) > 0
    for line, one in zip(lines, of_one, strict=True):
        assert line.keys() == one.keys()
        names = one.keys() & COMPARED
        assert {name: line[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-5)
    weights, of_one = (load_file(run / "final" / "model.safetensors") for run in (folder, expected))
    torch.testing.assert_close(weights, of_one, atol=1e-5, rtol=1e-4)


@pytest.mark.promise("C9")
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_train_as_one(config, name, finished):
    assert_same_run(finished(config, name), finished("single", name))


@pytest.mark.parametrize(
    ("before", "after"),
    [("single", "ddp"), ("ddp", "single"), ("single", "fsdp2"), ("fsdp2", "single"), ("ddp", "fsdp2")],
)
def test_a_checkpoint_goes_on_under_another_configuration(before, after, finished, launch, tmp_path):
    """It holds whole tensors, so that it does not matter how the run was split; without dropout the run is the same."""
    checkpoint = finished(before) / "checkpoints" / "step-2"
    said = launch(after, tmp_path, f"{OPTIONS['contrastive']} --resume_from_checkpoint {checkpoint} --allow_reshard")
    assert f"going on from {checkpoint}" in said
    assert_same_run(tmp_path, finished("single"), first=2)


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_go_on_to_the_same_bytes(config, finished, launch, tmp_path):
    checkpoint = finished(config) / "checkpoints" / "step-2"
    launch(config, tmp_path, f"{OPTIONS['contrastive']} --resume_from_checkpoint {checkpoint}")
    for name in (f"checkpoints/step-4/{WEIGHTS}", "final/model.safetensors"):
        assert sha256_file(tmp_path / name) == sha256_file(finished(config) / name)


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_another_number_of_processes_has_to_be_allowed(config, finished, train_script):
    checkpoint = finished(config) / "checkpoints" / "step-2"
    sentence = "step-2: was made by 2 processes, now there are 1; launch as before, or add --allow_reshard"
    with pytest.raises(UserError, match=sentence):
        train_script("contrastive", f"{OPTIONS['contrastive']} --resume_from_checkpoint {checkpoint}")


def test_another_batch_is_refused_however_many_processes(finished, train_script):
    """The processes may change, the pairs of a whole batch may not."""
    checkpoint = finished("ddp") / "checkpoints" / "step-2"
    options = f"{OPTIONS['contrastive']} --resume_from_checkpoint {checkpoint} --allow_reshard"
    with pytest.raises(UserError, match="was made with pairs a batch = 8, now it is 4"):
        train_script("contrastive", f"{options} --per_device_train_batch_size 4")
