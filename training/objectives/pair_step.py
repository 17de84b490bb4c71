"""One step of contrastive training on pairs: the gradient of an objective over the batches of all processes."""

from torch import Tensor, nn

from training.data.pairs.batches import PairBatch
from training.engine.gradient_cache import cached_backward
from training.engine.processes.distributed import gather_rows, gather_uneven_rows, own_rows
from training.engine.training import AccumulateGradient
from training.objectives.contrastive.blocks import GatheredBatch, Metrics
from training.objectives.contrastive.objective import Objective
from training.objectives.contrastive.words import BatchWords
from training.objectives.embed import outputs, with_queries
from training.objectives.guide import Guide
from training.objectives.losses.token_vectors import TokenVectors
from training.objectives.span_penalty import Penalty


def pair_gradient(
    objective: Objective,
    guide: Guide | None = None,
    penalty: Penalty | None = None,
    words: BatchWords | None = None,
) -> AccumulateGradient:
    """Build the gradient of an objective over the batches of all processes.

    Args:
        objective: the contrastive objective.
        guide: a model that detects false negatives.
        penalty: a term of the loss that depends on parameters only.
        words: BM25, if it teaches the one vector.

    Returns:
        The function that the loop calls for each batch.
    """

    arguments = objective.arguments

    def accumulate_gradient(model: nn.Module, batch: PairBatch, scale: float, synchronize: bool) -> Metrics:
        text_ids = gather_rows(by_row(batch.text_ids, batch.pairs))
        classes = {name: gather_rows(ids) for name, ids in batch.classes.items()}
        guide_vectors = None
        if guide is not None:
            assert batch.texts is not None
            guide_vectors = gather_rows(guide(batch.texts, text_ids.device))
        of_words = None
        if words is not None:
            assert batch.texts is not None
            of_words = gather_rows(words(batch.texts).to(text_ids.device))
        key = objective.keys(model, batch)
        if key is not None:
            key = gather_rows(key)

        def loss(embeddings: Tensor, *of_tokens: Tensor) -> tuple[Tensor, Metrics]:
            gathered = gather_rows(by_row(embeddings, batch.pairs))
            tokens = None
            if of_tokens:
                vectors, counts = of_tokens
                tokens = gather_tokens(arguments.for_scoring(vectors, counts, batch.pairs).by_row(batch.pairs))
            rows = own_rows(batch.pairs)
            gathered_batch = GatheredBatch(gathered, text_ids, rows, classes, guide_vectors, key, tokens, of_words)
            value, metrics = objective(gathered_batch)
            if penalty is not None:
                term, measures = penalty()
                value, metrics = value + term, metrics | measures
            return value * scale, metrics

        metrics = cached_backward(
            model,
            list(with_queries(objective.trained_chunks(batch), batch.pairs)),
            lambda part: outputs(model, *part, arguments.reads_tokens),
            loss,
            synchronize=synchronize,
        )
        if key is not None:
            objective.remember(key, text_ids[:, 1])
        return metrics | batch.measures()

    return accumulate_gradient


def by_row(texts: Tensor, pairs: int) -> Tensor:
    """Rearrange the texts of a batch, one column after the other, into rows.

    Args:
        texts: `(columns * pairs, ...)`.
        pairs: number of pairs on this process.

    Returns:
        `(pairs, columns, ...)`.
    """
    return texts.unflatten(0, (-1, pairs)).transpose(0, 1).contiguous()


def gather_tokens(texts: TokenVectors) -> TokenVectors:
    """Return the texts of all processes in process order, differentiable; each process has as many of them."""
    vectors, totals = gather_uneven_rows(texts.vectors)
    if len(totals) == 1:
        return texts
    first, count = gather_rows(texts.first.contiguous()), gather_rows(texts.count.contiguous())
    before = (totals.cumsum(0) - totals).repeat_interleave(len(texts))
    return TokenVectors(vectors, first + before.view(-1, *[1] * (first.ndim - 1)), count)
