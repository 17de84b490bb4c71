"""Measure a step of contrastive training, in a process of its own that experiments/training_throughput.py starts.

    python -m experiments.measured_steps '<a job as JSON>'      prints one line of JSON

A job has these fields:

- `side`: `longembed`, or `sentence-transformers` with its CachedMultipleNegativesRankingLoss;
- `model`: a folder that the side loads (sentence-transformers loads LongEmbed folders too);
- `texts`: a JSON file of two lists of token ids, the queries and their documents;
- `batch_tokens`: tokens whose activations are held at once (`mini_batch_num_tokens` of sentence-transformers);
- `temperature`: of InfoNCE;
- `threads`: CPU threads;
- `gradients`: a file for the gradients of the first step, after which the process ends; or null: steps are measured.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common.step_measurement import measure_calls
from modeling_longembed import LongEmbedModel

SHORT = 16  # tokens of the warm-up texts
Columns = list[list[list[int]]]  # queries and documents -> texts -> token ids


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job.

    Args:
        job: its fields are at the top of this file.

    Returns:
        `{"loss": ...}` if gradients were requested, otherwise what `measure_calls` returns.
    """
    torch.set_num_threads(job["threads"])
    model, encoder, gradient = SIDES[job["side"]](job)
    columns = json.loads(Path(job["texts"]).read_text())
    if job["gradients"]:
        loss = gradient(columns)
        save_file({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}, job["gradients"])
        return {"loss": loss}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(columns: Columns) -> None:
        gradient(columns)
        optimizer.step()
        optimizer.zero_grad()

    step([[text[:SHORT] for text in column] for column in columns])
    return measure_calls(lambda: step(columns), cuda=False)


# Each side imports its libraries itself, so that those of the other do not count in its memory.


def longembed_side(job: dict[str, Any]) -> tuple[nn.Module, nn.Module, Callable[[Columns], float]]:
    """Return our model, its encoder, and a function that adds gradients to the parameters and returns the loss."""
    from training.data.packing import pack
    from training.engine.gradient_cache import cached_backward
    from training.objectives.embed import embed
    from training.objectives.losses.contrastive import info_nce

    model = LongEmbedModel.from_pretrained(job["model"]).train()

    def gradient(columns: Columns) -> float:
        def loss(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value, metrics = info_nce(*embeddings.chunk(2), temperature=job["temperature"])
            return value, metrics | {"loss": value.detach()}

        chunks = pack([text for column in columns for text in column], job["batch_tokens"])
        return cached_backward(model, chunks, lambda chunk: embed(model, chunk), loss)["loss"].item()

    return model, model, gradient


def published_side(job: dict[str, Any]) -> tuple[nn.Module, nn.Module, Callable[[Columns], float]]:
    """Return the same of sentence-transformers; as its trainer does, it pads each column to its longest text."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(job["model"], device="cpu").train()
    loss = CachedMultipleNegativesRankingLoss(
        model, scale=1 / job["temperature"], mini_batch_num_tokens=job["batch_tokens"]
    )

    def gradient(columns: Columns) -> float:
        value = loss([padded(column) for column in columns], torch.empty(0))
        value.backward()
        return value.item()

    encoder: Any = model[0].model
    return model, encoder, gradient


SIDES = {"longembed": longembed_side, "sentence-transformers": published_side}


def padded(column: list[list[int]]) -> dict[str, Tensor]:
    """Return the token ids and the attention mask of a column, both `(n, longest)`, as a tokenizer does."""
    rows = [torch.tensor(text) for text in column]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
