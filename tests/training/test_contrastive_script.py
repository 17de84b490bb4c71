"""The training script as a user meets it: what it writes, and one sentence for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_training import losses, random_pairs, tiny_config, write_jsonl
from transformers import BertConfig, BertModel

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from training import contrastive
from training.contrastive import main
from training.tuning import WHOLE_WEIGHTS, load_adapter


@pytest.fixture
def train(model_folder, pairs_file, tmp_path):
    """Run the script in this process; options that are given again win. Returns the default output folder."""

    def run(options: str = "") -> Path:
        output = tmp_path / "out"
        given = f"--model_name_or_path {model_folder} --train_data {pairs_file} --output_dir {output} --max_steps 4 "
        main((given + "--per_device_train_batch_size 8 --dataloader_num_workers 0 " + options).split())
        return output

    return run


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_learns_and_reports(train, pairs_file):
    output = train(
        "--max_steps 40 --learning_rate 3e-3 --warmup_ratio 0.1 --logging_steps 10 --eval_steps 20 --dropout 0 "
        f"--eval_data {pairs_file} --batch_tokens 200"
    )
    lines = metrics(output)
    training, evaluation = [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in training] == [10, 20, 30, 40]
    assert [line["step"] for line in evaluation] == [20, 40]
    assert training[-1]["loss"] < 0.7 * training[0]["loss"]
    assert evaluation[-1]["eval_ndcg_at_10"] > evaluation[0]["eval_ndcg_at_10"]
    reported = {"learning_rate", "tokens_per_second", "pairs_per_second", "padding_share", "peak_memory_gib"}
    assert all(reported <= line.keys() for line in training)
    assert all(line["padding_share"] == 0 < line["padding_share_if_padded"] for line in training)
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    # The warm-up of 4 steps, then linear to zero: the rate of the last step is one step above zero.
    assert training[-1]["learning_rate"] == pytest.approx(3e-3 / 36)
    loaded = LongEmbedModel.from_pretrained(output / "final")
    vectors = loaded.encode(["river stone", "seven night"], output="torch")
    assert vectors.shape == (2, 32)
    card = (output / "final" / "README.md").read_text()
    assert "# out\n" in card
    assert ".tmp" not in card  # the folder that it was written in


@pytest.mark.parametrize("tuning", ["lora", "longlora"])
def test_the_final_model_is_the_adapter_merged(train, model_folder, tuning):
    output = train(f"--tuning {tuning} --learning_rate 1e-2 --gradient_checkpointing")
    adapted = load_adapter(LongEmbedModel.from_pretrained(model_folder), output / "adapter").merge_and_unload()
    final = LongEmbedModel.from_pretrained(output / "final")
    torch.testing.assert_close(dict(final.state_dict()), dict(adapted.state_dict()), atol=1e-6, rtol=0)
    before = load_file(model_folder / "model.safetensors")
    moved = {name for name, tensor in final.state_dict().items() if not tensor.equal(before[name])}
    assert ("embeddings.word_embeddings.weight" in moved) == (tuning == "longlora")
    assert "layers.0.attention.q_proj.weight" in moved
    assert (output / "adapter" / WHOLE_WEIGHTS).exists() == (tuning == "longlora")


@pytest.mark.parametrize("options", ["--gradient_checkpointing", "--batch_tokens 1", "--batch_tokens 300"])
def test_gradient_checkpointing_and_the_token_budget_change_nothing(train, tmp_path, options):
    plain = losses(train("--dropout 0 --logging_steps 1"))
    train(f"--dropout 0 --logging_steps 1 --output_dir {tmp_path}/again {options}")
    for one, two in zip(losses(tmp_path / "again"), plain, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_bf16_trains_float32_weights_to_nearly_the_same(train, tmp_path):
    plain = metrics(train("--logging_steps 1 --dropout 0"))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(f"--bf16 --logging_steps 1 --dropout 0 --output_dir {tmp_path}/bf16")
    weights = load_file(tmp_path / "bf16" / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    for one, two in zip(metrics(tmp_path / "bf16"), plain, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02)
        assert one["loss"] != two["loss"]


def test_a_recipe_and_the_command_line(model_folder, pairs_file, tmp_path):
    recipe = Path(contrastive.__file__).parent / "recipes" / "contrastive.yaml"
    options = f"--config {recipe} --model_name_or_path {model_folder} --train_data {pairs_file} --max_length 64 "
    options += f"--output_dir {tmp_path}/out --max_steps 2 --per_device_train_batch_size 4 --logging_steps 1"
    main(options.split())
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2]


def test_a_finished_run_that_is_started_again_ends_at_once_with_the_same_model(train):
    output = train()
    before = (output / "final" / "model.safetensors").read_bytes(), metrics(output)
    train("--resume_from_checkpoint last")
    assert ((output / "final" / "model.safetensors").read_bytes(), metrics(output)) == before


def test_the_final_tokenizer_does_not_cut_off(train, model_folder):
    """Training cuts texts off at --max_length, and a tokenizer remembers such a thing."""
    output = train("--max_length 32")
    final, original = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (output / "final", model_folder)
    )
    assert final == original


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--max_length 129", r"--max_length 129: must be at most 128, the context of"),
        ("--query_max_length 2", r"--query_max_length 2: must be"),
        ("--per_device_train_batch_size 49", r"has 48 pairs, fewer than a batch of 49"),
        ("--per_device_train_batch_size 0", r"--per_device_train_batch_size 0: must be more than 0"),
        ("--temperature 0", r"--temperature 0.0: must be more than 0"),
        ("--tuning all", r"--tuning.*: invalid choice: 'all'"),
        ("--temprature 1", r"unknown argument --temprature .*did you mean temperature"),
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
def test_a_mistake_is_one_sentence(train, tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        train(options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "final").exists()


def test_models_that_cannot_be_trained_so(train, tmp_path, tokenizer):
    sizes = {
        "vocab_size": 99,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    LongEmbedModel(tiny_config(position_embedding_type="alibi")).save_pretrained(tmp_path / "alibi")
    for name in ("bert", "alibi"):
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match="is a bert model; convert it"):
        train(f"--model_name_or_path {tmp_path}/bert")
    with pytest.raises(UserError, match="no position table"):
        train(f"--model_name_or_path {tmp_path}/alibi --tuning positions")


def test_going_on_with_something_else_is_refused(train, pairs_file, tmp_path):
    train()
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        train()
    other = write_jsonl(tmp_path / "other.jsonl", random_pairs(9, negatives=1))
    for options, complaint in (
        (f"--train_data {pairs_file} {other}", "was made with sources"),
        ("--seed 7", "was made with seed = 42, now it is 7"),
        ("--gradient_accumulation_steps 2", "was made with batches a step = 1, now it is 2"),
        ("--tuning lora", "trains other parameters than now"),
    ):
        with pytest.raises(UserError, match=complaint):
            train(f"--resume_from_checkpoint last {options}")


def test_exit_code_and_stderr_of_the_script_itself(tmp_path, model_folder):
    (tmp_path / "empty.jsonl").touch()
    script = Path(contrastive.__file__)
    options = f"--model_name_or_path {model_folder} --train_data {tmp_path}/empty.jsonl --output_dir {tmp_path}/out"
    done = subprocess.run(
        [sys.executable, str(script), *options.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    sentence = f"error: {tmp_path}/empty.jsonl: is empty; give JSON lines with anchor and positive"
    assert done.stderr.splitlines()[-1] == sentence
    assert "Traceback" not in done.stderr
