"""Floating-point operations: as torch counts them, over the pairs that the predicate allows."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.speed.flops import model_flops
from modeling_longembed import LongEmbedConfig, LongEmbedModel


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("pattern", "kernel", "pairs"),
    [
        ("full", "eager", lambda length: length**2),
        ({"type": "block", "size": 16}, "longembed_varlen", lambda length: 16 * length),
    ],
)
def test_operations_are_those_that_torch_counts(pattern, kernel, pairs, gated):
    """These kernels compute no pair that the pattern does not ask for."""
    config = LongEmbedConfig(
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        sublayer_pattern="ssff",
        attention_patterns=pattern,
        feed_forward_gated=gated,
        hidden_dropout_prob=0.0,
    )
    model = LongEmbedModel._from_config(config, attn_implementation=kernel)
    # The fused kernel of the CPU is not in torch's table, the products of the plain one are.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.ones(1, 64, dtype=torch.long))
    assert model_flops(config, 64) == counter.get_total_flops()
    assert model_flops(config, 64, "training") == 3 * model_flops(config, 64)
    more = model_flops(config, 128) - 2 * model_flops(config, 64)
    assert more == 2 * 2 * 2 * 32 * (pairs(128) - 2 * pairs(64))  # multiply and add, QK and PV, layers, width


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_counted_by_the_predicate(causal):
    length, window, heads = 50, 3, 4
    pairs = sum(abs(i - j) <= window and (j <= i or not causal) for i in range(length) for j in range(length))
    fields = {"hidden_size": 32, "num_attention_heads": heads, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LongEmbedConfig(**fields, attention_patterns={"type": "sliding", "window": window}, is_causal=causal)
    products = length * (4 * 32**2 + 2 * 32 * 48) + 2 * 32 * pairs
    assert model_flops(config, length) == 2 * products
