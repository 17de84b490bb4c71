"""Masked-language-model teachers: DistilBERT's loss by hand, a student of alternate layers, and refused teachers."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

from common.errors import UserError
from modeling_longembed import LongEmbedForMaskedLM
from tests.training.tiny_training import SPECIALS, WORDS, losses, tiny_config
from training import pretraining
from training.data.documents.batches import MaskedBatch, mask_batch
from training.data.documents.next_sentence import NextSentenceHead
from training.data.documents.sequences import MaskedText
from training.objectives.masked_lm import MaskedLanguageModel, masked_gradient
from training.teachers import masked_teachers
from training.teachers.masked_teachers import MaskedTeacherArguments, MaskedTeachers, load_masked_teachers

TEMPERATURE = 2.0


def model(seed: int, **changes) -> LongEmbedForMaskedLM:
    torch.manual_seed(seed)
    return LongEmbedForMaskedLM(tiny_config(initializer_range=0.3, **changes)).double()


def batch(budget: int = 40, lengths: tuple[int, ...] = (9, 21, 14), segments: bool = False) -> MaskedBatch:
    """Random texts; with `segments` the last 5 tokens of each are its second segment."""
    generator, texts = torch.Generator().manual_seed(0), []
    for length in lengths:
        ids = torch.randint(5, 31, (length,), generator=generator).numpy()
        labels = torch.full((length,), -100)
        labels[1 : length // 2] = torch.from_numpy(ids[1 : length // 2])
        texts.append(MaskedText(ids, labels.numpy(), segments * (np.arange(length) >= length - 5).astype(ids.dtype)))
    return mask_batch(texts, budget, 64, 0.5)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    taken = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return taken


@pytest.mark.promise("D2")
@pytest.mark.parametrize("masked_only", [False, True])
@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_the_weighted_sum_of_three_losses_text_by_text(budget, masked_only, monkeypatch):
    """Against torch's cross entropy, KL divergence and cosine embedding loss, for each text alone, unpacked.

    As `distiller.py` of DistilBERT does: rows are those of the attention mask, or under `restrict_ce_to_mask` those
    with a label, and the divergence is `KLDivLoss(reduction="batchmean")` times the square of the temperature.
    """
    monkeypatch.setattr(masked_teachers, "TOKENS_AT_ONCE", 8)
    student, teacher = model(0).train(), model(1).eval()
    weights = MaskedTeacherArguments(masked_teachers=["teacher"], soft_weight=5, hard_weight=2, hidden_weight=1).weights
    given = batch(budget)
    teachers = MaskedTeachers([teacher], TEMPERATURE, hidden=True, masked_only=masked_only)
    taught = MaskedLanguageModel(student, auxiliary=teachers)
    metrics = masked_gradient(weights=weights, auxiliary=teachers)(taught, given, 1.0, True)
    ours = gradients(student)

    soft, hard, cosine, predicted, tokens = 0.0, 0.0, 0.0, 0, 0
    for chunk in given.chunks:
        ends = chunk.texts.cu_seq_lens_q.tolist()
        for start, stop in pairwise(ends):
            ids, labels = chunk.texts.input_ids[:, start:stop], chunk.labels[0, start:stop]
            options = {"attention_mask": torch.ones_like(ids), "output_hidden_states": True}
            mine, theirs = student(ids, **options), teacher(ids, **options)
            chosen = labels >= 0
            hard = hard + F.cross_entropy(mine.logits[0, chosen], labels[chosen], reduction="sum")
            compared = chosen if masked_only else torch.ones_like(chosen)
            logits, target = mine.logits[0, compared], theirs.logits[0, compared].detach()
            divergence = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, -1), F.softmax(target / TEMPERATURE, -1), reduction="sum"
            )
            soft = soft + TEMPERATURE**2 * divergence
            states, others = mine.hidden_states[-1][0], theirs.hidden_states[-1][0].detach()
            cosine = cosine + F.cosine_embedding_loss(states, others, torch.ones(len(states)), reduction="sum")
            predicted, tokens = predicted + int(chosen.sum()), tokens + len(states)
    parts = {
        "soft_target_loss": soft / (predicted if masked_only else tokens),
        "masked_lm_loss": hard / predicted,
        "hidden_state_loss": cosine / tokens,
    }
    loss = 5 * parts["soft_target_loss"] + 2 * parts["masked_lm_loss"] + parts["hidden_state_loss"]
    loss.backward()
    for name, value in (parts | {"loss": loss}).items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(ours, gradients(student), atol=1e-5, rtol=1e-4)


@pytest.mark.promise("D2")
@pytest.mark.parametrize("masked_only", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_student_that_is_its_teacher_has_no_loss(pairs, masked_only):
    """With pairs of segments the teacher, too, must receive the segment ids."""
    student = model(0).train()
    head = NextSentenceHead(32, 0.02).double() if pairs else None
    teachers = MaskedTeachers([model(0)], TEMPERATURE, hidden=True, masked_only=masked_only)
    taught = MaskedLanguageModel(student, head, teachers)
    weights = {"masked_lm_loss": 0.0, "next_sentence_loss": 0.0}
    metrics = masked_gradient(weights=weights, auxiliary=teachers)(taught, batch(segments=pairs), 1.0, True)
    assert metrics["soft_target_loss"] + metrics["hidden_state_loss"] < 1e-6
    assert max(gradient.abs().max() for gradient in gradients(student).values()) < 1e-6


@pytest.mark.promise("D1")
def test_hard_targets_alone_are_masked_language_modelling():
    student, given = model(0).train(), batch()
    teachers = MaskedTeachers([model(1), model(2)], TEMPERATURE, hidden=False)
    weights = {"soft_target_loss": 0.0}
    taught = MaskedLanguageModel(student, auxiliary=teachers)
    masked_gradient(weights=weights, auxiliary=teachers)(taught, given, 1.0, True)
    with_teachers = gradients(student)
    masked_gradient()(MaskedLanguageModel(student), given, 1.0, True)
    torch.testing.assert_close(with_teachers, gradients(student), atol=1e-12, rtol=0)


@pytest.mark.parametrize("restrict", [False, True])
def test_distributions_are_compared_at_all_tokens_unless_the_option_says_otherwise(masked_lm_folder, restrict):
    options = {"restrict_ce_to_mask": True} if restrict else {}
    arguments = MaskedTeacherArguments(masked_teachers=[str(masked_lm_folder)], **options)
    student = LongEmbedForMaskedLM.from_pretrained(masked_lm_folder)
    teachers = load_masked_teachers(arguments, student, student.tokenizer, 60)
    assert teachers.needs_all_logits is not restrict
    assert teachers.denominators["soft_target_loss"] == ("prediction_count" if restrict else "token_count")


def test_teachers_are_no_part_of_the_student():
    teachers = MaskedTeachers([model(1)], TEMPERATURE, hidden=True)
    taught = MaskedLanguageModel(model(0), auxiliary=teachers)
    assert taught.state_dict().keys() == MaskedLanguageModel(model(0)).state_dict().keys()
    assert not teachers.models[0].training
    taught.eval()
    assert "soft_target_loss" not in taught(batch().chunks[0])


@pytest.mark.promise("D2")
def test_a_student_of_alternate_layers_begins_with_the_teachers_weights(word_tokenizer, tmp_path, documents_file):
    """At a learning rate of almost 0 the saved model is the initial one."""
    folder = tmp_path / "teacher"
    torch.manual_seed(0)
    teacher = LongEmbedForMaskedLM(tiny_config(num_hidden_layers=4))
    teacher.save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    options = (
        f"--model_name_or_path {folder} --masked_teachers {folder} --keep_layers 0 2 --train_data {documents_file} "
    )
    options += f"--output_dir {tmp_path}/out --max_steps 1 --learning_rate 1e-60 --weight_decay 0 "
    options += "--per_device_train_tokens 200 --sequence_length 60 --dataloader_num_workers 0 --logging_steps 1 "
    pretraining.main(options.split())
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "out" / "final")
    kept = LongEmbedForMaskedLM.from_pretrained(folder).keep_layers([0, 2])
    torch.testing.assert_close(student.state_dict(), kept.state_dict(), atol=0, rtol=0)
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    expected = 5 * line["soft_target_loss"] + 2 * line["masked_lm_loss"] + line["hidden_state_loss"]
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert line["soft_target_loss"] > 0


def test_a_run_with_teachers_goes_on_to_the_same_bytes(train_script, masked_lm_folder, tmp_path):
    options = f"--masked_teachers {masked_lm_folder} --learning_rate 1e-3 --save_steps 2 --logging_steps 1 "
    weights = []
    for name in ("whole", "stopped"):
        folder = f"--output_dir {tmp_path / name} "
        train_script("pretraining", options + folder)
        if name == "stopped":
            checkpoint = tmp_path / name / "checkpoints" / "step-2"
            train_script("pretraining", f"{options} --output_dir {tmp_path}/on --resume_from_checkpoint {checkpoint}")
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "on")]
    torch.testing.assert_close(weights[0], weights[1], atol=0, rtol=0)
    assert losses(tmp_path / "on") == losses(tmp_path / "whole")[2:]


def test_a_resumed_run_keeps_its_teachers_and_their_weights(train_script, masked_lm_folder, tmp_path):
    """The teacher may have moved; another model under the old name is refused."""
    teachers = [tmp_path / name for name in ("teacher", "moved")]
    for folder in teachers:
        shutil.copytree(masked_lm_folder, folder)
    options = "--save_steps 1 --resume_from_checkpoint last --change_settings max_steps --max_steps {} "
    options += "--masked_teachers {} "
    train_script("pretraining", options.format(1, teachers[0]))
    torch.manual_seed(5)
    LongEmbedForMaskedLM(tiny_config()).save_pretrained(teachers[0])
    for changed, name in (
        (f"--masked_teachers {teachers[0]}", "masked_teachers"),
        (f"--masked_teachers {teachers[1]} {teachers[1]} --hidden_weight 0", "masked_teachers|hidden_weight"),
        ("--soft_weight 1", "soft_weight"),
        ("--teacher_temperature 3", "teacher_temperature"),
    ):
        with pytest.raises(UserError, match=rf"step-1: was made with --({name}) .*, now it is "):
            train_script("pretraining", options.format(1, teachers[1]) + changed)
    with pytest.raises(UserError, match=r"was made with --masked_teachers .*, now it is not given"):
        train_script("pretraining", "--resume_from_checkpoint last --max_steps 1")
    train_script("pretraining", options.format(1, teachers[1]))


def test_teachers_that_cannot_teach(train_script, masked_lm_folder, model_folder, word_tokenizer, tmp_path):
    def saved(name: str, other_tokens: bool = False, **changes) -> Path:
        folder = tmp_path / name
        LongEmbedForMaskedLM(tiny_config(**changes)).save_pretrained(folder)
        (other(word_tokenizer) if other_tokens else word_tokenizer).save_pretrained(folder)
        return folder

    for options, complaint in (
        ("--masked_teachers /nowhere/model", "--masked_teachers /nowhere/model: "),
        (f"--masked_teachers {model_folder}", "has no masked-language-model head, and so nothing to teach"),
        (f"--masked_teachers {saved('tokens', other_tokens=True)}", "has another tokenizer than the student"),
        (f"--masked_teachers {saved('short', max_position_embeddings=32)}", "reads 32 tokens, fewer than the 60"),
        (f"--masked_teachers {saved('wide', hidden_size=40)}", "hidden states of width 40 and 32 cannot be compared"),
        (f"--masked_teachers {masked_lm_folder} {masked_lm_folder}", "--hidden_weight: .* nothing in common; give 0"),
        ("--teacher_temperature 0", "--teacher_temperature.*: 0: must be more than 0"),
        ("--soft_weight nan", "--soft_weight.*: nan is no finite number"),
        ("--keep_layers 7", "--keep_layers 7: "),
    ):
        with pytest.raises(UserError, match=complaint) as caught:
            train_script("pretraining", options)
        assert "\n" not in str(caught.value)


def other(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same words under other numbers."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    words = [*SPECIALS, *WORDS[::-1], *map(str, range(10))]
    core["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), **names)
