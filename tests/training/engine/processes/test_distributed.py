"""Two gloo processes, under DDP and under FSDP, against one process that has the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.fresh_processes import with_fresh_processes
from tests.training.tiny_training import tiny_config
from tests.two_processes import PROCESSES, in_two_processes
from training.data.packing import pack
from training.engine.gradient_cache import cached_backward
from training.engine.processes.distributed import from_main_process, gather_rows, own_rows, settle
from training.engine.processes.sharding import Sharding, whole
from training.objectives.embed import embed
from training.objectives.losses.contrastive import info_nce

pytestmark = with_fresh_processes

PAIRS, NEGATIVES = 6, 2


def documents() -> list[list[list[int]]]:
    """Token ids of queries, positives and negatives. The second half of the pairs is much longer than the first."""
    generator = torch.Generator().manual_seed(3)

    def text(pair: int) -> list[int]:
        length = int(torch.randint(1, 6 if pair < PAIRS // 2 else 60, (), generator=generator))
        return torch.randint(5, 31, (length,), generator=generator).tolist()

    return [[text(pair) for pair in range(PAIRS) for _ in range(repeats)] for repeats in (1, 1, NEGATIVES)]


def model() -> LongEmbedModel:
    torch.manual_seed(1)
    return LongEmbedModel(tiny_config()).double()


def gathered_loss(gather):
    def loss(embeddings):
        pairs = len(embeddings) // (2 + NEGATIVES)
        columns = embeddings.split([pairs, pairs, pairs * NEGATIVES])
        value, _ = info_nce(*map(gather, columns), symmetric=True, rows=own_rows(pairs))
        return value, {"loss": value.detach()}

    return loss


def one_process() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the whole batch, without cache and without gather."""
    everything = model()
    embeddings = torch.cat([embed(everything, chunk) for column in documents() for chunk in pack(column, 10**6)])
    loss, _ = info_nce(*embeddings.split([PAIRS, PAIRS, PAIRS * NEGATIVES]), symmetric=True)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in everything.named_parameters()}


def _gather_without_gradient(rows):
    everyone = [torch.empty_like(rows) for _ in range(PROCESSES)]
    dist.all_gather(everyone, rows.detach().contiguous())
    everyone[dist.get_rank()] = rows
    return torch.cat(everyone)


def of_one_process(rank: int) -> dict:
    """What one of two processes computes."""
    results: dict = {}

    def per_process(column: list) -> list:
        return column[len(column) // PROCESSES * rank : len(column) // PROCESSES * (rank + 1)]

    chunks = pack([text for column in documents() for text in per_process(column)], 40)
    results["chunks"] = len(chunks)
    for name, gather in (("exact", gather_rows), ("without_gradient", _gather_without_gradient)):
        reduced: list[int] = []

        def counting_hook(state, bucket, reduced=reduced):
            reduced.append(bucket.buffer().numel())
            dist.all_reduce(bucket.buffer())
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer() / PROCESSES)
            return done

        wrapped = DistributedDataParallel(model(), broadcast_buffers=False)
        wrapped.register_comm_hook(None, counting_hook)
        for synchronize in (False, True):
            metrics = cached_backward(
                wrapped, chunks, lambda c, m=wrapped: embed(m, c), gathered_loss(gather), synchronize=synchronize
            )
            results[name, "all_reduces", synchronize] = len(reduced)
            results[name, "reduced_numbers"] = sum(reduced)
        loss = metrics["loss"].clone()
        dist.all_reduce(loss)
        results[name, "loss"] = loss / PROCESSES
        # Two batches were accumulated, the first without a reduction.
        results[name, "gradients"] = {key: p.grad / 2 for key, p in wrapped.module.named_parameters()}

    # One chunk here, several there: their first forward passes with gradients are before and after the gather.
    uneven = pack([text for column in documents() for text in per_process(column)], (10**6, 40)[rank])
    wrapped = DistributedDataParallel(model(), broadcast_buffers=False)
    for _ in range(2):
        metrics = cached_backward(wrapped, uneven, lambda c: embed(wrapped, c), gathered_loss(gather_rows))
        settle(wrapped)
    results["uneven_chunks"] = len(uneven)
    results["uneven_gradients"] = {key: p.grad / 2 for key, p in wrapped.module.named_parameters()}

    called: list[int] = []

    def refused() -> None:
        called.append(rank)
        raise UserError("the data are wrong")

    results["from_main"] = from_main_process(lambda: {"rank": rank})
    try:
        from_main_process(refused)
    except UserError as error:
        results["refused"] = str(error)
    results["called"] = called

    results["sharded"] = _sharded(rank, chunks, uneven)

    torch.manual_seed(0)
    everyone = [F.normalize(torch.randn(PAIRS, 8, dtype=torch.float64), dim=-1) for _ in range(3)]
    own = [rows[own_rows(PAIRS // PROCESSES)].clone().requires_grad_() for rows in everyone]
    unit = [F.normalize(rows, dim=-1) for rows in own]  # the published loss normalises
    for name, value in (
        ("ours", info_nce(*map(gather_rows, unit), rows=own_rows(PAIRS // PROCESSES))[0]),
        (
            "published",
            MultipleNegativesRankingLoss(
                torch.nn.Identity(), scale=20.0, gather_across_devices=True
            ).compute_loss_from_embeddings(own, None),
        ),
        # The full loss on every process, its own shard alive: the gradient has to be multiplied by the processes.
        ("full_loss", info_nce(*map(_gather_without_gradient, unit))[0] * PROCESSES),
    ):
        results[name] = (value.detach(), torch.autograd.grad(value, own, retain_graph=True))
    return results


def _sharded(rank: int, chunks: list, uneven: list) -> dict:
    """What FSDP makes of the same batch: chunks in different numbers, and one here beside several there."""
    results: dict = {}
    for name, own in (("chunks", chunks), ("uneven", uneven)):
        wrapped = model()
        if rank == 1:  # what a process has drawn for itself must not count
            torch.nn.init.normal_(wrapped.layers[0].attention.q_proj.weight)
        numbers = sum(parameter.numel() for parameter in wrapped.parameters())
        sharding = Sharding()
        sharding.shard(wrapped, torch.device("cpu"))
        for synchronize in (False, True):
            cached_backward(
                wrapped, own, lambda c, m=wrapped: embed(m, c), gathered_loss(gather_rows), synchronize=synchronize
            )
        results[name] = {key: whole(parameter.grad) / 2 for key, parameter in wrapped.named_parameters()}
    results["share"] = sum(parameter.to_local().numel() for parameter in wrapped.parameters()) / numbers

    # Processes may run a model with whole weights as often as they like; then it is split again.
    with torch.no_grad(), sharding.whole_weights(wrapped.eval()):
        found = torch.cat([embed(wrapped, chunk) for chunk in chunks])
        torch.testing.assert_close(found, torch.cat([embed(model().eval(), chunk) for chunk in chunks]))
    results["share_after"] = sum(parameter.to_local().numel() for parameter in wrapped.parameters()) / numbers
    return results


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    return in_two_processes(of_one_process, tmp_path_factory.mktemp("processes"))


@pytest.mark.promise("C8", "C9")
def test_two_processes_have_the_gradient_of_one(two_processes):
    loss, gradients = one_process()
    assert two_processes[0]["chunks"] != two_processes[1]["chunks"]  # the budget cuts the two shares differently
    for results in two_processes:
        torch.testing.assert_close(results["exact", "loss"], loss, atol=1e-10, rtol=0)
        torch.testing.assert_close(results["exact", "gradients"], gradients, atol=1e-10, rtol=0)


@pytest.mark.promise("C8", "C9")
def test_one_chunk_beside_several_step_after_step(two_processes):
    _, gradients = one_process()
    assert [results["uneven_chunks"] > 1 for results in two_processes] == [False, True]
    for results in two_processes:
        torch.testing.assert_close(results["uneven_gradients"], gradients, atol=1e-10, rtol=0)


@pytest.mark.promise("C8", "C9")
@pytest.mark.parametrize("chunks", ["chunks", "uneven"])
def test_sharded_processes_have_the_gradient_of_one(chunks, two_processes):
    _, gradients = one_process()
    for results in two_processes:
        torch.testing.assert_close(results["sharded"][chunks], gradients, atol=1e-10, rtol=0)


def test_a_sharded_process_has_its_share_of_the_weights(two_processes):
    for results in two_processes:
        assert results["sharded"]["share"] == pytest.approx(1 / PROCESSES, abs=0.02)
        assert results["sharded"]["share_after"] == results["sharded"]["share"]


def test_what_the_main_process_finds_or_refuses_all_do(two_processes):
    assert [process["from_main"] for process in two_processes] == [{"rank": 0}] * 2
    assert [process["refused"] for process in two_processes] == ["the data are wrong"] * 2
    assert [process["called"] for process in two_processes] == [[0], []]


@pytest.mark.promise("C9")
def test_a_gather_without_gradient_is_wrong(two_processes):
    _, gradients = one_process()
    name = "layers.0.attention.v_proj.weight"
    wrong = two_processes[0]["without_gradient", "gradients"][name]
    assert F.cosine_similarity(wrong.flatten(), gradients[name].flatten(), dim=0) < 0.99


@pytest.mark.promise("C8")
def test_one_all_reduce_a_step(two_processes):
    """Every parameter is reduced exactly once over both accumulated batches and all their chunks."""
    numbers = sum(parameter.numel() for parameter in model().parameters())
    for results in two_processes:
        assert results["exact", "all_reduces", False] == 0
        assert results["exact", "all_reduces", True] == 1
        assert results["exact", "reduced_numbers"] == numbers


@pytest.mark.promise("C9")
def test_gather_recipes_agree_with_sentence_transformers(two_processes):
    for results in two_processes:
        (loss, ours), (published_loss, published) = results["ours"], results["published"]
        torch.testing.assert_close(loss, published_loss, atol=1e-10, rtol=0)
        torch.testing.assert_close(ours, published, atol=1e-10, rtol=0)
        # Means over own rows, averaged by DDP, against the loss of all rows: the same after the factor.
        torch.testing.assert_close(results["full_loss"][1], ours, atol=1e-10, rtol=0)
