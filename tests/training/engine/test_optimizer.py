"""Which parameters decay, and how the learning rate goes over a run."""

import json
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import SchedulerType, optimization

from common.arguments import parse
from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import tiny_config
from training.engine.held_out import Evaluation
from training.engine.optimizer import OptimizerArguments, make_optimizer, parameter_groups
from training.engine.schedule import check_metric, make_scheduler


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
    found = []
    for _ in range(11):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx([0, 1 / 2, *[1 - step / 8 for step in range(9)]])


def rates(arguments: OptimizerArguments, steps: int = 12, schedule=None) -> list[float]:
    """The learning rates of two groups at each step, of our schedule or of `schedule(optimizer)`."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5}]
    optimizer = make_optimizer(groups, arguments)
    scheduler = make_scheduler(optimizer, arguments, steps) if schedule is None else schedule(optimizer)
    found = []
    for _ in range(steps):
        found += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return found


def test_constant_schedules_and_the_inverse_square_root_by_their_formulas():
    def of(kind, **options):
        return rates(OptimizerArguments(learning_rate=1.0, lr_scheduler_type=kind, **options))[::2]

    assert of("constant") == [1.0] * 12
    assert of("constant_with_warmup", warmup_steps=4) == [0, 0.25, 0.5, 0.75, *[1.0] * 8]
    root = of("inverse_sqrt", warmup_steps=4)
    assert root == pytest.approx([0, 0.25, 0.5, 0.75, *[(4 / step) ** 0.5 for step in range(4, 12)]])


@pytest.mark.parametrize(
    ("kind", "settings", "schedule"),
    [
        ("linear", {}, optimization.get_linear_schedule_with_warmup),
        ("cosine", {"num_cycles": 1.5}, optimization.get_cosine_schedule_with_warmup),
        ("cosine_with_restarts", {"num_cycles": 2}, optimization.get_cosine_with_hard_restarts_schedule_with_warmup),
        ("polynomial", {"lr_end": 1e-3, "power": 2.0}, optimization.get_polynomial_decay_schedule_with_warmup),
        ("cosine_with_min_lr", {"min_lr": 0.1}, optimization.get_cosine_with_min_lr_schedule_with_warmup),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, optimization.get_cosine_with_min_lr_schedule_with_warmup),
        (
            "cosine_warmup_with_min_lr",
            {"min_lr_rate": 0.2, "warmup_lr_rate": 0.1},
            optimization.get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
        ),
        ("warmup_stable_decay", {"num_decay_steps": 4, "decay_type": "linear"}, optimization.get_wsd_schedule),
    ],
)
def test_schedules_are_those_of_transformers(kind, settings, schedule):
    given = [f"{name}={value}" for name, value in settings.items()]
    arguments = OptimizerArguments(learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=3, lr_scheduler_kwargs=given)
    steps = {"num_warmup_steps": 3, "num_training_steps": 12}
    found = rates(arguments)
    assert found == rates(arguments, schedule=lambda optimizer: schedule(optimizer, **steps, **settings))
    assert found[1::2] == pytest.approx([rate / 2 for rate in found[::2]])
    assert len(set(found)) > 6


@pytest.mark.parametrize(
    ("kind", "settings", "complaint"),
    [
        ("linear", ["min_lr=0.1"], "--lr_scheduler_kwargs min_lr: linear takes no settings"),
        ("constant_with_warmup", ["min_lr=0.1"], "constant_with_warmup takes no settings"),
        ("cosine_with_min_lr", ["min_rl=0.1"], "min_rl: cosine_with_min_lr takes num_cycles, min_lr, min_lr_rate"),
        ("cosine_with_min_lr", [], "min_lr"),
        ("cosine_with_min_lr", ["min_lr=0.1", "min_lr_rate=0.1"], "Only one of min_lr or min_lr_rate"),
        ("cosine_with_min_lr", ["min_lr"], "min_lr: write name=value"),
        ("warmup_stable_decay", [], "warmup_stable_decay needs num_decay_steps"),
        ("warmup_stable_decay", ["num_decay_steps=4", "decay_type=steep"], "Unknown decay type: steep"),
        ("warmup_stable_decay", ["num_decay_steps=13"], "0 steps of warm-up and 13 after it are more than the 12 of"),
        ("cosine", ["num_cycles=half"], "num_cycles=half: cosine: "),
        ("polynomial", ["power=x"], "power=x: polynomial: "),
        ("polynomial", ["power=-1"], "power=-1: polynomial: "),
        ("inverse_sqrt", ["timescale=0"], "timescale=0: inverse_sqrt: "),
        ("reduce_lr_on_plateau", ["factor=1"], "Factor should be < 1.0"),
        ("reduce_lr_on_plateau", ["factor=half"], "--lr_scheduler_kwargs factor=half"),
        ("reduce_lr_on_plateau", ["factor=nan"], "must be a finite number"),
        ("reduce_lr_on_plateau", ["mode=up"], "mode up is unknown"),
    ],
)
def test_settings_that_a_schedule_does_not_have_are_refused(kind, settings, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        rates(OptimizerArguments(lr_scheduler_type=kind, lr_scheduler_kwargs=settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["constant", "reduce_lr_on_plateau"])
@pytest.mark.parametrize("warmup", ["--warmup_steps", "--warmup_ratio"])
def test_a_schedule_without_a_warm_up_refuses_one(kind, warmup):
    with pytest.raises(UserError, match=rf"{warmup}: applies only with another --lr_scheduler_type than constant or"):
        parse(OptimizerArguments, argv=["--lr_scheduler_type", kind, warmup, "1"])


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("eval_loss", "min"), ("eval_perplexity/a", "min"), ("eval_mrr", "max"), ("eval_mrr/glossary", "max")],
)
def test_a_metric_improves_in_its_own_direction(metric, mode):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_metric": metric}
    assert OptimizerArguments(**options).scheduler_settings() == {"mode": mode}
    assert OptimizerArguments(**options, lr_scheduler_kwargs=["mode=max"]).scheduler_settings() == {"mode": "max"}


def test_a_run_waits_for_its_evaluations_as_the_scheduler_of_torch_does_and_resumes(train_contrastive, tmp_path):
    """The loss falls, so that `mode=max` lowers the learning rate at evaluations, with a cooldown after each time."""
    options = "--eval_split 0.2 --eval_steps 1 --max_steps 7 --save_steps 3 --rehearse never --learning_rate 1e-3 "
    options += "--lr_scheduler_type reduce_lr_on_plateau --save_total_limit 9 --lr_scheduler_kwargs "
    settings = {"mode": "max", "factor": 0.5, "patience": 0, "cooldown": 1, "min_lr": 3e-4, "threshold": 0.5}
    options += " ".join(f"{name}={value}" for name, value in settings.items()) + " "

    def lines(folder):
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        names = ("step", "learning_rate", "eval_loss", "loss")
        return [{name: line[name] for name in names if name in line} for line in found]

    whole = lines(train_contrastive(options))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    scheduler = ReduceLROnPlateau(optimizer, **settings)
    for line in whole:
        if "eval_loss" in line:
            scheduler.step(line["eval_loss"])
        else:
            assert line["learning_rate"] == optimizer.param_groups[0]["lr"]
    assert [line["learning_rate"] for line in whole[::2]] == [1e-3, 1e-3, 5e-4, 5e-4, 3e-4, 3e-4, 3e-4]
    for step in (3, 6):
        checkpoint = tmp_path / "out" / "checkpoints" / f"step-{step}"
        resumed = lines(train_contrastive(options + f"--resume_from_checkpoint {checkpoint}", output=f"from-{step}"))
        assert resumed == whole[2 * step :]
    go_on = f"{options}--resume_from_checkpoint {tmp_path / 'out' / 'checkpoints' / 'step-3'} --change_settings "
    faster = lines(train_contrastive(f"{go_on}learning_rate --learning_rate 2e-3", output="faster"))
    assert faster[0]["learning_rate"] == pytest.approx(2 * whole[6]["learning_rate"])
    for given, complaint in (
        (options + "--eval_steps 0", "give --eval_steps"),
        (options + "--lr_scheduler_metric eval_x", "eval_loss"),
        (
            options.partition("--lr_scheduler_type")[0]
            + f"--resume_from_checkpoint {checkpoint} --change_settings lr_scheduler_type lr_scheduler_kwargs",
            "counts evaluations",
        ),
    ):
        with pytest.raises(UserError, match=complaint):
            train_contrastive(given, output=complaint.replace(" ", "_"))


def test_all_schedules_of_transformers_are_offered_but_one():
    """`greedy` is told the loss after each step; a name that is new in transformers is seen here."""
    offered = set(get_args(get_type_hints(OptimizerArguments)["lr_scheduler_type"]))
    assert {kind.value for kind in SchedulerType} - {"greedy"} == offered


@pytest.mark.parametrize(
    ("sources", "metric", "complaint"),
    [
        (["a", "loss/b"], "eval_loss", "several held-out sources; write eval_loss/a or eval_loss/loss/b$"),
        (["a", "loss/b"], "eval_loss/c", "write eval_loss/a or"),
        (["a", "loss/b"], "eval_loss/loss/b", None),
        (["a"], "eval_loss/a", "one held-out source; write eval_loss$"),
        (["a"], "eval_loss", None),
        ([], "eval_loss", "waits for a metric of evaluations"),
    ],
)
def test_the_metric_that_a_schedule_waits_for_is_named_before_the_first_step(sources, metric, complaint):
    arguments = OptimizerArguments(lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_metric=metric)
    evaluation = Evaluation(dict.fromkeys(sources, 0.5), lambda value, model: {"eval_loss": value}, list)
    if complaint is None:
        check_metric(arguments, evaluation, 1)
        assert metric in evaluation(nn.Linear(1, 1))
        return
    with pytest.raises(UserError, match=complaint):
        check_metric(arguments, evaluation, 1)


def test_a_group_keeps_its_own_settings():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5, "weight_decay": 0.0}]
    (group,) = make_optimizer(groups, OptimizerArguments()).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)


def test_a_learning_rate_of_zero_is_refused():
    with pytest.raises(UserError, match=r"--learning_rate.*: 0: must be more than 0"):
        parse(OptimizerArguments, argv=["--learning_rate", "0"])
