"""Next-sentence prediction: pairs of segments from documents, and the head that tells which belong together."""

from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

IS_NEXT, NOT_NEXT = 0, 1  # transformers' labels in BertForNextSentencePrediction


class Segment(NamedTuple):
    """Tokens `start` to `stop` of a document."""

    document: int
    start: int
    stop: int


def draw_pair(piece: Segment, lengths: np.ndarray, generator: np.random.Generator) -> tuple[Segment, Segment, int]:
    """A and B of next-sentence prediction (Devlin et al. 2019, arXiv:1810.04805, section 3.1).

    A is the beginning of the piece, up to a random place. In half of the cases B is the rest of the piece, otherwise as
    many tokens, from a random place, of another document, or all of a shorter one: together they never exceed the
    piece, and their lengths do not give the answer away.

    Args:
        piece: at least 2 tokens.
        lengths: tokens of each document, at least one and of at least 2 documents.
        generator: where all randomness comes from.

    Returns:
        A, B, and the label: 0 if B follows A, 1 if it is from another document.
    """
    cut = int(generator.integers(piece.start + 1, piece.stop))
    first = Segment(piece.document, piece.start, cut)
    if generator.random() < 0.5:
        return first, Segment(piece.document, cut, piece.stop), IS_NEXT
    other = int(generator.integers(len(lengths) - 1))
    other += other >= piece.document
    size = min(piece.stop - cut, int(lengths[other]))
    start = int(generator.integers(lengths[other] - size + 1))
    return first, Segment(other, start, start + size), NOT_NEXT


class NextSentenceHead(nn.Module):
    """BERT's: dense, tanh, and two scores of the state of the first token, `(n, d)` to `(n, 2)`."""

    def __init__(self, hidden_size: int, initializer_range: float) -> None:
        super().__init__()
        self.dense, self.classifier = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, 2)
        for linear in (self.dense, self.classifier):
            nn.init.normal_(linear.weight, std=initializer_range)
            nn.init.zeros_(linear.bias)

    def forward(self, first_states: Tensor) -> Tensor:
        return self.classifier(self.dense(first_states).tanh())
