"""Pairs for contrastive training, as scripts use them: options, batches and the evaluation on held-out pairs."""

import sys
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.conditions import GIVEN, Not
from common.errors import UserError
from training.data.pairs.batches import PairBatches, PairTokenizer
from training.data.pairs.reading import PairArguments, read_pairs, stream_pairs
from training.data.pairs.streams import StreamedBatches
from training.data.sources import PAIRS, Source, read_sources
from training.engine.held_out import Evaluation
from training.engine.loop import Loop
from training.models.encoder import text_length
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.objective import Objective
from training.objectives.contrastive.registry import objective_columns
from training.objectives.embed import embed_for_scoring
from training.objectives.pair_retrieval import PairRetrieval


@dataclass(kw_only=True)
class ContrastiveArguments(PairArguments):
    """The training and evaluation data."""

    train_data: list[str] = field(
        metadata={
            "help": "training data, path_or_id[:weight] ...: .jsonl, .jsonl.gz, .parquet, a folder of these, or "
            "org/name[@config] on the Hub, with the columns of --pairs; the weight is how often an epoch repeats it"
        }
    )
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "held-out labelled pairs, in the same formats"}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "tokens after which a document is truncated; default: the model's context length"},
    )
    query_max_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens after which a query is truncated; default --max_length",
            "applies": [{"pairs": Not("twins"), "objective": Not("simcse")}, {"eval_data": GIVEN}],
        },
    )
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "number of pairs of a batch on each process", "within": "[1, inf)"}
    )
    batch_tokens: int = field(
        default=16384, metadata={"help": "number of tokens whose activations fit in memory", "within": "[1, inf)"}
    )


def pair_tokenizer(
    arguments: ContrastiveArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PairTokenizer:
    """Build the tokenizer of queries and documents.

    Args:
        arguments: parsed command-line options, with the lengths of queries and documents.
        model: the model, with its prompts and its context length.
        tokenizer: the model's tokenizer.

    Returns:
        A tokenizer that adds prompts and truncates.

    Raises:
        UserError: a length is more than the model's context.
    """
    max_length = text_length("max_length", arguments.max_length, model, tokenizer)
    query_max_length = max_length
    if arguments.query_max_length is not None:
        query_max_length = text_length("query_max_length", arguments.query_max_length, model, tokenizer)
    return PairTokenizer(tokenizer, max_length, query_max_length, model.config.prompts)


def pair_batches(
    arguments: ContrastiveArguments, objective: ObjectiveArguments, tokenize: PairTokenizer, loop: Loop
) -> tuple[PairBatches | StreamedBatches, list[Source]]:
    """Read the training data and divide it into batches with the columns that the objective reads.

    Args:
        arguments: parsed command-line options of the data.
        objective: parsed command-line options of the objective.
        tokenize: tokenizer of queries and documents.
        loop: the training loop; its seed, processes and number of steps are used.

    Returns:
        Batches from memory-mapped data, or with `--streaming` from a stream; and the pairs that `--eval_split` held
        out of them.

    Raises:
        UserError: the data cannot be read, or its options contradict the objective.
    """
    pair_arguments: PairArguments = arguments
    if objective.objective == "simcse":
        if arguments.pairs not in ("columns", "twins"):
            raise UserError(
                f"--pairs {arguments.pairs}: the pairs of --objective simcse are twins; use another objective"
            )
        if arguments.pairs == "columns":
            pair_arguments = replace(arguments, pairs="twins", text_column=arguments.anchor_column)

    def log(line: str) -> None:
        if loop.is_main:
            print(line, file=sys.stderr)

    options: dict[str, Any] = {
        "batch_size": arguments.per_device_train_batch_size,
        "batch_tokens": arguments.batch_tokens,
        "seed": loop.arguments.seed,
        "rank": loop.accelerator.process_index,
        "world_size": loop.accelerator.num_processes,
        "keep_texts": objective.guide_model is not None or objective.teach_bm25_weight > 0,
    }
    columns = objective_columns(objective)
    if arguments.streaming:
        if loop.arguments.max_steps <= 0:
            raise UserError("--streaming: how long an epoch is is not known; give --max_steps")
        streams = stream_pairs(arguments.train_data, pair_arguments, columns, tokenize)
        length = loop.total_batches(loop.arguments.max_steps)
        return StreamedBatches(streams, tokenize, length=length, buffer=arguments.shuffle_buffer, **options), []
    main_first = loop.accelerator.main_process_first()
    sources, held_out = read_pairs(arguments.train_data, pair_arguments, columns, tokenize, log, main_first)
    return PairBatches(sources, tokenize, **options), held_out


def pair_retrieval(
    arguments: ContrastiveArguments,
    objective: Objective,
    batches: PairBatches | StreamedBatches,
    held_out: list[Source],
    loop: Loop,
) -> Evaluation[PairRetrieval]:
    """Build the evaluation of a model on each source of `--eval_data`, and on what `--eval_split` held out.

    Its loss is InfoNCE at the temperature of the objective, whatever the objective is; texts
    are compared as in training.

    Args:
        arguments: parsed command-line options of the data.
        objective: the objective in training.
        batches: the training batches; the evaluation uses their tokenizer and their size.
        held_out: pairs that were held out of the training data.
        loop: the training loop.

    Returns:
        The evaluation; without `--eval_data` and `--eval_split` on nothing.
    """
    sources = [*read_sources(arguments.eval_data, arguments.renamed(PAIRS)), *held_out]
    retrievals = {
        source.name: PairRetrieval(
            source, batches.tokenize, batch_size=batches.global_batch_size, batch_tokens=arguments.batch_tokens
        )
        for source in sources
    }

    def evaluate(retrieval: PairRetrieval, model: nn.Module) -> dict[str, float]:
        device = loop.accelerator.device
        arguments, temperature = objective.arguments, float(objective.temperature())
        return retrieval(lambda chunk, kind: embed_for_scoring(model, chunk.to(device), kind, arguments), temperature)

    def contents() -> list[str]:
        return [source.content(source.text_ids(source.columns)) for source in sources]

    return Evaluation(retrievals, evaluate, contents)
