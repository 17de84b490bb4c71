"""Masked-language-model training: its loss by hand, the switch of lengths, models that it takes, what it writes."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
)

from common.errors import UserError
from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from tests.training.tiny_training import SPECIALS, tiny_config, write_jsonl
from training.data.documents.batches import mask_batch, pack_masked
from training.data.documents.masking import Masking
from training.data.documents.next_sentence import NextSentenceHead
from training.data.documents.sequences import MaskedText
from training.engine.checkpoints.folders import find_checkpoint
from training.engine.saving import WHOLE_WEIGHTS, load_adapter
from training.objectives.masked_lm import MaskedLanguageModel, masked_gradient

MASKING = Masking(4, tuple(range(5)), 31)
TABLE = "model.embeddings.position_embeddings.weight"


def masked_texts(lengths, rate=0.3, seed=0) -> list[MaskedText]:
    generator, texts = np.random.default_rng(seed), []
    for number, length in enumerate(lengths):
        ids = np.concatenate([[2], generator.integers(5, 31, length - 2), [3]])
        segments = (np.arange(length) >= length // 2).astype(np.int64)
        texts.append(MaskedText(*MASKING(ids, np.ones(length, bool), rate, generator), segments, number % 2))
    return texts


def model(**changes) -> LongEmbedForMaskedLM:
    torch.manual_seed(3)
    return LongEmbedForMaskedLM(tiny_config(**changes))


def gradients(module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


# The objective --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_the_loss_is_the_mean_over_all_predictions_whatever_the_chunks(budget, pairs):
    """By hand: each text alone, unpacked, its cross entropies added up and divided by how many there are."""
    head = NextSentenceHead(32, 0.5).double() if pairs else None
    module = MaskedLanguageModel(model(initializer_range=0.2).double(), head)
    texts = masked_texts([5, 37, 12, 60, 3])
    total, pair_total = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    count = sum((text.labels >= 0).sum() for text in texts)
    for text in texts:
        inputs = {"token_type_ids": torch.tensor(text.segment_ids)[None]} if pairs else {}
        output = module.model(torch.tensor(text.input_ids)[None], **inputs, output_hidden_states=True)
        total = total + F.cross_entropy(output.logits[0], torch.tensor(text.labels), reduction="sum")
        if pairs:
            scores = head(output.hidden_states[-1][0, :1])
            pair_total = pair_total + F.cross_entropy(scores, torch.tensor([text.next_label]))
    expected = total / count + pair_total / len(texts)
    expected.backward()
    by_hand = gradients(module)
    module.zero_grad()
    metrics = masked_gradient()(module, mask_batch(texts, budget, 60, 0.3), 1.0, True)
    # The model computes its cross entropies in float32.
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradients(module), by_hand, atol=1e-6, rtol=1e-5)
    assert metrics["prediction_count"] == count


def test_a_chunk_without_predictions_adds_nothing_and_breaks_nothing():
    module = MaskedLanguageModel(model().double())
    texts = masked_texts([9, 20])
    masked_gradient()(module, mask_batch(texts[1:], 10, 60, 0.3), 1.0, True)
    expected = gradients(module)
    module.zero_grad()
    silent = MaskedText(texts[0].input_ids, np.full(9, -100), texts[0].segment_ids)
    masked_gradient()(module, mask_batch([silent, texts[1]], 10, 60, 0.3), 1.0, True)
    torch.testing.assert_close(gradients(module), expected, atol=1e-12, rtol=0)


def test_texts_of_a_chunk_do_not_see_each_other():
    module = MaskedLanguageModel(model())
    first, second, other = masked_texts([20, 30, 30])
    sums = [module(pack_masked(texts, 100)[0]) for texts in ([first], [second], [first, second], [first, other])]
    torch.testing.assert_close(sums[2]["masked_lm_loss"], sums[0]["masked_lm_loss"] + sums[1]["masked_lm_loss"])
    assert not torch.isclose(sums[2]["masked_lm_loss"], sums[3]["masked_lm_loss"])


@pytest.mark.promise("M3")
def test_rows_beyond_the_first_length_have_no_gradient_before_the_switch():
    """Ids count from 0 in every piece: however many are packed, row 16 is read by none of 16 tokens."""
    for length, reached in ((16, 16), (48, 48)):
        module = MaskedLanguageModel(model(attention_patterns="full"))
        masked_gradient()(module, mask_batch(masked_texts([length] * 5), 64, length, 0.3), 1.0, True)
        rows = module.model.model.embeddings.position_embeddings.weight.grad.abs().sum(dim=1)
        assert (rows[:reached] > 0).all()
        assert (rows[reached:] == 0).all()


# The script -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretrain(train_script):
    return lambda options="": train_script("pretraining", "--report_to none --logging_steps 1 " + options)


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_learns_and_its_model_loads_as_encoder_and_as_masked_language_model(pretrain, tmp_path):
    rows = [{"text": "river stone cloud table green seven night paper " * 6} for _ in range(12)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    options = (
        f"--train_data {data} --eval_data {data} --eval_steps 75 --max_steps 150 --learning_rate 1e-2 --dropout 0 "
    )
    output = pretrain(options + " --mask_unit token --mask_rate 0.2 --sequence_length 16 --batch_tokens 1000")
    training = [line for line in lines(output) if "loss" in line]
    evaluation = [line for line in lines(output) if "eval_loss" in line]
    assert training[-1]["masked_lm_loss"] < 0.5 * training[0]["masked_lm_loss"]
    assert [line["step"] for line in evaluation] == [75, 150]
    assert evaluation[1]["eval_perplexity"] < evaluation[0]["eval_perplexity"]
    assert evaluation[1]["eval_perplexity"] == pytest.approx(math.exp(evaluation[1]["eval_masked_lm_loss"]))
    assert {"tokens_per_second", "predictions_per_second", "mask_rate", "accuracy"} <= training[0].keys()
    masked_lm = AutoModelForMaskedLM.from_pretrained(output / "final").eval()
    encoder = AutoModel.from_pretrained(output / "final").eval()
    assert (type(masked_lm), type(encoder)) == (LongEmbedForMaskedLM, LongEmbedModel)
    ids = torch.tensor([[2, 5, 6, 4, 8, 9, 10, 3]])
    assert encoder(ids).last_hidden_state.equal(masked_lm.model(ids).last_hidden_state)
    assert masked_lm(ids).logits[0, 3].argmax() == 7  # the word that always stands there
    assert encoder.tokenizer.tokenize("river stone") == ["river", "stone"]


@pytest.mark.promise("M3")
def test_optimiser_and_schedule_go_on_across_the_switch_of_lengths(pretrain):
    output = pretrain("--max_steps 6 --sequence_length 16:0.5 60:0.5 --learning_rate 1e-3 --save_steps 3")
    steps = lines(output)
    assert [line["sequence_length"] for line in steps] == [16] * 3 + [60] * 3
    assert [line["learning_rate"] for line in steps] == pytest.approx([1e-3 * (6 - n) / 6 for n in range(6)])
    assert [line["mask_rate"] for line in steps] == pytest.approx(np.linspace(0.4, 0.2, 6))
    tensors, state = find_checkpoint(output / "checkpoints", "last").load()
    assert {int(of_parameter["step"]) for of_parameter in state["optimizer"]["state"].values()} == {6}
    before, _ = find_checkpoint(output / "checkpoints", str(output / "checkpoints" / "step-3")).load()
    moved = (tensors["model." + TABLE] != before["model." + TABLE]).any(dim=1)
    assert moved[16:60].all()


@pytest.mark.promise("M3")
def test_rows_beyond_the_first_length_stay_bitwise_before_the_switch(pretrain, masked_lm_folder):
    output = pretrain("--max_steps 6 --sequence_length 16:0.5 60:0.5 --learning_rate 1e-3 --save_steps 3")
    tensors, _ = find_checkpoint(output / "checkpoints", str(output / "checkpoints" / "step-3")).load()
    start = load_file(masked_lm_folder / "model.safetensors")[TABLE]
    moved = (tensors["model." + TABLE] != start).any(dim=1)
    assert moved[:16].all()
    assert not moved[16:].any()


def test_held_out_texts_are_masked_in_the_same_way_in_every_run(pretrain, documents_file, tmp_path):
    """A learning rate of next to nothing: the evaluations differ by the masks, or not at all."""
    options = f"--eval_data {documents_file} --learning_rate 1e-12 --dropout 0 --max_steps 2 --eval_steps 1 "
    first = [line["eval_loss"] for line in lines(pretrain(options)) if "eval_loss" in line]
    pretrain(options + f"--seed 7 --batch_tokens 1000 --output_dir {tmp_path}/other")
    second = [line for line in lines(tmp_path / "other") if "eval_loss" in line]
    assert first == pytest.approx([first[0]] * 2, rel=1e-5)
    # The next-sentence head of another seed starts otherwise; the masked-language model does not.
    first = [line["eval_masked_lm_loss"] for line in lines(tmp_path / "out") if "eval_loss" in line]
    assert [line["eval_masked_lm_loss"] for line in second] == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "longlora"])
@pytest.mark.parametrize("start", ["with its head", "encoder alone"])
def test_the_final_model_is_the_adapter_merged(pretrain, inputs, capsys, tuning, start):
    folder = inputs["pretraining" if start == "with its head" else "contrastive"][0]
    output = pretrain(f"--model_name_or_path {folder} --tuning {tuning} --learning_rate 1e-2 --gradient_checkpointing")
    said = [line for line in capsys.readouterr().out.splitlines() if "no masked-language-model head" in line]
    assert len(said) == (start == "encoder alone")
    base = LongEmbedForMaskedLM.from_pretrained(folder)
    adapted = load_adapter(base, output / "adapter").merge_and_unload()
    final = LongEmbedForMaskedLM.from_pretrained(output / "final")
    torch.testing.assert_close(dict(final.state_dict()), dict(adapted.state_dict()), atol=1e-6, rtol=0)
    assert (output / "adapter" / WHOLE_WEIGHTS).exists() == (tuning == "longlora" or start == "encoder alone")


def test_new_rows_of_a_longer_table_are_all_that_positions_tuning_moves(pretrain, word_tokenizer, tmp_path):
    torch.manual_seed(0)
    LongEmbedForMaskedLM(tiny_config(attention_patterns="full", max_position_embeddings=32)).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    output = pretrain(
        f"--model_name_or_path {tmp_path} --max_position_embeddings 128 --position_extension repeat --tuning positions "
        "--learning_rate 1e-2 --sequence_length 60 --attention_patterns full "
        "--training_attention_patterns block:size=32"
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, output / "final"))
    assert {name for name in before if name != TABLE and not before[name].equal(after[name])} == set()
    moved = (after[TABLE] != before[TABLE].repeat(4, 1)).any(dim=1)
    assert not moved[:32].any()
    assert moved[32:60].all()
    config = json.loads((output / "final" / "config.json").read_text())
    assert config["training_attention_patterns"] == [{"type": "block", "size": 32}] * 2


@pytest.fixture
def save_bert(tmp_path, word_tokenizer):
    """A folder of transformers' own BERT, with its head or without."""

    def save(kind) -> Path:
        torch.manual_seed(0)
        sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        folder = tmp_path / "bert"
        kind(BertConfig(**sizes, intermediate_size=64, max_position_embeddings=64, hidden_act="gelu")).save_pretrained(
            folder
        )
        word_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertModel])
def test_an_encoder_of_transformers_is_converted_on_the_way(pretrain, save_bert, capsys, kind):
    folder = save_bert(kind)
    options = f"--model_name_or_path {folder} --max_position_embeddings 256 --attention_patterns block:size=32 "
    output = pretrain(
        options + "--position_extension restart:period=32 --dropout 0 --learning_rate 1e-12 --max_steps 1"
    )
    assert ("has no masked-language-model head: a new one" in capsys.readouterr().out) == (kind is BertModel)
    final = LongEmbedForMaskedLM.from_pretrained(output / "final").eval()
    assert final.config.attention_patterns == [{"type": "block", "size": 32}] * 2
    assert final.config.position_extension["period"] == 32
    ids = torch.randint(5, 31, (1, 30))
    original = kind.from_pretrained(folder).eval()(ids)[0]
    ours = final(ids).logits if kind is BertForMaskedLM else final.model(ids).last_hidden_state
    torch.testing.assert_close(ours, original, atol=1e-4, rtol=0)


def test_a_new_head_guesses_words_as_often_as_they_occur(pretrain, save_bert, documents_file, word_tokenizer):
    """One step at a rate of nothing: the bias is the logarithm of the shares, counted here by the tokenizer alone."""
    output = pretrain(f"--model_name_or_path {save_bert(BertModel)} --learning_rate 1e-12 --max_steps 1 --dropout 0")
    texts = [json.loads(line)["text"] for line in documents_file.read_text().splitlines()]
    counts = Counter(token for ids in word_tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids)
    bias = LongEmbedForMaskedLM.from_pretrained(output / "final").head.decoder.bias.double()
    expected = torch.tensor([counts[token] + 1.0 for token in range(len(bias))]).double()
    torch.testing.assert_close(bias.exp(), expected / expected.sum(), atol=1e-6, rtol=1e-5)


def test_a_table_gives_way_to_another_scheme(pretrain, save_bert):
    options = f"--model_name_or_path {save_bert(BertForMaskedLM)} --position_embedding_type rope --rope_theta 5000 "
    output = pretrain(options + "--max_position_embeddings 128")
    final = LongEmbedForMaskedLM.from_pretrained(output / "final")
    assert final.config.position_embedding_type == "rope"
    assert final.config.rope_parameters["rope_theta"] == 5000
    assert final.config.max_position_embeddings == 128
    assert final.model.embeddings.position_embeddings is None


@pytest.mark.parametrize("scheme", ["absolute", "rope"])
@pytest.mark.parametrize("kind", ["ours", "an encoder to convert"])
def test_patterns_may_reach_as_far_as_the_new_context(pretrain, save_bert, tmp_path, scheme, kind):
    """Bert's context is 64 tokens: windows and groups of more only make sense once it is longer."""
    start = save_bert(BertForMaskedLM)
    if kind == "ours":
        LongEmbedForMaskedLM.from_encoder(str(start)).save_pretrained(tmp_path / "ours")
        start = tmp_path / "ours"
    options = f"--model_name_or_path {start} --max_position_embeddings 256 --attention_patterns sliding:window=70 "
    options += "--training_attention_patterns shifted:size=128 "
    if scheme == "rope":
        options += "--position_embedding_type rope"
    final = LongEmbedForMaskedLM.from_pretrained(pretrain(options) / "final")
    assert final.config.max_position_embeddings == 256
    assert final.config.position_embedding_type == scheme
    assert [entry["window"] for entry in final.config.attention_patterns] == [70, 70]
    assert [entry["size"] for entry in final.config.training_attention_patterns] == [128, 128]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--sequence_length 129", r"--sequence_length 129: is more than the model's context of 128 tokens"),
        ("--eval_sequence_length 129 --eval_data held-out.jsonl", r"--eval_sequence_length 129: is more than"),
        ("--sequence_length 16:0.5", r"--sequence_length 16:0.5: the shares of the steps must sum to 1"),
        ("--mask_rate 2", r"--mask_rate 2: write a fraction"),
        ("--mask_unit letter", r"--mask_unit.*invalid choice"),
        ("--mask_replace_prob 0.95", r"--mask_replace_prob 0.95 --random_replace_prob 0.1: .* at most 1"),
        ("--gradient_accumulation_steps 2", r"--gradient_accumulation_steps: give more --per_device_train_tokens"),
        ("--attention_patterns block:", r"--attention_patterns: 'block:' is no choice"),
        ("--attention_patterns none", r"--model_name_or_path .*attention_patterns"),
        ("--max_position_embeddings 64", r"--model_name_or_path .* must be a whole number above the context"),
        ("--position_embedding_type rope --position_extension yarn", r"--position_extension: applies only without"),
        ("--rope_theta 3", r"--rope_theta: applies only with --position_embedding_type rope"),
        ("--position_embedding_type absolute", r"--model_name_or_path .*switch_positions"),
        ("--text_column body", r"the column body is missing; it has text"),
        ("--span_penalty_weight 1", r"--span_penalty_weight 1.0: no attention pattern"),
    ],
)
def test_a_mistake_is_one_sentence(pretrain, tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        pretrain(options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "final").exists()


def test_a_tokenizer_that_cannot_mask_is_refused(pretrain, word_tokenizer, tmp_path):
    torch.manual_seed(0)
    LongEmbedForMaskedLM(tiny_config()).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=word_tokenizer.backend_tokenizer, unk_token=SPECIALS[1]).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(UserError, match="has no mask token"):
        pretrain(f"--model_name_or_path {tmp_path}/model")
