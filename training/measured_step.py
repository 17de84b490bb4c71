"""One measurement of a contrastive step, in a process of its own, which eval/throughput.py --training starts.

    python -m training.measured_step '<a job as JSON>'      prints one line of JSON

The job: `model`, a folder of ours; `texts`, a JSON file of two lists of token ids, queries and their documents;
`batch_tokens`; `temperature`; `threads`; and `gradients`, a file for loss and gradients of the first step, after which
the process ends, or null: then steps of AdamW are measured (common/step_measurement.py says what).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.step_measurement import measure_calls
from modeling_longembed import LongEmbedModel
from training.batches import pack
from training.encoding import embed
from training.gradient_cache import cached_backward
from training.losses.contrastive import info_nce

SHORT = 16  # tokens of the texts that warm up


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """What a job asks for: `seconds`, `peak`, `base` and `pid` of a step, or `loss` alone and a file of gradients."""
    torch.set_num_threads(job["threads"])
    model = LongEmbedModel.from_pretrained(job["model"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    columns = json.loads(Path(job["texts"]).read_text())

    def gradient(columns: list[list[list[int]]]) -> float:
        def loss(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value, metrics = info_nce(*embeddings.chunk(2), temperature=job["temperature"])
            return value, metrics | {"loss": value.detach()}

        chunks = pack([text for column in columns for text in column], job["batch_tokens"])
        return cached_backward(model, chunks, lambda chunk: embed(model, chunk), loss)["loss"].item()

    def step(columns: list[list[list[int]]]) -> None:
        gradient(columns)
        optimizer.step()
        optimizer.zero_grad()

    if job["gradients"]:
        value = gradient(columns)
        save_file({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, job["gradients"])
        return {"loss": value}
    step([[text[:SHORT] for text in column] for column in columns])
    return measure_calls(lambda: step(columns), cuda=False)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
