"""The step of experiments/measured_step.py as sentence-transformers makes it: CachedMultipleNegativesRankingLoss.

    python -m experiments.published_step '<a job as JSON>'      prints one line of JSON

The job is the same, and `model` any folder that sentence-transformers loads, ours among them. `batch_tokens` is its
`mini_batch_num_tokens`; as its trainer does, each column is padded to its longest text.
"""

import json
import sys
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import modeling_longembed  # noqa: F401  (our folders load by its Auto classes)
from common.step_measurement import measure_step


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """What a job asks for: a step measured, or its loss and gradients alone."""
    torch.set_num_threads(job["threads"])
    model = SentenceTransformer(job["model"], device="cpu").train()
    loss = CachedMultipleNegativesRankingLoss(
        model, scale=1 / job["temperature"], mini_batch_num_tokens=job["batch_tokens"]
    )

    def gradient(columns: list[list[list[int]]]) -> float:
        value = loss([padded(column) for column in columns], torch.empty(0))
        value.backward()
        return value.item()

    encoder: Any = model[0].model
    return measure_step(job, model, gradient, encoder)


def padded(column: list[list[int]]) -> dict[str, Tensor]:
    """A column of texts as the tokenizer would give it: token ids and mask, `(n, longest)`."""
    rows = [torch.tensor(text) for text in column]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
