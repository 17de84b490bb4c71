"""Every objective on two gloo processes against one process that has the whole batch, over steps of an optimiser."""

import datasets
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.fresh_processes import with_fresh_processes
from tests.training.objectives.objective_cases import (
    CASES,
    batch_of,
    double_encoder,
    double_objective,
    gradients,
    state_of,
    words_of,
)
from tests.training.tiny_training import random_pairs
from tests.two_processes import PROCESSES, in_two_processes
from training.data.sources import Source
from training.engine.processes.distributed import average_gradients, broadcast, mean_over_processes, own_rows, settle
from training.objectives.contrastive.words import read_words
from training.objectives.pair_step import pair_gradient

pytestmark = with_fresh_processes

PAIRS, STEPS = 6, 3


def steps(case: str, rows: slice, budget: int, wrap=lambda encoder: encoder) -> list[tuple]:
    """The loss, the gradients and what is remembered at each step, on the rows of one process."""
    encoder = double_encoder()
    objective = double_objective(case, encoder, PAIRS)
    wrapped = wrap(encoder)
    broadcast(objective)
    accumulate = pair_gradient(objective, words=words_of(case))
    results = []
    for seed in range(STEPS):
        metrics = accumulate(wrapped, batch_of(case, PAIRS, budget, seed, rows), 1.0, True)
        settle(wrapped)
        average_gradients(objective)
        with torch.no_grad():
            for parameter in (*encoder.parameters(), *objective.parameters()):
                parameter -= 0.05 * (0 if parameter.grad is None else parameter.grad)
        results.append((mean_over_processes(metrics["loss"]), gradients(encoder, objective), state_of(objective)))
    return results


def of_one_process(rank: int) -> dict[str, list[tuple]]:
    """What one of two processes computes."""
    own = own_rows(PAIRS // PROCESSES)

    def wrap(encoder):
        return DistributedDataParallel(encoder, broadcast_buffers=False)

    return {case: steps(case, own, (10**6, 50)[rank], wrap) for case in CASES} | {"words": words_of_pairs()}


def words_of_pairs() -> dict:
    """What BM25 knows of some documents, of which many are there twice."""
    rows = random_pairs(20)
    source = Source("rows", datasets.Dataset.from_list(rows + rows[3:]), ("anchor", "positive"))
    counted = vars(read_words([source]))
    return counted | {"frequencies": dict(counted["frequencies"])}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    return in_two_processes(of_one_process, tmp_path_factory.mktemp("processes"))


@pytest.mark.promise("T21")
def test_two_processes_count_the_words_that_one_counts(two_processes):
    """A text that is in the shares of both is counted once."""
    assert [results["words"] for results in two_processes] == [words_of_pairs()] * 2


@pytest.mark.promise("C8", "C9")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, two_processes):
    """Heads see the statistics of the whole batch, queues hold the keys of both processes in order, and a temperature
    has the gradient of the whole loss. One process has a single chunk, the other several."""
    one = steps(case, slice(0, PAIRS), 100)
    for results in two_processes:
        torch.testing.assert_close(results[case], one, atol=1e-10, rtol=1e-8)
