"""Masked-language models as teachers of another one: their distributions, and their hidden states."""

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from modeling_longembed import LongEmbedForMaskedLM
from training.data.masked_batches import MaskedChunk
from training.models.adaptation import AdaptationArguments, load_masked_lm
from training.models.encoder import ModelArguments
from training.models.identity import model_identity, tokenizer_identity
from training.objectives.losses.soft_targets import soft_targets


@dataclass
class MaskedTeacherArguments:
    """Teachers of a masked-language model; the weights are DistilBERT's."""

    masked_teachers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders or Hub ids of masked-language models with the same tokenizer, which teach; several: the "
            "mean of their distributions"
        },
    )
    teacher_temperature: float = field(default=2.0, metadata={"help": "by which logits of both sides are divided"})
    soft_weight: float = field(default=5.0, metadata={"help": "of the distance from the teachers' distributions"})
    hard_weight: float = field(default=2.0, metadata={"help": "of masked-language modelling, if there are teachers"})
    hidden_weight: float = field(
        default=1.0, metadata={"help": "of the cosine distance of last hidden states; takes one teacher of equal width"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.teacher_temperature < math.inf:
            raise UserError(f"--teacher_temperature {self.teacher_temperature}: must be a number of more than 0")
        for name in ("soft_weight", "hard_weight", "hidden_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)}: must be a number of at least 0")
        if len(self.masked_teachers) > 1 and self.hidden_weight:
            raise UserError("--hidden_weight: hidden states of several teachers have nothing in common; give 0")

    @property
    def weights(self) -> dict[str, float]:
        """Of the parts of the loss by their names; those that are not named have 1."""
        if not self.masked_teachers:
            return {}
        soft, hard, hidden = self.soft_weight, self.hard_weight, self.hidden_weight
        return {"masked_lm_loss": hard, "soft_target_loss": soft, "hidden_state_loss": hidden}

    def describe(self, teachers: "MaskedTeachers | None") -> dict[str, Any]:
        """What a resumed run must agree in: all that the objective depends on, the teachers by what they are."""
        if teachers is None:
            return {}
        return asdict(self) | {"masked_teachers": [model_identity(model, model.tokenizer) for model in teachers.models]}


class MaskedTeachers:
    """Models that do not train. Not a module: they are no part of what is saved, wrapped or checkpointed."""

    def __init__(self, models: list[LongEmbedForMaskedLM], temperature: float, hidden: bool) -> None:
        """Args:
        models: the teachers.
        temperature: of the soft targets.
        hidden: whether hidden states are compared as well.
        """
        self.models = [model.eval().requires_grad_(False) for model in models]
        self.temperature, self.hidden = temperature, hidden

    def __deepcopy__(self, memo: dict) -> "MaskedTeachers":
        return copy.copy(self)  # a copy of the student has the same teachers

    def terms(self, chunk: MaskedChunk, logits: Tensor, hidden_states: Tensor | None) -> dict[str, Tensor]:
        """Sums over a chunk, as `MaskedLanguageModel` gives them.

        Args:
            chunk: of T tokens, P of which are predicted.
            logits: `(P, V)`, the student's.
            hidden_states: `(1, T, d)`, its last ones.

        Returns:
            `soft_target_loss`, over the predicted tokens alone, and `hidden_state_loss`, over all, as DistilBERT's
            L_ce and L_cos (Sanh et al. 2019, arXiv:1910.01108, section 3).
        """
        inputs: dict[str, Any] = {"input_ids": chunk.texts.input_ids, "labels": chunk.labels}
        inputs["token_type_ids"] = chunk.token_type_ids
        inputs |= {"cu_seq_lens_q": chunk.texts.cu_seq_lens_q, "max_length_q": chunk.texts.max_length_q}
        if self.hidden:
            inputs["output_hidden_states"] = True
        with torch.no_grad():
            outputs = [model.to(logits.device)(**inputs) for model in self.models]
        if len(logits):
            loss, _ = soft_targets(logits, [output.logits for output in outputs], temperature=self.temperature)
            terms = {"soft_target_loss": loss * len(logits)}
        else:
            terms = {"soft_target_loss": logits.sum() * 0.0}
        if self.hidden:
            assert hidden_states is not None
            cosine = F.cosine_similarity(hidden_states[0].float(), outputs[0].hidden_states[-1][0].float(), dim=-1)
            terms["hidden_state_loss"] = (1 - cosine).sum()
        return terms


def load_masked_teachers(
    arguments: MaskedTeacherArguments,
    model: LongEmbedForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
) -> MaskedTeachers | None:
    """The teachers, if there are any.

    Args:
        arguments: of the user.
        model: the student.
        tokenizer: its own.
        length: the longest text of the run, in tokens.

    Raises:
        UserError: there is no such model, it reads other tokens or shorter texts, has no head, or another width.
    """
    teachers = []
    for name in arguments.masked_teachers:
        try:
            teacher, head_is_new = load_masked_lm(ModelArguments(model_name_or_path=name), AdaptationArguments())
        except UserError as error:
            raise UserError(f"--masked_teachers {str(error).removeprefix('--model_name_or_path ')}") from None
        context, width = teacher.config.max_position_embeddings, teacher.config.hidden_size
        if head_is_new:
            raise UserError(f"--masked_teachers {name}: has no masked-language-model head, and so nothing to teach")
        if tokenizer_identity(teacher.tokenizer) != tokenizer_identity(tokenizer):
            raise UserError(
                f"--masked_teachers {name}: has another tokenizer than the student, and a distribution over tokens can "
                "only be learned token for token; give a teacher with the same one, or distil embeddings"
            )
        if length > context:
            raise UserError(
                f"--masked_teachers {name}: reads {context} tokens, fewer than the {length} of --sequence_length; give "
                "shorter pieces, or a teacher with a longer context"
            )
        if arguments.hidden_weight and width != model.config.hidden_size:
            raise UserError(
                f"--hidden_weight {arguments.hidden_weight}: hidden states of width {width} and "
                f"{model.config.hidden_size} cannot be compared; give 0"
            )
        teachers.append(teacher)
    if not teachers:
        return None
    return MaskedTeachers(teachers, arguments.teacher_temperature, arguments.hidden_weight > 0)
