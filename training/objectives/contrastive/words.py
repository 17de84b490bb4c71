"""BM25 of the texts of a batch, which teaches the one vector beside late interaction."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import UserError
from training.data.pairs.batches import PairBatches
from training.data.pairs.streams import StreamedBatches
from training.data.sources import Source, text_id
from training.engine.processes.distributed import gather_values, own_rows, world_size

if TYPE_CHECKING:
    from training.objectives.contrastive.corpus_words import CorpusWords

DOCUMENTS_AT_ONCE = 64  # whose words are in memory


class BatchWords:
    """BM25 of the queries of this process with the documents of all processes.

    Args:
        corpus: how often words are in the documents of the training data.
    """

    def __init__(self, corpus: "CorpusWords") -> None:
        self.corpus = corpus

    def __call__(self, columns: list[list[str]]) -> Tensor:
        """Score the texts of a batch, which are read whole, whatever the model truncates.

        Args:
            columns: for each column its n texts of this process; the first column holds queries, the others documents.

        Returns:
            float32 `(n, documents)`: one column after the other, each in the order of the processes.
        """
        of_processes = gather_values(columns[1:])
        documents = [text for column in zip(*of_processes, strict=True) for part in column for text in part]
        return torch.from_numpy(self.corpus.scores(columns[0], documents))


def read_words(sources: Sequence[Source]) -> "CorpusWords":
    """Count the words of the documents of training data; the processes share the work.

    Args:
        sources: the data. Pairs that are made from documents are scored as parts of these.

    Returns:
        How often words are in the documents, each distinct text counted once.

    Raises:
        UserError: bm25s is not installed, or no document has a word.
    """
    try:
        from training.objectives.contrastive.corpus_words import CorpusWords
    except ImportError:
        raise UserError("--teach_bm25_weight needs bm25s: pip install -e '.[search]'") from None
    own, seen, rank, processes = CorpusWords(), set[int](), own_rows(1).start, world_size()
    for source in sources:
        columns = list(dict.fromkeys(source.columns[1:] or source.columns))
        for rows in source.rows.select_columns(columns).iter(DOCUMENTS_AT_ONCE):
            texts = {text_id(text): text for column in columns for text in rows[column]}
            # All texts that are equal belong to one process.
            mine = [number for number in texts if number % processes == rank and number not in seen]
            seen.update(mine)
            own.add([texts[number] for number in mine])
    corpus = CorpusWords()
    for part in gather_values(own):
        corpus.include(part)
    if not corpus.words:
        raise UserError(
            f"--teach_bm25_weight: none of the {corpus.texts} documents has a word of two letters or more that is no "
            "stop word; leave it out"
        )
    return corpus


def load_words(weight: float, batches: PairBatches | StreamedBatches) -> BatchWords | None:
    """Return BM25 for `--teach_bm25_weight`, with the words of the training data; None at 0, where nothing is read.

    Args:
        weight: of the option, which streams refuse.
        batches: the training data.
    """
    if not weight:
        return None
    assert isinstance(batches, PairBatches)
    return BatchWords(read_words(batches.sources))
