"""The training script as a user meets it: what it writes, and one sentence for every mistake."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import tiny_config
from training.engine.saving import WHOLE_WEIGHTS, load_adapter


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_learns_and_reports(train_contrastive, pairs_file):
    output = train_contrastive(
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
    assert "None recorded" not in card
    rows = dict(re.findall(r"^\| (\w+) \| `(.*)` \|$", card, re.MULTILINE))
    assert (rows["max_steps"], rows["learning_rate"], rows["seed"]) == ("40", "0.003", "42")
    assert rows["train_data"] == "pairs.jsonl"
    assert not {"output_dir", "save_steps"} & rows.keys()
    assert f"| held-out rows | ndcg_at_10 | {evaluation[-1]['eval_ndcg_at_10']:.4f} |" in card
    assert f"| training, step 40 | loss | {training[-1]['loss']:.4f} |" in card


@pytest.mark.parametrize("tuning", ["lora", "longlora"])
def test_the_final_model_is_the_adapter_merged(train_contrastive, model_folder, tuning):
    output = train_contrastive(f"--tuning {tuning} --learning_rate 1e-2 --gradient_checkpointing")
    adapted = load_adapter(LongEmbedModel.from_pretrained(model_folder), output / "adapter").merge_and_unload()
    final = LongEmbedModel.from_pretrained(output / "final")
    torch.testing.assert_close(dict(final.state_dict()), dict(adapted.state_dict()), atol=1e-6, rtol=0)
    before = load_file(model_folder / "model.safetensors")
    moved = {name for name, tensor in final.state_dict().items() if not tensor.equal(before[name])}
    assert ("embeddings.word_embeddings.weight" in moved) == (tuning == "longlora")
    assert "layers.0.attention.q_proj.weight" in moved
    assert (output / "adapter" / WHOLE_WEIGHTS).exists() == (tuning == "longlora")


def test_the_final_tokenizer_does_not_cut_off(train_contrastive, model_folder):
    """Training cuts texts off at --max_length, and a tokenizer remembers such a thing."""
    output = train_contrastive("--max_length 32")
    final, original = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (output / "final", model_folder)
    )
    assert final == original


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--max_length 129", r"--max_length 129: must be at most 128, the context of"),
        ("--query_max_length 2", r"--query_max_length 2: must be"),
        ("--temperature 0", r"--temperature: 0: must be more than 0"),
        *[
            (f"--{name} 0", rf"--{name}/\S*: 0: must be at least 1")
            for name in ("logging_steps", "save_steps", "save_total_limit", "gradient_accumulation_steps")
        ],
        ("--temprature 1", r"unknown argument --temprature .*did you mean --temperature"),
    ],
)
def test_a_mistake_is_one_sentence(train_contrastive, tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        train_contrastive(options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "final").exists()


def test_models_that_cannot_be_trained_so(train_contrastive, tmp_path, word_tokenizer):
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
        word_tokenizer.save_pretrained(tmp_path / name)
    for dropouts in ("", "--dropout 0.1 --attention_dropout 0"):  # BERT has another name for the second
        with pytest.raises(UserError, match="is a bert model; convert it"):
            train_contrastive(f"--model_name_or_path {tmp_path}/bert {dropouts}")
    with pytest.raises(UserError, match="no position table"):
        train_contrastive(f"--model_name_or_path {tmp_path}/alibi --tuning positions")
