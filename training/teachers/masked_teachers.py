"""Masked-language models as teachers of a smaller one: their distributions over tokens, and their hidden states."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

from common.conditions import GIVEN, Not
from common.errors import UserError
from modeling_longembed import LongEmbedForMaskedLM
from training.data.documents.batches import MaskedChunk
from training.models.adaptation import AdaptationArguments, load_masked_lm
from training.models.encoder import ModelArguments
from training.models.identity import tokenizer_identity
from training.objectives.contrastive.blocks import Metrics
from training.objectives.losses.soft_targets import soft_targets

TOKENS_AT_ONCE = 1024  # tokens whose distributions are held at a time, 125 MB each for 30,522 words in float32


@dataclass
class MaskedTeacherArguments:
    """Teachers of a masked-language model; the default weights are those of DistilBERT.

    Raises:
        UserError: hidden states of several teachers are asked for.
    """

    masked_teachers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders or Hub ids of masked-language models with the student's tokenizer, to distil from; of "
            "several teachers the distributions are averaged"
        },
    )
    teacher_temperature: float = field(
        default=2.0,
        metadata={
            "help": "temperature that the logits of teachers and student are divided by",
            "within": "(0, inf)",
            "applies": {"masked_teachers": GIVEN, "soft_weight": Not(0.0)},
        },
    )
    soft_weight: float = field(
        default=5.0,
        metadata={
            "help": "weight of the divergence from the teachers' distributions",
            "within": "[0, inf)",
            "applies": {"masked_teachers": GIVEN},
        },
    )
    restrict_ce_to_mask: bool = field(
        default=False,
        metadata={
            "help": "compare distributions at the masked tokens only, which takes less memory; by default at all "
            "tokens, as in DistilBERT's code",
            "applies": {"masked_teachers": GIVEN, "soft_weight": Not(0.0)},
        },
    )
    hard_weight: float = field(
        default=2.0,
        metadata={
            "help": "weight of the masked-language-model loss if there are teachers",
            "within": "[0, inf)",
            "applies": {"masked_teachers": GIVEN},
        },
    )
    hidden_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the cosine distance between last hidden states; needs a single teacher of the student's "
            "width",
            "within": "[0, inf)",
            "applies": {"masked_teachers": GIVEN},
        },
    )

    def __post_init__(self) -> None:
        if len(self.masked_teachers) > 1 and self.hidden_weight:
            raise UserError("--hidden_weight: hidden states of several teachers have nothing in common; give 0")

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the losses by name; empty without teachers. A loss that is not named has weight 1."""
        if not self.masked_teachers:
            return {}
        soft, hard, hidden = self.soft_weight, self.hard_weight, self.hidden_weight
        return {"masked_lm_loss": hard, "soft_target_loss": soft, "hidden_state_loss": hidden}


class MaskedTeachers:
    """Frozen masked-language models, and the losses of a student against them: an `AuxiliaryLoss` of `masked_lm.py`.

    This is not a module, so that teachers are not saved, wrapped or checkpointed with the student.

    Args:
        models: the teachers.
        temperature: temperature of the soft targets.
        hidden: whether last hidden states are compared as well.
        soft: whether distributions are compared.
        masked_only: whether distributions are compared at the predicted tokens only, and not at all of them.

    Attributes:
        models: the teachers.
        needs_hidden_states: whether last hidden states are compared.
        needs_all_logits: whether distributions are compared at all tokens.
        denominators: by loss, the count that the sum over a batch is divided by.
    """

    def __init__(
        self,
        models: list[LongEmbedForMaskedLM],
        temperature: float,
        hidden: bool,
        masked_only: bool = False,
        soft: bool = True,
    ) -> None:
        self.models = [model.eval().requires_grad_(False) for model in models]
        self.temperature, self.soft, self.needs_hidden_states = temperature, soft, hidden
        self.needs_all_logits = soft and not masked_only
        self.denominators: Mapping[str, str] = {
            "soft_target_loss": "prediction_count" if masked_only else "token_count",
            "hidden_state_loss": "token_count",
        }

    def __deepcopy__(self, memo: dict) -> "MaskedTeachers":
        return copy.copy(self)  # a copy of the student shares the teachers

    def __call__(self, chunk: MaskedChunk, logits: Tensor, hidden_states: Tensor | None) -> Metrics:
        """Compute the losses of DistilBERT, L_ce and L_cos (Sanh et al. 2019, arXiv:1910.01108, section 3).

        The paper does not say at which tokens L_ce is taken. The authors' code (`distiller.py` of transformers'
        research projects) takes all tokens that are no padding, and with `restrict_ce_to_mask` the masked ones.

        Args:
            chunk: T packed tokens, P of which are predicted.
            logits: the student's, `(T, V)` with `needs_all_logits`, else `(P, V)`.
            hidden_states: `(1, T, d)`, the student's last ones; None if they are not compared.

        Returns:
            Sums over the chunk: `soft_target_loss` over all tokens or over the predicted ones, `hidden_state_loss` over
            all tokens, of what is compared.
        """
        inputs: dict[str, Any] = {"input_ids": chunk.texts.input_ids, "token_type_ids": chunk.token_type_ids}
        inputs |= {"cu_seq_lens_q": chunk.texts.cu_seq_lens_q, "max_length_q": chunk.texts.max_length_q}
        if not self.needs_all_logits:
            inputs |= {"labels": chunk.labels, "only_predicted": True}
        if self.needs_hidden_states:
            inputs["output_hidden_states"] = True
        with torch.no_grad():
            outputs = [model.to(logits.device)(**inputs) for model in self.models]
        sums = Metrics()
        if self.soft:
            of_teachers = [output.logits.flatten(0, -2) for output in outputs]
            sums["soft_target_loss"] = self.soft_target_sum(logits, of_teachers)
        if hidden_states is not None:
            cosine = F.cosine_similarity(hidden_states[0].float(), outputs[0].hidden_states[-1][0].float(), dim=-1)
            sums["hidden_state_loss"] = (1 - cosine).sum()
        return sums

    def soft_target_sum(self, logits: Tensor, of_teachers: list[Tensor]) -> Tensor:
        """Compute the divergence from the teachers, summed over n tokens, some of them at a time.

        Args:
            logits: `(n, V)`, the student's.
            of_teachers: `(n, V)` of each teacher.

        Returns:
            A scalar, 0 for no tokens.
        """

        def of_some(logits: Tensor, *of_teachers: Tensor) -> Tensor:
            return soft_targets(logits, of_teachers, temperature=self.temperature)[0] * len(logits)

        total = logits.sum() * 0.0  # every parameter must take part in the graph
        for start in range(0, len(logits), TOKENS_AT_ONCE):
            some = [x[start : start + TOKENS_AT_ONCE] for x in (logits, *of_teachers)]
            total = total + checkpoint(of_some, *some, use_reentrant=False, preserve_rng_state=False)
        return total


def load_masked_teachers(
    arguments: MaskedTeacherArguments,
    model: LongEmbedForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
) -> MaskedTeachers | None:
    """Load the teachers of `--masked_teachers`.

    Args:
        arguments: parsed command-line options.
        model: the student.
        tokenizer: the student's tokenizer.
        length: length of the longest text of the run, in tokens.

    Returns:
        The teachers; None if there are none.

    Raises:
        UserError: a teacher cannot be loaded, has no head, another tokenizer, a shorter context, or a width that does
            not fit `--hidden_weight`.
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
                "a smaller one, or a teacher with a longer context"
            )
        if arguments.hidden_weight and width != model.config.hidden_size:
            raise UserError(
                f"--hidden_weight {arguments.hidden_weight}: hidden states of width {width} and "
                f"{model.config.hidden_size} cannot be compared; give 0"
            )
        teachers.append(teacher)
    if not teachers:
        return None
    return MaskedTeachers(
        teachers,
        arguments.teacher_temperature,
        arguments.hidden_weight > 0,
        arguments.restrict_ce_to_mask,
        arguments.soft_weight > 0,
    )
