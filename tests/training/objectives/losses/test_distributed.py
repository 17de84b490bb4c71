"""Every loss over rows gathered from two gloo processes under DDP, against one process with the whole batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.fresh_processes import with_fresh_processes
from tests.two_processes import PROCESSES, in_two_processes
from training.engine.processes.distributed import gather_rows, own_rows
from training.objectives.losses.contrastive import info_nce
from training.objectives.losses.matryoshka import matryoshka
from training.objectives.losses.momentum import momentum_contrast
from training.objectives.losses.regularizers import debias, spread_out
from training.objectives.losses.simclr import nt_xent
from training.objectives.losses.supcon import sup_con
from training.objectives.losses.vicreg import vicreg

pytestmark = with_fresh_processes

PAIRS = 6
COLUMNS = 4  # query, positive and two columns of negatives


@dataclass(frozen=True)
class GatheredRows:
    """Vectors of PAIRS pairs, gathered from all processes, and which of them are this process's.

    Args:
        query: `(PAIRS, 4)`, unit length.
        positive: `(PAIRS, 4)`, unit length.
        negative: `(2 * PAIRS, 4)`, unit length.
        label: `(PAIRS,)`, the class of each pair.
        owner: `(2 * PAIRS,)`, the pair of each negative.
        views: queries and positives before normalisation.
        own: this process's pairs.
    """

    query: Tensor
    positive: Tensor
    negative: Tensor
    label: Tensor
    owner: Tensor
    views: tuple[Tensor, Tensor]
    own: slice


def text_features() -> Tensor:
    """`(PAIRS, COLUMNS, 5)`: features that stand for the texts of each pair."""
    return torch.randn(PAIRS, COLUMNS, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def guided_info_nce(rows: GatheredRows) -> Tensor:
    columns = (rows.query, rows.positive, rows.negative)
    weight = {"negative_weight": 1.5, "negative_row": rows.owner}
    return info_nce(*columns, symmetric=True, **weight, guide=columns, guide_margin=-0.5, rows=rows.own)[0]


def nt_xent_of_views(rows: GatheredRows) -> Tensor:
    return nt_xent(rows.query, rows.positive, rows=rows.own)[0]


def sup_con_of_queries(rows: GatheredRows) -> Tensor:
    return sup_con(rows.query, rows.label, rows=rows.own)[0]


def momentum_contrast_with_negatives_as_queue(rows: GatheredRows) -> Tensor:
    return momentum_contrast(rows.query, rows.positive, rows.negative, rows=rows.own)[0]


def vicreg_of_views(rows: GatheredRows) -> Tensor:
    return vicreg(*rows.views)[0]


def spread_out_queries(rows: GatheredRows) -> Tensor:
    return spread_out(rows.query)[0]


def debias_queries(rows: GatheredRows) -> Tensor:
    return debias(rows.query, rows.label % 2)[0]


def matryoshka_info_nce(rows: GatheredRows) -> Tensor:
    own_rows_loss = partial(info_nce, rows=rows.own)
    return matryoshka(own_rows_loss, [2, 4])(rows.query, rows.positive)[0]


LOSSES: dict[str, Callable[[GatheredRows], Tensor]] = {
    "info_nce": guided_info_nce,
    "nt_xent": nt_xent_of_views,
    "sup_con": sup_con_of_queries,
    "momentum_contrast": momentum_contrast_with_negatives_as_queue,
    "vicreg": vicreg_of_views,
    "spread_out": spread_out_queries,
    "debias": debias_queries,
    "matryoshka": matryoshka_info_nce,
}


def value(name: str, model: nn.Module, pairs: range) -> Tensor:
    """Compute a loss of the model on the pairs of one process."""
    own = text_features()[pairs.start : pairs.stop]
    # The first process has two pairs of one class, the second has none: unequal numbers of anchors with positives.
    label = torch.tensor([0, 1, 0, 2, 0, 3])[pairs.start : pairs.stop]
    owner = torch.arange(pairs.start, pairs.stop).repeat(COLUMNS - 2)
    query, positive, *negatives = model(own.transpose(0, 1).reshape(-1, 5)).split(len(own))
    query, positive, negative = (gather_rows(rows) for rows in (query, positive, torch.cat(negatives)))
    unit = (F.normalize(rows, dim=-1) for rows in (query, positive, negative))
    rows = GatheredRows(*unit, gather_rows(label), gather_rows(owner), (query, positive), own_rows(len(own)))
    return LOSSES[name](rows)


def of_one_process(rank: int) -> dict:
    """Compute the mean loss and DDP's gradients, on one of two processes."""
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
