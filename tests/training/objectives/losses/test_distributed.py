"""Every loss over rows gathered from two gloo processes under DDP, against one process with the whole batch."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.two_processes import PROCESSES, in_two_processes
from training.engine.distributed import gather_rows, own_rows
from training.objectives.losses.contrastive import info_nce
from training.objectives.losses.matryoshka import matryoshka
from training.objectives.losses.momentum import momentum_contrast
from training.objectives.losses.regularizers import debias, spread_out
from training.objectives.losses.simclr import nt_xent
from training.objectives.losses.supcon import sup_con
from training.objectives.losses.vicreg import vicreg

PAIRS = 6
COLUMNS = 4  # query, positive and two columns of negatives


def texts() -> Tensor:
    """`(PAIRS, COLUMNS, 5)`: what stands for the texts of each pair."""
    return torch.randn(PAIRS, COLUMNS, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)


# Query, positive, negatives, label of each pair, pair of each negative, and the own rows to a loss.
LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {
    "info_nce": lambda q, p, n, label, owner, rows: info_nce(
        unit(q),
        unit(p),
        unit(n),
        symmetric=True,
        negative_weight=1.5,
        negative_row=owner,
        guide=(unit(q), unit(p), unit(n)),
        guide_margin=-0.5,
        rows=rows,
    ),
    "nt_xent": lambda q, p, n, label, owner, rows: nt_xent(unit(q), unit(p), rows=rows),
    "sup_con": lambda q, p, n, label, owner, rows: sup_con(unit(q), label, rows=rows),
    "momentum_contrast": lambda q, p, n, label, owner, rows: momentum_contrast(unit(q), unit(p), unit(n), rows=rows),
    "vicreg": lambda q, p, n, label, owner, rows: vicreg(q, p),
    "spread_out": lambda q, p, n, label, owner, rows: spread_out(unit(q)),
    "debias": lambda q, p, n, label, owner, rows: debias(unit(q), label % 2),
    "matryoshka": lambda q, p, n, label, owner, rows: matryoshka(lambda a, b: info_nce(a, b, rows=rows), [2, 4])(
        unit(q), unit(p)
    ),
}


def value(name: str, model: nn.Module, pairs: range) -> Tensor:
    """A loss of the model on the pairs of one process."""
    own = texts()[pairs.start : pairs.stop]
    # The second process has no two of one class, the first has two: unequal numbers of anchors with positives.
    label = torch.tensor([0, 1, 0, 2, 0, 3])[pairs.start : pairs.stop]
    query, positive, *negatives = model(own.transpose(0, 1).reshape(-1, 5)).split(len(own))
    owner = torch.arange(pairs.start, pairs.stop).repeat(COLUMNS - 2)
    columns = (query, positive, torch.cat(negatives), label, owner)
    return LOSSES[name](*map(gather_rows, columns), own_rows(len(own)))[0]


def of_one_process(rank: int) -> dict:
    """What one of two processes computes."""
    share, results = PAIRS // PROCESSES, {}
    for name in LOSSES:
        wrapped = DistributedDataParallel(encoder())
        loss = value(name, wrapped, range(rank * share, (rank + 1) * share))
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        results[name] = mean / PROCESSES, {key: p.grad for key, p in wrapped.module.named_parameters()}
    return results


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    return in_two_processes(of_one_process, tmp_path_factory.mktemp("processes"))


@pytest.mark.promise("C7", "C9")
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_have_the_loss_and_the_gradient_of_one(two_processes, name):
    model = encoder()
    loss = value(name, model, range(PAIRS))
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for results in two_processes:
        mean, averaged = results[name]
        torch.testing.assert_close(mean, loss.detach(), atol=1e-10, rtol=0)
        torch.testing.assert_close(averaged, gradients, atol=1e-10, rtol=0)
