"""The order of a source's rows: shuffled passes, in batches without a text twice, a pure function of (seed, number)."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

TRIES = 500  # rows that a row is tried to be exchanged with; one that then still stands beside its like stays there


class RowOrder:
    """An endless stream of shuffled passes over the rows, cut into batches of the same size.

    Every pass holds each row once. Rows that share a text are moved out of each other's batch, by exchange with a row
    of another one. Where a batch begins in one pass and ends in the next, the end of a pass is settled first, from that
    pass alone, and the next pass begins so that it goes with it: no pass depends on more than the one before it.
    (With fewer rows than two batches hold there may be nothing to exchange with.)
    """

    def __init__(self, text_ids: np.ndarray, batch_size: int, *seed: int) -> None:
        """Args:
        text_ids: `(rows, columns)`, equal where the texts are equal.
        batch_size: rows of a batch, at most as many as there are.
        seed: of all shuffles.
        """
        self.count, self.batch_size, self.seed = len(text_ids), batch_size, seed
        self.shared = _shared_texts(text_ids)
        self._passes = dict[int, list[int]]()

    def batch(self, number: int) -> list[int]:
        """The rows of a batch."""
        start, stop = number * self.batch_size, (number + 1) * self.batch_size
        passes = range(start // self.count, (stop - 1) // self.count + 1)
        self._passes = {turn: self._passes.get(turn) or self._arranged(turn) for turn in passes}
        rows = [row for turn in passes for row in self._passes[turn]]
        return rows[start - passes.start * self.count :][: self.batch_size]

    def _arranged(self, turn: int) -> list[int]:
        rows, begun, end = self._settled(turn), list[int](), self._end(turn)
        if turn and self._end(turn - 1):
            begun = self._settled(turn - 1)[-self._end(turn - 1) :]
        self._part(rows, turn, range(self.count - end), range(self.count - end), begun)
        return rows

    def _end(self, turn: int) -> int:
        """How many rows of a pass begin a batch that the next pass fills."""
        return (turn + 1) * self.count % self.batch_size

    def _settled(self, turn: int) -> list[int]:
        """A shuffled pass whose last rows are settled."""
        rows = np.random.default_rng((*self.seed, turn)).permutation(self.count).tolist()
        self._part(rows, turn, range(self.count - self._end(turn), self.count), range(self.count), [])
        return rows

    def _part(self, rows: list[int], turn: int, places: range, free: range, begun: Sequence[int]) -> None:
        """Part the rows that share a text with another one of their batch, in place.

        Args:
            turn: the number of the pass.
            places: where in it such rows are looked for.
            free: where rows may be that are exchanged with them.
            begun: rows that the previous pass has put into the first batch. One of them must not come again in it.
        """
        generator = np.random.default_rng((*self.seed, turn, 1))
        again = {row: [~row] for row in begun}
        offset = turn * self.count % self.batch_size

        def texts(row: int) -> Sequence[int]:
            return [*self.shared.get(row, ()), *again.get(row, ())]

        def batch(place: int) -> int:
            return (offset + place) // self.batch_size

        held: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for row in begun:
            held[0].update(texts(row))
        for place, row in enumerate(rows):
            if row in self.shared or row in again:
                held[batch(place)].update(texts(row))

        def fits(row: int, place: int) -> bool:
            """Whether a row can take the place of another one."""
            others, leaving = held[batch(place)], texts(rows[place])
            return all(others[text] == (text in leaving) for text in texts(row))

        for place in places:
            if all(held[batch(place)][text] == 1 for text in texts(rows[place])):
                continue
            for other in generator.integers(free.start, free.stop, TRIES).tolist():
                if batch(other) != batch(place) and fits(rows[place], other) and fits(rows[other], place):
                    for one, two in ((place, other), (other, place)):
                        held[batch(one)].subtract(texts(rows[one]))
                        held[batch(one)].update(texts(rows[two]))
                    rows[place], rows[other] = rows[other], rows[place]
                    break


def _shared_texts(text_ids: np.ndarray) -> dict[int, list[int]]:
    """For each row that shares a text with another one the texts that it shares, by numbers from 0."""
    rows = np.repeat(np.arange(len(text_ids)), text_ids.shape[1])
    texts, numbers = np.unique(text_ids, return_inverse=True)
    pairs = np.unique(np.stack([rows, numbers.ravel()], axis=1), axis=0)  # a text twice in one row is not shared
    often = np.bincount(pairs[:, 1], minlength=len(texts)) > 1
    shared: dict[int, list[int]] = {}
    for row, text in pairs[often[pairs[:, 1]]].tolist():
        shared.setdefault(row, []).append(text)
    return shared
