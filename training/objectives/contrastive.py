"""The objectives of contrastive training: what is asked of embeddings, and what trains beside the encoder.

An objective takes embeddings, not texts: gathering them over processes and caching their gradient are around it
(training/objectives/pair_step.py), the formulas are pure functions (training/objectives/losses/). What it
owns, a temperature, a projection head, a queue, is in the checkpoints of a run and never in the model that is saved.
"""

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from training.data.packing import PackedTexts
from training.data.pair_batches import PairBatch
from training.data.sources import PAIRS, Columns
from training.engine.optimizer import parameter_groups
from training.objectives.heads import ProjectionHead
from training.objectives.losses.contrastive import info_nce
from training.objectives.losses.matryoshka import matryoshka
from training.objectives.losses.momentum import MomentumQueue, momentum_contrast
from training.objectives.losses.regularizers import debias, spread_out
from training.objectives.losses.simclr import nt_xent
from training.objectives.losses.supcon import sup_con
from training.objectives.losses.vicreg import vicreg
from training.objectives.momentum_encoder import MomentumEncoder

Metrics = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Metrics]]
GROUP = "group"  # the column of the debiasing term
ROWS_AT_ONCE = 512  # of the scores that a loss takes: beside 4,096 pairs with a negative each 17 MB


@dataclass
class ObjectiveArguments:
    """What is asked of the embeddings; docs/training.md says which objective takes which option."""

    objective: Literal["info_nce", "simcse", "nt_xent", "sup_con", "vicreg", "momentum"] = field(
        default="info_nce",
        metadata={
            "help": "info_nce: find the positive among all documents of the batch; simcse: the same with the anchor "
            "alone, under two dropout masks; nt_xent: among all texts of the batch, behind a projection head (SimCLR); "
            "sup_con: all of one label together; vicreg: agree, vary, do not repeat, behind an expander; momentum: "
            "among the keys of a queue (MoCo, Contriever)"
        },
    )
    temperature: float | None = field(
        default=None, metadata={"help": "similarities are divided by it; 0.05, nt_xent 0.1, sup_con 0.07 if not given"}
    )
    learnable_temperature: bool = field(default=False, metadata={"help": "the temperature trains, from there on"})
    symmetric: bool = field(default=False, metadata={"help": "also find the query of a document"})
    negative_weight: float = field(
        default=0.0,
        metadata={"help": "added to the scores of a own negatives, the log of how often they count; =-inf: never"},
    )
    guide_model: str | None = field(
        default=None,
        metadata={"help": "a model that tells false negatives: what it finds nearer than the positive is no negative"},
    )
    false_negative_margin: float | None = field(
        default=None,
        metadata={
            "help": "how much nearer than the positive a false negative is, in cosines, by --guide_model (0 if not "
            "given), or without one by the model that trains (not at all if not given)"
        },
    )
    false_negative_relative: bool = field(
        default=False, metadata={"help": "that margin is a share of the positive's own cosine"}
    )
    head_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "widths of the layers of the projection head of nt_xent (the model's and 128 if not given) or the "
            "expander of vicreg (8192 8192 8192); 0: none"
        },
    )
    vicreg_invariance_weight: float = field(default=25.0, metadata={"help": "of the two views' distance"})
    vicreg_variance_weight: float = field(default=25.0, metadata={"help": "of what variance falls short of 1"})
    vicreg_covariance_weight: float = field(default=1.0, metadata={"help": "of the covariance of dimensions"})
    queue_size: int = field(default=131072, metadata={"help": "keys that momentum compares with"})
    momentum: float = field(default=0.9995, metadata={"help": "share of the momentum encoder that stays at each batch"})
    matryoshka_dims: list[int] = field(
        default_factory=list, metadata={"help": "first dimensions that are to be embeddings of their own: 384 256 128"}
    )
    matryoshka_weights: list[float] = field(
        default_factory=list, metadata={"help": "of the losses at these dimensions; 1 each if not given"}
    )
    spread_out_weight: float = field(
        default=0.0, metadata={"help": "of the term that spreads embeddings over the sphere"}
    )
    debias_weight: float = field(
        default=0.0, metadata={"help": f"of the term that hides the column {GROUP!r} from a linear probe"}
    )
    objective_learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate of a temperature or a head; --learning_rate if not given"}
    )

    def __post_init__(self) -> None:
        for name in ("temperature", "queue_size", "objective_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name} {value}: must be more than 0")
        if not 0 <= self.momentum <= 1:
            raise UserError(f"--momentum {self.momentum}: must be from 0 to 1")
        for name in ("spread_out_weight", "debias_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be less than 0")
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka_dims):
            raise UserError(
                f"--matryoshka_weights: {len(self.matryoshka_weights)} weights for {len(self.matryoshka_dims)} "
                "--matryoshka_dims; give one each"
            )
        if self.false_negative_relative and self.guide_model is None and self.false_negative_margin is None:
            raise UserError("--false_negative_relative: give --guide_model or --false_negative_margin as well")
        taken = OBJECTIVES[self.objective].options
        for option in fields(self):
            if option.name in OWN_OPTIONS - taken and getattr(self, option.name) != _default(option):
                others = [name for name, objective in OBJECTIVES.items() if option.name in objective.options]
                raise UserError(
                    f"--{option.name}: --objective {self.objective} does not take it, but {' and '.join(others)}"
                )

    @property
    def columns(self) -> Columns:
        """Which columns of the data the objective reads."""
        columns = OBJECTIVES[self.objective].columns
        classes = (*columns.classes, GROUP) if self.debias_weight else columns.classes
        return Columns(columns.required, columns.prefix, columns.rows, classes)


def _default(option: Any) -> Any:
    return option.default_factory() if option.default is MISSING else option.default


@dataclass(frozen=True)
class GatheredBatch:
    """A batch of N rows, of all processes, in the order of the processes.

    Args:
        embeddings: `(N, columns, d)`, as the model pools them, not normalised; with the gradient of every process.
        text_ids: `(N, columns of texts)`, equal where the texts are equal.
        rows: those of this process.
        classes: for each class column `(N,)`, equal where the classes are equal.
        guide: `(N, columns, g)`, unit vectors of the same texts by another model.
        key: `(N, d)`, unit vectors of the second column by the momentum encoder.
    """

    embeddings: Tensor
    text_ids: Tensor
    rows: slice
    classes: dict[str, Tensor] = field(default_factory=dict)
    guide: Tensor | None = None
    key: Tensor | None = None


class Objective(nn.Module):
    """A loss of embeddings, with the parameters and buffers that it needs.

    All processes compute it of the same gathered rows, each averaging over its own, or the whole where it is a
    statistic of the batch. Either way the mean of the processes' gradients is that of one process that has the whole
    batch: for the encoder because the backward pass of the gather sums over the processes and DDP takes the mean, for
    what the objective owns because the loop takes the mean (`average_gradients`).

    In evaluation mode it computes the same loss but remembers nothing.

    Attributes:
        columns: which columns of the data it reads.
        options: which of `ObjectiveArguments` are its own, beside those that all take.
        default_temperature: that of the paper.
        smallest_batch: fewer rows leave it nothing to compare.
    """

    columns: ClassVar[Columns] = PAIRS
    options: ClassVar[frozenset[str]] = frozenset()
    default_temperature: ClassVar[float] = 0.05
    smallest_batch: ClassVar[int] = 1

    def __init__(self, arguments: ObjectiveArguments, model: nn.Module) -> None:
        """Args:
        arguments: of the user.
        model: the encoder, in which what trains is chosen already.

        Raises:
            UserError: dimensions that the model does not have, or a model that the objective cannot train.
        """
        super().__init__()
        self.arguments = arguments
        config: Any = model.config
        self.width: int = config.hidden_size
        wrong = [dim for dim in arguments.matryoshka_dims if not 0 < dim <= self.width]
        if wrong:
            raise UserError(f"--matryoshka_dims {wrong[0]}: must be from 1 to {self.width}, the width of the model")
        temperature = arguments.temperature or self.default_temperature
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if arguments.learnable_temperature else None
        self.fixed_temperature = temperature

    def temperature(self) -> float | Tensor:
        """By which similarities are divided; a tensor if it trains.

        What trains is log(1 / t) (CLIP, Radford et al. 2021, arXiv:2103.00020, section 2.4; cpt, Neelakantan et al.
        2022, arXiv:2201.10005).
        """
        return self.fixed_temperature if self.log_scale is None else (-self.log_scale).exp()

    def trained_chunks(self, batch: PairBatch) -> list[PackedTexts]:
        """The texts that the encoder embeds with a gradient: the first columns, or all."""
        return batch.chunks

    def keys(self, encoder: nn.Module, batch: PairBatch) -> Tensor | None:
        """Vectors of a momentum encoder, if there is one, of this process's rows, `(n, d)`."""
        return None

    def remember(self, key: Tensor, key_id: Tensor) -> None:
        """Keep the gathered keys of a batch, after its backward pass, for later ones."""

    def forward(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        """The loss of a batch and what is reported of it: detached scalars, `loss` without the auxiliary terms."""
        if self.log_scale is not None and self.training:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(100.0))  # as in CLIP: beyond it training becomes unstable
        loss, metrics = self.loss(batch)
        metrics |= {"loss": loss.detach()}
        if self.log_scale is not None:
            metrics |= {"temperature": torch.as_tensor(self.temperature()).detach()}
        unit = F.normalize(batch.embeddings[:, :2], dim=-1)
        if self.arguments.spread_out_weight:
            terms = [spread_out(column)[0] for column in unit.unbind(1)]
            term = torch.stack(terms).mean()
            loss, metrics = loss + self.arguments.spread_out_weight * term, metrics | {"spread_out": term.detach()}
        if self.arguments.debias_weight:
            term, measures = debias(unit[:, -1], batch.classes[GROUP])
            loss = loss + self.arguments.debias_weight * term
            metrics |= measures | {"debias": term.detach()}
        return loss, metrics

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        """The objective itself."""
        raise NotImplementedError

    def over_dims(self, loss: Loss, *embeddings: Tensor, normalize: bool = True) -> tuple[Tensor, Metrics]:
        """`loss` of the embeddings, or under `--matryoshka_dims` the sum over their first dimensions."""
        dims, weights = self.arguments.matryoshka_dims, self.arguments.matryoshka_weights
        return (matryoshka(loss, dims, weights or None, normalize) if dims else loss)(*embeddings)


class InfoNCE(Objective):
    """Find the positive among all positives and hard negatives of the batch."""

    options = frozenset(
        (
            *("temperature", "learnable_temperature", "symmetric", "negative_weight"),
            *("guide_model", "false_negative_margin", "false_negative_relative"),
        )
    )

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        arguments, count = self.arguments, len(batch.embeddings)
        query_id, positive_id, negative_id = _pair_columns(batch.text_ids)
        margin = arguments.false_negative_margin

        def loss(*columns: Tensor, rows: slice) -> tuple[Tensor, Metrics]:
            guide = None
            if batch.guide is not None:
                guide = _pair_columns(batch.guide)
            elif margin is not None:
                guide = (columns[0], columns[1], columns[2] if columns[2:] else None)
            return info_nce(
                *columns,
                temperature=self.temperature(),
                symmetric=arguments.symmetric,
                negative_weight=arguments.negative_weight,
                negative_row=None if negative_id is None else _row_of(negative_id, count),
                query_id=query_id,
                positive_id=positive_id,
                negative_id=negative_id,
                guide=guide,
                guide_margin=-(margin or 0.0),
                guide_relative=arguments.false_negative_relative,
                rows=rows,
            )

        columns = _pair_columns(F.normalize(batch.embeddings, dim=-1))
        return self.over_dims(in_blocks(loss, batch.rows, count), *(column for column in columns if column is not None))


class SimCSE(InfoNCE):
    """Unsupervised SimCSE (Gao et al. 2021, arXiv:2104.08821, equation 4): the positive is the text itself.

    Both are embedded in one pass, under masks of their own.
    """

    columns = Columns(("anchor",), None, "texts")
    options = InfoNCE.options - {"negative_weight"}

    def __init__(self, arguments: ObjectiveArguments, model: nn.Module) -> None:
        super().__init__(arguments, model)
        config: Any = model.config
        if not (config.hidden_dropout_prob or config.attention_dropout):
            raise UserError(
                "--objective simcse: this model has no dropout, so that a text and its twin are one vector and there "
                "is nothing to learn; give --dropout 0.1"
            )


class NTXent(Objective):
    """SimCLR: find the other view among all texts of the batch, behind a projection head."""

    columns = Columns(("anchor", "positive"), None, "pairs")
    options = frozenset(("temperature", "learnable_temperature", "head_dims"))
    default_temperature = 0.1
    smallest_batch = 2

    def __init__(self, arguments: ObjectiveArguments, model: nn.Module) -> None:
        super().__init__(arguments, model)
        self.head = _head(arguments.head_dims or [self.width, 128], self.width)

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        def loss_of_rows(first: Tensor, second: Tensor, rows: slice) -> tuple[Tensor, Metrics]:
            return nt_xent(first, second, temperature=self.temperature(), rows=rows)

        def loss(views: Tensor) -> tuple[Tensor, Metrics]:
            # Both views through the head at once: the batch norm of SimCLR is over all of them.
            first, second = F.normalize(self.head(views), dim=-1).chunk(2)
            return in_blocks(loss_of_rows, batch.rows, len(first))(first, second)

        return self.over_dims(loss, torch.cat([*batch.embeddings[:, :2].unbind(1)]), normalize=False)


class SupCon(Objective):
    """All texts of one label are positives of each other; a row may have further texts in columns `positive...`."""

    columns = Columns(("anchor",), "positive", "labelled texts", classes=("label",))
    options = frozenset(("temperature", "learnable_temperature"))
    default_temperature = 0.07
    smallest_batch = 2

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        views = batch.embeddings.shape[1]
        label = batch.classes["label"].repeat_interleave(views)
        rows = slice(*(views * end for end in batch.rows.indices(len(batch.embeddings))[:2]))

        def loss(embeddings: Tensor, rows: slice) -> tuple[Tensor, Metrics]:
            return sup_con(embeddings, label, temperature=self.temperature(), rows=rows)

        return self.over_dims(in_blocks(loss, rows, len(label)), F.normalize(batch.embeddings, dim=-1).flatten(0, 1))


class VICReg(Objective):
    """The views agree, every dimension varies, no two dimensions tell the same; behind an expander."""

    columns = NTXent.columns
    options = frozenset(("head_dims", "vicreg_invariance_weight", "vicreg_variance_weight", "vicreg_covariance_weight"))
    smallest_batch = 2

    def __init__(self, arguments: ObjectiveArguments, model: nn.Module) -> None:
        super().__init__(arguments, model)
        self.head = _head(arguments.head_dims or [8192, 8192, 8192], self.width)

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
        def loss(first: Tensor, second: Tensor) -> tuple[Tensor, Metrics]:
            return vicreg(
                self.head(first),
                self.head(second),
                invariance_weight=self.arguments.vicreg_invariance_weight,
                variance_weight=self.arguments.vicreg_variance_weight,
                covariance_weight=self.arguments.vicreg_covariance_weight,
            )

        return self.over_dims(loss, *batch.embeddings[:, :2].unbind(1), normalize=False)


class MomentumContrast(Objective):
    """MoCo, as in Contriever (Izacard et al. 2022, arXiv:2112.09118, section 3.2): find the own key among those of a
    queue.

    The encoder that trains embeds the anchors alone, the momentum encoder the positives, which then enter the queue of
    all processes. The momentum encoder follows before each batch, as in Contriever's code.
    """

    columns = NTXent.columns
    options = frozenset(("temperature", "learnable_temperature", "queue_size", "momentum"))

    def __init__(self, arguments: ObjectiveArguments, model: nn.Module) -> None:
        super().__init__(arguments, model)
        self.momentum_encoder = MomentumEncoder(model, arguments.momentum)
        self.queue = MomentumQueue(arguments.queue_size, self.width)

    def trained_chunks(self, batch: PairBatch) -> list[PackedTexts]:
        return batch.column_chunks(0)

    def keys(self, encoder: nn.Module, batch: PairBatch) -> Tensor:
        if self.training:
            self.momentum_encoder.update(encoder)
        return self.momentum_encoder(encoder, batch.column_chunks(1))

    def remember(self, key: Tensor, key_id: Tensor) -> None:
        if self.training:
            self.queue.enqueue(key, key_id)

    def loss(self, batch: GatheredBatch) -> tuple[Tensor, Metrics]:
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


OBJECTIVES: dict[str, type[Objective]] = {
    "info_nce": InfoNCE,
    "simcse": SimCSE,
    "nt_xent": NTXent,
    "sup_con": SupCon,
    "vicreg": VICReg,
    "momentum": MomentumContrast,
}
OWN_OPTIONS = frozenset().union(*(objective.options for objective in OBJECTIVES.values()))


def in_blocks(loss: Loss, rows: slice, count: int) -> Loss:
    """A loss that is a mean over rows, as a function of embeddings alone, `ROWS_AT_ONCE` rows at a time.

    The scores of a block are dropped and computed again in the backward pass, so that memory grows with the number of
    rows, not with its square.

    Args:
        loss: of embeddings and of `rows`, a slice.
        rows: those that it is averaged over.
        count: of all rows.
    """
    start, stop, _ = rows.indices(count)
    blocks = [slice(first, min(first + ROWS_AT_ONCE, stop)) for first in range(start, stop, ROWS_AT_ONCE)]

    def mean_over_blocks(*embeddings: Tensor) -> tuple[Tensor, Metrics]:
        if len(blocks) == 1:
            return loss(*embeddings, rows=rows)
        total, means = embeddings[0].new_zeros(()), dict[str, Tensor]()
        for block in blocks:
            value, metrics = checkpoint(loss, *embeddings, rows=block, use_reentrant=False, preserve_rng_state=False)
            share = (block.stop - block.start) / (stop - start)
            total = total + share * value
            means = {name: means.get(name, 0.0) + share * metric for name, metric in metrics.items()}
        return total, means

    return mean_over_blocks


def build_objective(arguments: ObjectiveArguments, encoder: nn.Module, rows: int) -> Objective:
    """The objective that was asked for.

    Args:
        arguments: of the user.
        encoder: in which what trains is chosen already.
        rows: of a batch, over all processes.

    Raises:
        UserError: it cannot train this encoder, or compare so few rows.
    """
    objective = OBJECTIVES[arguments.objective](arguments, encoder)
    if rows < objective.smallest_batch:
        raise UserError(
            f"--objective {arguments.objective}: compares the rows of a batch, which has {rows}; give a larger "
            "--per_device_train_batch_size"
        )
    return objective


def objective_groups(objective: Objective, weight_decay: float) -> list[dict[str, Any]]:
    """The optimiser groups of what an objective owns."""
    groups = parameter_groups(objective, weight_decay)
    learning_rate = objective.arguments.objective_learning_rate
    return groups if learning_rate is None else [group | {"lr": learning_rate} for group in groups]


def _head(dims: list[int], width: int) -> nn.Module:
    if dims == [0]:
        return nn.Identity()
    if min(dims) < 1:
        raise UserError(f"--head_dims {' '.join(map(str, dims))}: each must be at least 1, or 0 alone for no head")
    return ProjectionHead(width, dims)


def _pair_columns(rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query, positive and negatives of `(N, columns, ...)`; the negatives one column after the other, or None."""
    negatives = rows[:, 2:].transpose(0, 1).flatten(0, 1)
    return rows[:, 0], rows[:, 1], negatives if len(negatives) else None


def _row_of(negatives: Tensor, rows: int) -> Tensor:
    """The row that each of the negatives of `_pair_columns` belongs to."""
    return torch.arange(len(negatives), device=negatives.device) % rows
