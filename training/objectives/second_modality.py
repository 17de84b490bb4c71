"""Non-linguistic supervision: a second task on another modality's features, through the same encoder.

Jian et al. 2022 (arXiv:2209.09433): sentence encoders cluster better when they also learn to cluster images or sounds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.errors import UserError
from training.data.modality_features import FeatureBatch, FeatureBatches, FeatureSource, PackedFeatures, read_features
from training.data.packing import PackedTexts
from training.data.pair_batches import PairBatch
from training.engine.distributed import gather_rows, own_rows
from training.engine.gradient_cache import cached_backward
from training.engine.loop import AccumulateGradient, AnyModel, Batches, Loop, Stream, Training
from training.engine.optimizer import parameter_groups
from training.objectives.losses.supcon import sup_con


@dataclass
class FeatureArguments:
    """The second task."""

    feature_data: str | None = field(
        default=None,
        metadata={
            "help": "a second task through the same encoder: a .jsonl, .jsonl.gz or .parquet file or a folder of these "
            "with the columns features, a list of vectors of another modality, and label (Jian et al. 2022)"
        },
    )
    feature_weight: float = field(default=0.05, metadata={"help": "of the second task's loss; 0: none of it"})
    feature_temperature: float = field(default=0.07, metadata={"help": "similarities of features are divided by it"})
    per_device_feature_batch_size: int = field(
        default=48, metadata={"help": "rows of features of one process in a batch; each comes with one of its label"}
    )

    def __post_init__(self) -> None:
        if self.feature_weight < 0:
            raise UserError(f"--feature_weight {self.feature_weight}: must not be less than 0")
        for name in ("feature_temperature", "per_device_feature_batch_size"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0")


@dataclass(frozen=True)
class TwoTaskBatch:
    """One process's share of a batch of texts and of one of features."""

    texts: PairBatch
    features: FeatureBatch

    def to(self, device: torch.device) -> "TwoTaskBatch":
        return replace(self, texts=self.texts.to(device), features=self.features.to(device))

    @property
    def bookmark(self) -> dict[str, Any] | None:
        """Of a stream of texts, where the next batch begins."""
        return self.texts.bookmark

    def locate(self) -> str:
        """Where the texts come from."""
        return self.texts.locate()

    def largest_chunk(self) -> PackedTexts:
        """The texts that take the most memory at once; a chunk of features holds no more tokens than theirs may."""
        return self.texts.largest_chunk()


class TwoTaskBatches(Dataset):
    """Batches of texts, each with one of features; what an epoch is the texts say."""

    def __init__(self, texts: Batches[PairBatch], features: FeatureBatches) -> None:
        self.texts, self.features, self.batch_tokens = texts, features, texts.batch_tokens

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> TwoTaskBatch:
        texts: Any = self.texts[index]  # or a stream's `Refusal`, which raises where the batch goes to its device
        return TwoTaskBatch(texts, self.features[index])

    def describe(self) -> dict[str, Any]:
        """What a resumed run must agree in."""
        return self.texts.describe() | self.features.describe()

    def go_to(self, bookmark: dict[str, Any]) -> None:
        """Let a stream of texts go on from there."""
        assert isinstance(self.texts, Stream)  # which alone makes bookmarks
        self.texts.go_to(bookmark)

    def heaviest(self) -> TwoTaskBatch:
        """The batch that takes the most memory."""
        return TwoTaskBatch(self.texts.heaviest(), self.features.heaviest())


class FeatureTask(nn.Module):
    """SupCon over the labels of features that enter the encoder in place of word vectors.

        L = L_texts + weight L_features

    An adapter, linear after a layer norm without parameters, so that the unit of the features does not matter, makes a
    word vector of each feature vector; positions are added, the encoder's layers and its pooling follow as for a text.
    The positives of a row are those of its label: the proper SupCon, which the authors' paper states, not the variant
    that their code takes by default.

    Features come first in each step, as in the authors' code, which has an optimiser of its own for them. Here both
    gradients are one step of one optimiser: two AdamW on the same weights would decay them twice, and in one of its own
    the weight of a loss would hardly matter, as AdamW divides it out.

    Dropout draws from a generator of its own, so the texts see the masks that they would see without this task.
    """

    def __init__(self, arguments: FeatureArguments, source: FeatureSource, model: nn.Module) -> None:
        """Args:
        arguments: of the user.
        source: the features.
        model: the encoder.
        """
        super().__init__()
        config: Any = model.config
        self.arguments, self.source = arguments, source
        # Random numbers of its own: what is drawn later, for the texts, is drawn as without this task.
        self.adapter = nn.utils.skip_init(nn.Linear, source.width, config.hidden_size)
        generator = torch.Generator().manual_seed(0)
        nn.init.normal_(self.adapter.weight, std=config.initializer_range, generator=generator)
        nn.init.zeros_(self.adapter.bias)

    def batches(self, texts: Batches[PairBatch], loop: Loop) -> TwoTaskBatches:
        """Batches of both tasks."""
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
        """Vectors of rows of features as the model pools them, `(n, d)`, not normalised."""
        words = self.adapter(F.layer_norm(chunk.features, (self.source.width,)))
        return model(
            inputs_embeds=words, cu_seq_lens_q=chunk.cu_seq_lens_q, max_length_q=chunk.max_length_q
        ).pooler_output

    def accumulate_gradient(self, model: nn.Module, batch: FeatureBatch, scale: float) -> dict[str, Tensor]:
        """Add the gradient of the weighted loss; a later pass of the step makes DDP's all-reduce.

        Returns:
            `feature_loss`, without its weight.
        """

        def loss(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            unit, label = gather_rows(F.normalize(embeddings, dim=-1)), gather_rows(batch.label)
            rows = own_rows(len(embeddings))
            value, _ = sup_con(unit, label, temperature=self.arguments.feature_temperature, rows=rows)
            return self.arguments.feature_weight * scale * value, {"feature_loss": value.detach()}

        device = batch.label.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(batch.seed)
            return cached_backward(model, batch.chunks, lambda chunk: self.pool(model, chunk), loss, synchronize=False)

    def before(self, text_gradient: AccumulateGradient) -> AccumulateGradient:
        """The gradient of this task and then that of the texts."""

        def accumulate_gradient(
            model: nn.Module, batch: TwoTaskBatch, scale: float, synchronize: bool
        ) -> dict[str, Tensor]:
            metrics = self.accumulate_gradient(model, batch.features, scale)
            return text_gradient(model, batch.texts, scale, synchronize) | metrics

        return accumulate_gradient

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The optimiser groups of the adapter."""
        return parameter_groups(self, weight_decay)


def add_feature_task(
    training: Training[AnyModel, PairBatch], arguments: FeatureArguments, loop: Loop
) -> Training[AnyModel, Any]:
    """Add the second task to a training on texts, unless there is none or its weight is 0.

    Args:
        training: the training on texts alone.
        arguments: parsed command-line options.
        loop: of the run.

    Raises:
        UserError: the features cannot be read, or do not fit the model.
    """
    task = feature_task(arguments, training.model)
    if task is None:
        return training
    assert training.groups is not None
    return Training(
        model=training.model,
        batches=task.batches(training.batches, loop),
        gradient=task.before(training.gradient),
        evaluate=training.evaluate,
        groups=[*training.groups, *task.groups(loop.arguments.weight_decay)],
        auxiliary=nn.ModuleDict({"texts": training.auxiliary, "features": task}),
        settings=training.settings,
        tuning=training.tuning,
        length_option=training.length_option,
    )


def feature_task(arguments: FeatureArguments, model: nn.Module) -> FeatureTask | None:
    """The second task; None without it, or with a weight of 0.

    Args:
        arguments: of the user.
        model: the encoder, in which what trains is chosen already.

    Raises:
        UserError: the features cannot be read, or do not fit the model.
    """
    if arguments.feature_data is None or not arguments.feature_weight:
        return None
    config: Any = model.config
    return FeatureTask(arguments, read_features(arguments.feature_data, config.max_position_embeddings), model)
