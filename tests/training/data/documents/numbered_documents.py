"""Documents for tests, of which every token tells its document and its place."""

import datasets
import numpy as np

from training.data.documents.masking import Masking
from training.data.documents.sequences import SequenceReader, SpecialTokens
from training.data.documents.token_store import TokenizedDocuments

SPECIAL = SpecialTokens((2,), (3,))
MASKING = Masking(4, tuple(range(5)), 31)
READ, READ_PAIRS = SequenceReader(SPECIAL, MASKING), SequenceReader(SPECIAL, MASKING, next_sentence=True)


def numbered_documents(lengths, name="documents", weight=1.0) -> TokenizedDocuments:
    """Documents of these lengths; token n of document d is 1000 d + n + 10, and starts a word."""
    ids = [1000 * document + np.arange(length) + 10 for document, length in enumerate(lengths)]
    starts = [np.ones(length, bool) for length in lengths]
    return TokenizedDocuments(datasets.Dataset.from_dict({"input_ids": ids, "starts_word": starts}), name, weight)
