"""Masked-language modelling of packed documents: the model in training, its gradient and its evaluation."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.data.documents.batches import MaskedBatch, MaskedChunk, mask_batch
from training.data.documents.next_sentence import NextSentenceHead
from training.data.documents.sequences import SequenceReader, Sequences
from training.data.documents.token_store import TokenizedDocuments
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
from training.objectives.span_penalty import Penalty

# What the model returns of a chunk, and the count of `MaskedBatch.measures` that the sum over a batch is divided by.
MASKED_LM_SUMS = {"masked_lm_loss": "prediction_count", "accuracy": "prediction_count"}
NEXT_SENTENCE_SUMS = {"next_sentence_loss": "text_count", "next_sentence_accuracy": "text_count"}


class AuxiliaryLoss(Protocol):
    """Losses that are added to masked-language modelling in training mode, such as distances from teachers.

    Attributes:
        needs_hidden_states: whether the model must return its last hidden states.
        needs_all_logits: whether the losses read the logits of all tokens, and not of the predicted ones alone.
        denominators: the names of the losses, which end in `_loss`, and the count of `MaskedBatch.measures` that the
            sum over a batch is divided by.
    """

    needs_hidden_states: bool
    needs_all_logits: bool
    denominators: Mapping[str, str]

    def __call__(self, chunk: MaskedChunk, logits: Tensor, hidden_states: Tensor | None) -> Metrics:
        """Compute the losses of a chunk.

        Args:
            chunk: T packed tokens, P of which are predicted.
            logits: the model's, `(T, V)` with `needs_all_logits`, else `(P, V)`.
            hidden_states: `(1, T, d)`, the model's last ones; None if they are not needed.

        Returns:
            Sums over the chunk, by name.
        """


class MaskedLanguageModel(LossModule):
    """A masked-language model, maybe with a next-sentence head, whose forward pass returns sums of its losses.

    Args:
        model: returns `loss` and `logits` of packed tokens with labels, as `LongEmbedForMaskedLM`; maybe wrapped for
            LoRA.
        next_sentence: a head on the last hidden state of the first token of each text; None if texts are no pairs.
        auxiliary: losses that are added in training mode.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        next_sentence: NextSentenceHead | None = None,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> None:
        super().__init__(model)
        self.next_sentence, self.auxiliary = next_sentence, auxiliary

    def forward(self, chunk: MaskedChunk) -> Metrics:
        """Compute sums over a chunk: losses and right predictions of tokens and of pairs, and auxiliary losses."""
        inputs: dict[str, Any] = {"input_ids": chunk.texts.input_ids, "labels": chunk.labels, "only_predicted": True}
        inputs |= {"cu_seq_lens_q": chunk.texts.cu_seq_lens_q, "max_length_q": chunk.texts.max_length_q}
        if self.next_sentence is not None:
            inputs |= {"token_type_ids": chunk.token_type_ids, "output_hidden_states": True}
        auxiliary = self.auxiliary if self.training else None
        if auxiliary is not None and auxiliary.needs_hidden_states:
            inputs["output_hidden_states"] = True
        everywhere = auxiliary is not None and auxiliary.needs_all_logits
        chosen = chunk.labels >= 0
        labels = chunk.labels[chosen]
        # The model's loss is then a sum, which is 0 where nothing is predicted, with all parameters in its graph.
        inputs["num_items_in_batch"] = 1
        if everywhere:
            inputs["only_predicted"] = False
        output = self.model(**inputs)
        logits = output.logits[chosen] if everywhere else output.logits
        sums = {"masked_lm_loss": output.loss, "accuracy": (logits.argmax(dim=-1) == labels).sum()}
        if self.next_sentence is not None:
            first = output.hidden_states[-1][0, chunk.texts.cu_seq_lens_q[:-1].long()]
            scores = self.next_sentence(first).float()
            sums["next_sentence_loss"] = F.cross_entropy(scores, chunk.next_labels, reduction="sum")
            sums["next_sentence_accuracy"] = (scores.argmax(dim=-1) == chunk.next_labels).sum()
        if auxiliary is not None:
            states = output.hidden_states[-1] if auxiliary.needs_hidden_states else None
            sums |= auxiliary(chunk, output.logits[0] if everywhere else output.logits, states)
        return sums


def masked_gradient(
    penalty: Penalty | None = None,
    weights: Mapping[str, float] | None = None,
    auxiliary: AuxiliaryLoss | None = None,
) -> AccumulateGradient:
    """Build the gradient of masked-language modelling.

    The loss is the mean cross entropy over all tokens that all processes predict in a step, plus the mean over their
    pairs if there are any, plus auxiliary losses and a penalty on parameters.

    Args:
        penalty: a term of the loss that depends on parameters only.
        weights: weights of the losses by name; 1 where there is none.
        auxiliary: the auxiliary losses of the model.

    Returns:
        The function that the loop calls for each batch.
    """
    denominators = MASKED_LM_SUMS | NEXT_SENTENCE_SUMS | dict(auxiliary.denominators if auxiliary else {})

    def accumulate_gradient(model: nn.Module, batch: MaskedBatch, scale: float, synchronize: bool) -> Metrics:
        measures = batch.measures()
        # Local sums are divided by the mean count of the processes. DDP takes the mean of their gradients, which is
        # then the gradient of the mean over all tokens of all processes.
        names = sorted(set(denominators.values()))
        local = torch.stack([measures[name] for name in names]).float().to(batch.chunks[0].labels.device)
        counts = dict(zip(names, denominator(mean_over_processes(local)), strict=True))

        def parts_of(chunk: MaskedChunk) -> Metrics:
            return {name: value / counts[denominators[name]] for name, value in model(chunk).items()}

        metrics = backward_over_chunks(
            model, batch.chunks, parts_of, weights or {}, scale=scale, synchronize=synchronize, penalty=penalty
        )
        return metrics | measures

    return accumulate_gradient


class MaskedEvaluation:
    """Masked-language modelling of one held-out source, cut, paired and masked in the same way at every evaluation.

    Args:
        documents: the held-out documents.
        read: reads and masks a span of a document.
        length: length of a text, in tokens.
        mask_rate: share of the tokens that are predicted.
        batch_tokens: number of tokens of one packed chunk.
    """

    def __init__(
        self, documents: TokenizedDocuments, read: SequenceReader, *, length: int, mask_rate: float, batch_tokens: int
    ) -> None:
        self.sequences, self.read, self.length = Sequences(documents, length, read), read, length
        self.mask_rate, self.batch_tokens = mask_rate, batch_tokens

    @torch.no_grad()
    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Evaluate a model; the processes share the texts.

        Args:
            model: a `MaskedLanguageModel` in evaluation mode.
            device: the model's device.

        Returns:
            `eval_loss`, `eval_perplexity`, `eval_masked_lm_loss` and `eval_accuracy`, and the loss and the accuracy of
            the pairs.
        """
        denominators = MASKED_LM_SUMS | (NEXT_SENTENCE_SUMS if self.read.next_sentence else {})

        def sums_of(numbers: range) -> Metrics:
            batch, sums = self.batch(numbers), Metrics()
            for chunk in batch.chunks:
                found = model(chunk.to(device))
                sums = add_detached(sums, {name: value.double().cpu() for name, value in found.items()})
            return batch.measures() | sums

        names = [*denominators, *dict.fromkeys(denominators.values())]
        sums = sums_over_processes(len(self.sequences), sums_of, names, device)
        means = {name: sums[name] / denominator(sums[count]) for name, count in denominators.items()}
        values = {f"eval_{name}": value.item() for name, value in means.items()}
        loss = weighted_sum(means, {}).item()
        return {"eval_loss": loss, "eval_perplexity": means["masked_lm_loss"].exp().item()} | values

    def batch(self, numbers: range) -> MaskedBatch:
        """Return the spans of some numbers; a number is masked in the same way on every call and every process."""
        texts = [
            self.read(
                self.sequences.documents, self.sequences.segment(n), self.mask_rate, np.random.default_rng((0, n))
            )
            for n in numbers
        ]
        return mask_batch(texts, self.batch_tokens, self.length, self.mask_rate)
