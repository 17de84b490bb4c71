"""The checks of the GPU script: on the CPU as far as they go there, that they find what is wrong, and all with CUDA."""

import math
import sys
from unittest.mock import patch

import pytest
import torch

from common.errors import UserError
from eval.speed import process
from eval.speed.measurement import Workload
from experiments import gpu_check
from experiments.gpu_check import (
    MEMORY_RATIO,
    RULE,
    batch_of,
    check_compilation,
    check_device,
    check_precision,
    check_speed,
    compile_whole,
    error_ratios,
    in_time,
    memory_ratio,
    tiny_model,
)
from modeling_longembed import attention_kernels_longembed, pattern_local_longembed
from modeling_longembed.attention_longembed import KERNELS, flash_attn_varlen_func
from modeling_longembed.pattern_registry_longembed import PATTERNS, build_pattern

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# On the CPU -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(gpu_check, "LENGTHS", (1, 67, 0, 130))


def test_the_kernels_of_the_cpu_keep_the_rule(short):
    checks = list(check_precision(["longembed_varlen"], "cpu"))
    assert len(checks) == 2 * len(gpu_check.MASKS)
    assert all(check.passed for check in checks), checks


@pytest.mark.parametrize("spoiled", [0, 1], ids=["the context", "the gradient of the value"])
def test_a_kernel_that_is_wrong_breaks_the_rule(spoiled):
    def wrong(inputs):
        context, weights = KERNELS["eager"].function(inputs)
        if spoiled == 0:
            return context * 1.05, weights
        return context + 0.05 * (inputs.value - inputs.value.detach()), weights

    with patch.dict(KERNELS, wrong=KERNELS["eager"]._replace(function=wrong)):
        ratios = error_ratios(build_pattern("full"), "wrong", "cpu")
    assert max(ratios) > RULE
    assert (ratios[0] > RULE) == (spoiled == 0)


def test_every_pattern_is_compared_with_the_cpu(short):
    checks = list(check_device("cpu"))
    assert [check.name for check in checks[::2]] == [f"device: {name} in inference" for name in PATTERNS]
    assert all(check.passed for check in checks)


@pytest.fixture
def as_on_cuda():
    """The path of the GPU, its kernel stood in for by one that looks at nothing: what surrounds it is traced."""
    with (
        patch.object(attention_kernels_longembed, "varlen_attn", lambda query, *args, **kwargs: query * 1.0),
        patch.object(attention_kernels_longembed, "varlen_kernel_applies", lambda query, dropout: True),
        patch.object(pattern_local_longembed, "varlen_kernel_applies", lambda query, dropout: True),
    ):
        yield


@pytest.mark.slow
def test_the_packed_forward_of_the_gpu_is_one_graph(as_on_cuda):
    checks = list(check_compilation("cpu", backend="eager"))
    assert len(checks) == 4
    for check in checks:
        assert check.passed, check


@pytest.mark.parametrize("pattern", ["full", "sliding"])
def test_without_being_told_to_the_compiler_makes_one_graph_too(as_on_cuda, pattern):
    # `fullgraph=True` captures what a plain `torch.compile` breaks the graph for: a number asked of the device.
    model, batch = tiny_model(pattern, "cpu", torch.float32), batch_of((7, 12), "cpu")
    with torch.no_grad():
        report = torch._dynamo.explain(model)(**batch)
    assert report.graph_count == 1, report.break_reasons


def test_a_break_of_the_graph_is_found_and_its_place_told():
    model = tiny_model("full", "cpu", torch.float32)
    forward = model.layers[0].forward

    def broken(*args, **kwargs):
        print("a break")
        return forward(*args, **kwargs)

    model.layers[0].forward = broken
    found, reason = compile_whole(model, [batch_of((7,), "cpu")], "eager")
    assert not found
    assert "test_gpu_check.py" in reason


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
    outcome = "measured"
    assert memory_ratio({"type": "full"}, "eager", Workload(), 64) == 4
    outcome = "out of memory"
    assert not memory_ratio({"type": "full"}, "eager", Workload(), 64) < MEMORY_RATIO


def test_a_part_that_raises_or_comes_too_late_is_a_failure():
    def raises():
        yield gpu_check.Check("first", True, "")
        raise ValueError("no such kernel")

    checks = list(in_time("part", raises(), math.inf))
    assert [(check.name, check.passed) for check in checks] == [("first", True), ("part", False)]
    assert checks[1].detail == "ValueError: no such kernel"
    (late,) = in_time("part", raises(), -math.inf)
    assert not late.passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_script_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match=r"^there is no CUDA device here, .*; run it on a GPU$"):
        gpu_check.main()
    assert not list(tmp_path.iterdir())


# With CUDA ------------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.promise("A3")
@pytest.mark.parametrize(
    "kernel",
    [
        "longembed_varlen",
        "flex_attention",
        pytest.param(
            "flash_attention_2",
            marks=pytest.mark.skipif(flash_attn_varlen_func is None, reason="flash-attn is not installed"),
        ),
    ],
)
def test_the_kernels_of_the_gpu_keep_the_rule(kernel):
    for check in check_precision([kernel], "cuda"):
        assert check.passed, check


@needs_cuda
def test_every_pattern_gives_on_the_gpu_what_it_gives_on_the_cpu():
    for check in check_device("cuda"):
        assert check.passed, check


@needs_cuda
def test_the_packed_forward_compiles_to_one_graph_on_the_gpu():
    for check in check_compilation("cuda"):
        assert check.passed, check


@needs_cuda
@pytest.mark.promise("A4")
@pytest.mark.parametrize("pattern", ["full", "sliding", "block", "shifted"])
def test_twice_the_length_takes_no_more_than_the_ratio_on_the_gpu(pattern):
    workload = Workload(num_hidden_layers=1, mode="training", dtype="bfloat16", device="cuda")
    assert memory_ratio({"type": pattern}, "longembed_varlen", workload, 16384) < MEMORY_RATIO


@needs_cuda
def test_speed_can_be_measured_on_the_gpu(tmp_path):
    for check in check_speed("cuda", str(tmp_path)):
        assert check.passed, check
