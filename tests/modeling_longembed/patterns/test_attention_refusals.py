"""What the kernels that need a GPU are asked for, by stand-ins, and what a kernel cannot compute is refused."""

import inspect
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch

from modeling_longembed import attention_kernels_longembed, attention_longembed, pattern_local_longembed
from modeling_longembed.attention_longembed import flash_attention
from modeling_longembed.pattern_registry_longembed import build_pattern
from tests.modeling_longembed.patterns.dense_attention import dense_attention, make_problem, scheme_fields


def dense_varlen(query, key, value, cu_seqlens, window, scale):
    """What both flash kernels are documented to compute: segments, `-1` for no limit, windows with both ends."""
    context = torch.empty_like(query)
    for start, end in pairwise(cu_seqlens.tolist()):
        index = torch.arange(end - start)
        distance = index[:, None] - index[None]
        visible = torch.ones_like(distance, dtype=torch.bool)
        if window[0] >= 0:
            visible &= distance <= window[0]
        if window[1] >= 0:
            visible &= -distance <= window[1]
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        context[start:end] = torch.einsum("hqk,khd->qhd", weights, value[start:end])
    return context


PLAIN_PATTERNS = [
    build_pattern(entry) for entry in ("full", {"type": "sliding", "window": 5}, {"type": "block", "size": 6})
]


@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("pattern", PLAIN_PATTERNS, ids=str)
def test_what_flash_attention_is_asked_for(pattern, causal):
    def flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert cu_q is cu_k
        assert cu_q.dtype == torch.int32
        assert max_q == max_k == cu_q.diff().max()
        assert causal == problem.inputs.causal
        return dense_varlen(q, k, v, cu_q, (window_size[0], 0) if causal else window_size, softmax_scale)

    problem = make_problem(pattern, "rope", [20, 3, 7], causal=causal)
    with patch.object(attention_longembed, "flash_attn_varlen_func", flash):
        output, _ = flash_attention(problem.inputs)
    torch.testing.assert_close(output, dense_attention(problem), atol=1e-10, rtol=0)


@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("pattern", PLAIN_PATTERNS, ids=str)
def test_what_the_varlen_kernel_of_torch_is_asked_for(pattern, causal):
    real = attention_kernels_longembed.varlen_attn
    if real is None:
        pytest.skip("this torch has no torch.nn.attention.varlen")

    def varlen(*args, **kwargs):
        call = inspect.signature(real).bind(*args, **kwargs)
        call.apply_defaults()
        call = call.arguments
        assert call["max_q"] == call["max_k"] == call["cu_seq_q"].diff().max()
        return dense_varlen(
            call["query"], call["key"], call["value"], call["cu_seq_q"], tuple(call["window_size"]), call["scale"]
        )

    problem = make_problem(pattern, "rope", [20, 3, 7], causal=causal)
    applies = {"varlen_kernel_applies": lambda query, dropout: True}
    with (
        patch.multiple(attention_kernels_longembed, varlen_attn=varlen, **applies),
        patch.multiple(pattern_local_longembed, **applies),
    ):
        output = problem.attend("longembed_varlen")
    torch.testing.assert_close(output, dense_attention(problem), atol=1e-10, rtol=0)


@pytest.mark.skipif(attention_longembed.flash_attn_varlen_func is not None, reason="flash-attn is installed")
def test_flash_attention_is_refused_where_it_is_not_installed(build_tiny_model):
    for build in (
        lambda: build_tiny_model(attn_implementation="flash_attention_2"),
        lambda: build_tiny_model().set_attn_implementation("flash_attention_2"),
    ):
        with pytest.raises(
            ValueError, match=r"^attn_implementation='flash_attention_2' needs the package flash-attn, "
        ):
            build()


def test_what_a_kernel_cannot_compute_is_refused(build_tiny_model):
    with patch.object(attention_longembed, "flash_attn_varlen_func", dense_varlen):
        for scheme, refusal in (("alibi", "cannot add the position bias"), ("rope+group", "cannot compute Self-Ext")):
            with pytest.raises(ValueError, match=rf"^attn_implementation='flash_attention_2' {refusal}.*; use "):
                build_tiny_model(attn_implementation="flash_attention_2", **scheme_fields(scheme, 16))
        with pytest.raises(ValueError, match=r"^attn_implementation='flex_attention' cannot add the position bias"):
            build_tiny_model(**scheme_fields("relative", 16)).set_attn_implementation("flex_attention")
        more_than_a_mask = {"type": "sliding", "window": 2, "global_projections": True}
        with pytest.raises(ValueError, match=r"^attn_implementation='sdpa' computes masks alone, and the pattern"):
            build_tiny_model(attn_implementation="sdpa", attention_patterns=more_than_a_mask)
        pattern = build_pattern({"type": "sliding", "window": 2, "global_tokens": 1})
        with pytest.raises(ValueError, match=r"^flash_attention_2 computes .* without global tokens; load with"):
            flash_attention(make_problem(pattern, "absolute", [9]).inputs)
    with pytest.raises(
        ValueError, match=r"^attn_implementation='fast' is not one of our kernels; choose from eager, sdpa"
    ):
        build_tiny_model(attn_implementation="fast")
    model = build_tiny_model(attn_implementation="flex_attention")
    with pytest.raises(ValueError, match=r"^flex_attention has no backward pass on CPU; train with"):
        model(torch.ones(1, 4, dtype=torch.long))
    model = build_tiny_model(attn_implementation="flex_attention", attention_dropout=0.1).train()
    with torch.no_grad(), pytest.raises(ValueError, match=r"^flex_attention has no dropout; set"):
        model(torch.ones(1, 4, dtype=torch.long))
    # Patterns of training count when the model trains, and a change of the positions is checked against the kernel.
    model = build_tiny_model(attn_implementation="sdpa", training_attention_patterns={"type": "focused", "size": 4})
    model(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(
        ValueError, match=r"^attn_implementation='sdpa' computes masks alone, and the pattern 'focused'"
    ):
        model.train()(torch.ones(1, 4, dtype=torch.long))
    model = build_tiny_model(attn_implementation="flex_attention")
    with pytest.raises(ValueError, match=r"^attn_implementation='flex_attention' cannot add the position bias"):
        model.switch_positions("relative")
    assert model.config.position_embedding_type == "absolute"
    problem = make_problem(
        build_pattern({"type": "sliding", "window": 2}), "rope+group", [20], is_global=torch.arange(20) == 0
    )
    with pytest.raises(ValueError, match=r"^global_attention_mask cannot be combined with Self-Extend"):
        problem.attend("longembed_varlen")
