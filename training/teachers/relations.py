"""Self-attention distillation of packed documents: the student under training, its teacher, objective, evaluation."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from common.errors import UserError
from training.data.masked_batches import MaskedBatch, Pieces, SpecialTokens
from training.data.packing import PackedTexts, pack
from training.engine.distributed import mean_over_processes, own_share, passes_together, synchronizing, world_size
from training.engine.loop import AccumulateGradient
from training.objectives.losses.relations import attention_kl, relation_heads, relation_kl
from training.teachers.projections import Projections, ProjectionTap


@dataclass
class RelationArguments:
    """What of the teacher's attention the student learns."""

    relation_objective: Literal["minilm", "minilmv2"] = field(
        default="minilmv2",
        metadata={
            "help": "minilm: the attention distribution and the relations of the values, head by head; minilmv2: the "
            "relations of queries, of keys and of values, in --relation_heads heads"
        },
    )
    relation_heads: int = field(
        default=48, metadata={"help": "of minilmv2: a divisor of the width of the attention of both models"}
    )
    teacher_layer: int | None = field(
        default=None, metadata={"help": "attention layer of the teacher that is learned, from 1; the last if not given"}
    )
    attention_weight: float = field(default=1.0, metadata={"help": "of the attention distribution in minilm"})
    query_weight: float = field(default=1.0, metadata={"help": "of the relations of queries in minilmv2; 0: without"})
    key_weight: float = field(default=1.0, metadata={"help": "of the relations of keys in minilmv2; 0: without"})
    value_weight: float = field(default=1.0, metadata={"help": "of the relations of values; 0: without"})
    hidden_mse_weight: float = field(
        default=0.0,
        metadata={
            "help": "of the squared distance of last hidden states, which teaches what comes after the last attention "
            "too; takes a student of the teacher's width"
        },
    )

    def __post_init__(self) -> None:
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise UserError("the weights of the losses must be at least 0, and one of them more")

    @property
    def weights(self) -> dict[str, float]:
        """Of the losses, by name."""
        names = ("attention", "value") if self.relation_objective == "minilm" else ("query", "key", "value")
        return {name: getattr(self, f"{name}_weight") for name in names} | {"hidden": self.hidden_mse_weight}

    def describe(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one, under the names that checkpoints use."""
        stored = {"relation_objective": "objective", "hidden_mse_weight": "hidden_weight"}
        return {stored.get(name, name): value for name, value in asdict(self).items()}

    def check(self, teacher: Any, student: Any) -> None:
        """Raises `UserError` if models of these two configs have nothing that can be compared."""
        layers = len(teacher.get_patterns())
        if self.teacher_layer is not None and not 1 <= self.teacher_layer <= layers:
            raise UserError(f"--teacher_layer {self.teacher_layer}: the teacher has attention layers 1 to {layers}")
        if self.hidden_mse_weight and teacher.hidden_size != student.hidden_size:
            raise UserError(
                f"--hidden_mse_weight {self.hidden_mse_weight}: hidden states of width {teacher.hidden_size} and "
                f"{student.hidden_size} cannot be compared; give 0"
            )
        if self.relation_objective == "minilm" and teacher.num_attention_heads != student.num_attention_heads:
            raise UserError(
                f"--relation_objective minilm: the teacher has {teacher.num_attention_heads} attention heads, the "
                f"student {student.num_attention_heads}; give a student with as many, or use "
                "--relation_objective minilmv2"
            )
        for config in (teacher, student):
            width = config.num_attention_heads * config.head_dim
            if self.relation_objective == "minilmv2" and (self.relation_heads < 1 or width % self.relation_heads):
                raise UserError(
                    f"--relation_heads {self.relation_heads}: does not divide the attention's width of {width}; give "
                    "a divisor of the widths of both models"
                )
        if self.relation_objective == "minilm" and self.attention_weight:
            for pattern in (teacher.get_patterns()[(self.teacher_layer or 0) - 1], student.get_patterns()[-1]):
                if not pattern.is_mask:
                    raise UserError(
                        f"--relation_objective minilm: the pattern {pattern.type!r} is more than a mask, its "
                        "distribution cannot be compared; give --attention_weight 0, or use "
                        "--relation_objective minilmv2"
                    )


class Lesson(NamedTuple):
    """What a model computes of T packed tokens: the projections of an attention layer, and `(T, d)`, its output."""

    projections: Projections
    hidden_states: Tensor


class RelationTeacher:
    """A model that does not train, and what it computes.

    Args:
        model: the teacher; it is put into evaluation mode.
        layer: the attention layer, from 1; the last if None.
        device: where it runs.
        autocast: makes the context of a forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layer: int | None,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.tap, self.autocast = ProjectionTap(model, layer), autocast
        self.model = model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def __call__(self, texts: PackedTexts) -> Lesson:
        with self.autocast():
            return lesson(self.model, self.tap, texts)[0]


class RelationStudent(nn.Module):
    """A student, maybe wrapped for LoRA, whose forward pass gives its losses.

    Args:
        model: an encoder; the last of its attention layers learns.
        arguments: what it learns.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, arguments: RelationArguments) -> None:
        super().__init__()
        self.model, self.arguments, self.tap = model, arguments, ProjectionTap(model)

    def __getattr__(self, name: str) -> Any:
        """What it has not its model has, such as the switch for gradient checkpointing."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, texts: PackedTexts, teacher: Lesson) -> dict[str, Tensor]:
        """Sums over the tokens of packed texts, of each loss that has a weight, by name."""
        student, embeddings = lesson(self.model, self.tap, texts)
        # What comes after the last projections may learn nothing, and must have its part in the graph.
        untrained = 0.0 * embeddings.sum()
        losses = relation_losses(teacher, student, self.arguments)
        return {f"{name}_loss": loss.sum() + untrained for name, loss in losses.items()}


def lesson(model: nn.Module, tap: ProjectionTap, texts: PackedTexts) -> tuple[Lesson, Tensor]:
    """What a model computes of packed texts, and their embeddings."""
    output = model(input_ids=texts.input_ids, cu_seq_lens_q=texts.cu_seq_lens_q, max_length_q=texts.max_length_q)
    return Lesson(tap.take(), output.last_hidden_state[0]), output.pooler_output


def relation_losses(teacher: Lesson, student: Lesson, arguments: RelationArguments) -> dict[str, Tensor]:
    """The losses that have a weight, by name, each `(T,)`."""
    bounds = student.projections.attention.documents.bounds
    losses = {}
    for name, weight in arguments.weights.items():
        if weight and name == "attention":
            losses[name] = attention_kl(teacher.projections.attention, student.projections.attention)
        elif weight and name == "hidden":
            losses[name] = F.mse_loss(
                student.hidden_states.float(), teacher.hidden_states.float(), reduction="none"
            ).mean(1)
        elif weight:
            of_teacher, of_student = getattr(teacher.projections, name), getattr(student.projections, name)
            if arguments.relation_objective == "minilmv2":
                of_teacher, of_student = (relation_heads(x, arguments.relation_heads) for x in (of_teacher, of_student))
            losses[name] = relation_kl(of_teacher, of_student, bounds)
    return losses


def relation_gradient(teacher: RelationTeacher, arguments: RelationArguments) -> AccumulateGradient:
    """The objective: the weighted sum of the losses, each the mean over the tokens of the step on all processes."""

    def accumulate_gradient(model: nn.Module, batch: MaskedBatch, scale: float, synchronize: bool) -> dict[str, Tensor]:
        measures = batch.measures()
        # Local sums over the processes' mean count: their mean over the processes, DDP's, is the mean over all tokens.
        tokens = mean_over_processes(measures["token_count"].float().to(batch.chunks[0].labels.device))
        metrics: dict[str, Tensor] = {}
        passes = passes_together(model, len(batch.chunks))
        for number, chunk in enumerate([*batch.chunks, *batch.chunks[-1:] * (passes - len(batch.chunks))]):
            share = 1.0 if number < len(batch.chunks) else 0.0
            with synchronizing(model, synchronize and number == passes - 1):
                sums = model(chunk.texts, teacher(chunk.texts))
                means = {name: value * share / tokens for name, value in sums.items()}
                loss = _weighted(means, arguments)
                for name, value in (means | {"loss": loss}).items():
                    metrics[name] = metrics.get(name, 0.0) + value.detach()
                (loss * scale).backward()
        return metrics | {name: measures[name] for name in ("token_count", "text_count", "sequence_length")}

    return accumulate_gradient


class RelationEvaluation:
    """How far the student is from its teacher on held-out documents of one source.

    Args:
        pieces: of the documents.
        special: what stands around a piece.
        teacher: of the student.
        arguments: what it learns.
        batch_tokens: tokens of one packed chunk.
    """

    def __init__(
        self,
        pieces: Pieces,
        special: SpecialTokens,
        teacher: RelationTeacher,
        arguments: RelationArguments,
        batch_tokens: int,
    ) -> None:
        self.pieces, self.special, self.batch_tokens = pieces, special, batch_tokens
        self.teacher, self.arguments = teacher, arguments

    @torch.no_grad()
    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """`eval_loss`, and `eval_` of each of its parts; all processes share the texts."""
        own = own_share(len(self.pieces))
        names = [f"{name}_loss" for name, weight in self.arguments.weights.items() if weight]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64)
        for start in tqdm(range(own.start, own.stop, 64), desc="evaluating", disable=own.start > 0, leave=False):
            segments = [self.pieces.segment(number) for number in range(start, min(start + 64, own.stop))]
            texts = [self.special.frame(self.pieces.documents.read(segment))[0] for segment in segments]
            for chunk in pack(texts, self.batch_tokens):
                found = model(chunk.to(device), self.teacher(chunk.to(device)))
                tokens = torch.tensor(chunk.input_ids.numel())
                sums += torch.stack([*(found[name].double().cpu() for name in names), tokens.double()])
        *values, tokens = mean_over_processes(sums.to(device)).cpu()
        means = {name: value / tokens.clamp(min=1 / world_size()) for name, value in zip(names, values, strict=True)}
        means = {"loss": _weighted(means, self.arguments)} | means
        return {f"eval_{name}": value.item() for name, value in means.items()}


def _weighted(means: dict[str, Tensor], arguments: RelationArguments) -> Tensor:
    terms = [weight * means[f"{name}_loss"] for name, weight in arguments.weights.items() if weight]
    return torch.stack(terms).sum()
