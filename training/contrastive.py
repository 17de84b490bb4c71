"""Contrastive training of a LongEmbed model on pairs of texts.

accelerate launch training/contrastive.py --config training/recipes/contrastive.yaml \\
    --model_name_or_path MODEL --train_data pairs.jsonl --output_dir runs/mine
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_folder
from modeling_longembed import LongEmbedModel  # registers the Auto classes, so that our own folders need no remote code
from training.batches import PackedTexts, PairBatch, PairBatches, PairTokenizer
from training.data import read_sources
from training.distributed import gather_rows, own_rows
from training.gradient_cache import cached_backward
from training.loop import AccumulateGradient, Loop, LoopArguments
from training.losses.contrastive import info_nce
from training.spans import Penalty, SpanArguments, span_groups, span_penalty
from training.tuning import TuningArguments, save_adapter, select_parameters
from training.validation import PairRetrieval


@dataclass
class ModelArguments:
    """The model to train."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of a LongEmbed model"})
    model_revision: str = field(default="main", metadata={"help": "revision of a model on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code in the model's folder, not ours"})
    dropout: float | None = field(default=None, metadata={"help": "of hidden states; the model's own if not given"})
    max_length: int | None = field(
        default=None, metadata={"help": "tokens at which a document is cut off; the model's context if not given"}
    )
    query_max_length: int | None = field(
        default=None, metadata={"help": "the same for queries; --max_length if not given"}
    )


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
    per_device_train_batch_size: int = field(default=64, metadata={"help": "pairs of one process in a batch"})
    batch_tokens: int = field(default=16384, metadata={"help": "tokens whose activations are held at once"})
    temperature: float = field(default=0.05, metadata={"help": "similarities are divided by it"})
    symmetric: bool = field(default=False, metadata={"help": "also find the query of a document"})

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "batch_tokens", "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0")


@dataclass
class HubArguments:
    """Where the final model is published."""

    push_to_hub: bool = field(default=False, metadata={"help": "upload the final model"})
    hub_model_id: str | None = field(default=None, metadata={"help": "where to: org/name"})
    hub_private_repo: bool = field(default=True, metadata={"help": "whether a repository that is made is private"})

    def __post_init__(self) -> None:
        if self.push_to_hub and not self.hub_model_id:
            raise UserError("--push_to_hub needs --hub_model_id org/name")


def main(argv: Sequence[str] | None = None) -> None:
    """Train; `argv` is the process's own if None."""
    model_arguments, arguments, tuning, spans, loop_arguments, hub = parse(
        ModelArguments, ContrastiveArguments, TuningArguments, SpanArguments, LoopArguments, HubArguments, argv=argv
    )
    loop = Loop(loop_arguments)
    model, tokenize = load(model_arguments)
    batches = pair_batches(arguments, tokenize, loop)
    evaluate = pair_retrieval(arguments, batches, loop)
    selected = select_parameters(model, tuning)
    trained = loop.run(
        selected,
        batches,
        pair_gradient(arguments, span_penalty(model, spans)),
        evaluate,
        span_groups(model, spans, loop_arguments.weight_decay),
    )
    if loop.is_main:
        output_dir = Path(loop_arguments.output_dir).absolute()
        final = save(trained, tuning, output_dir, title=hub.hub_model_id or output_dir.name)
        if hub.push_to_hub:
            push(final, hub.hub_model_id, hub.hub_private_repo)


def load(arguments: ModelArguments) -> tuple[PreTrainedModel, PairTokenizer]:
    """The model and how it reads pairs.

    Raises:
        UserError: there is no such model, it is none of ours, or its context is shorter than asked for.
    """
    name = arguments.model_name_or_path
    options: dict[str, Any] = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    overrides = {} if arguments.dropout is None else {"hidden_dropout_prob": arguments.dropout}
    try:
        model = AutoModel.from_pretrained(name, dtype=torch.float32, **options, **overrides)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {name}: {' '.join(str(error).split())}") from None
    if model.config.model_type != LongEmbedModel.config_class.model_type:
        raise UserError(
            f"--model_name_or_path {name}: is a {model.config.model_type} model; convert it with "
            "LongEmbedModel.from_encoder(...) and save_pretrained first"
        )
    context = model.config.max_position_embeddings
    max_length = context if arguments.max_length is None else arguments.max_length
    query_max_length = max_length if arguments.query_max_length is None else arguments.query_max_length
    for option, length in (("max_length", max_length), ("query_max_length", query_max_length)):
        if not tokenizer.num_special_tokens_to_add() < length <= context:
            raise UserError(
                f"--{option} {length}: must be at most {context}, the context of {name} in tokens, and leave room "
                "for text"
            )
    return model, PairTokenizer(tokenizer, max_length, query_max_length, model.config.prompts)


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


def save(model: PreTrainedModel | PeftModel, tuning: TuningArguments, output_dir: Path, title: str) -> Path:
    """Write the model to `output_dir/final`; a LoRA one merged, and its adapter to `output_dir/adapter`."""
    if isinstance(model, PeftModel):
        with atomic_folder(output_dir / "adapter") as folder:
            save_adapter(model, tuning.tuning, folder)
        model = model.merge_and_unload()
    with atomic_folder(output_dir / "final") as folder:
        model.eval().save_pretrained(str(folder), title=title)  # with its tokenizer
    return output_dir / "final"


def push(final: Path, repository: str, private: bool) -> None:
    """Upload the final folder as it stands."""
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=final)
    except (OSError, ValueError) as error:
        raise UserError(f"{repository}: upload failed, the model is in {final}: {error}") from None


if __name__ == "__main__":
    run(main)
