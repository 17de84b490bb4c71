"""Contrastive training on pairs, as scripts take it: arguments, data, objective, evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError
from training.batches import PackedTexts, PairBatch, PairBatches, PairTokenizer
from training.data import read_sources
from training.distributed import gather_rows, own_rows
from training.gradient_cache import cached_backward
from training.loop import AccumulateGradient, Loop
from training.losses.contrastive import info_nce
from training.spans import Penalty
from training.validation import PairRetrieval


@dataclass
class ContrastiveArguments:
    """The data and the objective."""

    train_data: list[str] = field(
        metadata={
            "help": "path_or_id[:weight] ...: .jsonl, .jsonl.gz, .parquet, a folder of these, or org/name[@config] on "
            "the Hub, with columns anchor, positive[, negative...]; the weight says how often an epoch goes through it"
        }
    )
    eval_data: list[str] = field(default_factory=list, metadata={"help": "held-out pairs, in the same form"})
    max_length: int | None = field(
        default=None, metadata={"help": "tokens at which a document is cut off; the model's context if not given"}
    )
    query_max_length: int | None = field(
        default=None, metadata={"help": "the same for queries; --max_length if not given"}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "pairs of one process in a batch"})
    batch_tokens: int = field(default=16384, metadata={"help": "tokens whose activations are held at once"})
    temperature: float = field(default=0.05, metadata={"help": "similarities are divided by it"})
    symmetric: bool = field(default=False, metadata={"help": "also find the query of a document"})

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "batch_tokens", "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0")


def pair_tokenizer(
    arguments: ContrastiveArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PairTokenizer:
    """How a model reads pairs.

    Raises:
        UserError: its context is shorter than asked for.
    """
    context = model.config.max_position_embeddings
    max_length = context if arguments.max_length is None else arguments.max_length
    query_max_length = max_length if arguments.query_max_length is None else arguments.query_max_length
    for option, length in (("max_length", max_length), ("query_max_length", query_max_length)):
        if not tokenizer.num_special_tokens_to_add() < length <= context:
            raise UserError(
                f"--{option} {length}: must be at most {context}, the context of {model.name_or_path} in tokens, and "
                "leave room for text"
            )
    return PairTokenizer(tokenizer, max_length, query_max_length, model.config.prompts)


def pair_batches(arguments: ContrastiveArguments, tokenize: PairTokenizer, loop: Loop) -> PairBatches:
    """The training data, as the loop takes it."""
    return PairBatches(
        read_sources(arguments.train_data),
        tokenize,
        batch_size=arguments.per_device_train_batch_size,
        batch_tokens=arguments.batch_tokens,
        seed=loop.arguments.seed,
        rank=loop.accelerator.process_index,
        world_size=loop.accelerator.num_processes,
    )


def pair_retrieval(
    arguments: ContrastiveArguments, batches: PairBatches, loop: Loop
) -> Callable[[nn.Module], dict[str, float]] | None:
    """The evaluation of a model on each source of `--eval_data`; None if there is none."""
    retrievals = {
        source.name: PairRetrieval(
            source, batches.tokenize, batch_size=batches.global_batch_size, batch_tokens=arguments.batch_tokens
        )
        for source in read_sources(arguments.eval_data)
    }

    def evaluate(model: nn.Module) -> dict[str, float]:
        device = loop.accelerator.device
        results = {
            name: retrieval(lambda chunk: embed(model, chunk.to(device)), arguments.temperature)
            for name, retrieval in retrievals.items()
        }
        if len(results) == 1:
            return next(iter(results.values()))
        return {f"{metric}/{name}": value for name, values in results.items() for metric, value in values.items()}

    return evaluate if retrievals else None


def pair_gradient(arguments: ContrastiveArguments, penalty: Penalty | None = None) -> AccumulateGradient:
    """The objective: InfoNCE over the pairs of a batch, on all processes, and maybe a penalty on parameters."""

    def accumulate_gradient(model: nn.Module, batch: PairBatch, scale: float, synchronize: bool) -> dict[str, Tensor]:
        def loss(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            sizes = [batch.pairs, batch.pairs, len(embeddings) - 2 * batch.pairs]
            # Columns are gathered one by one: all positives come before all negatives, on every process.
            query, positive, negative = (gather_rows(rows) for rows in embeddings.split(sizes))
            query_id, positive_id, negative_id = (gather_rows(ids) for ids in batch.text_ids.split(sizes))
            value, metrics = info_nce(
                query,
                positive,
                negative,
                temperature=arguments.temperature,
                symmetric=arguments.symmetric,
                query_id=query_id,
                positive_id=positive_id,
                negative_id=negative_id,
                rows=own_rows(batch.pairs),
            )
            metrics |= {"loss": value.detach()}
            if penalty is not None:
                term, measures = penalty()
                value, metrics = value + term, metrics | measures
            return value * scale, metrics

        metrics = cached_backward(model, batch.chunks, lambda chunk: embed(model, chunk), loss, synchronize=synchronize)
        return metrics | batch.measures()

    return accumulate_gradient


def embed(model: nn.Module, chunk: PackedTexts) -> Tensor:
    """Unit vectors of packed texts, `(n, d)`."""
    output = model(
        input_ids=chunk.input_ids, cu_seq_lens_q=chunk.cu_seq_lens_q, max_length_q=chunk.max_length_q
    ).pooler_output
    return F.normalize(output, dim=-1)
