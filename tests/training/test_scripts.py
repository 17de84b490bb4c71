"""What every script over the loop keeps to, whatever it trains."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from common.errors import UserError
from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from tests.forked import run_forked
from tests.training.double_precision import double_precision
from tests.training.tiny_training import SCRIPTS, losses, random_documents, random_pairs, tiny_config, write_jsonl
from training.engine.training import Training

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture(params=SCRIPTS)
def script(request) -> str:
    return request.param


# What the loop alone decides: one script of pairs and one of documents are enough for the fast tests.
of_the_loop = pytest.mark.parametrize(
    "script",
    [
        name if name in ("contrastive", "pretraining") else pytest.param(name, marks=pytest.mark.slow)
        for name in SCRIPTS
    ],
    indirect=True,
)


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folders_with_token_output(tmp_path_factory, word_tokenizer) -> dict[type, Path]:
    """A saved tiny encoder and a masked-language model, with a token head and weights of query tokens."""
    folders = {}
    for kind in (LongEmbedModel, LongEmbedForMaskedLM):
        folders[kind] = tmp_path_factory.mktemp("tokens")
        kind(tiny_config(token_dim=16, query_token_weights="state")).save_pretrained(folders[kind])
        word_tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture
def built(folders_with_token_output, inputs, tmp_path, monkeypatch):
    """Build what a script would train, from a model with a token head and weights of query tokens."""

    def build(name: str, options: str = "") -> Training:
        folder = folders_with_token_output[LongEmbedForMaskedLM if name == "pretraining" else LongEmbedModel]
        module, found = importlib.import_module(f"training.{name}"), list[Training]()
        monkeypatch.setattr(module, "run_training", lambda training, *_: found.append(training) or training.model)
        monkeypatch.setattr(module, "write_layout", lambda *_: "", raising=False)
        of_script = OPTIONS_FOR_TOKENS[name].format(model=folder)
        given = f"--model_name_or_path {folder} --train_data {inputs.get(name, inputs['contrastive'])[1]} "
        given += f"--output_dir {tmp_path}/out --max_steps 4 --dataloader_num_workers 0 {of_script} {options}"
        module.main(given.split())
        return found[0]

    return build


OPTIONS_FOR_TOKENS = {
    "compression": "--relation_heads 4 --sequence_length 40 --per_device_train_tokens 80",
    "contrastive": "--per_device_train_batch_size 8",
    "distillation": "--per_device_train_batch_size 8 --structural_teacher truncate:{model}:16",
    "layout_search": "--per_device_train_batch_size 8 --weight_steps 2 --cycle_steps 2 --architecture_share 0.5",
    "pretraining": "--sequence_length 40 --per_device_train_tokens 80",
}


@pytest.mark.parametrize("tuning", ["full", "longlora"])
@pytest.mark.parametrize("name", OPTIONS_FOR_TOKENS)
def test_what_makes_token_vectors_trains_only_where_a_loss_reads_them(built, name, tuning):
    """DDP waits for the gradient of every parameter that requires one."""
    if name == "layout_search" and tuning != "full":
        pytest.skip("the layout search trains all weights")
    options = "" if name == "layout_search" else f"--tuning {tuning} "
    if tuning == "longlora":
        options += "--lora_target_modules q_proj query_gate"
    model = built(name, options).model
    of_tokens = {name: weight for name, weight in model.named_parameters() if "token_output" in name}
    assert of_tokens
    assert not [name for name, weight in of_tokens.items() if weight.requires_grad]


@pytest.mark.parametrize("name", ["contrastive", "layout_search"])
def test_late_interaction_trains_them_and_their_learning_rate_counts(built, name):
    training = built(name, "--similarity maxsim --token_weights_learning_rate 0.25")
    of_tokens = dict(training.model.token_output.named_parameters())
    assert all(weight.requires_grad for weight in of_tokens.values())
    grouped = [weight for group in training.groups for weight in group["params"]]
    assert len({id(weight) for weight in grouped}) == len(grouped)
    assert {id(weight) for weight in training.model.parameters()} <= {id(weight) for weight in grouped}
    (own,) = [group for group in training.groups if group.get("lr") == 0.25]
    weights = {id(weight) for name, weight in of_tokens.items() if name.startswith("query_")}
    assert {id(weight) for weight in own["params"]} == weights


def test_gradient_checkpointing_and_the_token_budget_change_nothing(train_script, script, tmp_path):
    options = "--dropout 0 --logging_steps 1 --max_steps 2"
    with double_precision():
        plain = losses(train_script(script, options))
        for number, more in enumerate(("--batch_tokens 1", "--batch_tokens 1000 --gradient_checkpointing")):
            train_script(script, f"{options} --output_dir {tmp_path}/{number} {more}")
            for one, two in zip(losses(tmp_path / str(number)), plain, strict=True):
                assert one == pytest.approx(two, rel=1e-6), more  # a teacher's vectors are float32


def test_bf16_trains_float32_weights_to_nearly_the_same(train_script, script, tmp_path):
    options = "--logging_steps 1 --dropout 0 --max_steps 2"
    plain = metrics(train_script(script, options))
    AcceleratorState._reset_state(reset_partial_state=True)
    train_script(script, f"--bf16 {options} --output_dir {tmp_path}/bf16")
    weights = load_file(tmp_path / "bf16" / "final" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float32"}
    for one, two in zip(metrics(tmp_path / "bf16"), plain, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02)
        assert one["loss"] != two["loss"]


def test_dropout_is_of_hidden_states_and_of_attention(train_script, script, tmp_path):
    """Each by itself makes the loss of the first step another, and stands in the config of what is saved."""
    first_losses = set()
    for number, options in enumerate(("--dropout 0", "--dropout 0.3", "--dropout 0 --attention_dropout 0.3")):
        output = tmp_path / str(number)
        train_script(script, f"{options} --max_steps 1 --logging_steps 1 --output_dir {output}")
        first_losses.add(losses(output)[0])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert len(first_losses) == 3
    config = json.loads((output / "final" / "config.json").read_text())
    assert (config["hidden_dropout_prob"], config["attention_dropout"]) == (0, 0.3)


@pytest.mark.promise("L3")
def test_layerdrop_is_an_option_of_every_training_but_of_attention(train_script, script, tmp_path):
    """Without dropout a first step that leaves sublayers out has another loss, and the config has what was given."""
    options = "--dropout 0 --attention_dropout 0 --max_steps 1 --logging_steps 1"
    left_out = f"{options} --layerdrop 0.9 --layerdrop_unit sublayer --output_dir {tmp_path}/left_out"
    if script == "compression":
        with pytest.raises(UserError, match=r"--layerdrop 0.9: .* must not be left out"):
            train_script(script, left_out)
        return
    whole = losses(train_script(script, options))
    AcceleratorState._reset_state(reset_partial_state=True)
    train_script(script, left_out)
    assert losses(tmp_path / "left_out") != whole
    config = json.loads((tmp_path / "left_out" / "final" / "config.json").read_text())
    assert (config["layerdrop"], config["layerdrop_unit"]) == (0.9, "sublayer")


@of_the_loop
def test_a_finished_run_that_is_started_again_ends_at_once_with_the_same_model(train_script, script):
    output = train_script(script)
    before = (output / "final" / "model.safetensors").read_bytes(), metrics(output)
    train_script(script, "--resume_from_checkpoint last")
    assert ((output / "final" / "model.safetensors").read_bytes(), metrics(output)) == before


@of_the_loop
def test_going_on_with_something_else_is_refused(train_script, script, inputs, tmp_path):
    data = inputs[script][1]
    train_script(script)
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        train_script(script)
    rows = random_pairs(9, negatives=1) if script == "contrastive" else random_documents(9)
    other = write_jsonl(tmp_path / "other.jsonl", rows)
    for options, complaint in (
        (f"--train_data {data} {other}", "was made with --train_data"),
        ("--seed 7", "was made with --seed 42, now it is 7"),
        (f"{SCRIPTS[script].size} {SCRIPTS[script].sizes[0] - 1}", f"was made with {SCRIPTS[script].size} "),
        ("--tuning lora", "was made with --tuning full, now it is lora; use the same, or start anew"),
    ):
        with pytest.raises(UserError, match=complaint):
            train_script(script, f"--resume_from_checkpoint last {options}")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            "{size} {too_much}",
            r"has (48|24) pairs, fewer than a batch of (49|25)|--per_device_train_tokens 59: .* at least 60",
        ),
        ("{size} 0", r"{size}/\S*: 0: must be at least 1"),
        ("--tuning all", r"--tuning.*: invalid choice: 'all'"),
        ("--learning_rat 1", r"unknown argument --learning_rat .*did you mean --learning_rate"),
        ("--learning_rate fast", r"--learning_rate.*: invalid float value: 'fast'"),
        ("--train_data nowhere.jsonl", r"nowhere.jsonl: no such file"),
        ("--eval_data nowhere.jsonl", r"nowhere.jsonl: no such file"),
        ("--model_name_or_path /nowhere/at-all", r"--model_name_or_path /nowhere/at-all"),
        ("--push_to_hub", r"--push_to_hub needs --hub_model_id"),
        ("--resume_from_checkpoint /nowhere/step-3", r"/nowhere/step-3: is no complete checkpoint"),
        ("--max_steps 0 --num_train_epochs 0", r"nothing to train"),
        ("--config nowhere.yaml", r"cannot read the recipe nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(train_script, script, tmp_path, options, complaint):
    values = {"size": SCRIPTS[script].size, "too_much": SCRIPTS[script].sizes[1]}
    with pytest.raises(UserError, match=complaint.replace("{size}", values["size"])) as caught:
        train_script(script, options.format(**values))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "final").exists()


def test_exit_code_and_stderr_of_the_script_itself(script, inputs, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    options = (
        f"--model_name_or_path {inputs[script][0]} --train_data {tmp_path}/empty.jsonl --output_dir {tmp_path}/out"
    )
    options += f" {SCRIPTS[script].options.format(model=inputs[script][0])}"
    path = str(TRAINING / f"{script}.py")

    def run_script():
        sys.argv = [path, *options.split()]
        runpy.run_path(path, run_name="__main__")

    done = run_forked(run_script, seconds=300, log=tmp_path / "log")
    assert done.code == 2
    columns = {
        "compression": "text",
        "contrastive": "anchor and positive",
        "distillation": "text",
        "pretraining": "text",
    }[script]
    sentence = f"error: {tmp_path}/empty.jsonl: is empty; give JSON lines with {columns}"
    assert done.stderr.splitlines()[-1] == sentence
    assert "Traceback" not in done.stderr


def test_the_recipe_is_one(script, inputs, tmp_path):
    model, data = inputs[script]
    options = f"--config {TRAINING}/recipes/{script}/default.yaml --model_name_or_path {model} --train_data {data} "
    options += (
        f"--output_dir {tmp_path}/out --max_steps 2 --logging_steps 1 {SCRIPTS[script].options.format(model=model)} "
    )
    SCRIPTS[script].main((options + f"{SCRIPTS[script].size} {SCRIPTS[script].sizes[0]}").split())
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2]
