"""One thread that computes for all requests, in batches of what waits for it, of which there may not be too much."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

# Compute a batch: a result for each item, in their order.
Work = Callable[[list[Any]], Sequence[Any]]


class BusyError(Exception):
    """The queue is full: the request may be sent again later."""


@dataclass(eq=False)
class Job:
    """An item of a request that waits.

    Attributes:
        work: the function that computes it, together with others of the same function.
        item: what it is given.
        tokens: that it counts for.
        future: holds the result.
    """

    work: Work
    item: Any
    tokens: int
    future: Future = field(default_factory=Future)


class Worker:
    """A thread that computes what is submitted, in the order in which it came.

    Items of the same function that stand one behind the other are computed together, whichever request they are from,
    as many as have `batch_tokens`. If a batch fails, its items are computed one by one, so that a request fails for no
    other's sake.

    Args:
        batch_tokens: tokens of a batch; a larger item is a batch of its own.
        queue_tokens: tokens that may wait.
        on_batch: is called with the tokens of each batch before it is computed.
    """

    def __init__(
        self, batch_tokens: int = 16_384, queue_tokens: int = 1_000_000, on_batch: Callable[[int], None] | None = None
    ):
        self.batch_tokens, self.queue_tokens, self.on_batch = batch_tokens, queue_tokens, on_batch
        self.waiting: deque[Job] = deque()
        self.waiting_tokens = 0
        self._changed, self._closed = Condition(), False
        self._thread = Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def submit(self, work: Work, items: Sequence[Any], tokens: Sequence[int]) -> list[Future]:
        """Put the items of a request into the queue: all of them or none.

        Args:
            work: the function that computes them.
            items: what it is given.
            tokens: that each of them counts for.

        Returns:
            A future for each item; see `cancel`.

        Raises:
            BusyError: there is no room in the queue, or the server is shutting down.
        """
        jobs = [Job(work, item, count) for item, count in zip(items, tokens, strict=True)]
        with self._changed:
            if self._closed:
                raise BusyError("the server is shutting down")
            if self.waiting_tokens + sum(tokens) > self.queue_tokens:
                raise BusyError(
                    f"{self.waiting_tokens:,} tokens are waiting, and there is no room for {sum(tokens):,} more (the "
                    f"queue has {self.queue_tokens:,}); try again later"
                )
            self.waiting.extend(jobs)
            self.waiting_tokens += sum(tokens)
            self._changed.notify()
        return [job.future for job in jobs]

    def cancel(self, futures: Sequence[Future]) -> None:
        """Take what nobody waits for any more out of the queue, so that others have room.

        Args:
            futures: of `submit`. What is computed already, or at this moment, stays as it is.
        """
        for future in futures:
            future.cancel()
        with self._changed:
            self.waiting = deque(job for job in self.waiting if not job.future.cancelled())
            self.waiting_tokens = sum(job.tokens for job in self.waiting)

    def close(self) -> None:
        """Compute what is waiting, accept nothing more, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self._closed)
                if not self.waiting:
                    return
                batch = self._take()
            self._compute([job for job in batch if job.future.set_running_or_notify_cancel()])

    def _take(self) -> list[Job]:
        batch = [self.waiting.popleft()]
        total = batch[0].tokens
        while (
            self.waiting
            and self.waiting[0].work == batch[0].work
            and total + self.waiting[0].tokens <= self.batch_tokens
        ):
            batch.append(self.waiting.popleft())
            total += batch[-1].tokens
        self.waiting_tokens -= total
        return batch

    def _compute(self, batch: list[Job]) -> None:
        if not batch:
            return
        if self.on_batch is not None:
            self.on_batch(sum(job.tokens for job in batch))
        try:
            results = batch[0].work([job.item for job in batch])
            assert len(results) == len(batch)
        except BaseException as error:  # a panic of a library in Rust is no Exception, and must not end the thread
            if len(batch) == 1:
                is_plain = isinstance(error, Exception)
                batch[0].future.set_exception(error if is_plain else RuntimeError(f"{type(error).__name__}: {error}"))
            else:
                for job in batch:
                    self._compute([job])
        else:
            for job, result in zip(batch, results, strict=True):
                job.future.set_result(result)
