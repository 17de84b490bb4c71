"""Self-attention distillation (MiniLM, MiniLMv2) of packed documents: teacher, student, gradient and evaluation."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import UserError
from training.data.documents.batches import MaskedBatch, MaskedChunk
from training.data.documents.sequences import Sequences, SpecialTokens
from training.data.packing import PackedTexts, pack
from training.engine.processes.distributed import mean_over_processes
from training.engine.training import AccumulateGradient
from training.objectives.chunked_loss import (
    LossModule,
    add_detached,
    backward_over_chunks,
    denominator,
    sums_over_processes,
    weighted_sum,
)
from training.objectives.contrastive.blocks import Metrics
from training.objectives.losses.relations import attention_kl, relation_heads, relation_kl
from training.teachers.projections import Projections, ProjectionTap


@dataclass
class RelationArguments:
    """The losses between the attention of the teacher and of the student, and their weights.

    Raises:
        UserError: a weight is negative, or all are 0.
    """

    relation_objective: Literal["minilm", "minilmv2"] = field(
        default="minilmv2",
        metadata={
            "help": "what is distilled. minilm: attention distributions and value relations, head by head; "
            "minilmv2: relations of queries, keys and values, split into --relation_heads heads"
        },
    )
    relation_heads: int = field(
        default=48,
        metadata={
            "help": "number of relation heads of minilmv2; divides the attention width of both models",
            "within": "[1, inf)",
            "applies": {"relation_objective": "minilmv2"},
        },
    )
    teacher_layer: int | None = field(
        default=None,
        metadata={"help": "number of the teacher's attention layer to distil, from 1; default: the last"},
    )
    attention_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the attention distributions in minilm; 0: not computed",
            "within": "[0, inf)",
            "applies": {"relation_objective": "minilm"},
        },
    )
    query_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the query relations in minilmv2; 0: not computed",
            "applies": {"relation_objective": "minilmv2"},
        },
    )
    key_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the key relations in minilmv2; 0: not computed",
            "applies": {"relation_objective": "minilmv2"},
        },
    )
    value_weight: float = field(default=1.0, metadata={"help": "weight of the value relations; 0: not computed"})
    hidden_mse_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of the squared distance between last hidden states, which also trains what follows the "
            "last attention layer; needs a student of the teacher's width"
        },
    )

    def __post_init__(self) -> None:
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise UserError("the weights of the losses must be at least 0, and one of them more")

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the objective's losses by the name of what is compared, zeros included."""
        names = ("attention", "value") if self.relation_objective == "minilm" else ("query", "key", "value")
        return {name: getattr(self, f"{name}_weight") for name in names} | {"hidden": self.hidden_mse_weight}

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of the losses that are computed, by the name of the loss."""
        return {f"{name}_loss": weight for name, weight in self.weights.items() if weight}

    def check(self, teacher: Any, student: Any) -> None:
        """Check that the models of two configs can be compared.

        Args:
            teacher: config of the teacher.
            student: config of the student.

        Raises:
            UserError: the layer does not exist, or widths, heads or patterns do not fit the losses.
        """
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


class LayerOutputs(NamedTuple):
    """What a model computes of T packed tokens.

    Args:
        projections: queries, keys and values of the attention layer that is compared.
        hidden_states: `(T, d)`, the output of the last layer.
    """

    projections: Projections
    hidden_states: Tensor


class RelationTeacher:
    """A frozen model whose attention a student learns.

    Args:
        model: the teacher; it is put into evaluation mode.
        layer: number of the attention layer, from 1; None: the last one.
        device: device that the teacher runs on.
        autocast: returns the context manager of a forward pass.
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
    def __call__(self, texts: PackedTexts) -> LayerOutputs:
        """Compute the layer outputs of packed texts."""
        with self.autocast():
            return layer_outputs(self.model, self.tap, texts)[0]


class RelationStudent(LossModule):
    """A student whose forward pass returns sums of its losses against the teacher.

    Args:
        model: an encoder, maybe wrapped for LoRA.
        arguments: parsed command-line options.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, arguments: RelationArguments) -> None:
        super().__init__(model)
        self.arguments, self.tap = arguments, ProjectionTap(model)

    def forward(self, texts: PackedTexts, teacher: LayerOutputs) -> Metrics:
        """Compute each loss that has a weight, summed over the tokens of packed texts."""
        student, embeddings = layer_outputs(self.model, self.tap, texts)
        # Parameters after the last projections may get no gradient, but must take part in the graph.
        unused = 0.0 * embeddings.sum()
        losses = relation_losses(teacher, student, self.arguments)
        return {f"{name}_loss": loss.sum() + unused for name, loss in losses.items()}


def layer_outputs(model: nn.Module, tap: ProjectionTap, texts: PackedTexts) -> tuple[LayerOutputs, Tensor]:
    """Run a model on packed texts.

    Args:
        model: the teacher or the student.
        tap: the hook on its attention layer.
        texts: n packed texts.

    Returns:
        The outputs that are compared, and the embeddings of the texts, `(n, d)`.
    """
    output = model(input_ids=texts.input_ids, cu_seq_lens_q=texts.cu_seq_lens_q, max_length_q=texts.max_length_q)
    return LayerOutputs(tap.take(), output.last_hidden_state[0]), output.pooler_output


def relation_losses(teacher: LayerOutputs, student: LayerOutputs, arguments: RelationArguments) -> dict[str, Tensor]:
    """Compute the losses that have a weight.

    Args:
        teacher: layer outputs of T packed tokens.
        student: layer outputs of the same tokens.
        arguments: parsed command-line options.

    Returns:
        By name `(T,)`, the loss of each token.
    """
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
    """Build the gradient of the weighted losses, each a mean over the tokens of a step on all processes.

    Args:
        teacher: the frozen teacher.
        arguments: parsed command-line options.

    Returns:
        The function that the loop calls for each batch.
    """

    def accumulate_gradient(model: nn.Module, batch: MaskedBatch, scale: float, synchronize: bool) -> Metrics:
        measures = batch.measures()
        # As in `masked_gradient`: local sums over the mean count, of whose gradients DDP takes the mean.
        tokens = mean_over_processes(measures["token_count"].float().to(batch.chunks[0].labels.device))

        def parts_of(chunk: MaskedChunk) -> Metrics:
            return {name: value / tokens for name, value in model(chunk.texts, teacher(chunk.texts)).items()}

        metrics = backward_over_chunks(
            model, batch.chunks, parts_of, arguments.loss_weights, scale=scale, synchronize=synchronize
        )
        return metrics | {name: measures[name] for name in ("token_count", "text_count", "sequence_length")}

    return accumulate_gradient


class RelationEvaluation:
    """The losses of a student against its teacher on the documents of one held-out source.

    Args:
        sequences: spans of the documents.
        special: special tokens around a span.
        teacher: the frozen teacher.
        arguments: parsed command-line options.
        batch_tokens: number of tokens of one packed chunk.
    """

    def __init__(
        self,
        sequences: Sequences,
        special: SpecialTokens,
        teacher: RelationTeacher,
        arguments: RelationArguments,
        batch_tokens: int,
    ) -> None:
        self.sequences, self.special, self.batch_tokens = sequences, special, batch_tokens
        self.teacher, self.arguments = teacher, arguments

    @torch.no_grad()
    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Evaluate a student; the processes share the texts.

        Args:
            model: a `RelationStudent` in evaluation mode.
            device: the model's device.

        Returns:
            `eval_loss`, and each of its parts as `eval_...`.
        """

        def sums_of(numbers: range) -> Metrics:
            segments = [self.sequences.segment(number) for number in numbers]
            texts = [self.special.frame(self.sequences.documents.read(segment))[0] for segment in segments]
            sums = Metrics()
            for chunk in pack(texts, self.batch_tokens):
                found = model(chunk.to(device), self.teacher(chunk.to(device)))
                tokens = {"token_count": torch.tensor(chunk.input_ids.numel())}
                sums = add_detached(sums, {name: value.double().cpu() for name, value in (found | tokens).items()})
            return sums

        names = list(self.arguments.loss_weights)
        sums = sums_over_processes(len(self.sequences), sums_of, [*names, "token_count"], device)
        means = {name: sums[name] / denominator(sums["token_count"]) for name in names}
        means = {"loss": weighted_sum(means, self.arguments.loss_weights)} | means
        return {f"eval_{name}": value.item() for name, value in means.items()}
