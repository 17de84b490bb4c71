"""MaxSim of a query with documents whose token vectors are codes, without decoding them in full.

The codes stay memory-mapped; those of the candidates are unpacked some at a time.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from modeling_longembed.output_maxsim_longembed import maxsim
from modeling_longembed.output_token_codes_longembed import TokenCodec

# Token vectors that are unpacked at a time.
TOKENS_AT_A_TIME = 1 << 16


class TokenScores:
    """MaxSim with a query.

    Args:
        codec: that made the codes.
        query: `(t, k)`, the token vectors of the query.
    """

    def __init__(self, codec: TokenCodec, query: Tensor):
        self.codec = codec
        self.query, self.constants = codec.prepare(query.float())

    def of_documents(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """Return the MaxSim of each document, `(n,)` float32; 0 for one without token vectors.

        Args:
            documents: the codes of each.
        """
        scores = np.zeros(len(documents), np.float32)
        for places in _runs(documents):
            run = [documents[place] for place in places]
            lengths = torch.tensor([0, *map(len, run)])
            vectors = self.codec.numbers(torch.from_numpy(np.concatenate(run)))
            found = maxsim(self.query, torch.tensor([0, len(self.query)]), vectors, lengths.cumsum(0))[0]
            scores[places] = (found + self.constants.sum()).numpy()
        return scores

    def of_passages(self, document: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """Return the MaxSim of each passage of a document, `(p,)` float32; minus infinity if it has no token vectors.

        Args:
            document: the codes of the document, `(t, ...)`.
            passages: `(p, 2)`, first row of each passage in it and the one after its last.
        """
        scores = np.full(len(passages), -np.inf, np.float32)
        if len(document) and len(self.query):
            products = torch.cat(
                [
                    # A copy, because a memory-mapped array cannot be written to, which torch warns of.
                    self.query @ self.codec.numbers(torch.tensor(document[start : start + TOKENS_AT_A_TIME])).T
                    for start in range(0, len(document), TOKENS_AT_A_TIME)
                ],
                dim=1,
            )
            for place, (start, end) in enumerate(passages.tolist()):
                if end > start:
                    scores[place] = float((products[:, start:end].amax(1) + self.constants).sum())
        return scores


def _runs(documents: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Yield the places of documents with vectors in runs of at most `TOKENS_AT_A_TIME`; a longer one is a run alone."""
    run: list[int] = []
    size = 0
    for place, codes in enumerate(documents):
        if run and size + len(codes) > TOKENS_AT_A_TIME:
            yield run
            run, size = [], 0
        if len(codes):
            run.append(place)
            size += len(codes)
    if run:
        yield run
