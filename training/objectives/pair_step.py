"""Contrastive training on pairs, as scripts take it: arguments, data, gradient, evaluation."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError
from training.data.pair_batches import PairBatch, PairBatches, PairTokenizer
from training.data.pairs import PairArguments, read_pairs, stream_pairs
from training.data.sources import PAIRS, read_sources
from training.data.streams import StreamedBatches
from training.engine.distributed import gather_rows, own_rows
from training.engine.gradient_cache import cached_backward
from training.engine.held_out import by_source
from training.engine.loop import AccumulateGradient, Loop
from training.models.encoder import text_length
from training.objectives.contrastive import GatheredBatch, Objective, ObjectiveArguments
from training.objectives.embed import embed, pool
from training.objectives.guide import Guide
from training.objectives.pair_retrieval import PairRetrieval
from training.objectives.span_penalty import Penalty


@dataclass(kw_only=True)
class ContrastiveArguments(PairArguments):
    """The data."""

    train_data: list[str] = field(
        metadata={
            "help": "path_or_id[:weight] ...: .jsonl, .jsonl.gz, .parquet, a folder of these, or org/name[@config] on "
            "the Hub, with the columns of --pairs; the weight says how often an epoch goes through it"
        }
    )
    eval_data: list[str] = field(default_factory=list, metadata={"help": "held-out labelled pairs, in the same forms"})
    max_length: int | None = field(
        default=None, metadata={"help": "tokens at which a document is cut off; the model's context if not given"}
    )
    query_max_length: int | None = field(
        default=None, metadata={"help": "the same for queries; --max_length if not given"}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "pairs of one process in a batch"})
    batch_tokens: int = field(default=16384, metadata={"help": "tokens whose activations are held at once"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("per_device_train_batch_size", "batch_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0")


def pair_tokenizer(
    arguments: ContrastiveArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PairTokenizer:
    """How a model reads pairs.

    Raises:
        UserError: its context is shorter than asked for.
    """
    max_length = text_length("max_length", arguments.max_length, model, tokenizer)
    query_max_length = max_length
    if arguments.query_max_length is not None:
        query_max_length = text_length("query_max_length", arguments.query_max_length, model, tokenizer)
    return PairTokenizer(tokenizer, max_length, query_max_length, model.config.prompts)


def pair_batches(
    arguments: ContrastiveArguments, objective: ObjectiveArguments, tokenize: PairTokenizer, loop: Loop
) -> PairBatches | StreamedBatches:
    """The training data, as the loop takes it and the objective reads it."""
    given: PairArguments = arguments
    if objective.objective == "simcse":
        if arguments.pairs not in ("columns", "twins"):
            raise UserError(
                f"--pairs {arguments.pairs}: the pairs of --objective simcse are twins; use another objective"
            )
        if arguments.pairs == "columns":
            given = replace(arguments, pairs="twins", text_column=arguments.anchor_column)

    def say(line: str) -> None:
        if loop.is_main:
            print(line, file=sys.stderr)

    options: dict[str, Any] = {
        "batch_size": arguments.per_device_train_batch_size,
        "batch_tokens": arguments.batch_tokens,
        "seed": loop.arguments.seed,
        "rank": loop.accelerator.process_index,
        "world_size": loop.accelerator.num_processes,
        "keep_texts": objective.guide_model is not None,
    }
    if arguments.streaming:
        if loop.arguments.max_steps <= 0:
            raise UserError("--streaming: how long an epoch is is not known; give --max_steps")
        streams = stream_pairs(arguments.train_data, given, objective.columns, tokenize)
        length = loop.arguments.max_steps * loop.arguments.gradient_accumulation_steps
        return StreamedBatches(streams, tokenize, length=length, buffer=arguments.shuffle_buffer, **options)
    with loop.accelerator.main_process_first():  # what it has tokenised the others find
        sources = read_pairs(arguments.train_data, given, objective.columns, tokenize, say)
    return PairBatches(sources, tokenize, **options)


def pair_retrieval(
    arguments: ContrastiveArguments, objective: Objective, batches: PairBatches | StreamedBatches, loop: Loop
) -> Callable[[nn.Module], dict[str, float]] | None:
    """The evaluation of a model on each source of `--eval_data`; None if there is none.

    Its loss is InfoNCE at the temperature of the objective, whatever the objective.
    """
    retrievals = {
        source.name: PairRetrieval(
            source, batches.tokenize, batch_size=batches.global_batch_size, batch_tokens=arguments.batch_tokens
        )
        for source in read_sources(arguments.eval_data, arguments.renamed(PAIRS))
    }

    def evaluate(retrieval: PairRetrieval, model: nn.Module) -> dict[str, float]:
        device = loop.accelerator.device
        return retrieval(lambda chunk: embed(model, chunk.to(device)), float(objective.temperature()))

    return by_source(retrievals, evaluate)


def load_guide(arguments: ContrastiveArguments, objective: ObjectiveArguments) -> Guide | None:
    """The model that tells false negatives, if one is asked for."""
    return None if objective.guide_model is None else Guide(objective.guide_model, arguments.batch_tokens)


def pair_gradient(
    objective: Objective, guide: Guide | None = None, penalty: Penalty | None = None
) -> AccumulateGradient:
    """The gradient of an objective over the batches of all processes, and maybe of a penalty on parameters."""

    def accumulate_gradient(model: nn.Module, batch: PairBatch, scale: float, synchronize: bool) -> dict[str, Tensor]:
        text_ids = gather_rows(by_row(batch.text_ids, batch.pairs))
        classes = {name: gather_rows(ids) for name, ids in batch.classes.items()}
        guiding = None
        if guide is not None:
            assert batch.texts is not None
            guiding = gather_rows(guide(batch.texts, text_ids.device))
        key = objective.keys(model, batch)
        if key is not None:
            key = gather_rows(key)

        def loss(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            gathered = gather_rows(by_row(embeddings, batch.pairs))
            value, metrics = objective(GatheredBatch(gathered, text_ids, own_rows(batch.pairs), classes, guiding, key))
            if penalty is not None:
                term, measures = penalty()
                value, metrics = value + term, metrics | measures
            return value * scale, metrics

        metrics = cached_backward(
            model, objective.trained_chunks(batch), lambda chunk: pool(model, chunk), loss, synchronize=synchronize
        )
        if key is not None:
            objective.remember(key, text_ids[:, 1])
        return metrics | batch.measures()

    return accumulate_gradient


def by_row(texts: Tensor, pairs: int) -> Tensor:
    """What belongs to the texts of a batch, all of a column after another, as `(pairs, columns, ...)`."""
    return texts.unflatten(0, (-1, pairs)).transpose(0, 1).contiguous()
