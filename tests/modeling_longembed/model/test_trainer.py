"""The masked-language model in transformers' own `Trainer`."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_longembed import LongEmbedForMaskedLM

LENGTHS, VOCABULARY = (9, 4, 7, 12), 64


@pytest.fixture
def rows():
    """Documents that are padded to one length, every third token of which is predicted."""
    torch.manual_seed(1)
    rows = []
    for length in LENGTHS:
        mask = (torch.arange(max(LENGTHS)) < length).long()
        input_ids = torch.randint(1, VOCABULARY, (max(LENGTHS),)) * mask
        labels = input_ids.masked_fill((mask == 0) | (torch.arange(max(LENGTHS)) % 3 > 0), -100)
        rows.append({"input_ids": input_ids, "attention_mask": mask, "labels": labels})
    return rows


def trainer(model, rows, folder, compute_metrics=None, **options):
    options = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True} | options
    arguments = TrainingArguments(str(folder), **options)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics)


def test_predictions_and_metrics_are_those_of_the_padded_batch(build_tiny_model, rows, tmp_path):
    model = build_tiny_model(LongEmbedForMaskedLM)

    def compute_metrics(prediction):
        chosen = prediction.label_ids != -100
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids)[chosen].mean()}

    found = trainer(model, rows, tmp_path, compute_metrics, per_device_eval_batch_size=3).predict(rows)
    assert found.predictions.shape == (len(rows), max(LENGTHS), VOCABULARY)
    right = []
    for row, logits in zip(rows, found.predictions, strict=True):
        length = int(row["attention_mask"].sum())
        alone = model(row["input_ids"][None, :length]).logits[0].detach().numpy()
        np.testing.assert_allclose(logits[:length], alone, atol=1e-5)
        right += (alone.argmax(-1) == row["labels"][:length].numpy())[row["labels"][:length] != -100].tolist()
    assert found.metrics["test_accuracy"] == pytest.approx(np.mean(right))


def weights_after_a_step(build_tiny_model, rows, folder, **options):
    torch.manual_seed(0)
    model = build_tiny_model(LongEmbedForMaskedLM, hidden_dropout_prob=0.0)
    options |= {
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    trainer(model, rows, folder, **options).train()
    return model.state_dict()


def test_accumulated_batches_are_one_batch(build_tiny_model, rows, tmp_path):
    # The Trainer leaves the division to a model whose forward takes further arguments; a mean for each batch would
    # count tokens in batches with few labels more, and the sum of the means would be as many times too large.
    whole = weights_after_a_step(build_tiny_model, rows, tmp_path, per_device_train_batch_size=4)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    parts = weights_after_a_step(build_tiny_model, rows, tmp_path, **options)
    before = build_tiny_model(LongEmbedForMaskedLM, hidden_dropout_prob=0.0).state_dict()
    assert max((whole[name] - before[name]).abs().max() for name in whole) > 1e-3
    for name, weights in whole.items():
        torch.testing.assert_close(parts[name], weights, atol=1e-6, rtol=1e-4)
