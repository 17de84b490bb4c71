"""Token vectors of one bit a dimension, as they are stored and searched: in blocks of 32, four bits of each at a time.

The layout is that of faiss's fast scan of product quantisation (PQ Fast Scan, André et al. 2015,
https://www.vldb.org/pvldb/vol9/p288-andre.pdf), which looks up four bits of 32 vectors in one instruction. A block
holds, for each byte of a code, 16 bytes with the lower halves and 16 with the upper halves of the byte in 32 vectors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retrieval.index.approximate import import_faiss

BLOCK = 32
# Of which vector, and of which one 16 later, each byte of a half has four bits.
_ORDER = np.arange(16).reshape(2, 8).T.ravel()
_PLACE = np.argsort(_ORDER)
# Vectors that are found for each query token in a document, to be compared again without rounding: the largest product
# was never among fewer than the two that are largest after rounding.
NEAREST = 2
# Vectors of documents, and pairs of a query token and a document, that are compared at a time. A pair has a table of 4
# bytes for each 4 bits of a code and their 16 values.
VECTORS_AT_A_TIME, PAIRS_AT_A_TIME = 1 << 17, 1 << 12


@dataclass(frozen=True)
class TokenBits:
    """The codes of the token vectors of a document.

    Args:
        blocks: `(ceil(n / 32), 32 b)` uint8, may be memory-mapped.
        count: n, of the vectors.
    """

    blocks: np.ndarray
    count: int

    @classmethod
    def pack(cls, codes: np.ndarray) -> "TokenBits":
        """Put codes into blocks.

        Args:
            codes: `(n, b)` uint8.
        """
        count, width = codes.shape
        filled = np.zeros((-(-count // BLOCK) * BLOCK, width), np.uint8)
        filled[:count] = codes
        of_byte = filled.reshape(-1, BLOCK, width).transpose(0, 2, 1)
        first, second = of_byte[:, :, _ORDER], of_byte[:, :, _ORDER + 16]
        halves = [(first & 15) | (second << 4), (first >> 4) | (second & 240)]
        return cls(np.concatenate(halves, axis=2).reshape(-1, BLOCK * width), count)

    def __len__(self) -> int:
        return self.count

    @property
    def codes(self) -> np.ndarray:
        """The codes, `(n, b)` uint8."""
        count, width = len(self.blocks), self.blocks.shape[1] // BLOCK
        halves = self.blocks.reshape(count, width, 2, 16)[..., _PLACE]
        halves = np.concatenate([halves & 15, halves >> 4], axis=3)
        of_byte = halves[:, :, 0] | (halves[:, :, 1] << 4)  # (blocks, b, 32)
        return of_byte.transpose(0, 2, 1).reshape(count * BLOCK, width)[: self.count]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return some of the codes, `(r, b)` uint8.

        Args:
            rows: `(r,)` int.
        """
        blocks, places = np.divmod(rows, BLOCK)
        lower = (blocks * self.blocks.shape[1] + _PLACE[places % 16])[:, None] + np.arange(
            0, self.blocks.shape[1], BLOCK
        )
        shift = (places // 16 * 4).astype(np.uint8)[:, None]
        numbers = self.blocks.ravel()
        return (numbers[lower] >> shift & 15) | (numbers[lower + 16] >> shift << 4)


def nearest_tokens(query: np.ndarray, documents: Sequence[TokenBits]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Find the tokens of documents that have the largest products with query tokens.

    The sum of a code's tables, one for each 4 bits with 8-bit entries, rounds a product by at most b of the 255 steps
    in which the table that varies most is divided. So a token that is not found exceeds those that are by at most twice
    this, and hardly ever exceeds them at all.

    Args:
        query: `(t, k)` float32, none of them zero; the product with a code is that with plus or minus 1 for its bits.
        documents: each with at least one vector.

    Yields:
        The places of some documents, and `(d, t, NEAREST)` rows of their vectors, in no order.
    """
    if not len(query) or not documents:
        return
    faiss = import_faiss()
    width = documents[0].blocks.shape[1] // BLOCK
    padded = np.zeros((len(query), 8 * width), np.float32)
    padded[:, : query.shape[1]] = query
    # The first dimension is the highest bit of a byte, and faiss begins with the lowest.
    padded = np.ascontiguousarray(padded.reshape(len(query), width, 8)[:, :, ::-1]).reshape(padded.shape)
    # One list for each document, in which each query token looks for its nearest vectors.
    runs = list(_runs(documents, max(1, PAIRS_AT_A_TIME // len(query))))
    index = faiss.IndexIVFPQFastScan(
        faiss.IndexFlatIP(8 * width), 8 * width, max(map(len, runs)), 2 * width, 4, faiss.METRIC_INNER_PRODUCT
    )
    signs = 2.0 * (np.arange(16)[:, None] >> np.arange(4) & 1) - 1
    faiss.copy_array_to_vector(np.tile(signs.astype(np.float32).ravel(), 2 * width), index.pq.centroids)
    index.by_residual, index.is_trained = False, True
    lists = faiss.downcast_InvertedLists(index.invlists)
    numbers = np.arange(max(map(len, documents)))
    for run in runs:
        for place, document in enumerate(documents[one] for one in run):
            blocks = np.ascontiguousarray(document.blocks)
            lists.resize(place, 0)
            lists.add_entries(place, len(document), faiss.swig_ptr(numbers), faiss.swig_ptr(blocks))
        index.ntotal = sum(len(documents[place]) for place in run)
        of_list = np.repeat(np.arange(len(run)), len(query))[:, None]
        _, rows = index.search_preassigned(
            np.tile(padded, (len(run), 1)), NEAREST, of_list, np.zeros(of_list.shape, np.float32)
        )
        # -1 if the document has one vector, or if no product is above the smallest that there could be.
        rows = np.where(rows < 0, rows[:, :1].clip(min=0), rows)
        yield run, rows.reshape(len(run), len(query), NEAREST)


def _runs(documents: Sequence[TokenBits], most: int) -> Iterator[list[int]]:
    """Yield the places of at most so many documents, of at most `VECTORS_AT_A_TIME` vectors if they are several."""
    run: list[int] = []
    size = 0
    for place, document in enumerate(documents):
        if run and (len(run) == most or size + len(document) > VECTORS_AT_A_TIME):
            yield run
            run, size = [], 0
        run.append(place)
        size += len(document)
    if run:
        yield run
