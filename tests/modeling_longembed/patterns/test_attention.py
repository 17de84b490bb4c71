"""Every pattern on every kernel against the dense softmax under the pattern's own predicate, written out here.

The tests run over the registries: a pattern, a kernel or a position scheme that is added is tested by being there.
"""

import inspect
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from modeling_longembed import (
    LongEmbedConfig,
    LongEmbedModel,
    attention_kernels_longembed,
    attention_longembed,
    pattern_local_longembed,
)
from modeling_longembed.attention_interface_longembed import longembed_varlen
from modeling_longembed.attention_longembed import KERNELS, flash_attention
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_base_longembed import AttentionInputs, AttentionPattern, Places
from modeling_longembed.pattern_registry_longembed import PATTERNS, build_pattern
from modeling_longembed.position_alibi_longembed import AlibiBias, alibi_slopes
from modeling_longembed.position_buckets_longembed import BucketBias
from modeling_longembed.position_relative_longembed import DistanceBias
from modeling_longembed.position_rope_longembed import rope_plan
from tests.covering import covering_first
from tests.modeling_longembed.pattern_settings import entries

HEADS, DIM = 4, 8
BUCKETS, DISTANCE = 8, 20
SCHEMES = ("absolute", "rope", "alibi", "buckets", "relative", "rope+group")
# flash-attn needs a GPU: what is passed to it is tested with a stand-in below.
CPU_KERNELS = [name for name in KERNELS if name != "flash_attention_2"]
TRAINABLE_KERNELS = [name for name in CPU_KERNELS if name != "flex_attention"]
LENGTHS = (0, 1, 2, 3, 7, 13, 61, 64, 65, 67, 131)


# The oracle -----------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Attention inputs and the leaves that gradients are taken at."""

    inputs: AttentionInputs
    scheme: str
    leaves: list[Tensor]

    def attend(self, kernel):
        return KERNELS[kernel][0](self.inputs)[0]


def scheme_fields(scheme, neighbours):
    """Config fields of a position scheme; under Self-Extend documents beyond 8 tokens are extended."""
    if scheme == "buckets":
        return {"relative_attention_num_buckets": BUCKETS, "relative_attention_max_distance": DISTANCE}
    extension = {"method": "group", "original_max_position_embeddings": 8, "factor": 3, "neighbours": neighbours}
    return {
        "position_embedding_type": scheme.partition("+")[0],
        "position_extension": extension if scheme == "rope+group" else None,
    }


def make_problem(pattern, scheme, lengths, is_global=None, neighbours=16, dtype=torch.float64, causal=False):
    """Random inputs, with gradients unless they are turned off. ValueError where the config refuses the combination."""
    config = LongEmbedConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        max_position_embeddings=256,
        attention_patterns={"type": pattern.type, **vars(pattern)},
        is_causal=causal,
        **scheme_fields(scheme, neighbours),
    )
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    documents = PackedDocuments(cu_seqlens, max(lengths), is_global=is_global)
    trainable = torch.is_grad_enabled()
    leaves = [torch.randn(sum(lengths), HEADS, DIM, dtype=dtype, requires_grad=trainable) for _ in range(3)]
    query, key, value = leaves
    bias = grouped = None
    if config.position_embedding_type == "rope":
        query, key, grouped = rope_plan(config, config.rope_parameters, documents, documents.token_index)(query, key)
    elif scheme == "alibi":
        bias = AlibiBias(torch.tensor(alibi_slopes(HEADS)))
    elif scheme == "buckets":
        leaves.append(torch.randn(BUCKETS, HEADS, dtype=dtype, requires_grad=trainable))
        bias = BucketBias(leaves[-1], DISTANCE)
    elif scheme == "relative":  # Transformer-XL: keys of the distances -reach to reach, u and v
        reach = max(lengths)
        leaves.append(torch.randn(HEADS, 2 * reach + 1, DIM, dtype=dtype, requires_grad=trainable))
        leaves += [torch.randn(HEADS, DIM, dtype=dtype, requires_grad=trainable) for _ in range(2)]
        keys, u, v = leaves[3:]
        query, bias = query + u, DistanceBias(keys, v - u, 0.3)
    inputs = AttentionInputs(
        query, key, value, pattern, documents, scaling=0.3, dropout=0.0, bias=bias, grouped=grouped, causal=causal
    )
    return Problem(inputs, scheme, leaves)


def predicate(pattern, length, marked):
    """The pattern's own definition, on every pair of tokens of a document: bool `(1 or H, L, L)`."""
    fields = (torch.arange(length), torch.full((length,), length), marked)
    query, key = (Places(*(x.view(shape) for x in fields)) for shape in ((-1, 1), (1, -1)))
    return pattern.visible(query, key, torch.arange(HEADS)[:, None, None], HEADS)


def dense_attention(problem, dtype=torch.float64):
    """The definition: softmax over all the keys that the predicate allows, document by document, in `dtype`."""
    inputs, cu_seqlens = problem.inputs, problem.inputs.documents.cu_seqlens.tolist()
    query, key, value = (x.to(dtype) for x in inputs[:3])
    contexts = []
    for start, end in pairwise(cu_seqlens):
        rows, i = slice(start, end), torch.arange(end - start)[:, None]
        j = i.T
        marked = inputs.documents.is_global
        marked = torch.zeros(end - start, dtype=torch.bool) if marked is None else marked[rows]
        scores = torch.einsum("qhd,khd->hqk", query[rows], key[rows])
        if inputs.grouped is not None:
            left, right = inputs.grouped.query_left[rows].to(dtype), inputs.grouped.query_right[rows].to(dtype)
            far_key = inputs.grouped.key[rows].to(dtype)
            far = torch.where(
                j < i, torch.einsum("qhd,khd->hqk", left, far_key), torch.einsum("qhd,khd->hqk", right, far_key)
            )
            scores = torch.where((i - j).abs() < inputs.grouped.neighbours[rows][:, None], scores, far)
        scores = scores * inputs.scaling
        if problem.scheme == "alibi":
            scores = scores - torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=dtype)[:, None, None] * (i - j).abs()
        if problem.scheme == "relative":  # (q + v) . r_{i - j}, pair by pair; the query carries u already
            keys, u, v = (leaf.to(dtype) for leaf in problem.leaves[3:])
            pairs = keys[:, i - j + keys.shape[1] // 2]  # (H, L, L, D)
            scores = scores + inputs.scaling * torch.einsum("qhd,hqkd->hqk", query[rows] - u + v, pairs)
        if problem.scheme == "buckets":
            buckets = MPNetEncoder.relative_position_bucket(j - i, BUCKETS, DISTANCE)
            scores = scores + problem.leaves[3].to(dtype)[buckets].permute(2, 0, 1)
        visible = predicate(inputs.pattern, end - start, marked).expand(scores.shape)
        visible = visible & (j <= i) if inputs.causal else visible
        weights = torch.where(visible, scores.exp(), 0.0)
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
        contexts.append(torch.einsum("hqk,khd->qhd", weights, value[rows]))
    return torch.cat(contexts).to(dtype)


def gradients(output, leaves):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    grads = torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def assert_same_gradients(output, expected, leaves):
    for ours, theirs in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def allowed(pattern, scheme, kernel, causal):
    """Whether kernel and config take the combination; that they refuse it in words is tested elsewhere."""
    kernel = KERNELS[kernel]
    needs = {"alibi": kernel.bias, "buckets": kernel.bias, "relative": kernel.query_bias, "rope+group": kernel.grouped}
    if scheme == "rope+group" and pattern.type == "sliding" and pattern.global_tokens:
        return False  # Self-Extend cannot be merged with tokens that see everything
    if getattr(pattern, "wrap", False) and (causal or scheme == "rope+group"):
        return False  # the roll joins the end of a document with its beginning
    return needs.get(scheme, True)


# Patterns that are more than a mask have tests, and an oracle, of their own.
ALL_PATTERNS = [p for name in PATTERNS for p in map(build_pattern, entries(name)) if p.is_mask]
MASKS = sorted({pattern.type for pattern in ALL_PATTERNS})
LARGEST = {  # of each kind, among those that can be causal, and among all
    causal: {pattern.type: pattern for pattern in ALL_PATTERNS if allowed(pattern, "absolute", "eager", causal)}
    for causal in (False, True)
}
COMBINATIONS = covering_first(
    [
        pytest.param(pattern, scheme, kernel, causal, id=f"{pattern}-{scheme}-{kernel}-{'causal' * causal}")
        for causal in (False, True)
        for pattern in ALL_PATTERNS
        for scheme in SCHEMES
        for kernel in CPU_KERNELS
        if allowed(pattern, scheme, kernel, causal)
    ],
    # The one kernel with a path of its own for each pattern; mistakes of it have shown in three values together.
    # Those of a setting that is not the largest are drawn, under every scheme, in a test below.
    keep=lambda pattern, scheme, kernel, causal: (
        kernel == "longembed_varlen" and pattern == LARGEST[causal][pattern.type]
    ),
)
BOTH_WAYS = covering_first(
    [pytest.param(*case.values[:3], id=case.id) for case in COMBINATIONS if not case.values[3]],
)
TRAINABLE = covering_first(
    [pytest.param(*case.values, id=case.id) for case in BOTH_WAYS if case.values[2] in TRAINABLE_KERNELS],
)


def whose_path_is_its_own(cases: list) -> list:
    """Mark the cases slow that differ from an earlier one in the mask alone, which most kernels add to the scores.

    FlexAttention takes seconds a case outside of a compiler, and adds the bias of a scheme to the scores as well.
    """
    found, seen = [], set()
    for case in cases:
        pattern, scheme, kernel = case.values
        path = (
            None if kernel == "flex_attention" else scheme,
            kernel,
            pattern if kernel == "longembed_varlen" else None,
        )
        found.append(pytest.param(*case.values, id=case.id, marks=case.marks if path not in seen else pytest.mark.slow))
        if not case.marks:
            seen.add(path)
    return found


ROUNDED = whose_path_is_its_own(BOTH_WAYS)


# The predicates -------------------------------------------------------------------------------------------------------


def test_the_predicates_are_what_their_names_say():
    none = torch.zeros(12, dtype=torch.bool)
    chosen = none.clone()
    chosen[7] = True

    def seen(entry, marked=none, head=0):
        return predicate(build_pattern(entry), 12, marked).expand(HEADS, 12, 12)[head].tolist()

    places = range(12)
    assert seen("full") == [[True] * 12] * 12
    assert seen({"type": "sliding", "window": 2}) == [[abs(a - b) <= 2 for b in places] for a in places]
    assert seen({"type": "sliding", "window": 2, "global_tokens": 1}) == [
        [abs(a - b) <= 2 or a == 0 or b == 0 for b in places] for a in places
    ]
    assert seen({"type": "sliding", "window": 2}, chosen) == [
        [abs(a - b) <= 2 or a == 7 or b == 7 for b in places] for a in places
    ]
    assert seen({"type": "sliding", "window": 2, "dilation": 3}) == [
        [abs(a - b) in (0, 3, 6) for b in places] for a in places
    ]
    shifted = {"type": "shifted", "size": 4}
    for head in (0, 1):
        assert seen(shifted, head=head) == [[a // 4 == b // 4 for b in places] for a in places]
    for head in (2, 3):
        assert seen(shifted, head=head) == [[(a + 2) // 4 == (b + 2) // 4 for b in places] for a in places]
        ends = {0, 1, 10, 11}
        assert seen(shifted | {"wrap": True}, head=head) == [
            [(a + 2) // 4 == (b + 2) // 4 or {a, b} <= ends for b in places] for a in places
        ]
    assert seen({"type": "block", "size": 5}) == [[a // 5 == b // 5 for b in places] for a in places]


@pytest.mark.parametrize("pattern", ALL_PATTERNS, ids=str)
def test_sees_all_agrees_with_the_predicate(pattern):
    for length in range(1, 20):
        dense = predicate(pattern, length, torch.zeros(length, dtype=torch.bool))
        assert not pattern.sees_all(length) or dense.all()


# Every pattern, scheme and kernel -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ALL_PATTERNS, ids=str)
def test_reach_is_as_far_as_the_predicate_sees(pattern):
    for length in range(1, 30):
        marked = torch.zeros(length, dtype=torch.bool)
        _, query, key = predicate(pattern, length, marked).expand(HEADS, length, length).nonzero(as_tuple=True)
        documents = PackedDocuments(torch.tensor([0, length], dtype=torch.int32), length)
        assert pattern.reach(documents) >= (query - key).abs().max()


@pytest.mark.promise("A1")
@pytest.mark.parametrize(("pattern", "scheme", "kernel", "causal"), COMBINATIONS)
def test_equals_dense_attention(pattern, scheme, kernel, causal):
    with torch.set_grad_enabled(kernel in TRAINABLE_KERNELS):
        # Blocks of one or two tokens take time by their number, and have nothing new to show in long documents.
        lengths = [1, 7, 0, 2, 9, 5, 4] if getattr(pattern, "size", 64) <= 2 else [1, 67, 0, 2, 6, 131, 5, 4, 13]
        problem = make_problem(pattern, scheme, lengths, causal=causal)
        output, expected = problem.attend(kernel), dense_attention(problem)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    if kernel in TRAINABLE_KERNELS:
        assert_same_gradients(output, expected, problem.leaves)


@st.composite
def cases(draw, name, scheme):
    """A setting of the pattern `name`, and documents whose lengths lie around its parameters, some tokens global."""
    entry, may_be_global = {"type": name}, (name, scheme) != ("sliding", "rope+group")  # refused, see below
    for field in fields(PATTERNS[name]):
        least = field.metadata["least"]
        if field.name == "global_projections" or (field.name == "global_tokens" and not may_be_global):
            continue
        if least is None:
            entry[field.name] = scheme != "rope+group" and draw(st.booleans())
        else:
            entry[field.name] = draw(st.integers(least, least + (2 if field.name == "dilation" else 70)))
    sizes = [size for size in entry.values() if type(size) is int]
    around = [max(0, size * times + more) for size in sizes for times in (1, 2) for more in (-1, 0, 1)]
    longest = 12 * entry.get("size", 64)  # the time of blocks goes by their number
    lengths = [length for length in (*LENGTHS, *around) if length <= longest]
    lengths = draw(st.lists(st.sampled_from(lengths), min_size=1, max_size=3).filter(any))
    is_global = None
    if may_be_global and draw(st.booleans()):
        is_global = torch.tensor(
            draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))), dtype=bool
        )
        is_global &= torch.arange(len(is_global)) % 5 == 0
    return build_pattern(entry), lengths, is_global, draw(st.sampled_from([5000, 2**24]))


@pytest.mark.promise("A1")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=settings.default.max_examples // 3)
@given(data=st.data())
def test_the_packed_path_equals_dense_attention_on_any_batch(name, scheme, data):
    pattern, lengths, is_global, max_scores = data.draw(cases(name, scheme))
    causal = not getattr(pattern, "wrap", False) and data.draw(st.booleans())
    problem = make_problem(pattern, scheme, lengths, is_global, neighbours=256, causal=causal)
    with patch.object(attention_kernels_longembed, "MAX_SCORES", max_scores):
        output, expected = problem.attend("longembed_varlen"), dense_attention(problem)
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
        assert_same_gradients(output, expected, problem.leaves)


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    ("pattern", "kernel"),
    [
        # FlexAttention takes seconds a case, and is given one mask, of the predicate, whatever the pattern.
        pytest.param(
            pattern,
            kernel,
            id=f"{pattern}-{kernel}",
            marks=[pytest.mark.slow] if kernel == "flex_attention" and pattern != LARGEST[False]["sliding"] else [],
        )
        for pattern in ALL_PATTERNS
        for kernel in CPU_KERNELS
    ],
)
def test_global_tokens_of_a_mask(pattern, kernel):
    lengths = [70, 1, 9, 67]
    is_global = torch.zeros(sum(lengths), dtype=torch.bool)
    is_global[[0, 3, 69, 70, 79, 80, 146]] = True  # first, last and inner tokens, and a document without any
    with torch.no_grad():
        problem = make_problem(pattern, "alibi", lengths, is_global)
        torch.testing.assert_close(problem.attend(kernel), dense_attention(problem), atol=1e-10, rtol=0)


@pytest.mark.promise("A1")
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 33, 63, 64, 65, 97, 128, 129, 193])
@pytest.mark.parametrize(
    "entry",
    [
        {"type": "sliding", "window": 16},
        {"type": "block", "size": 16},
        {"type": "shifted", "size": 16},
        {"type": "shifted", "size": 16, "wrap": True},
    ],
    ids=str,
)
def test_lengths_around_the_window_and_the_blocks_of_the_computation(entry, length):
    problem = make_problem(build_pattern(entry), "absolute", [length])
    torch.testing.assert_close(problem.attend("longembed_varlen"), dense_attention(problem), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("pattern", "scheme", "kernel"), ROUNDED)
def test_single_precision(pattern, scheme, kernel):
    with torch.no_grad():
        problem = make_problem(pattern, scheme, [67, 1, 131], dtype=torch.float32)
        expected = dense_attention(problem).float()
        torch.testing.assert_close(problem.attend(kernel), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("pattern", "scheme", "kernel"), ROUNDED)
def test_half_precision_loses_no_more_than_a_dense_softmax_would(pattern, scheme, kernel):
    with torch.no_grad():
        problem = make_problem(pattern, scheme, [67, 131], dtype=torch.bfloat16)
        expected = dense_attention(problem)
        reference = (dense_attention(problem, torch.bfloat16).double() - expected).norm()
        assert (problem.attend(kernel).double() - expected).norm() <= 3 * reference


# Documents ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "scheme", "kernel"), TRAINABLE)
def test_no_document_sees_another(pattern, scheme, kernel):
    problem = make_problem(pattern, scheme, [9, 70, 1, 12])
    output = problem.attend(kernel)
    for start, end in problem.inputs.documents.bounds:
        grads = torch.autograd.grad(output[start:end].sum(), problem.leaves[:3], retain_graph=True)
        for grad in grads:
            assert not grad[:start].any()
            assert not grad[end:].any()


class EvenTokens(AttentionPattern):
    """Odd tokens see nothing and are not seen: what no pattern of ours does to a query, and a new one may."""

    type = "even"
    layer_type = "full_attention"

    def visible(self, query, key, head, num_heads):
        return (query.index % 2 == 0) & (key.index % 2 == 0)

    def sees_all(self, length):
        return length == 1


@pytest.mark.promise("A13")
@pytest.mark.parametrize("bias", [None, AlibiBias(torch.tensor(alibi_slopes(HEADS)))], ids=["plain", "alibi"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "longembed_chunked", "longembed_varlen", "flex_attention"])
def test_a_query_that_sees_nothing_gives_zeros(kernel, bias):
    with torch.set_grad_enabled(kernel in TRAINABLE_KERNELS):
        problem = make_problem(build_pattern("full"), "absolute", [7, 1, 10])
        problem = replace(problem, inputs=problem.inputs._replace(pattern=EvenTokens(), bias=bias))
        output = problem.attend(kernel)
    blind = problem.inputs.documents.token_index % 2 == 1
    assert (output[blind] == 0).all()
    assert (output[~blind] != 0).all()
    if kernel in TRAINABLE_KERNELS:
        for grad in gradients(output, problem.leaves):
            assert grad.isfinite().all()
            assert (grad[blind] == 0).all()


@pytest.mark.promise("A13")
@pytest.mark.parametrize(
    ("pattern", "kernel", "pooling"),
    covering_first(
        [
            pytest.param(pattern, kernel, pooling, id=f"{pattern}-{kernel}-{pooling}")
            for pattern in ALL_PATTERNS
            for kernel in TRAINABLE_KERNELS
            for pooling in ("mean", "cls", "last", "weighted_mean")
        ]
    ),
)
def test_a_document_that_is_all_padding_gives_zeros(build_tiny_model, pattern, kernel, pooling):
    entry = {"type": pattern.type, **vars(pattern)}
    model = build_tiny_model(attention_patterns=entry, pooling=pooling, attn_implementation=kernel)
    input_ids = torch.randint(1, 64, (3, 9))
    for empty in ([1], [0, 2], [0, 1, 2]):
        attention_mask = torch.ones_like(input_ids)
        attention_mask[empty] = 0
        output = model(input_ids, attention_mask=attention_mask)
        assert (output.last_hidden_state[empty] == 0).all()
        assert (output.pooler_output[empty] == 0).all()
        model.zero_grad()
        (output.last_hidden_state.square().sum() + output.pooler_output.square().sum()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# Other people's implementations ---------------------------------------------------------------------------------------


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    "kernel",
    # The others are compared with the dense softmax under the same predicate above.
    [k if k in ("eager", "longembed_varlen") else pytest.param(k, marks=pytest.mark.slow) for k in CPU_KERNELS],
)
def test_the_window_is_that_of_modernbert(tmp_path, kernel):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}
    config = ModernBertConfig(
        vocab_size=64, **sizes, local_attention=8, global_attn_every_n_layers=3, initializer_range=0.3, pad_token_id=0
    )
    original = ModernBertModel(config).eval()
    original.save_pretrained(tmp_path)
    model = LongEmbedModel.from_encoder(tmp_path, attn_implementation=kernel)
    assert [entry["type"] for entry in model.config.attention_patterns] == ["full", "sliding", "sliding"]
    input_ids = torch.randint(1, 64, (2, 40))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 30:] = 0
    with torch.no_grad():
        expected = original(input_ids, attention_mask=attention_mask).last_hidden_state
        output = model(input_ids, attention_mask=attention_mask).last_hidden_state
    torch.testing.assert_close(output[attention_mask == 1], expected[attention_mask == 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_the_entry_in_transformers_table_serves_other_models(side):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=64, **sizes, initializer_range=0.3)
    model = BertModel(config, add_pooling_layer=False).eval()
    input_ids = torch.randint(1, 64, (3, 20))
    attention_mask = torch.ones_like(input_ids)
    if side == "holes":
        attention_mask = torch.bernoulli(torch.full((3, 20), 0.6)).long()
    else:
        attention_mask[1, slice(12, None) if side == "right" else slice(0, 8)] = 0
    outputs = {}
    for name in ("sdpa", "longembed_varlen"):
        model.set_attn_implementation(name)
        outputs[name] = model(input_ids, attention_mask=attention_mask).last_hidden_state[attention_mask == 1]
    torch.testing.assert_close(outputs["longembed_varlen"], outputs["sdpa"], atol=1e-5, rtol=0)
    # Without the registered mask function the padding would have been seen: it makes a difference here.
    assert (model(input_ids).last_hidden_state[attention_mask == 1] - outputs["sdpa"]).abs().max() > 1e-2


def test_the_entry_takes_packed_input_too():
    query, key, value = torch.randn(3, 1, HEADS, 12, DIM)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    output, _ = longembed_varlen(None, query, key, value, None, cu_seq_lens_q=cu_seqlens, is_causal=False)
    for start, end in ((0, 5), (5, 12)):
        part = (x[:, :, start:end] for x in (query, key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(*part).transpose(1, 2)
        torch.testing.assert_close(output[:, start:end], expected, atol=1e-6, rtol=0)


# Kernels that need a GPU ----------------------------------------------------------------------------------------------


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
