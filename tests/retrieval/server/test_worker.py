"""One thread computes what is submitted: in order, in batches of a budget, each result to its own request."""

import sys
import threading

import pytest

from retrieval.server.worker import BusyError, Worker


class Blocked:
    """A worker that is held up until what was submitted is looked at."""

    def __init__(self, **options):
        self.leave, entered = threading.Event(), threading.Event()
        self.worker = Worker(**options)

        def block(items):
            entered.set()
            self.leave.wait(60)
            return items

        self.worker.submit(block, [None], [0])
        assert entered.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.leave.set()
        self.worker.close()


@pytest.mark.promise("S2")
def test_batches_hold_what_the_budget_allows_in_the_order_in_which_it_came():
    batches = []

    def double(items):
        batches.append(items)
        return [2 * item for item in items]

    def negate(items):
        batches.append(items)
        return [-item for item in items]

    with Blocked(batch_tokens=10) as blocked:
        submit = blocked.worker.submit
        futures = submit(double, [1, 2], [4, 4]) + submit(double, [3, 4, 5], [2, 30, 1])
        futures += submit(negate, [6], [1]) + submit(double, [7], [1])
        blocked.leave.set()
        assert [future.result(60) for future in futures] == [2, 4, 6, 8, 10, -6, 14]
    assert batches == [[1, 2, 3], [4], [5], [6], [7]]


@pytest.mark.promise("S2")
def test_a_failure_is_that_of_its_own_item():
    def invert(items):
        return [1 / item for item in items]

    with Blocked() as blocked:
        futures = [blocked.worker.submit(invert, [item], [1])[0] for item in (1, 0, 2)]
        blocked.leave.set()
        assert futures[0].result(60) == 1
        assert futures[2].result(60) == 0.5
        with pytest.raises(ZeroDivisionError):
            futures[1].result(60)


@pytest.mark.promise("S2")
def test_a_panic_ends_one_request_and_not_the_thread():
    """What Rust's libraries raise is no Exception, as here."""
    with Blocked() as blocked:
        (failed,) = blocked.worker.submit(lambda items: sys.exit("panic"), [None], [1])
        (after,) = blocked.worker.submit(list, ["a"], [1])
        blocked.leave.set()
        with pytest.raises(RuntimeError, match="SystemExit: panic"):
            failed.result(60)
        assert after.result(60) == "a"
        assert blocked.worker.is_alive


@pytest.mark.promise("S3")
def test_the_queue_takes_a_request_whole_or_not_at_all():
    with Blocked(queue_tokens=10) as blocked:
        submit = blocked.worker.submit
        (first,) = submit(list, ["a"], [6])
        with pytest.raises(BusyError, match="6 tokens are waiting"):
            submit(list, ["b", "c"], [4, 1])
        (second,) = submit(list, ["d"], [4])
        blocked.worker.cancel([first])
        assert blocked.worker.waiting_tokens == 4
        (third,) = submit(list, ["e"], [6])
        second.cancel()
        blocked.leave.set()
        assert third.result(60) == "e"
    assert blocked.worker.waiting_tokens == 0
    with pytest.raises(BusyError, match="shutting down"):
        submit(list, ["f"], [1])
