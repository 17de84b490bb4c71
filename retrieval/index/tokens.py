"""MaxSim of a query with documents whose token vectors are codes, without decoding them in full.

The codes stay memory-mapped; those of the candidates are unpacked some at a time, or looked up as they are.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from modeling_longembed.output_maxsim_longembed import maxsim
from modeling_longembed.output_token_codes_longembed import TokenCodec
from retrieval.index.token_bits import TokenBits, nearest_tokens

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

    def of_documents(self, documents: Sequence[np.ndarray | TokenBits]) -> np.ndarray:
        """Return the MaxSim of each document, `(n,)` float32; 0 for one without token vectors.

        With codes of one bit a dimension it may be too small, by what `nearest_tokens` says, and is never too large.

        Args:
            documents: the codes of each.
        """
        if self.codec.kind == "binary":
            return self._of_bits([one if isinstance(one, TokenBits) else TokenBits.pack(one) for one in documents])
        arrays = cast(Sequence[np.ndarray], documents)
        scores = np.zeros(len(arrays), np.float32)
        for places in _runs(arrays):
            run = [arrays[place] for place in places]
            lengths = torch.tensor([0, *map(len, run)])
            vectors = self.codec.numbers(torch.from_numpy(np.concatenate(run)))
            found = maxsim(self.query, torch.tensor([0, len(self.query)]), vectors, lengths.cumsum(0))[0]
            scores[places] = (found + self.constants.sum()).numpy()
        return scores

    def _of_bits(self, documents: Sequence[TokenBits]) -> np.ndarray:
        scores = np.zeros(len(documents), np.float32)
        filled = np.array([place for place, bits in enumerate(documents) if len(bits)], int)
        scores[filled] = self.constants.sum()
        query = self.query[(self.query != 0).any(1)]
        for run, rows in nearest_tokens(query.numpy(), [documents[place] for place in filled]):
            codes = [documents[filled[one]].take(of_one.ravel()) for one, of_one in zip(run, rows, strict=True)]
            signs = self.codec.numbers(torch.from_numpy(np.concatenate(codes))).view(*rows.shape, -1)
            products = torch.einsum("dtnk,tk->dtn", signs, query)
            scores[filled[run]] += products.amax(2).sum(1).numpy()
        return scores

    def of_passages(self, document: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """Return the MaxSim of each passage of a document, `(p,)` float32; minus infinity if it has no token vectors.

        Args:
            document: the codes of the document, `(t, ...)`.
            passages: `(p, 2)`, first row of each passage in it and the one after its last.
        """
        scores = np.full(len(passages), -np.inf, np.float32)
        filled = passages[:, 1] > passages[:, 0]
        if filled.any() and len(self.query):
            products = np.concatenate([self._products(document), np.zeros((1, len(self.query)), np.float32)])
            # Of each second pair of bounds, which are those of a passage; the last row is where the last one may end.
            best = np.maximum.reduceat(products, passages[filled].ravel())[::2]
            scores[filled] = (best + self.constants.numpy()).sum(1)
        return scores

    def _products(self, codes: np.ndarray) -> np.ndarray:
        """Return the products of codes `(n, ...)` with the query, `(n, t)`, without the constants."""
        if self.codec.kind == "binary":
            # What a query token and the 8 signs of a byte give is added up from a table, `(b * 256, t)`.
            width = codes.shape[1]
            padded = torch.nn.functional.pad(self.query, (0, 8 * width - self.query.shape[1])).view(-1, width, 8)
            signs = 2.0 * (torch.arange(256)[:, None] >> torch.arange(7, -1, -1) & 1) - 1
            table = torch.einsum("tbi,vi->bvt", padded, signs).reshape(width * 256, -1)
            places = torch.from_numpy(codes.astype(np.int32) + 256 * np.arange(width, dtype=np.int32))
            return torch.nn.functional.embedding_bag(places, table, mode="sum").numpy()
        parts = [
            # A copy, because a memory-mapped array cannot be written to, which torch warns of.
            self.codec.numbers(torch.tensor(codes[start : start + TOKENS_AT_A_TIME])) @ self.query.T
            for start in range(0, len(codes), TOKENS_AT_A_TIME)
        ]
        return torch.cat(parts).numpy()


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
