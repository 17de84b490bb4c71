"""Every objective on two gloo processes against one process that has the whole batch, over steps of an optimiser."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from objective_cases import CASES, batch_of, double_encoder, double_objective, gradients, state_of
from torch.nn.parallel import DistributedDataParallel

from training.distributed import average_gradients, broadcast, mean_over_processes, own_rows, settle
from training.pairs import pair_gradient

PROCESSES, PAIRS, STEPS = 2, 6, 3


def steps(case: str, rows: slice, budget: int, wrap=lambda encoder: encoder) -> list[tuple]:
    """The loss, the gradients and what is remembered at each step, on the rows of one process."""
    encoder = double_encoder()
    objective = double_objective(case, encoder, PAIRS)
    wrapped = wrap(encoder)
    broadcast(objective)
    accumulate = pair_gradient(objective)
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


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),  # a mistake that makes one process wait for the other is to fail
    )
    own = own_rows(PAIRS // PROCESSES)

    def wrap(encoder):
        return DistributedDataParallel(encoder, broadcast_buffers=False)

    torch.save({case: steps(case, own, (10**6, 50)[rank], wrap) for case in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_worker, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.promise("C8", "C9")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, two_processes):
    """Heads see the statistics of the whole batch, queues hold the keys of both processes in order, and a temperature
    has the gradient of the whole loss. One process has a single chunk, the other several."""
    one = steps(case, slice(0, PAIRS), 100)
    for results in two_processes:
        torch.testing.assert_close(results[case], one, atol=1e-10, rtol=1e-8)
