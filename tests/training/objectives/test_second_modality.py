"""Non-linguistic supervision: exact gradients, plain training at weight 0, resumed runs, and real digits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import SupConLoss
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import losses, random_pairs, tiny_config, write_jsonl
from training import contrastive
from training.data.modality_features import FeatureBatches
from training.data.pairs.batches import PairTokenizer, collate_pairs
from training.engine.checkpoints.folders import WEIGHTS
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.registry import build_objective
from training.objectives.pair_step import pair_gradient
from training.objectives.second_modality import FeatureArguments, TwoTaskBatch, feature_task

WEIGHT = 0.3


@pytest.fixture(scope="session")
def digits() -> list[dict]:
    """Images of digits from scikit-learn, 8 rows of 8 pixels each, with the digit as label."""
    data = load_digits()
    return [
        {"features": image, "label": int(digit)} for image, digit in zip(data.images.tolist(), data.target, strict=True)
    ]


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory, digits):
    return write_jsonl(tmp_path_factory.mktemp("features") / "digits.jsonl", digits[:300])


def tasks(digits_file, tokenizer, dropout: float, weight: float = WEIGHT, vectors: int = 1000):
    """A float64 model, the second task, the gradient of the texts, and a batch with chunks of `vectors` features."""
    torch.manual_seed(1)
    model = LongEmbedModel(tiny_config(hidden_dropout_prob=dropout)).double().train()
    arguments = FeatureArguments(feature_data=str(digits_file), feature_weight=weight)
    task = feature_task(arguments, model)
    assert task is not None
    task.double()
    columns = [[row[name] for row in random_pairs(6)] for name in ("anchor", "positive")]
    texts = collate_pairs(columns, PairTokenizer(tokenizer, 64, 64, {}), 40)
    features = FeatureBatches(task.source, batch_size=7, batch_tokens=vectors, seed=0)[0]
    chunks = [replace(chunk, features=chunk.features.double()) for chunk in features.chunks]
    objective = build_objective(ObjectiveArguments(objective="simcse" if dropout else "info_nce"), model, 6)
    text_gradient = pair_gradient(objective)
    return model, task, text_gradient, TwoTaskBatch(texts, replace(features, chunks=chunks))


def gradients(*modules) -> list[torch.Tensor]:
    """The accumulated gradients of all parameters, zero where there is none; they are removed."""
    taken = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for module in modules
        for parameter in module.parameters()
    ]
    for module in modules:
        module.zero_grad()
    return taken


@pytest.mark.parametrize("vectors", [1000, 30])
def test_the_gradient_is_that_of_sup_con_over_the_labels(digits_file, word_tokenizer, vectors):
    """The weighted gradient, in one chunk and in several, against pytorch-metric-learning's loss of padded images."""
    model, task, _, batch = tasks(digits_file, word_tokenizer, dropout=0.0, vectors=vectors)
    assert (len(batch.features.chunks) > 1) == (vectors == 30)
    metrics = task.accumulate_gradient(model, batch.features, scale=0.5)
    ours = gradients(model, task)

    images = torch.cat([chunk.features[0] for chunk in batch.features.chunks]).view(14, 8, 8)
    words = task.adapter(
        (images - images.mean(-1, keepdim=True)) / (images.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    )
    embeddings = model(inputs_embeds=words, attention_mask=torch.ones(14, 8)).pooler_output
    loss = SupConLoss(temperature=0.07)(embeddings, batch.features.label)
    (WEIGHT * 0.5 * loss).backward()
    torch.testing.assert_close(metrics["feature_loss"], loss.detach(), atol=1e-9, rtol=0)
    torch.testing.assert_close(ours, gradients(model, task), atol=1e-9, rtol=0)
    assert ours[-1].abs().max() > 0  # the adapter's


@pytest.mark.promise("C11")
def test_the_texts_see_the_dropout_that_they_would_see_alone(digits_file, word_tokenizer):
    """Then the gradient of both is exactly the sum, and later random numbers do not depend on the weight."""
    model, task, text_gradient, batch = tasks(digits_file, word_tokenizer, dropout=0.1, vectors=30)
    torch.manual_seed(5)
    text_gradient(model, batch.texts, 1.0, True)
    after_texts, alone = torch.rand(3), gradients(model, task)
    task.accumulate_gradient(model, batch.features, 1.0)
    second = gradients(model, task)
    torch.manual_seed(5)
    task.before(text_gradient)(model, batch, 1.0, True)
    torch.testing.assert_close(torch.rand(3), after_texts, atol=0, rtol=0)
    expected = [one + two for one, two in zip(alone, second, strict=True)]
    torch.testing.assert_close(gradients(model, task), expected, atol=1e-12, rtol=0)
    assert sum(gradient.abs().sum() for gradient in second) > 0


@pytest.mark.promise("C11")
def test_weight_0_trains_as_without_features(train_script, digits_file, tmp_path):
    given = {
        "without": "",
        "zero": f"--feature_data {digits_file} --feature_weight 0",
        "with": f"--feature_data {digits_file} --per_device_feature_batch_size 6",
    }
    for name, more in given.items():
        train_script("contrastive", f"--objective simcse --learning_rate 1e-3 {more} --output_dir {tmp_path / name}")
    weights = {name: load_file(tmp_path / name / "final" / "model.safetensors") for name in given}
    torch.testing.assert_close(weights["zero"], weights["without"], atol=0, rtol=0)
    assert losses(tmp_path / "zero") == losses(tmp_path / "without") != losses(tmp_path / "with")


@pytest.mark.promise("C11")
def test_making_the_task_draws_no_random_number(digits_file):
    model, state = LongEmbedModel(tiny_config()), torch.get_rng_state()
    feature_task(FeatureArguments(feature_data=str(digits_file)), model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_recipe_trains(train_script, digits_file):
    recipe = Path(contrastive.__file__).parent / "recipes" / "contrastive" / "non_linguistic.yaml"
    output = train_script("contrastive", f"--config {recipe} --feature_data {digits_file} --logging_steps 1")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(line["feature_loss"] > 0 for line in lines if "loss" in line)


@pytest.mark.parametrize("texts", ["", "--streaming --shuffle_buffer 20 "])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(train_script, digits_file, tmp_path, texts):
    options = f"{texts}--objective simcse --learning_rate 1e-2 --feature_data {digits_file} --feature_weight 1 "
    options += "--per_device_feature_batch_size 6 --save_steps 2 --save_total_limit 9 --logging_steps 1 "
    folders = {name: tmp_path / name for name in ("whole", "stopped")}
    for folder in folders.values():
        train_script("contrastive", options + f"--output_dir {folder}")
    last = {name: folder / "checkpoints" / "step-4" for name, folder in folders.items()}
    shutil.rmtree(last["stopped"])
    train_script("contrastive", options + f"--output_dir {folders['stopped']} --resume_from_checkpoint last")
    whole, stopped = (load_file(folder / WEIGHTS) for folder in last.values())
    assert "objective.features.adapter.weight" in whole
    torch.testing.assert_close(stopped, whole, atol=0, rtol=0)
    assert losses(folders["stopped"]) == losses(folders["whole"])


@pytest.mark.slow
def test_digits_of_a_class_come_together_while_the_texts_are_learnt(word_tokenizer, digits, tmp_path):
    """Nearest neighbours classify held-out digits better than at the start, and the loss of the texts falls, too."""
    file = write_jsonl(tmp_path / "digits.jsonl", digits[:1000])
    model, task, text_gradient, batch = tasks(file, word_tokenizer, dropout=0.0, weight=1.0)
    gradient = task.before(text_gradient)
    features = FeatureBatches(task.source, batch_size=24, batch_tokens=4096, seed=0)
    held_out = digits[1000:1400]

    @torch.no_grad()
    def embedded(rows: list[dict]) -> np.ndarray:
        images = torch.tensor([row["features"] for row in rows], dtype=torch.float64)
        words = task.adapter(F.layer_norm(images, (8,)))
        model.eval()
        pooled = F.normalize(model(inputs_embeds=words, attention_mask=torch.ones(len(rows), 8)).pooler_output, dim=-1)
        model.train()
        return pooled.numpy()

    def accuracy() -> float:
        labels = [[row["label"] for row in rows] for rows in (digits[:200], held_out)]
        return KNeighborsClassifier(1).fit(embedded(digits[:200]), labels[0]).score(embedded(held_out), labels[1])

    start = accuracy()
    optimizer = torch.optim.AdamW([*model.parameters(), *task.parameters()], lr=5e-3)
    history = []
    for index in range(80):
        drawn = features[index]
        drawn = replace(drawn, chunks=[replace(chunk, features=chunk.features.double()) for chunk in drawn.chunks])
        metrics = gradient(model, TwoTaskBatch(batch.texts, drawn), 1.0, True)
        optimizer.step()
        optimizer.zero_grad()
        history.append((metrics["loss"].item(), metrics["feature_loss"].item()))
    (first_text, first_feature), (last_text, last_feature) = np.mean(history[:5], axis=0), np.mean(history[-5:], axis=0)
    assert last_text < 0.5 * first_text
    assert last_feature < 0.9 * first_feature
    assert accuracy() > start + 0.1
