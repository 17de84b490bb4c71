"""Every pattern on every kernel against the dense softmax under the pattern's own predicate, written out here.

The tests run over the registries: a pattern, a kernel or a position scheme that is added is tested by being there.
"""

from dataclasses import fields, replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ModernBertConfig, ModernBertModel

from modeling_longembed import (
    LongEmbedModel,
    attention_kernels_longembed,
)
from modeling_longembed.attention_longembed import KERNELS
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_base_longembed import AttentionPattern
from modeling_longembed.pattern_registry_longembed import PATTERNS, build_pattern
from modeling_longembed.position_alibi_longembed import AlibiBias, alibi_slopes
from tests.covering import covering_first
from tests.modeling_longembed.pattern_settings import entries
from tests.modeling_longembed.patterns.dense_attention import (
    HEADS,
    assert_same_gradients,
    dense_attention,
    gradients,
    make_problem,
    predicate,
)

SCHEMES = ("absolute", "rope", "alibi", "buckets", "relative", "rope+group")
# flash-attn needs a GPU: what is passed to it is tested with a stand-in in test_attention_refusals.py.
CPU_KERNELS = [name for name in KERNELS if name != "flash_attention_2"]
TRAINABLE_KERNELS = [name for name in CPU_KERNELS if name != "flex_attention"]
LENGTHS = (0, 1, 2, 3, 7, 13, 61, 64, 65, 67, 131)


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
