"""What FSDP refuses: settings of a launcher, and models that it would get wrong."""

import os

import pytest
import torch

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import tiny_config
from training.engine.processes.sharding import Sharding, launched_sharding
from training.models.tuning import TuningArguments, select_parameters


@pytest.fixture
def launcher(monkeypatch):
    """The environment that accelerate launch makes of fsdp2.yaml, with changes."""

    def environment(**changes: str) -> None:
        names = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}
        for name, value in (names | changes).items():
            monkeypatch.setenv(name, value)

    return environment


def test_the_launcher_decides_and_accelerate_does_not_hear_of_it(launcher):
    launcher()
    assert launched_sharding() == Sharding(reshard_after_forward=True)
    assert "ACCELERATE_USE_FSDP" not in os.environ
    launcher(FSDP_RESHARD_AFTER_FORWARD="false")
    assert launched_sharding() == Sharding(reshard_after_forward=False)
    launcher(WORLD_SIZE="1")
    assert launched_sharding() is None
    launcher(ACCELERATE_USE_FSDP="false")
    assert launched_sharding() is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"FSDP_VERSION": "1"}, "^fsdp_version: 1 is not supported; set it to 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "^fsdp_offload_params is not .* set it to false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "True"}, "^fsdp_activation_checkpointing .* use --gradient_checkpointing"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true"}, "^DeepSpeed is not supported, its"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "^parallelism_config is not supported, .*fsdp2.yaml"),
    ],
)
def test_settings_that_this_loop_does_not_keep_are_refused(launcher, changes, sentence):
    launcher(**changes)
    with pytest.raises(UserError, match=sentence):
        launched_sharding()


EXTENDED = {"position_extension": {"method": "repeat", "original_max_position_embeddings": 64}}


@pytest.mark.parametrize(
    ("fields", "tuning", "sentence"),
    [
        ({"layerdrop": 0.1}, "full", "^layerdrop: .* launch with training/accelerate/ddp.yaml$"),
        ({"attention_patterns": {"type": "adaptive", "max_span": 8}}, "full", "^adaptive spans: .*ddp.yaml$"),
        (EXTENDED, "positions", "^--tuning positions: .*ddp.yaml$"),
    ],
)
def test_models_that_it_would_get_wrong_are_refused(fields, tuning, sentence):
    model = select_parameters(LongEmbedModel(tiny_config(**fields)), TuningArguments(tuning=tuning))
    with pytest.raises(UserError, match=sentence):
        Sharding().shard(model, torch.device("cpu"))
