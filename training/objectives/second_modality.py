"""Non-linguistic supervision: a second task, on features of another modality, through the same encoder.

Jian et al. 2022 (arXiv:2209.09433): sentence encoders cluster texts better if they also learn to cluster images or
sounds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.conditions import GIVEN, Not
from training.data.modality_features import FeatureBatch, FeatureBatches, FeatureSource, PackedFeatures, read_features
from training.data.packing import PackedTexts
from training.data.pairs.batches import PairBatch
from training.engine.gradient_cache import cached_backward
from training.engine.loop import Loop
from training.engine.optimizer import parameter_groups
from training.engine.processes.distributed import gather_rows, own_rows
from training.engine.training import AccumulateGradient, AnyModel, Batches, Stream, Training
from training.objectives.contrastive.blocks import Metrics
from training.objectives.losses.supcon import sup_con


@dataclass
class FeatureArguments:
    """The second task and its weight."""

    feature_data: str | None = field(
        default=None,
        metadata={
            "help": "data of a second task through the same encoder (Jian et al. 2022): a .jsonl, .jsonl.gz or "
            ".parquet file, or a folder of these, with the columns features, a list of vectors of another modality, "
            "and label"
        },
    )
    feature_weight: float = field(
        default=0.05,
        metadata={
            "help": "weight of the second task's loss; 0: no second task",
            "within": "[0, inf)",
            "applies": {"feature_data": GIVEN},
        },
    )
    feature_temperature: float = field(
        default=0.07,
        metadata={
            "help": "similarities of the second task are divided by the temperature",
            "within": "(0, inf)",
            "applies": {"feature_data": GIVEN, "feature_weight": Not(0.0)},
        },
    )
    per_device_feature_batch_size: int = field(
        default=48,
        metadata={
            "help": "number of rows of features of a batch on each process; each is paired with another of its label",
            "within": "[1, inf)",
            "applies": {"feature_data": GIVEN, "feature_weight": Not(0.0)},
        },
    )


@dataclass(frozen=True)
class TwoTaskBatch:
    """One process's share of a batch of texts and of a batch of features."""

    texts: PairBatch
    features: FeatureBatch

    def to(self, device: torch.device) -> "TwoTaskBatch":
        """Move the tensors to a device."""
        return replace(self, texts=self.texts.to(device), features=self.features.to(device))

    @property
    def bookmark(self) -> dict[str, Any] | None:
        """The place in a stream of texts where the next batch begins; None for data that is not streamed."""
        return self.texts.bookmark

    def locate(self) -> str:
        """Return the source and the rows of the texts, for error messages."""
        return self.texts.locate()

    def largest_chunk(self) -> PackedTexts:
        """Return the texts that need the most memory at once; a chunk of features has no more tokens than they may."""
        return self.texts.largest_chunk()


class TwoTaskBatches(Dataset):
    """Batches of texts, each with a batch of features; the texts determine the length of an epoch."""

    def __init__(self, texts: Batches[PairBatch], features: FeatureBatches) -> None:
        self.texts, self.features, self.batch_tokens = texts, features, texts.batch_tokens

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> TwoTaskBatch:
        texts: Any = self.texts[index]  # or a stream's `Refusal`, which raises when the batch is moved to its device
        return TwoTaskBatch(texts, self.features[index])

    def describe(self) -> dict[str, Any]:
        """Return what options of both stand for, by option."""
        return self.texts.describe() | self.features.describe()

    def go_to(self, bookmark: dict[str, Any]) -> None:
        """Continue a stream of texts at a bookmark."""
        assert isinstance(self.texts, Stream)  # only streams make bookmarks
        self.texts.go_to(bookmark)

    def heaviest(self) -> TwoTaskBatch:
        """Return a batch that needs as much memory as any."""
        return TwoTaskBatch(self.texts.heaviest(), self.features.heaviest())


class FeatureTask(nn.Module):
    """SupCon over the labels of features that enter the encoder in place of word embeddings.

        L = L_texts + weight L_features

    A trained adapter, a linear layer behind a layer norm without parameters (so that the unit of the features does not
    matter), maps each feature vector to the width of a word embedding. Positions are added, and the encoder's layers
    and pooling follow as for a text. Rows with the same label are positives of each other: this is the SupCon loss that
    the paper states, and not the variant that the authors' code runs by default.

    As in the authors' code, each step computes the features first. The authors give the two tasks an optimiser each;
    here both gradients enter one step of one optimiser. Two AdamW optimisers would decay the shared weights twice, and
    the weight of a loss would hardly matter in an optimiser of its own, because AdamW divides it out.

    Dropout draws from its own random generator, so the texts get the dropout masks that they would get without this
    task.

    Args:
        arguments: parsed command-line options.
        source: the features and their labels.
        model: the encoder.
    """

    def __init__(self, arguments: FeatureArguments, source: FeatureSource, model: nn.Module) -> None:
        super().__init__()
        config: Any = model.config
        self.arguments, self.source = arguments, source
        # Initialised from its own generator: random numbers drawn later, for the texts, are those of a run without it.
        self.adapter = nn.utils.skip_init(nn.Linear, source.width, config.hidden_size)
        generator = torch.Generator().manual_seed(0)
        nn.init.normal_(self.adapter.weight, std=config.initializer_range, generator=generator)
        nn.init.zeros_(self.adapter.bias)

    def batches(self, texts: Batches[PairBatch], loop: Loop) -> TwoTaskBatches:
        """Pair the batches of texts with batches of features."""
        features = FeatureBatches(
            self.source,
            batch_size=self.arguments.per_device_feature_batch_size,
            batch_tokens=texts.batch_tokens,
            seed=loop.arguments.seed,
            rank=loop.accelerator.process_index,
            world_size=loop.accelerator.num_processes,
        )
        return TwoTaskBatches(texts, features)

    def pool(self, model: Callable[..., Any], chunk: PackedFeatures) -> Tensor:
        """Return the model's pooled vectors of n rows of features, `(n, d)`, not normalised."""
        word_embeddings = self.adapter(F.layer_norm(chunk.features, (self.source.width,)))
        return model(
            inputs_embeds=word_embeddings, cu_seq_lens_q=chunk.cu_seq_lens_q, max_length_q=chunk.max_length_q
        ).pooler_output

    def accumulate_gradient(self, model: nn.Module, batch: FeatureBatch, scale: float) -> Metrics:
        """Add the gradient of the weighted loss; DDP reduces gradients in a later pass of the same step.

        Args:
            model: the encoder, wrapped by DDP in a distributed run.
            batch: this process's rows of features.
            scale: factor of the loss, for gradient accumulation.

        Returns:
            `feature_loss`, without its weight.
        """

        def loss(embeddings: Tensor) -> tuple[Tensor, Metrics]:
            unit, label = gather_rows(F.normalize(embeddings, dim=-1)), gather_rows(batch.label)
            rows = own_rows(len(embeddings))
            value, _ = sup_con(unit, label, temperature=self.arguments.feature_temperature, rows=rows)
            return self.arguments.feature_weight * scale * value, {"feature_loss": value.detach()}

        device = batch.label.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(batch.seed)
            return cached_backward(model, batch.chunks, lambda chunk: self.pool(model, chunk), loss, synchronize=False)

    def before(self, text_gradient: AccumulateGradient) -> AccumulateGradient:
        """Build the gradient of both tasks: that of the features first, then that of the texts."""

        def accumulate_gradient(model: nn.Module, batch: TwoTaskBatch, scale: float, synchronize: bool) -> Metrics:
            metrics = self.accumulate_gradient(model, batch.features, scale)
            return text_gradient(model, batch.texts, scale, synchronize) | metrics

        return accumulate_gradient

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups of the adapter."""
        return parameter_groups(self, weight_decay)


def add_feature_task(
    training: Training[AnyModel, PairBatch], arguments: FeatureArguments, loop: Loop
) -> Training[AnyModel, Any]:
    """Add the second task to a training on texts.

    Args:
        training: the training on texts alone.
        arguments: parsed command-line options.
        loop: the training loop; its seed, processes and weight decay are used.

    Returns:
        The training on both; `training` itself without `--feature_data`, or at a weight of 0.

    Raises:
        UserError: the features cannot be read, or are longer than the model's context.
    """
    task = feature_task(arguments, training.model)
    if task is None:
        return training
    assert training.groups is not None
    changes: dict[str, Any] = {
        "batches": task.batches(training.batches, loop),
        "gradient": task.before(training.gradient),
        "groups": [*training.groups, *task.groups(loop.arguments.weight_decay)],
        "auxiliary": nn.ModuleDict({"texts": training.auxiliary, "features": task}),
    }
    return replace(training, **changes)


def feature_task(arguments: FeatureArguments, model: nn.Module) -> FeatureTask | None:
    """Build the second task of `--feature_data`.

    Args:
        arguments: parsed command-line options.
        model: the encoder; its trainable parameters have been selected already.

    Returns:
        The task; None without `--feature_data`, or at a weight of 0.

    Raises:
        UserError: the features cannot be read, or are longer than the model's context.
    """
    if arguments.feature_data is None or not arguments.feature_weight:
        return None
    config: Any = model.config
    return FeatureTask(arguments, read_features(arguments.feature_data, config.max_position_embeddings), model)
