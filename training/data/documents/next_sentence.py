"""Next-sentence prediction: pairs of segments from documents, and the head that classifies them."""

from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

IS_NEXT, NOT_NEXT = 0, 1  # transformers' labels in BertForNextSentencePrediction


class Segment(NamedTuple):
    """Tokens `start` to `stop` of a document, which is given by its number in its source."""

    document: int
    start: int
    stop: int


def draw_pair(sequence: Segment, lengths: np.ndarray, generator: np.random.Generator) -> tuple[Segment, Segment, int]:
    """Draw segments A and B for next-sentence prediction (Devlin et al. 2019, arXiv:1810.04805, section 3.1).

    A is the beginning of the sequence, up to a random place. With probability 1/2 B is the rest of the sequence;
    otherwise it is a span of another document, as long as that rest, at a random place, or all of a shorter document.
    So A and B together are never longer than the sequence, and their lengths do not reveal the label.

    Args:
        sequence: of at least 2 tokens.
        lengths: tokens of each document, at least one token and 2 documents.
        generator: source of all randomness.

    Returns:
        A, B, and the label: 0 if B follows A, 1 if it is from another document.
    """
    cut = int(generator.integers(sequence.start + 1, sequence.stop))
    first = Segment(sequence.document, sequence.start, cut)
    if generator.random() < 0.5:
        return first, Segment(sequence.document, cut, sequence.stop), IS_NEXT
    other = int(generator.integers(len(lengths) - 1))
    other += other >= sequence.document
    size = min(sequence.stop - cut, int(lengths[other]))
    start = int(generator.integers(lengths[other] - size + 1))
    return first, Segment(other, start, start + size), NOT_NEXT


class NextSentenceHead(nn.Module):
    """Classify pairs as BERT does: a dense layer, tanh, and two scores.

    Args:
        hidden_size: width of the states, d.
        initializer_range: standard deviation of the initial weights.
    """

    def __init__(self, hidden_size: int, initializer_range: float) -> None:
        super().__init__()
        self.dense, self.classifier = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, 2)
        for linear in (self.dense, self.classifier):
            nn.init.normal_(linear.weight, std=initializer_range)
            nn.init.zeros_(linear.bias)

    def forward(self, first_states: Tensor) -> Tensor:
        """Return the scores, `(n, 2)`, given the states of the first tokens, `(n, d)`."""
        return self.classifier(self.dense(first_states).tanh())
