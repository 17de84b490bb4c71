"""A tiny LongEmbed model with a tokenizer of its own, and pairs to train on."""

import os
from pathlib import Path

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from tests.modeling_longembed.tiny_checkpoints import leave_out_code
from tests.training.tiny_training import (
    SCRIPTS,
    random_documents,
    random_pairs,
    tiny_config,
    word_tokenizer,
    write_jsonl,
)
from training import contrastive


@pytest.fixture
def tiny_encoder() -> LongEmbedModel:
    return LongEmbedModel(tiny_config())


@pytest.fixture(scope="session", name="word_tokenizer")
def _word_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, word_tokenizer) -> Path:
    """A saved tiny model, with dropout."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LongEmbedModel(tiny_config(hidden_dropout_prob=0.1)).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def masked_lm_folder(tmp_path_factory, word_tokenizer) -> Path:
    """A saved tiny masked-language model, with dropout."""
    folder = tmp_path_factory.mktemp("masked-lm")
    torch.manual_seed(0)
    LongEmbedForMaskedLM(tiny_config(hidden_dropout_prob=0.1)).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def documents_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "documents.jsonl", random_documents(24))


@pytest.fixture(scope="session")
def inputs(model_folder, masked_lm_folder, pairs_file, documents_file) -> dict[str, tuple[Path, Path]]:
    """A model and data of each script."""
    return {
        "compression": (model_folder, documents_file),
        "contrastive": (model_folder, pairs_file),
        "distillation": (model_folder, documents_file),
        "pretraining": (masked_lm_folder, documents_file),
    }


@pytest.fixture
def train_script(inputs, tmp_path):
    """Run a script in this process; options that are given again win. Returns the default output folder."""

    def run(name: str, options: str = "") -> Path:
        script, (model, data), output = SCRIPTS[name], inputs[name], tmp_path / "out"
        given = f"--model_name_or_path {model} --train_data {data} --output_dir {output} --max_steps 4 "
        given += f"{script.options.format(model=model)} {script.size} {script.sizes[0]} --dataloader_num_workers 0 "
        script.main((given + options).split())
        return output

    return run


@pytest.fixture
def train_contrastive(model_folder, pairs_file, tmp_path):
    """Run training/contrastive.py in this process; options that are given again win. Returns the output folder."""

    def run(options: str = "", output: str = "out") -> Path:
        given = f"--model_name_or_path {model_folder} --train_data {pairs_file} --output_dir {tmp_path / output} "
        given += "--max_steps 4 --logging_steps 1 --per_device_train_batch_size 8 --dataloader_num_workers 0 "
        contrastive.main((given + options).split())
        return tmp_path / output

    return run


@pytest.fixture
def out_of_memory_above(monkeypatch):
    """Let models run out of memory beyond a number of tokens at once. Returns a list that receives those numbers."""

    def fail_above(tokens: int) -> list[int]:
        forward, seen = LongEmbedModel.forward, []

        def forward_or_fail(self, input_ids, **inputs):
            seen.append(input_ids.numel())
            if input_ids.numel() > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, input_ids, **inputs)

        monkeypatch.setattr(LongEmbedModel, "forward", forward_or_fail)
        return seen

    return fail_above


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", random_pairs(48, negatives=1))


@pytest.fixture(autouse=True, scope="session")
def _own_dataset_cache(tmp_path_factory):
    """What the tests read is cached in their own folder, in this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("datasets"))
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """Leave out what makes files outlive a power cut; processes that the tests kill lose nothing by it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _without_code(monkeypatch):
    """Save models without a copy of the package, which would take most of the time of saving a tiny one."""
    leave_out_code(monkeypatch)


@pytest.fixture(autouse=True)
def _fresh_accelerator(fresh_accelerator):
    """Give every test of training an accelerate without the settings of the tests before it."""
