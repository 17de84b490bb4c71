"""A resumed run has the settings of the run that it goes on with, or those that it changes on purpose, which count."""

import importlib
import json
import re
import shutil
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from common.conditions import default_of
from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import SCRIPTS, random_pairs, tiny_config, write_jsonl
from training.data.pairs.batches import PairBatches
from training.data.pairs.streams import StreamedBatches
from training.engine import loop
from training.engine.checkpoints.folders import COMPLETE, WEIGHTS, Progress
from training.engine.checkpoints.resuming import EVALUATION, MAY_CHANGE, ONLY_AT_START, PLATEAU, Settings

OVER_THE_LOOP = (*SCRIPTS, "layout_search")


class _Parsed(BaseException):
    """Leaves a script's `main` where it would parse its options."""


def dataclasses_of(script: str) -> list[type]:
    """The dataclasses of a script's options."""
    found: list[type] = []

    def stop(*types: type, argv: Any = None) -> None:
        found.extend(types)
        raise _Parsed

    module = importlib.import_module(f"training.{script}")
    with patch.object(module, "parse", stop), pytest.raises(_Parsed):
        module.main([])
    return found


def options_of(script: str) -> list[tuple[type, str, Any]]:
    """Each option of a script: its dataclass, its name, and its default; another one than the default if required."""
    return [
        (dataclass, option.name, "some" if default_of(option) is MISSING else default_of(option))
        for dataclass in dataclasses_of(script)
        for option in fields(dataclass)
        if option.init
    ]


def instances(script: str, **changes: Any) -> list[Any]:
    """The options of a script, unchecked: what matters here is how values are compared."""
    made = []
    for dataclass_type in dataclasses_of(script):
        instance = object.__new__(dataclass_type)
        own = {name: value for owner, name, value in options_of(script) if owner is dataclass_type}
        vars(instance).update({name: changes.get(name, value) for name, value in own.items()})
        made.append(instance)
    return made


def another(dataclass_type: type, name: str, value: Any) -> Any:
    """A value of an option's type that is not `value`."""
    kind = get_type_hints(dataclass_type)[name]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else ["another"] if isinstance(value, list) else "another"


# Written out, so that an option that is added to the list of the code by mistake is seen here.
# fmt: off
CHANGES_NO_NUMBER = [
    "logging_steps", "report_to", "eval_steps", "eval_data", "eval_sequence_length",
    "check_leakage", "output_dir", "save_steps", "save_total_limit", "teacher_cache",
    "push_to_hub", "hub_model_id", "hub_private_repo", "dataloader_num_workers", "gradient_checkpointing",
    "rehearse", "find_batch_tokens", "memory_limit_gib", "model_revision", "resume_from_checkpoint",
    "allow_reshard", "change_settings",
]
# fmt: on


def at(settings: dict | None, **changes: Any) -> Progress:
    return Progress(step=1, batches=1, world_size=1, settings=settings, **changes)


@pytest.mark.parametrize("script", OVER_THE_LOOP)
def test_each_option_may_change_or_is_refused_with_both_values(script):
    before = Settings(instances(script), {})
    for owner, name, value in options_of(script):
        new = another(owner, name, value)
        now = Settings(instances(script, **{name: new}), {})
        if name in CHANGES_NO_NUMBER:
            assert now.changes(at(before.values), Path("step-1"), []) == set()
            with pytest.raises(UserError, match=f"--change_settings {name}: it may always change"):
                now.check_names([name])
            continue
        with pytest.raises(UserError, match=rf"^step-1: was made with (no )?--{name}\b.*, now it is ") as caught:
            now.changes(at(before.values), Path("step-1"), [])
        if name in ONLY_AT_START:
            assert "--change_settings" not in str(caught.value)
            with pytest.raises(UserError, match=f"--change_settings {name}: a training starts from it"):
                now.check_names([name])
        else:
            assert str(caught.value).endswith(f"add --change_settings {name}")
            now.check_names([name])
            assert now.changes(at(before.values), Path("step-1"), [name]) == {name}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (None, 0.5, "with no --temperature, now it is 0.5;"),
        (0.5, None, "with --temperature 0.5, now it is not given;"),
        (0.0, 0.5, "with --temperature 0.0, now it is 0.5;"),
        (0.5, 0.0, "with --temperature 0.5, now it is 0.0;"),
    ],
)
def test_the_old_and_the_new_value_are_named(old, new, words):
    before = at(Settings([Schedule(temperature=old)], {}).values)
    with pytest.raises(UserError) as caught:
        Settings([Schedule(temperature=new)], {}).changes(before, Path("step-1"), [])
    assert str(caught.value).startswith(f"step-1: was made {words} use the same, ")


def test_a_switch_is_named_with_both_values():
    before = at(Settings([Schedule()], {}).values)
    with pytest.raises(UserError, match="with --learnable_temperature False, now it is True; use"):
        Settings([Schedule(learnable_temperature=True)], {}).changes(before, Path("step-1"), [])


def test_no_list_names_an_option_that_does_not_exist():
    names = {name for script in OVER_THE_LOOP for _, name, _ in options_of(script)}
    assert sorted(MAY_CHANGE) == sorted(CHANGES_NO_NUMBER)
    assert names >= MAY_CHANGE
    assert names >= ONLY_AT_START
    assert not MAY_CHANGE & ONLY_AT_START
    assert MAY_CHANGE >= EVALUATION


@dataclass
class Schedule:
    lr_scheduler_type: str = "linear"
    eval_steps: int = 0
    temperature: float | None = None
    learnable_temperature: bool = False
    new: int = field(default=3)


def test_what_is_evaluated_counts_where_the_schedule_reads_it():
    for kind, counts in (("linear", False), (PLATEAU, True)):
        assert ("eval_steps" in Settings([Schedule(kind)], {}).values) == counts


def test_the_start_of_a_temperature_that_trains_cannot_change():
    Settings([Schedule()], {}).check_names(["temperature"])
    with pytest.raises(UserError, match="--change_settings temperature: a training starts from it"):
        Settings([Schedule(learnable_temperature=True)], {}).check_names(["temperature"])
    with pytest.raises(UserError, match="--change_settings colour: is no option of this script"):
        Settings([Schedule()], {}).check_names(["colour"])


def test_an_option_that_is_younger_than_the_checkpoint_had_its_default():
    before = {name: value for name, value in Settings([Schedule()], {}).values.items() if name != "new"}
    assert Settings([Schedule()], {}).changes(at(before), Path("step-1"), []) == set()
    with pytest.raises(UserError, match="was made with --new 3, now it is 4"):
        Settings([Schedule(new=4)], {}).changes(at(before), Path("step-1"), [])


def test_all_differences_are_named_at_once():
    before = Settings([Schedule()], {"data": "3 rows"}).values
    with pytest.raises(UserError) as caught:
        Settings([Schedule("cosine", temperature=0.5)], {"data": "4 rows"}).changes(at(before), Path("step-1"), [])
    assert str(caught.value) == (
        "step-1: was made with --lr_scheduler_type linear, now it is cosine, and with no --temperature, now it is 0.5, "
        "and with --data 3 rows, now it is 4 rows; use the same, or start anew in another --output_dir, or go on with "
        "the new values on purpose: add --change_settings lr_scheduler_type temperature data"
    )


def test_what_is_recommended_is_accepted():
    """Names that were given stay; what cannot change is not recommended, and is refused if it is named."""
    before = Settings([Schedule()], {}, {"seed": 1}).values
    both = Settings([Schedule(new=4, temperature=0.5)], {}, {"seed": 1})
    with pytest.raises(UserError, match=r"add --change_settings new temperature$"):
        both.changes(at(before), Path("step-1"), ["new"])
    for now, progress, name in (
        (Settings([Schedule()], {}, {"seed": 2}), at(before, bookmark={"index": 3}), "seed"),
        (Settings([Schedule(PLATEAU)], {}, {"seed": 1}), at(before), "lr_scheduler_type"),
    ):
        for allowed in ([], [name, "eval_steps", "eval_data"]):
            with pytest.raises(
                UserError, match=rf"was made with --{name} \w+, now it is \w+; use the same, or"
            ) as caught:
                now.changes(progress, Path("step-1"), allowed)
            assert "--change_settings" not in str(caught.value)
    assert Settings([Schedule()], {}, {"seed": 2}).changes(at(before), Path("step-1"), ["seed"]) == {"seed"}


def test_a_model_is_not_blamed_for_an_option_that_adapts_it():
    @dataclass
    class Adaptation:
        attention_patterns: list[str] = field(default_factory=list)

    before = Settings([Adaptation()], {"model_name_or_path": "a" * 40}).values
    with pytest.raises(
        UserError, match="was made with no --attention_patterns, now it is full; use the same"
    ) as caught:
        Settings([Adaptation(["full"])], {"model_name_or_path": "b" * 40}).changes(at(before), Path("step-1"), [])
    assert "model_name_or_path" not in str(caught.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_records_all_options_that_may_not_change(train_script, script):
    output = train_script(script, "--max_steps 1")
    settings = json.loads((output / "checkpoints" / "step-1" / COMPLETE).read_text())["settings"]
    assert settings.keys() >= {name for _, name, _ in options_of(script)} - set(CHANGES_NO_NUMBER)
    assert re.fullmatch("[0-9a-f]{40}", settings["model_name_or_path"])
    assert re.search("with the hash [0-9a-f]{16} and weight 1", settings["train_data"][0])


@pytest.fixture
def go_on(train_contrastive):
    """Train for two steps, and from there with other options. Returns the weights of the second and the last step."""

    def run(options: str) -> tuple[dict, dict, list[dict]]:
        start = "--learning_rate 1e-3 --lr_scheduler_type constant --weight_decay 0 --dropout 0 --save_total_limit 9 "
        output = train_contrastive(start + "--max_steps 2")
        train_contrastive(f"{start} --max_steps 3 --resume_from_checkpoint last {options}")
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return *(load_file(output / "checkpoints" / f"step-{n}" / WEIGHTS) for n in (2, 3)), lines

    return run


@pytest.mark.parametrize("rate", [1e-3, 4e-3])
def test_a_new_learning_rate_is_that_of_the_next_step(go_on, rate):
    """Without decay AdamW's step is its learning rate times what the checkpoint and the batch alone determine."""
    before, after, lines = go_on(f"--learning_rate {rate} --change_settings learning_rate max_steps")
    assert [line["learning_rate"] for line in lines if "loss" in line] == [1e-3, 1e-3, rate]
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0.3 * rate < moved < 3 * rate


def test_other_settings_count_from_the_checkpoint_on(go_on):
    """Decay alone: at a gradient of zero a matrix shrinks by learning rate times decay."""
    options = "--adam_beta1 0 --adam_beta2 0.5 --weight_decay 100 --max_grad_norm 1e-30"
    options += " --change_settings max_steps adam_beta1 adam_beta2 weight_decay max_grad_norm"
    before, after, _ = go_on(options)
    name = next(name for name in before if name.endswith("q_proj.weight"))
    torch.testing.assert_close(after[name], before[name] * (1 - 1e-3 * 100), atol=1e-6, rtol=1e-4)


def test_the_contents_of_data_and_model_are_compared(train_contrastive, pairs_file, word_tokenizer, tmp_path):
    train_contrastive("--max_steps 1")
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    moved = write_jsonl(tmp_path / "moved.jsonl", rows)
    train_contrastive(f"--max_steps 1 --resume_from_checkpoint last --train_data {moved}")
    rows[-1]["positive"] += " stone"
    other = write_jsonl(tmp_path / "other.jsonl", rows)
    with pytest.raises(
        UserError, match=rf"was made with --train_data {len(rows)} rows with the hash \w+ and weight 1, "
    ):
        train_contrastive(f"--max_steps 1 --resume_from_checkpoint last --train_data {other}")
    LongEmbedModel(tiny_config(hidden_dropout_prob=0.1)).save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(
        UserError, match=r"was made with --model_name_or_path \w{40}, now it is \w{40}; use the same, or"
    ):
        train_contrastive(f"--max_steps 1 --resume_from_checkpoint last --model_name_or_path {tmp_path}/model")


def recorded(**values: Any) -> Progress:
    return Progress(step=1, batches=1, world_size=1, settings=values)


def test_what_earlier_versions_recorded_otherwise_is_no_other_setting():
    """Names of held-out data, whose contents count now, and a column of scores as a teacher."""
    plateau = {"lr_scheduler_type": PLATEAU, "eval_data": ["held-out.jsonl"]}
    now = Settings(instances("contrastive", **plateau), {"eval_data": ["9 rows with the hash 0a"]})
    assert not now.changes(recorded(**now.values | {"eval_data": ["held-out.jsonl"]}), Path("step-1"), [])
    with pytest.raises(UserError, match=r"was made with --eval_data other\.jsonl"):
        now.changes(recorded(**now.values | {"eval_data": ["other.jsonl"]}), Path("step-1"), [])

    now = Settings(instances("distillation", score_column="scores"), {"score_column": "column scores"})
    earlier = now.values | {"score_column": "scores", "score_teacher": "column scores"}
    assert not now.changes(recorded(**earlier), Path("step-1"), [])
    with pytest.raises(UserError, match="was made with --score_column column labels"):
        now.changes(recorded(**earlier | {"score_teacher": "column labels"}), Path("step-1"), [])


@pytest.mark.parametrize("steps", [0, 2])
def test_after_a_loss_that_is_not_finite_the_advice_works(train_contrastive, monkeypatch, steps):
    """The words of the message, appended to the same command; of rates of their own those that were given."""
    clip, calls = loop.clip_gradients, [0]

    def clip_gradients(*given):
        calls[0] += 1
        return torch.tensor(float("nan")) if calls[0] == steps + 1 else clip(*given)

    monkeypatch.setattr(loop, "clip_gradients", clip_gradients)
    options = "--learning_rate 1e-3 --lr_scheduler_type constant --save_steps 1 --learnable_temperature "
    options += "--objective_learning_rate 0.02 "
    with pytest.raises(UserError, match=f"the norm of the gradient is nan at step {steps + 1}") as caught:
        train_contrastive(options)
    pattern = r"the same command and (.*), or start anew" if steps else r"start anew with (.*), or with more"
    assert "--objective_learning_rate 0.01" in str(caught.value)
    assert "--span_learning_rate" not in str(caught.value)
    with pytest.MonkeyPatch.context() as patch:  # the advice reads the folder of checkpoints: not at each step
        patch.setattr(loop, "has_checkpoints", lambda folder: pytest.fail("the loss is finite"))
        output = train_contrastive(options + re.search(pattern, str(caught.value))[1])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "loss" in line] == [1e-3] * steps + [5e-4] * (4 - steps)


def test_contrastive_training_is_not_resumed_with_another_loss_or_length(train_contrastive):
    train_contrastive("--max_steps 1")
    resumed = "--max_steps 1 --resume_from_checkpoint last "
    for option, words in (
        ("--temperature 0.5", r"with (no )?--temperature.*, now it is 0\.5; "),
        ("--max_length 50", "with no --max_length, now it is 50; "),
        ("--symmetric", "with --symmetric False, now it is True; "),
    ):
        with pytest.raises(UserError, match=f"step-1: was made {words}use the same, .*--change_settings"):
            train_contrastive(resumed + option)


def test_a_schedule_on_a_plateau_compares_what_is_held_out_by_its_content(train_contrastive, tmp_path):
    rows = random_pairs(12, seed=5)
    first, moved = (write_jsonl(tmp_path / name, rows) for name in ("first.jsonl", "moved.jsonl"))
    other = write_jsonl(tmp_path / "other.jsonl", random_pairs(12, seed=6))
    options = "--max_steps 1 --eval_steps 1 --lr_scheduler_type reduce_lr_on_plateau --rehearse never "
    train_contrastive(f"{options} --eval_data {first}")
    options += "--resume_from_checkpoint last --eval_data"
    train_contrastive(f"{options} {moved}")
    with pytest.raises(UserError, match=r"was made with --eval_data 12 rows with the hash \w+, now it is 12 rows"):
        train_contrastive(f"{options} {other}")


def test_another_seed_makes_another_head_and_the_model_is_the_same(train_script, model_folder):
    """An encoder without a head: its random weights are no part of the model that the training starts from."""
    options = f"--model_name_or_path {model_folder} --rehearse never --max_steps 1 "
    train_script("pretraining", options)
    train_script("pretraining", options + "--seed 7 --resume_from_checkpoint last --change_settings seed")


def test_a_run_that_is_to_end_before_its_checkpoint_is_refused(train_contrastive):
    train_contrastive("--max_steps 2")
    with pytest.raises(UserError, match="the run ends after 1 steps, and the checkpoint has made 2"):
        train_contrastive("--max_steps 1 --resume_from_checkpoint last --change_settings max_steps")


def test_a_stream_goes_on_with_its_own_data_only(train_contrastive, tmp_path):
    train_contrastive("--max_steps 1 --streaming")
    other = write_jsonl(tmp_path / "other.jsonl", random_pairs(20, seed=5))
    more = f"--streaming --max_steps 2 --resume_from_checkpoint last --train_data {other} --change_settings max_steps"
    with pytest.raises(UserError, match=r"was made with --train_data \d+ bytes with the hash"):
        train_contrastive(more)
    with pytest.raises(UserError, match=r"was made with --train_data .* \(the place in the stream where"):
        train_contrastive(more + " train_data")


def names_in(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def test_the_checkpoint_that_a_run_resumes_from_stays_until_it_has_one_of_its_own(train_contrastive):
    """The newest one is damaged: counted among those to keep, it would displace the good one, and then the new one."""
    options = "--save_steps 1 --save_total_limit 9 --resume_from_checkpoint last "
    output = train_contrastive(options + "--max_steps 3")
    (output / "checkpoints" / "step-3" / WEIGHTS).write_bytes(b"cut short")
    options += "--save_total_limit 1 --change_settings max_steps "
    with pytest.raises(SystemExit):
        train_contrastive(options + "--rehearse only --max_steps 4")
    assert names_in(output) == ["step-1", "step-2", "step-3"]
    shutil.rmtree(output / "checkpoints" / "step-2")
    train_contrastive(options + "--save_steps 2 --max_steps 2")  # step 2 is written while a later one lies there
    assert names_in(output) == ["step-2"]


def test_a_run_that_has_no_step_left_keeps_later_checkpoints(train_contrastive):
    output = train_contrastive("--save_steps 1 --save_total_limit 9 --max_steps 3")
    first = output / "checkpoints" / "step-1"
    train_contrastive(
        f"--max_steps 1 --save_total_limit 1 --resume_from_checkpoint {first} --change_settings max_steps"
    )
    assert names_in(output) == ["step-1", "step-2", "step-3"]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_accumulation_goes_on_at_the_next_batch(train_contrastive, monkeypatch, streaming):
    """Two steps of two batches, and then two of three: each batch once, and each another one."""
    batches = StreamedBatches if streaming else PairBatches
    read, original = [], batches.__getitem__

    def recorded(self, index):
        batch = original(self, index)
        read.append((index, batch.rows if batch.bookmark is None else batch.bookmark["index"]))
        return batch

    monkeypatch.setattr(batches, "__getitem__", recorded)
    options = "--rehearse never " + "--streaming --shuffle_buffer 16 " * streaming
    train_contrastive(f"{options} --max_steps 2 --gradient_accumulation_steps 2")
    options += "--max_steps 4 --resume_from_checkpoint last --change_settings gradient_accumulation_steps max_steps "
    output = train_contrastive(f"{options} --gradient_accumulation_steps 3")
    assert [index for index, _ in read] == list(range(10))
    assert len({place for _, place in read[-6:]}) == 6
    assert json.loads((output / "checkpoints" / "step-4" / COMPLETE).read_text())["batches"] == 10


def test_other_accumulation_ends_after_the_same_epochs(train_contrastive):
    """Two epochs of six batches: after four batches eight are left, in two steps of four."""
    options = "--max_steps -1 --num_train_epochs 2 --gradient_accumulation_steps 2 --save_steps 2 --save_total_limit 9 "
    output = train_contrastive(options)
    assert names_in(output) == ["step-2", "step-4", "step-6"]
    second = output / "checkpoints" / "step-2"
    options += f"--resume_from_checkpoint {second} --change_settings gradient_accumulation_steps "
    output = train_contrastive(options + "--gradient_accumulation_steps 4", output="other")
    assert names_in(output) == ["step-4"]
    (last,) = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][-1:]
    assert (last["step"], last["epoch"]) == (4, 2.0)
