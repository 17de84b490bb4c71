"""The gradient of texts and features on two gloo processes under DDP, against one process with the whole batches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modeling_longembed import LongEmbedModel
from tests.fresh_processes import with_fresh_processes
from tests.training.tiny_training import random_pairs, tiny_config, write_jsonl
from tests.two_processes import PROCESSES, in_two_processes
from training.data.modality_features import FeatureBatches
from training.data.packing import pack
from training.data.pairs.batches import PairBatch, text_id
from training.engine.processes.distributed import average_gradients, settle
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.registry import build_objective
from training.objectives.pair_step import pair_gradient
from training.objectives.second_modality import FeatureArguments, FeatureTask, TwoTaskBatch, feature_task

PAIRS, ROWS = 6, 8


def tasks(folder: Path) -> tuple[nn.Module, FeatureTask]:
    torch.manual_seed(1)
    model = LongEmbedModel(tiny_config()).double().train()
    task = feature_task(FeatureArguments(feature_data=str(folder / "digits.jsonl"), feature_weight=0.5), model)
    return model, task.double()


def texts(pairs: slice) -> PairBatch:
    columns = [[row[name] for row in random_pairs(PAIRS)][pairs] for name in ("anchor", "positive")]
    ids = [[5 + text_id(word) % 26 for word in text.split()] for column in columns for text in column]
    return PairBatch(
        pack(ids, 40),
        torch.tensor([text_id(text) for column in columns for text in column]),
        pairs=len(columns[0]),
        tokens=sum(map(len, ids)),
        longest=(40, 40),
        cut_off=0,
    )


def gradients(model: nn.Module, wrapped: nn.Module, task: FeatureTask, rank: int, processes: int) -> dict:
    """Of two accumulated batches, the first without a reduction; each process has features in other chunks."""
    objective = build_objective(ObjectiveArguments(), model, PAIRS)
    gradient = task.before(pair_gradient(objective))
    own = slice(PAIRS // processes * rank, PAIRS // processes * (rank + 1))
    features = FeatureBatches(
        task.source,
        batch_size=ROWS // processes,
        batch_tokens=(1000, 24)[rank],
        seed=0,
        rank=rank,
        world_size=processes,
    )
    for index in range(2):
        batch = features[index]
        batch = replace(batch, chunks=[replace(chunk, features=chunk.features.double()) for chunk in batch.chunks])
        gradient(wrapped, TwoTaskBatch(texts(own), batch), 0.5, index == 1)
    settle(wrapped)
    average_gradients(task)
    return {name: p.grad for part in (model, task) for name, p in part.named_parameters()}


def of_one_process(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    """What one of two processes computes."""
    model, task = tasks(folder)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    return gradients(model, wrapped, task, rank, PROCESSES)


@with_fresh_processes
@pytest.mark.promise("C9")
def test_two_processes_have_the_gradient_of_one(tmp_path):
    data = load_digits()
    rows = [
        {"features": image, "label": int(digit)} for image, digit in zip(data.images.tolist(), data.target, strict=True)
    ]
    write_jsonl(tmp_path / "digits.jsonl", rows[:100])
    model, task = tasks(tmp_path)
    expected = gradients(model, model, task, 0, 1)
    assert expected["adapter.weight"].abs().max() > 1e-6
    for found in in_two_processes(of_one_process, tmp_path, tmp_path):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
