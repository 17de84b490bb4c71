"""Compression: the three ways to a student, what it learns, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoTokenizer

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import random_documents, tiny_config, write_jsonl
from training import compression
from training.models.layer_choice import chosen_layers
from training.teachers.relations import RelationArguments

pytestmark = pytest.mark.promise("D4")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
RECIPES = Path(compression.__file__).parent / "recipes" / "compression"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, word_tokenizer):
    """Four layers whose attention is far from uniform, so that there is something to learn."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    model = LongEmbedModel(tiny_config(num_hidden_layers=4, initializer_range=0.2, layerdrop=0.5))
    model.tokenizer = word_tokenizer
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def compress(teacher, documents_file, tmp_path):
    """Run the script; options that are given again win. Returns the lines of metrics.jsonl and the final model."""

    def run(options: str, name: str = "out"):
        output = tmp_path / name
        given = f"--model_name_or_path {teacher} --train_data {documents_file} --output_dir {output} "
        given += "--per_device_train_tokens 400 --sequence_length 40 --batch_tokens 200 "
        given += "" if re.search(r"--relation_objective minilm( |$)|/minilm\.yaml", options) else "--relation_heads 8 "
        given += "--max_steps 3 --logging_steps 1 --dataloader_num_workers 0 --report_to none "
        AcceleratorState._reset_state(reset_partial_state=True)
        compression.main((given + options).split())
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return lines, output / "final"

    return run


def test_a_new_student_has_no_token_output_that_nothing_trains(compress, teacher, word_tokenizer, tmp_path):
    """One of the teacher's layers keeps the teacher's, which does not train either."""
    folder = tmp_path / "with-head"
    model = LongEmbedModel(tiny_config(token_dim=16, query_token_weights="state", token_head="mlp"))
    model.tokenizer = word_tokenizer
    model.save_pretrained(folder)
    _, final = compress(f"--model_name_or_path {folder} --student_hidden_size 16", "new")
    config = LongEmbedModel.from_pretrained(final).config
    assert (config.token_dim, config.token_head, config.query_token_weights) == (None, "linear", "none")
    _, final = compress(f"--model_name_or_path {folder} --student_layers 0", "layer")
    kept = LongEmbedModel.from_pretrained(final).token_output.state_dict()
    torch.testing.assert_close(dict(kept), dict(model.token_output.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [("", [0, 2]), ("--student_layers ends:2", [0, 3]), ("--student_layers 1 2", [1, 2])],
    ids=["default", "ends", "list"],
)
def test_a_student_of_some_layers_begins_as_the_slice_of_its_teacher(compress, teacher, options, kept):
    _, final = compress(f"--learning_rate 1e-30 --max_steps 1 --weight_decay 0 {options}")
    weights, slice_of = load_file(final / "model.safetensors"), load_file(teacher / "model.safetensors")
    places = {
        f"layers.{2 * layer + part}.": f"layers.{2 * n + part}." for n, layer in enumerate(kept) for part in (0, 1)
    }
    expected = {}
    for name, tensor in slice_of.items():
        layer = re.search(r"layers\.\d+\.", name)
        if layer is None or layer[0] in places:
            expected[name if layer is None else name.replace(layer[0], places[layer[0]])] = tensor
    assert weights.keys() == expected.keys()
    torch.testing.assert_close(weights, expected, atol=1e-29, rtol=0)  # AdamW moves by its learning rate


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_every_recipe_trains(compress, recipe):
    """On a teacher smaller than those that the recipes are for, hence fewer relation heads and shorter texts."""
    layers = "--student_layers 0 3" if "0, 3, 5" in (RECIPES / recipe).read_text() else ""
    lines, final = compress(f"--config {RECIPES / recipe} --max_steps 1 {layers}")
    assert lines[0]["loss"] > 0
    assert (final / "model.safetensors").is_file()


def test_evenly_spaced_layers_are_those_of_distilbert():
    assert chosen_layers(["ends:6"], 12, "student_layers") == [0, 2, 4, 7, 9, 11]
    assert chosen_layers([], 6, "student_layers") == [0, 2, 4]
    assert chosen_layers(["5", "0"], 6, "student_layers") == [0, 5]
    for wrong in (["ends:7"], ["6"], ["half"], ["ends:0"]):
        with pytest.raises(UserError, match=r"--student_layers .*: write every_other, ends:N with N up to 6"):
            chosen_layers(wrong, 6, "student_layers")


@pytest.mark.parametrize("objective", ["minilm", "minilmv2"])
def test_a_fresh_student_of_another_width_pattern_and_scheme_learns(compress, tmp_path, objective):
    """The loss on other documents falls by a fifth, and each of its parts falls."""
    held_out_file = write_jsonl(tmp_path / "held-out.jsonl", random_documents(4, seed=1))
    options = f"--relation_objective {objective} --student_hidden_size 16 --student_num_hidden_layers 2 "
    options += "--student_attention_patterns sliding:window=12 --student_position_embedding_type rope "
    options += f"--eval_data {held_out_file} --learning_rate 1e-2"
    (*_, first), _ = compress(f"{options} --max_steps 1", "first")
    (*_, last), final = compress(f"{options} --max_steps 40")
    parts = ("attention", "value") if objective == "minilm" else ("query", "key", "value")
    assert set(first) >= {f"eval_{name}_loss" for name in parts}
    assert first["eval_loss"] == pytest.approx(sum(first[f"eval_{name}_loss"] for name in parts))
    for name in first.keys() - {"step"}:
        assert last[name] < first[name]
    assert last["eval_loss"] < 0.8 * first["eval_loss"]
    config = LongEmbedModel.from_pretrained(final).config
    assert (config.hidden_size, config.intermediate_size, config.sublayer_pattern) == (16, 32, "sfsf")
    assert config.position_embedding_type == "rope"
    assert config.attention_patterns[0]["type"] == "sliding"


def test_the_loss_of_a_run_is_the_mean_over_tokens(compress, tmp_path):
    """Whatever the chunks: the first step of a student that is the teacher has none, another one has the same."""
    lines, _ = compress("--student_layers ends:4 --max_steps 1")
    assert abs(lines[0]["loss"]) < 1e-6
    whole = compress("--max_steps 1 --dropout 0 --batch_tokens 10000", "whole")[0][0]
    parts = compress("--max_steps 1 --dropout 0 --batch_tokens 1", "parts")[0][0]
    assert whole["loss"] > 1e-3
    for name in ("loss", "query_loss", "key_loss", "value_loss", "grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)


def test_an_assistant_is_a_student_and_then_a_teacher(compress, tmp_path):
    """MiniLM's two stages: narrow first, then shallow, from what the first stage has written."""
    _, assistant = compress("--student_hidden_size 16", "assistant")
    _, final = compress(f"--model_name_or_path {assistant} --student_layers 0 3", "student")
    config = LongEmbedModel.from_pretrained(final).config
    assert (config.hidden_size, config.num_hidden_layers) == (16, 2)
    _, again = compress(f"--student_name_or_path {final}", "again")
    assert LongEmbedModel.from_pretrained(again).encode(["river stone"]).shape == (1, 16)


def test_a_weight_of_zero_leaves_a_loss_out(compress):
    lines, _ = compress("--query_weight 0 --key_weight 2 --max_steps 1")
    assert "query_loss" not in lines[0]
    assert lines[0]["loss"] == pytest.approx(2 * lines[0]["key_loss"] + lines[0]["value_loss"])


@pytest.mark.parametrize("weighting", ["none", "generalized_max"])
def test_hidden_states_are_compared_as_they_are(compress, teacher, tmp_path, weighting, documents_file, word_tokenizer):
    """The loss of the first step against what the two models give for the same pieces; the last feed-forward learns."""
    folder = tmp_path / "weighed"
    LongEmbedModel.from_pretrained(teacher, token_weighting=weighting).save_pretrained(folder)
    options = f"--model_name_or_path {folder} --query_weight 0 --key_weight 0 --value_weight 0 --hidden_mse_weight 3 "
    options += f"--dropout 0 --student_layers 0 3 --learning_rate 1e-30 --eval_data {documents_file} --weight_decay 0 "
    (step, evaluation), final = compress(options + "--max_steps 1")
    student = LongEmbedModel.from_pretrained(final)
    assert student.config.token_weighting == weighting
    models, squares = (LongEmbedModel.from_pretrained(teacher).eval(), student.eval()), []
    for model in models:
        model.weighs_tokens = False
    for line in documents_file.read_text().splitlines():
        ids = word_tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), 38):  # a piece of 40 tokens has two special ones
            piece = torch.tensor([[word_tokenizer.cls_token_id, *ids[start : start + 38], word_tokenizer.sep_token_id]])
            with torch.no_grad():
                states = [model(input_ids=piece).last_hidden_state[0] for model in models]
            squares.append((states[0] - states[1]).pow(2).mean(1))
    assert evaluation["eval_hidden_loss"] == pytest.approx(torch.cat(squares).mean().item(), rel=1e-4)
    assert evaluation["eval_loss"] == pytest.approx(3 * evaluation["eval_hidden_loss"])
    assert step["grad_norm"] > 0


def test_a_student_with_another_tokenizer_is_refused_with_the_reason(compress, tmp_path, teacher):
    folder = tmp_path / "other"
    model = LongEmbedModel.from_pretrained(teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["another"])
    model.tokenizer = tokenizer
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"has another tokenizer than the teacher, and relations .* token for token"):
        compress(f"--student_name_or_path {folder}")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--student_layers 9", r"--student_layers 9: write every_other"),
        ("--student_layers 0 --student_hidden_size 16", r"are three ways to a student; give one"),
        ("--relation_heads 5", r"--relation_heads 5: does not divide the attention's width of 32"),
        ("--student_hidden_size 17", r"the student cannot be made: .*hidden_size"),
        ("--student_num_attention_heads 2 --relation_objective minilm", r"4 attention heads, the student 2"),
        ("--student_hidden_size 16 --hidden_mse_weight 1", r"--hidden_mse_weight 1.0: hidden states of width 32"),
        ("--teacher_layer 5", r"--teacher_layer 5: the teacher has attention layers 1 to 4"),
        ("--teacher_layer 0", r"--teacher_layer 0: the teacher has attention layers 1 to 4"),
        ("--teacher_layer -4 --relation_objective minilm", r"--teacher_layer -4: the teacher has attention layers 1"),
        ("--student_hidden_size 0", r"--student_hidden_size 0: must be at least 1"),
        ("--student_num_hidden_layers 0", r"--student_num_hidden_layers 0: must be at least 1"),
        ("--student_num_attention_heads -2", r"--student_num_attention_heads -2: must be at least 1"),
        ("--student_intermediate_size 0", r"--student_intermediate_size 0: must be at least 1"),
        ("--gradient_accumulation_steps 2", r"--gradient_accumulation_steps: give more --per_device_train_tokens"),
        ("--sequence_length 500", r"context of 128 tokens; teacher and student must both read it"),
        ("--query_weight 0 --key_weight 0 --value_weight 0", r"one of them more"),
        ("--student_name_or_path /nowhere/at-all", r"--student_name_or_path /nowhere/at-all"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(compress, options, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        compress(options)
    assert "\n" not in str(caught.value)


def test_a_resumed_run_has_the_same_teacher_and_learns_the_same(compress, teacher, tmp_path):
    """What is other is named; a teacher that was moved is the same one."""
    options = (
        "--save_steps 1 --resume_from_checkpoint last --change_settings max_steps --student_layers 1 2 --max_steps"
    )
    compress(f"{options} 1")
    other = tmp_path / "other"
    model = LongEmbedModel.from_pretrained(teacher)
    model.layers[0].attention.q_proj.weight.data[0, 0] += 1  # no layer of the student
    model.save_pretrained(other)
    for change, name in (
        ("--relation_objective minilm", "--relation_objective minilmv2, now it is minilm, and"),
        ("--teacher_layer 2", "no --teacher_layer, now it is 2;"),
        ("--key_weight 0.5", "--key_weight 1.0, now it is 0.5;"),
        ("--relation_heads 4", "--relation_heads 8, now it is 4;"),
        (f"--model_name_or_path {other}", "--model_name_or_path [0-9a-f]+, now"),
    ):
        with pytest.raises(UserError, match=f"was made with {name}"):
            compress(f"{options} 2 {change}")
    lines, _ = compress(f"{options} 2 --model_name_or_path {shutil.copytree(teacher, tmp_path / 'moved')}")
    assert [line["step"] for line in lines] == [1, 2]


def test_a_rehearsal_changes_no_bit_and_ends_in_an_answer(compress, monkeypatch, tmp_path):
    with_it, without = compress("--dropout 0.1"), compress("--dropout 0.1 --rehearse never", "never")
    assert [line["loss"] for line in with_it[0]] == [line["loss"] for line in without[0]]
    weights = [load_file(final / "model.safetensors") for _, final in (with_it, without)]
    torch.testing.assert_close(*weights, atol=0, rtol=0)
    monkeypatch.setattr(compression.RelationStudent, "forward", lambda *_: (_ for _ in ()).throw(OUT_OF_MEMORY))
    with pytest.raises(UserError, match=r"with 200 tokens at once and texts of up to 40 tokens; use --grad"):
        compress("", "failed")
    assert not (tmp_path / "failed" / "final").exists()


def test_a_distribution_that_is_more_than_a_mask_cannot_be_compared(teacher):
    patterns = {"type": "lsh"}
    config = tiny_config(attention_patterns=patterns, max_position_embeddings=64)
    with pytest.raises(UserError, match="'lsh' is more than a mask"):
        RelationArguments(relation_objective="minilm").check(config, config)
    RelationArguments(relation_objective="minilm", attention_weight=0).check(config, config)
    mixed = tiny_config(attention_patterns=["full", patterns], max_position_embeddings=64)
    RelationArguments(relation_objective="minilm", teacher_layer=1).check(mixed, tiny_config())


def test_the_final_model_has_no_layer_that_is_left_out(compress):
    """The teacher was trained with LayerDrop; the layer that learns is always there."""
    _, final = compress("--max_steps 1")
    assert LongEmbedModel.from_pretrained(final).config.layerdrop == 0
