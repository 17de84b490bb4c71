"""Momentum contrast (MoCo): the momentum encoder, and the objective that compares queries with its earlier keys."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from training.data.packing import PackedTexts
from training.data.pairs.batches import PairBatch
from training.data.sources import Columns
from training.engine.chunks import parts_of_batch
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.blocks import GatheredBatch, Metrics, in_blocks
from training.objectives.contrastive.objective import Objective
from training.objectives.embed import pool
from training.objectives.losses.momentum import MomentumQueue, exponential_moving_average, momentum_contrast


class MomentumEncoder(nn.Module):
    """An exponential moving average of an encoder's weights (He et al. 2020, arXiv:1911.05722, equation 2).

    It holds averages of the trainable parameters only, as buffers: they get no gradient, and a checkpoint stores them.
    Everything else, the architecture and the frozen weights (the base of a LoRA model), is the encoder's own.

    Args:
        encoder: its parameters that require a gradient are averaged.
        momentum: share of the average that is kept at an update.
    """

    def __init__(self, encoder: nn.Module, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.names = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
        for name in self.names:
            # The name of a buffer must not contain dots.
            self.register_buffer(name.replace(".", "/"), encoder.get_parameter(name).detach().clone())

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged weights by their names in the encoder."""
        return {name: self.get_buffer(name.replace(".", "/")) for name in self.names}

    def update(self, encoder: nn.Module) -> None:
        """Move the average one step towards the encoder's weights."""
        encoder = _unwrapped(encoder)
        source = [encoder.get_parameter(name) for name in self.names]
        exponential_moving_average(self.weights().values(), source, self.momentum)

    @torch.no_grad()
    def forward(self, encoder: nn.Module, chunks: Sequence[PackedTexts]) -> Tensor:
        """Embed packed texts with the averaged weights.

        Args:
            encoder: the encoder in training; dropout is applied if it is in training mode.
            chunks: packed texts.

        Returns:
            Unit vectors `(n, d)` without gradient.
        """
        encoder, weights = _unwrapped(encoder), self.weights()
        with parts_of_batch(encoder, len(chunks)):
            rows = [pool(lambda **inputs: functional_call(encoder, weights, (), inputs), chunk) for chunk in chunks]
        return F.normalize(torch.cat(rows), dim=-1)


class MomentumContrast(Objective):
    """MoCo as in Contriever (Izacard et al. 2022, arXiv:2112.09118, section 3.2): find the own key in a queue.

    The encoder in training embeds the anchors only. The momentum encoder embeds the positives, which then enter the
    queue that all processes share. The momentum encoder is updated before each batch, as in Contriever's code.
    """

    columns = Columns(("anchor", "positive"), None, "pairs")

    def __init__(self, arguments: ObjectiveArguments, model: nn.Module) -> None:
        super().__init__(arguments, model)
        self.momentum_encoder = MomentumEncoder(model, arguments.momentum)
        self.queue = MomentumQueue(arguments.queue_size, self.width)

    def trained_chunks(self, batch: PairBatch) -> list[PackedTexts]:
        """Return the anchors: the momentum encoder embeds the positives without a gradient."""
        return batch.column_chunks(0)

    def keys(self, encoder: nn.Module, batch: PairBatch) -> Tensor:
        """Update the momentum encoder in training mode, and return its unit vectors of the positives, `(n, d)`."""
        if self.training:
            self.momentum_encoder.update(encoder)
        return self.momentum_encoder(encoder, batch.column_chunks(1))

    def remember(self, key: Tensor, key_id: Tensor) -> None:
        """Put the gathered keys into the queue, in training mode only."""
        if self.training:
            self.queue.enqueue(key, key_id)

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        """Compute the loss of this process's queries against their keys and the queue."""
        keys, key_ids = self.queue.filled()

        def loss(query: Tensor, key: Tensor, queue: Tensor, rows: slice) -> tuple[Tensor, Metrics]:
            return momentum_contrast(
                query,
                key,
                queue,
                temperature=self.temperature(),
                key_id=batch.text_ids[:, 1],
                queue_id=key_ids,
                rows=rows,
            )

        assert batch.key is not None
        query = F.normalize(batch.embeddings[:, 0], dim=-1)
        return self.over_dims(in_blocks(loss, batch.rows, len(query)), query, batch.key, keys)


def _unwrapped(encoder: nn.Module) -> nn.Module:
    """Return the encoder inside DDP's wrapper."""
    if isinstance(encoder, FSDPModule):
        raise UserError("--objective momentum: the weights of a sharded model are not at hand; launch with ddp.yaml")
    return encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
