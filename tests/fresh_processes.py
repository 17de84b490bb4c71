"""Fresh processes that start fast: forked off a server that has imported the libraries and done nothing else."""

import multiprocessing
from multiprocessing.context import ForkServerContext

import pytest

# Of tests that start fresh processes, so that one process of pytest-xdist runs them all: its server imports once.
with_fresh_processes = pytest.mark.xdist_group("fresh_processes")

PRELOADED = [
    "training.compression",
    "training.contrastive",
    "training.distillation",
    "training.pretraining",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]


def fresh_processes() -> ForkServerContext:
    """Return the context of `multiprocessing` that starts such processes.

    All tests of a process share one server, whose imports would cost each process that is spawned ten seconds. The
    first process to start fixes what the server imports, so everybody has to start processes by this function.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
