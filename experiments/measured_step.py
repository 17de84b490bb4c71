"""One measurement of a contrastive step, in a process of its own, which eval/throughput.py --training starts.

    python -m experiments.measured_step '<a job as JSON>'      prints one line of JSON

The job: `model`, a folder of ours; `batch_tokens`; `temperature`; `threads`; and what `measure_step` takes.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor

from common.step_measurement import measure_step
from modeling_longembed import LongEmbedModel
from training.data.packing import pack
from training.engine.gradient_cache import cached_backward
from training.objectives.embed import embed
from training.objectives.losses.contrastive import info_nce


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """What a job asks for: a step measured, or its loss and gradients alone."""
    torch.set_num_threads(job["threads"])
    model = LongEmbedModel.from_pretrained(job["model"]).train()

    def gradient(columns: list[list[list[int]]]) -> float:
        def loss(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value, metrics = info_nce(*embeddings.chunk(2), temperature=job["temperature"])
            return value, metrics | {"loss": value.detach()}

        chunks = pack([text for column in columns for text in column], job["batch_tokens"])
        return cached_backward(model, chunks, lambda chunk: embed(model, chunk), loss)["loss"].item()

    return measure_step(job, model, gradient, model)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
