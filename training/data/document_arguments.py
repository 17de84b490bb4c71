"""Documents to train on, as scripts take them: where they are, and the pieces that they are cut into."""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from training.data.curriculum import Course, LengthSchedule, RateSchedule
from training.data.masked_batches import (
    MaskedBatches,
    PieceReader,
    TokenizedDocuments,
    epoch_batches,
    tokenize_documents,
)
from training.data.sources import Columns, read_sources
from training.engine.loop import Loop


@dataclass(kw_only=True)
class DocumentArguments:
    """The data."""

    train_data: list[str] = field(
        metadata={
            "help": "path_or_id[:weight] ...: .jsonl, .jsonl.gz, .parquet, a folder of these, or org/name[@config] on "
            "the Hub, with one document a row; the weight says how often an epoch goes through it"
        }
    )
    eval_data: list[str] = field(default_factory=list, metadata={"help": "held-out documents, in the same form"})
    text_column: str = field(default="text", metadata={"help": "the column that holds the documents"})
    sequence_length: list[str] = field(
        default_factory=list,
        metadata={
            "help": "tokens of the pieces that documents are cut into: 4096; phases with their shares of the steps, "
            "128:0.9 512:0.1; or ramp:512-8192:5, in 5 stages; the model's context if not given"
        },
    )
    eval_sequence_length: int | None = field(
        default=None, metadata={"help": "the same for held-out documents; the last training one if not given"}
    )
    per_device_train_tokens: int = field(
        default=65536, metadata={"help": "tokens of one process in a batch, whatever the sequence length"}
    )
    batch_tokens: int = field(default=16384, metadata={"help": "tokens whose activations are held at once"})

    def __post_init__(self) -> None:
        for name in ("per_device_train_tokens", "batch_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0")


def sequence_lengths(arguments: DocumentArguments, context: int, remedy: str) -> LengthSchedule:
    """The lengths of the pieces over the run.

    Args:
        arguments: of the user.
        context: the most tokens that a piece may have.
        remedy: what to do about a longer one.

    Raises:
        UserError: lengths in no known form, or beyond the context.
    """
    lengths = LengthSchedule.parse(arguments.sequence_length or [str(context)])
    for option, length in (
        ("sequence_length", max(lengths.lengths)),
        ("eval_sequence_length", arguments.eval_sequence_length or 1),
    ):
        if length > context:
            raise UserError(f"--{option} {length}: is more than the model's context of {context} tokens; {remedy}")
    return lengths


def documents(
    specifications: list[str], arguments: DocumentArguments, tokenizer: PreTrainedTokenizerBase, loop: Loop
) -> list[TokenizedDocuments]:
    """The sources as token ids, which the main process writes below the output folder and the others read."""
    columns = Columns((arguments.text_column,), None, "texts")
    sources = read_sources(specifications, columns)
    with loop.accelerator.main_process_first():
        return [tokenize_documents(source, tokenizer, loop.output_dir / "tokens") for source in sources]


def document_batches(
    arguments: DocumentArguments,
    read: PieceReader,
    lengths: LengthSchedule,
    mask_rates: RateSchedule,
    tokenizer: PreTrainedTokenizerBase,
    loop: Loop,
) -> MaskedBatches:
    """Return the training data in batches of packed pieces of documents.

    Args:
        arguments: parsed command-line options.
        read: makes masked texts of pieces.
        lengths: length of the pieces over the run.
        mask_rates: fraction of masked tokens over the run.
        tokenizer: of the model.
        loop: of the run.

    Raises:
        UserError: the data cannot be read, or gradients are accumulated over batches.
    """
    if loop.arguments.gradient_accumulation_steps > 1:
        raise UserError(
            "--gradient_accumulation_steps: give more --per_device_train_tokens instead; --batch_tokens of them are "
            "held at once"
        )
    sources = documents(arguments.train_data, arguments, tokenizer, loop)
    processes = loop.accelerator.num_processes
    steps = loop.total_steps(range(epoch_batches(sources, arguments.per_device_train_tokens * processes)))
    return MaskedBatches(
        sources,
        read,
        Course(lengths, mask_rates, steps),
        batch_size=arguments.per_device_train_tokens,
        batch_tokens=arguments.batch_tokens,
        seed=loop.arguments.seed,
        rank=loop.accelerator.process_index,
        world_size=processes,
    )
