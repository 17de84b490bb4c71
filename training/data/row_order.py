"""The order of a source's rows: shuffled, in batches without duplicate texts, as a pure function of (seed, number)."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

TRIES = 500  # exchanges that are tried for a row; one that still shares a text with its batch after them stays there


class RowOrder:
    """An endless stream of shuffled epochs over the rows, cut into batches of the same size.

    Every epoch contains each row once. Rows that share a text are moved out of each other's batch, by exchange with a
    row of another one. Where a batch begins in one epoch and ends in the next, the end of an epoch is arranged first,
    from that epoch alone, and the next epoch is arranged to fit it: no epoch depends on more than the one before it.
    (With fewer rows than two batches have there may be nothing to exchange with.)

    Args:
        text_ids: `(rows, columns)`, equal where the texts are equal.
        batch_size: rows of a batch, at most as many as there are.
        seed: random seed of all shuffles.
    """

    def __init__(self, text_ids: np.ndarray, batch_size: int, *seed: int) -> None:
        self.count, self.batch_size, self.seed = len(text_ids), batch_size, seed
        self.shared = _shared_texts(text_ids)
        self._epochs = dict[int, list[int]]()

    def batch(self, number: int) -> list[int]:
        """Return the rows of a batch."""
        start, stop = number * self.batch_size, (number + 1) * self.batch_size
        epochs = range(start // self.count, (stop - 1) // self.count + 1)
        self._epochs = {epoch: self._epochs.get(epoch) or self._arranged(epoch) for epoch in epochs}
        rows = [row for epoch in epochs for row in self._epochs[epoch]]
        return rows[start - epochs.start * self.count :][: self.batch_size]

    def _arranged(self, epoch: int) -> list[int]:
        """Return the rows of an epoch in their final order."""
        rows, begun, overhang = self._with_settled_end(epoch), list[int](), self._overhang(epoch)
        if epoch and self._overhang(epoch - 1):
            begun = self._with_settled_end(epoch - 1)[-self._overhang(epoch - 1) :]
        self._separate(rows, epoch, range(self.count - overhang), range(self.count - overhang), begun)
        return rows

    def _overhang(self, epoch: int) -> int:
        """Count the rows at the end of an epoch whose batch ends in the next one."""
        return (epoch + 1) * self.count % self.batch_size

    def _with_settled_end(self, epoch: int) -> list[int]:
        """Return the shuffled rows of an epoch, of which only the overhang is in its final order."""
        rows = np.random.default_rng((*self.seed, epoch)).permutation(self.count).tolist()
        self._separate(rows, epoch, range(self.count - self._overhang(epoch), self.count), range(self.count), [])
        return rows

    def _separate(self, rows: list[int], epoch: int, places: range, free: range, begun: Sequence[int]) -> None:
        """Exchange rows, in place, that share a text with another one of their batch.

        Args:
            rows: the rows of the epoch.
            epoch: its number.
            places: the places where such rows are looked for.
            free: the places of rows that they may be exchanged with.
            begun: rows that the epoch before has put into the first batch; none of them may be in it twice.
        """
        generator = np.random.default_rng((*self.seed, epoch, 1))
        # A row of `begun` that comes again gets a text of its own, which no other row has: a negative number.
        again = {row: [~row] for row in begun}
        offset = epoch * self.count % self.batch_size

        def texts(row: int) -> Sequence[int]:
            return [*self.shared.get(row, ()), *again.get(row, ())]

        def batch(place: int) -> int:
            return (offset + place) // self.batch_size

        texts_of_batch: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for row in begun:
            texts_of_batch[0].update(texts(row))
        for place, row in enumerate(rows):
            if row in self.shared or row in again:
                texts_of_batch[batch(place)].update(texts(row))

        def fits(row: int, place: int) -> bool:
            """Check that a row would share no text with the batch of a place whose own row leaves it."""
            others, leaving = texts_of_batch[batch(place)], texts(rows[place])
            return all(others[text] == (text in leaving) for text in texts(row))

        for place in places:
            if all(texts_of_batch[batch(place)][text] == 1 for text in texts(rows[place])):
                continue
            for other in generator.integers(free.start, free.stop, TRIES).tolist():
                if batch(other) != batch(place) and fits(rows[place], other) and fits(rows[other], place):
                    for one, two in ((place, other), (other, place)):
                        texts_of_batch[batch(one)].subtract(texts(rows[one]))
                        texts_of_batch[batch(one)].update(texts(rows[two]))
                    rows[place], rows[other] = rows[other], rows[place]
                    break


def _shared_texts(text_ids: np.ndarray) -> dict[int, list[int]]:
    """Return the texts, numbered from 0, that each row shares with another one; rows that share none are left out."""
    rows = np.repeat(np.arange(len(text_ids)), text_ids.shape[1])
    texts, numbers = np.unique(text_ids, return_inverse=True)
    pairs = np.unique(np.stack([rows, numbers.ravel()], axis=1), axis=0)  # a text twice in one row is not shared
    often = np.bincount(pairs[:, 1], minlength=len(texts)) > 1
    shared: dict[int, list[int]] = {}
    for row, text in pairs[often[pairs[:, 1]]].tolist():
        shared.setdefault(row, []).append(text)
    return shared
