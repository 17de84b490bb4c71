"""The growth of memory, and what is said of speed."""

import pytest
import torch

from eval.speed import process
from eval.speed.measurement import Case, Workload
from experiments.gpu.cost import MEMORY_RATIO, check_memory, check_speed, describe_speed, memory_ratio

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.promise("A4")
@pytest.mark.slow
def test_twice_the_length_takes_no_more_than_the_ratio():
    workload = Workload(
        num_hidden_layers=1, hidden_size=64, num_attention_heads=2, intermediate_size=128, mode="training", device="cpu"
    )
    assert memory_ratio({"type": "sliding", "window": 64}, "longembed_varlen", workload, 8192) < MEMORY_RATIO


def test_the_ratio_is_of_what_is_above_the_base(monkeypatch):
    def run_case(case, limit):
        return {"outcome": outcome, "base": 1000, "peak": 1000 + case.length**2}

    monkeypatch.setattr(process, "run_case", run_case)
    outcome, workload = "measured", Workload(device="cpu")
    assert memory_ratio({"type": "full"}, "eager", workload, 64) == 4
    outcome = "out of memory"
    assert not memory_ratio({"type": "full"}, "eager", workload, 64) < MEMORY_RATIO


def test_the_utilisation_is_the_share_of_the_peak_of_a_device_that_is_known():
    workload = Workload(num_hidden_layers=1, hidden_size=64, num_attention_heads=2, dtype="bfloat16", device="cpu")
    case = Case(workload, {"type": "full"}, "longembed_varlen", 1000, context=1000)
    found = {"seconds": 0.5, "peak": 3e9}
    assert describe_speed(case, found, "an unknown card") == "2,000 tokens a second, 3.00 GB"
    # Twice the multiplications: 4 projections and the two matrices of the feed-forward of 1,536, and all pairs twice.
    operations = 2 * 1000 * (4 * 64**2 + 2 * 64 * 1536) + 4 * 1000**2 * 64
    share = operations / 0.5 / 989e12
    assert f"{share:.1%} of the peak" in describe_speed(case, found, "NVIDIA H100 80GB HBM3")


# With CUDA ------------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.promise("A4")
def test_twice_the_length_takes_no_more_than_the_ratio_on_the_gpu():
    checks = list(check_memory("cuda"))
    assert checks
    assert all(found.passed for found in checks), checks


@needs_cuda
def test_speed_can_be_measured_on_the_gpu():
    checks = list(check_speed("cuda"))
    assert checks
    assert all(found.passed for found in checks), checks
