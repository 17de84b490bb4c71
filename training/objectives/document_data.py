"""Documents for masked-language-model training and compression, as scripts use them: read, and batched for a run."""

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from training.data.documents.batches import MaskedBatches, epoch_batches
from training.data.documents.curriculum import Curriculum, LengthSchedule, RateSchedule
from training.data.documents.reading import DocumentArguments, read_documents
from training.data.documents.sequences import SequenceReader
from training.data.documents.token_store import TokenizedDocuments
from training.engine.loop import Loop


def document_batches(
    arguments: DocumentArguments,
    tokenizer: PreTrainedTokenizerBase,
    read: SequenceReader,
    lengths: LengthSchedule,
    mask_rates: RateSchedule,
    loop: Loop,
) -> tuple[MaskedBatches, list[TokenizedDocuments]]:
    """Read the documents, and divide those for training into batches.

    Args:
        arguments: parsed command-line options of the data.
        tokenizer: the model's tokenizer.
        read: reads and masks a sequence.
        lengths: schedule of the sequence length.
        mask_rates: schedule of the fraction of the tokens to predict.
        loop: the training loop; its seed, processes and number of steps are used.

    Returns:
        The training batches of this process, and the held-out documents, one value per source.

    Raises:
        UserError: a source cannot be read, gradients are to be accumulated over batches, or see `MaskedBatches`.
    """
    with loop.accelerator.main_process_first():  # the other processes then find its tokens in the cache
        train, held_out = (
            read_documents(names, arguments, tokenizer) for names in (arguments.train_data, arguments.eval_data)
        )
    if loop.arguments.gradient_accumulation_steps > 1:
        raise UserError(
            "--gradient_accumulation_steps: give more --per_device_train_tokens instead; --batch_tokens of them are "
            "held at once"
        )
    world_size = loop.accelerator.num_processes
    steps = loop.total_steps(range(epoch_batches(train, arguments.per_device_train_tokens * world_size)))
    batches = MaskedBatches(
        train,
        read,
        Curriculum(lengths, mask_rates, steps),
        batch_size=arguments.per_device_train_tokens,
        batch_tokens=arguments.batch_tokens,
        seed=loop.arguments.seed,
        rank=loop.accelerator.process_index,
        world_size=world_size,
    )
    return batches, held_out
