"""Masked-language modelling of packed documents: the model under training, its objective and its evaluation."""

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from training.data.masked_batches import MaskedBatch, MaskedChunk, PieceReader, Pieces, TokenizedDocuments, mask_batch
from training.data.next_sentence import NextSentenceHead
from training.engine.distributed import mean_over_processes, own_share, passes_together, synchronizing, world_size
from training.engine.loop import AccumulateGradient
from training.objectives.span_penalty import Penalty

# What the model returns of a chunk, and what each is a mean over: predicted tokens, pairs, or all tokens.
SUMS = {"masked_lm_loss": 0, "accuracy": 0, "next_sentence_loss": 1, "next_sentence_accuracy": 1}
SUMS |= {"soft_target_loss": 0, "hidden_state_loss": 2}


class Teachers(Protocol):
    """Models that a masked-language model learns from beside its labels.

    Attributes:
        hidden: whether they compare hidden states too.
    """

    hidden: bool

    def terms(self, chunk: MaskedChunk, logits: Tensor, hidden_states: Tensor | None) -> dict[str, Tensor]:
        """Return what they add to the loss, as sums over a chunk; see `training.teachers.masked_teachers`."""


class MaskedLanguageModel(nn.Module):
    """A masked-language model, maybe wrapped for LoRA, and beside it maybe a next-sentence head.

    Args:
        model: gives `loss` and `logits` of packed tokens with labels, as `LongEmbedForMaskedLM`.
        next_sentence: the head, on the state of the first token of each text; None: there are no pairs.
        teachers: models that it learns from in training mode.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        next_sentence: NextSentenceHead | None = None,
        teachers: Teachers | None = None,
    ) -> None:
        super().__init__()
        self.model, self.next_sentence, self.teachers = model, next_sentence, teachers

    def __getattr__(self, name: str) -> Any:
        """What it has not its model has, such as the switch for gradient checkpointing."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, chunk: MaskedChunk) -> dict[str, Tensor]:
        """Sums over a chunk: cross entropies and right answers, of the predicted tokens and of the pairs, and maybe
        distances from teachers.
        """
        inputs: dict[str, Any] = {"input_ids": chunk.texts.input_ids, "labels": chunk.labels}
        inputs |= {"cu_seq_lens_q": chunk.texts.cu_seq_lens_q, "max_length_q": chunk.texts.max_length_q}
        if self.next_sentence is not None:
            inputs |= {"token_type_ids": chunk.token_type_ids, "output_hidden_states": True}
        teachers = self.teachers if self.training else None
        if teachers is not None and teachers.hidden:
            inputs["output_hidden_states"] = True
        output = self.model(**inputs)
        labels = chunk.labels[chunk.labels >= 0]
        # The mean of nothing is no number, and every parameter must have its part in the graph.
        loss = output.loss * len(labels) if len(labels) else output.logits.sum() * 0.0
        sums = {"masked_lm_loss": loss, "accuracy": (output.logits.argmax(dim=-1) == labels).sum()}
        if self.next_sentence is not None:
            first = output.hidden_states[-1][0, chunk.texts.cu_seq_lens_q[:-1].long()]
            scores = self.next_sentence(first).float()
            sums["next_sentence_loss"] = F.cross_entropy(scores, chunk.next_labels, reduction="sum")
            sums["next_sentence_accuracy"] = (scores.argmax(dim=-1) == chunk.next_labels).sum()
        if teachers is not None:
            states = output.hidden_states[-1] if teachers.hidden else None
            sums |= teachers.terms(chunk, output.logits, states)
        return sums


def masked_gradient(penalty: Penalty | None = None, weights: dict[str, float] | None = None) -> AccumulateGradient:
    """The objective: the mean cross entropy of all tokens that the step predicts on all processes, plus that of its
    pairs if there are any, what teachers ask for, and maybe a penalty on parameters.

    Args:
        penalty: on parameters.
        weights: of the parts of the loss by their names, which are 1 if not given.
    """

    def accumulate_gradient(model: nn.Module, batch: MaskedBatch, scale: float, synchronize: bool) -> dict[str, Tensor]:
        # Local sums over the processes' mean count: their mean over the processes, DDP's, is the mean over all tokens.
        counts = _denominators(mean_over_processes(_counts(batch)))
        metrics: dict[str, Tensor] = {}
        passes = passes_together(model, len(batch.chunks))
        for number, chunk in enumerate([*batch.chunks, *batch.chunks[-1:] * (passes - len(batch.chunks))]):
            last = number == passes - 1
            with synchronizing(model, synchronize and last):
                parts = {name: value / counts[SUMS[name]] for name, value in model(chunk).items()}
                if number >= len(batch.chunks):
                    parts = {name: value * 0.0 for name, value in parts.items()}
                loss = _loss(parts, weights)
                metrics = _added(metrics, parts | {"loss": loss})
                if last and penalty is not None:
                    term, measures = penalty()
                    loss, metrics = loss + term, metrics | measures
                (loss * scale).backward()
        return metrics | batch.measures()

    return accumulate_gradient


class MaskedEvaluation:
    """Held-out documents of one source, cut, paired and masked once and for all."""

    def __init__(
        self, documents: TokenizedDocuments, read: PieceReader, *, length: int, mask_rate: float, batch_tokens: int
    ) -> None:
        """Args:
        length: of a text, in tokens.
        mask_rate: share of the tokens that is predicted.
        batch_tokens: tokens of one packed chunk.
        """
        self.pieces, self.mask_rate, self.batch_tokens = Pieces(documents, length, read), mask_rate, batch_tokens
        self.read, self.length = read, length

    @torch.no_grad()
    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """`eval_loss`, `eval_perplexity`, `eval_accuracy`, and those of the pairs; all processes share the texts."""
        own, counts = own_share(len(self.pieces)), torch.zeros(3, dtype=torch.float64)
        names = list(SUMS)[: 4 if self.read.next_sentence else 2]
        sums = dict.fromkeys(names, torch.zeros((), dtype=torch.float64))
        for start in tqdm(range(own.start, own.stop, 64), desc="evaluating", disable=own.start > 0, leave=False):
            batch = self.batch(range(start, min(start + 64, own.stop)))
            counts += _counts(batch)
            for chunk in batch.chunks:
                sums = _added(sums, {name: value.double().cpu() for name, value in model(chunk.to(device)).items()})
        whole = mean_over_processes(torch.stack([*sums.values(), *counts]).to(device)).cpu()
        counts = _denominators(whole[len(names) :])
        means = {name: whole[number] / counts[SUMS[name]] for number, name in enumerate(names)}
        values = {f"eval_{name}": value.item() for name, value in means.items()}
        loss = _loss(means)
        return {"eval_loss": loss.item(), "eval_perplexity": means["masked_lm_loss"].exp().item()} | values

    def batch(self, numbers: range) -> MaskedBatch:
        """Some of the pieces: the same, masked in the same way, whenever and whoever asks."""
        texts = [
            self.read(self.pieces.documents, self.pieces.segment(n), self.mask_rate, np.random.default_rng((0, n)))
            for n in numbers
        ]
        return mask_batch(texts, self.batch_tokens, self.length, self.mask_rate)


def _counts(batch: MaskedBatch) -> Tensor:
    """`(3,)`: predicted tokens, texts and all tokens, as `SUMS` numbers them."""
    texts = sum(len(chunk.next_labels) for chunk in batch.chunks)
    tokens = sum(chunk.texts.input_ids.numel() for chunk in batch.chunks)
    return torch.tensor([batch.predictions, texts, tokens], dtype=torch.float32, device=batch.chunks[0].labels.device)


def _denominators(mean_counts: Tensor) -> Tensor:
    """Of counts that were averaged over processes: at least one on one of them, so that a mean over nothing is 0."""
    return mean_counts.clamp(min=1 / world_size())


def _loss(parts: dict[str, Tensor], weights: dict[str, float] | None = None) -> Tensor:
    weights = weights or {}
    losses = (weights.get(name, 1.0) * value for name, value in parts.items() if name.endswith("_loss"))
    return sum(losses, torch.tensor(0.0))


def _added(metrics: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: metrics.get(name, 0) + value.detach() for name, value in more.items()}
