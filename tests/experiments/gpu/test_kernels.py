"""The precision of kernels, and the number of programs that flex attention compiles."""

from unittest.mock import patch

import pytest
import torch

from experiments.gpu import check, kernels
from experiments.gpu.check import RULE, attention_inputs, ratio_of_errors
from experiments.gpu.kernels import check_flex, check_kernels, error_ratio, outputs_and_gradients, varlen_kernels
from modeling_longembed import attention_flex_longembed
from modeling_longembed.attention_longembed import KERNELS
from modeling_longembed.pattern_registry_longembed import build_pattern

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(check, "LENGTHS", (1, 67, 0, 130))


def test_the_kernels_of_the_cpu_keep_the_rule(short):
    checks = list(check_kernels("cpu", ["longembed_varlen"]))
    assert len(checks) == 3 * len(kernels.MASKS)
    assert all(found.passed for found in checks), checks


@pytest.mark.parametrize("spoiled", ["the context", "the gradient of the value"])
def test_a_kernel_that_is_wrong_breaks_the_rule(short, spoiled):
    def wrong(inputs):
        context, weights = KERNELS["eager"].function(inputs)
        if spoiled == "the context":
            return context * 1.05, weights
        return context + 0.05 * (inputs.value - inputs.value.detach()), weights

    with patch.dict(KERNELS, wrong=KERNELS["eager"]._replace(function=wrong)):
        inputs = attention_inputs(build_pattern("full"), "cpu", torch.bfloat16)
        assert error_ratio("wrong", inputs) > RULE
        exact, dense, found = (
            outputs_and_gradients(kernel, inputs, dtype)
            for kernel, dtype in (("eager", torch.float64), ("eager", torch.bfloat16), ("wrong", torch.bfloat16))
        )
    ratios = [
        ratio_of_errors(*parts) for parts in zip(*([[x] for x in xs] for xs in (found, dense, exact)), strict=True)
    ]
    context, _, _, value_gradient = ratios
    assert (context > RULE) == (spoiled == "the context")
    assert value_gradient > RULE


@pytest.fixture
def compiled(monkeypatch):
    """Flex attention as on a GPU, with a backend that counts the graphs of each compilation."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setitem(attention_flex_longembed.BACKENDS, "cpu", backend)
    attention_flex_longembed._compiled_programs.cache_clear()
    yield graphs
    attention_flex_longembed._compiled_programs.cache_clear()


@torch.no_grad()
def flex_error(entry, alibi, lengths):
    inputs = attention_inputs(build_pattern(entry), "cpu", torch.float32, alibi, lengths)
    inputs = inputs._replace(**{name: getattr(inputs, name).detach() for name in ("query", "key", "value")})
    expected, found = (KERNELS[kernel].function(inputs)[0] for kernel in ("eager", "flex_attention"))
    return (found - expected).abs().max()


def test_flex_attention_compiles_once_for_a_mask_whatever_the_lengths(compiled):
    entry = {"type": "shifted", "size": 100}
    assert flex_error(entry, False, (1, 67, 300)) < 1e-5
    first = len(compiled)
    assert first == 2  # one finds the blocks, one computes attention
    for lengths in ((300, 40), (130,), (5, 5, 5, 400)):
        assert flex_error(entry, False, lengths) < 1e-5
    assert len(compiled) == first


@pytest.mark.slow
def test_masks_do_not_use_up_each_others_programs(compiled):
    # Dynamo keeps eight programs of a function by default, and then leaves it uncompiled, or raises.
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (3, 4, 5, 6):
            for lengths in ((70, 67), (300, 40)):
                for alibi in (False, True):
                    assert flex_error({"type": "block", "size": size}, alibi, lengths) < 1e-5
    assert len(compiled) == 4 * 3  # the blocks, and attention with the bias and without it


# With CUDA ------------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.promise("A3")
def test_the_kernels_of_the_gpu_keep_the_rule():
    checks = list(check_kernels("cuda", varlen_kernels()))
    assert len(checks) >= 3 * len(kernels.MASKS)
    assert all(found.passed for found in checks), checks


@needs_cuda
@pytest.mark.promise("A3")
def test_flex_attention_keeps_the_rule_and_compiles_once():
    checks = list(check_flex("cuda"))
    assert len(checks) >= len(kernels.FLEX_MASKS)
    assert all(found.passed for found in checks), checks
