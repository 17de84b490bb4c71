"""Documents to train on: the options of a script that reads them, and the sources that these name."""

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from training.data.curriculum import Curriculum, LengthSchedule, RateSchedule
from training.data.masked_batches import MaskedBatches, epoch_batches
from training.data.sequences import SequenceReader
from training.data.sources import Columns, read_sources
from training.data.token_store import TokenizedDocuments, tokenize_documents


@dataclass(kw_only=True)
class DocumentArguments:
    """The documents, and how they are batched.

    Raises:
        UserError: a number of tokens is not positive.
    """

    train_data: list[str] = field(
        metadata={
            "help": "training documents, one per row: path_or_id[:weight] ..., each a .jsonl, .jsonl.gz or .parquet "
            "file, a folder of these, or org/name[@config] on the Hub; the weight is how often an epoch goes through it"
        }
    )
    eval_data: list[str] = field(default_factory=list, metadata={"help": "held-out documents, in the same format"})
    text_column: str = field(default="text", metadata={"help": "column of the documents"})
    sequence_length: list[str] = field(
        default_factory=list,
        metadata={
            "help": "length in tokens of the sequences that documents are split into: one number (4096), phases with "
            "their shares of the steps (128:0.9 512:0.1), or a ramp (ramp:512-8192:5, five stages); the model's "
            "context by default"
        },
    )
    eval_sequence_length: int | None = field(
        default=None,
        metadata={"help": "sequence length of held-out documents; the last one of training by default"},
    )
    per_device_train_tokens: int = field(
        default=65536, metadata={"help": "tokens per batch and process, whatever the sequence length"}
    )
    batch_tokens: int = field(
        default=16384, metadata={"help": "tokens per forward pass, whose activations are in memory at once"}
    )

    def __post_init__(self) -> None:
        for name in ("per_device_train_tokens", "batch_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0")


def sequence_lengths(arguments: DocumentArguments, context: int, remedy: str) -> LengthSchedule:
    """Read the schedule of the sequence length from the options.

    Args:
        arguments: parsed command-line options.
        context: the longest sequence that the model can read, in tokens.
        remedy: advice for the error about a longer one.

    Returns:
        The schedule; the context throughout if no length is given.

    Raises:
        UserError: lengths in an unknown format, or beyond the context.
    """
    lengths = LengthSchedule.parse(arguments.sequence_length or [str(context)])
    for option, length in (
        ("sequence_length", max(lengths.lengths)),
        ("eval_sequence_length", arguments.eval_sequence_length or 1),
    ):
        if length > context:
            raise UserError(f"--{option} {length}: is more than the model's context of {context} tokens; {remedy}")
    return lengths


def read_documents(
    specifications: list[str], arguments: DocumentArguments, tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedDocuments]:
    """Read and tokenise documents.

    With several processes the main one has to come first: the others then find its tokens in the cache.

    Args:
        specifications: the sources, in the format of `read_sources`.
        arguments: parsed command-line options.
        tokenizer: the model's.

    Returns:
        One value per source.

    Raises:
        UserError: a source cannot be read, or has no tokens.
    """
    sources = read_sources(specifications, Columns((arguments.text_column,), None, "texts"))
    return [tokenize_documents(source, tokenizer) for source in sources]


def document_batches(
    sources: Sequence[TokenizedDocuments],
    arguments: DocumentArguments,
    read: SequenceReader,
    lengths: LengthSchedule,
    mask_rates: RateSchedule,
    total_steps: Callable[[Sized], int],
    *,
    accumulation_steps: int,
    seed: int,
    rank: int,
    world_size: int,
) -> MaskedBatches:
    """Batch training documents for a run.

    Args:
        sources: the documents.
        arguments: parsed command-line options.
        read: reads and masks a sequence.
        lengths: schedule of the sequence length.
        mask_rates: schedule of the fraction of the tokens to predict.
        total_steps: returns the number of steps of the run, given the batches of an epoch.
        accumulation_steps: batches per step.
        seed: random seed.
        rank: number of this process.
        world_size: number of processes.

    Returns:
        The batches of this process.

    Raises:
        UserError: gradients are to be accumulated over batches, or see `MaskedBatches`.
    """
    if accumulation_steps > 1:
        raise UserError(
            "--gradient_accumulation_steps: give more --per_device_train_tokens instead; --batch_tokens of them are "
            "held at once"
        )
    steps = total_steps(range(epoch_batches(sources, arguments.per_device_train_tokens * world_size)))
    return MaskedBatches(
        list(sources),
        read,
        Curriculum(lengths, mask_rates, steps),
        batch_size=arguments.per_device_train_tokens,
        batch_tokens=arguments.batch_tokens,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
