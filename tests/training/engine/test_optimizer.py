"""Which parameters decay, and how the learning rate goes over a run."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import tiny_config
from training.engine.optimizer import OptimizerArguments, make_optimizer, make_scheduler, parameter_groups


def test_decay_is_for_matrices_alone():
    model = LongEmbedModel(tiny_config())
    decays = {id(p): group["weight_decay"] for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.1 if "_proj.weight" in name else 0.0), name


def test_frozen_parameters_are_in_no_group():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    (group,) = parameter_groups(layer, 0.1)
    assert group["params"] == [layer.bias]


@pytest.mark.parametrize(
    "warmup", [{"warmup_steps": 2}, {"warmup_ratio": 0.2}, {"warmup_ratio": 0.9, "warmup_steps": 2}]
)
def test_the_learning_rate_rises_in_the_warm_up_and_falls_to_zero(warmup):
    arguments = OptimizerArguments(learning_rate=1.0, **warmup)
    optimizer = make_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], arguments)
    scheduler = make_scheduler(optimizer, arguments, total_steps=10)
    rates = []
    for _ in range(11):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 1 / 2, *[1 - step / 8 for step in range(9)]])


def test_a_group_keeps_its_own_settings():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5, "weight_decay": 0.0}]
    (group,) = make_optimizer(groups, OptimizerArguments()).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)


def test_a_learning_rate_of_zero_is_refused():
    with pytest.raises(UserError, match=r"--learning_rate 0: must be more than 0"):
        OptimizerArguments(learning_rate=0)
