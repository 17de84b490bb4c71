"""Documents to train on: the options of a script that reads them, and the sources that these name."""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from common.conditions import GIVEN
from common.errors import UserError
from training.data.documents.curriculum import LengthSchedule
from training.data.documents.token_store import TokenizedDocuments, tokenize_documents
from training.data.sources import Columns, read_sources


@dataclass(kw_only=True)
class DocumentArguments:
    """The documents, and how they are batched."""

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
        metadata={
            "help": "sequence length of held-out documents; the last one of training by default",
            "within": "[1, inf)",
            "applies": {"eval_data": GIVEN},
        },
    )
    per_device_train_tokens: int = field(
        default=65536,
        metadata={"help": "tokens per batch and process, whatever the sequence length", "within": "[1, inf)"},
    )
    batch_tokens: int = field(
        default=16384,
        metadata={"help": "tokens per forward pass, whose activations are in memory at once", "within": "[1, inf)"},
    )


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
