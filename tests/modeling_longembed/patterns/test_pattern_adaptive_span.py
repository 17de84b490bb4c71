"""Adaptive spans against the paper's formula, written out here: softmax, multiplied by the mask, renormalised."""

import json
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from modeling_longembed import (
    LongEmbedConfig,
    LongEmbedModel,
    attention_kernels_longembed,
    pattern_adaptive_span_longembed,
)
from modeling_longembed.attention_longembed import KERNELS, AttentionInputs
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_adaptive_span_longembed import AdaptiveSpan
from modeling_longembed.pattern_registry_longembed import build_pattern
from modeling_longembed.position_alibi_longembed import AlibiBias
from tests.modeling_longembed.memory_use import Allocated, KeptForBackward
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, random_batch, save_checkpoint

HEADS, DIM, SCALING = 4, 8, 0.3
SLOPES = torch.tensor([0.5, 0.1, 0.03, 0.0], dtype=torch.float64)
SCHEMES = {
    "absolute": {},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "rope": {"position_embedding_type": "rope"},
    "rope+group": {
        "position_embedding_type": "rope",
        "position_extension": {"method": "group", "original_max_position_embeddings": 16, "neighbours": 24},
    },
    "alibi": {"position_embedding_type": "alibi"},
    "relative": {"position_embedding_type": "relative"},
    "buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    "none": {"position_embedding_type": "none", "is_causal": True},
}


def adaptive(max_span, ramp, **others):
    return {"type": "adaptive", "max_span": max_span, "ramp": ramp} | others


def make_inputs(spans, max_span, ramp, lengths, bias=None, causal=False, dtype=torch.float64):
    """Random inputs with these spans in tokens, and the leaves: query, key, value `(T, H, D)`, fractions `(H,)`."""
    leaves = [torch.randn(sum(lengths), HEADS, DIM, dtype=dtype, requires_grad=True) for _ in range(3)]
    own = AdaptiveSpan(HEADS, max_span).to(torch.float64)
    own.fraction.data = torch.as_tensor(spans, dtype=torch.float64) / max_span
    documents = PackedDocuments(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths))
    pattern = build_pattern(adaptive(max_span, ramp))
    inputs = AttentionInputs(
        *leaves, pattern, documents, scaling=SCALING, dropout=0.0, bias=bias, causal=causal, own=own()
    )
    return inputs, [*leaves, own.fraction]


def reference(inputs, leaves, max_span, ramp, slopes=None, dtype=torch.float64):
    """Equations 3 and 4 of the paper, on both sides: `(T, H, D)`."""
    query, key, value = (leaf.to(dtype) for leaf in leaves[:3])
    spans = leaves[3].to(dtype) * max_span
    contexts = []
    for start, end in pairwise(inputs.documents.cu_seqlens.tolist()):
        index = torch.arange(end - start)
        signed = index[:, None] - index[None, :]
        distance = signed.abs()
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * inputs.scaling
        if slopes is not None:
            scores = scores - slopes.to(dtype)[:, None, None] * distance
        in_window = distance <= max_span
        if inputs.causal:
            in_window = in_window & (signed >= 0)
        soft = ((ramp + spans[:, None, None] - distance) / ramp).clamp(0, 1)
        weights = scores.masked_fill(~in_window, float("-inf")).softmax(-1) * soft
        weights = weights / weights.sum(-1, keepdim=True)
        contexts.append(torch.einsum("hqk,khd->qhd", weights, value[start:end]))
    return torch.cat(contexts)


def gradients(output, leaves):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), leaves, retain_graph=True)


@pytest.fixture
def build_adaptive_span(build_tiny_model):
    """`model_of(entry, **fields)`: fp64, in the context of 64 tokens."""

    def build(entry, attn_implementation=None, **fields):
        fields = {"max_position_embeddings": 64, "attention_patterns": entry} | fields
        return build_tiny_model(attn_implementation=attn_implementation, **fields).double()

    return build


# The formula ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("A7")
def test_the_ramp_is_that_of_the_paper():
    """Equal scores leave the mask alone: 1 up to z, then down by 1 / R a token, 0 from z + R on."""
    inputs, _ = make_inputs([0.0, 2.0, 2.5, 6.0], max_span=6, ramp=4, lengths=[15])
    inputs = inputs._replace(query=torch.zeros_like(inputs.query))
    _, weights = inputs.pattern.dense(inputs, slice(0, 15))
    from_the_last = weights[:, 14].flip(-1)  # by distance
    expected = torch.tensor(
        [
            [1, 3 / 4, 2 / 4, 1 / 4, 0, 0, 0],
            [1, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0],
            [1, 1, 1, 3.5 / 4, 2.5 / 4, 1.5 / 4, 0.5 / 4],
            [1, 1, 1, 1, 1, 1, 1],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(from_the_last[:, :7], expected / expected.sum(-1, keepdim=True), atol=1e-12, rtol=0)
    assert (from_the_last[:, 7:] == 0).all()


@st.composite
def problems(draw):
    max_span, ramp = draw(st.integers(1, 90)), draw(st.integers(1, 40))
    # Whole spans put keys on both ends of the ramp, where the mask is 0 or 1 and has two derivatives: kept off here.
    inside = st.integers(0, max_span - 1).map(lambda tokens: tokens + 0.37)
    spans = draw(st.lists(inside, min_size=HEADS, max_size=HEADS))
    around = [max_span, ramp, 64, 65, 131]
    lengths = [max(1, n + draw(st.integers(-1, 1))) for n in draw(st.lists(st.sampled_from(around), max_size=2))]
    lengths = draw(st.permutations([*lengths, draw(st.sampled_from([1, 2, 13])), 0]))
    biased, causal = draw(st.booleans()), draw(st.booleans())
    return spans, max_span, ramp, lengths, biased, causal, draw(st.sampled_from([5000, 2**24]))


@pytest.mark.promise("A7")
@given(problems())
def test_both_paths_are_the_definition_on_any_batch(problem):
    spans, max_span, ramp, lengths, biased, causal, max_scores = problem
    slopes = SLOPES if biased else None
    inputs, leaves = make_inputs(spans, max_span, ramp, lengths, AlibiBias(SLOPES) if biased else None, causal)
    expected = reference(inputs, leaves, max_span, ramp, slopes)
    expected_gradients = gradients(expected, leaves)
    for kernel in ("eager", "longembed_varlen"):
        with patch.object(attention_kernels_longembed, "MAX_SCORES", max_scores):
            output = KERNELS[kernel].function(inputs)[0]
            torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
            for ours, theirs in zip(gradients(output, leaves), expected_gradients, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-10)


@pytest.mark.parametrize("kernel", ["eager", "longembed_varlen"])
@pytest.mark.parametrize("spans", [[0, 1, 5, 9], [-3, -0.5, 9.5, 14]], ids=["whole", "out of range"])
def test_keys_at_the_ends_of_the_ramp_give_no_nan(spans, kernel):
    inputs, leaves = make_inputs(spans, 9, 3, [40, 1])
    output = KERNELS[kernel].function(inputs)[0]
    clamped = [*leaves[:3], leaves[3].clamp(0, 1)]
    torch.testing.assert_close(output, reference(inputs, clamped, 9, 3), atol=1e-10, rtol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(output, leaves))


def test_a_span_out_of_range_can_come_back():
    """The gradient of the output passes the clamp; that of the penalty stops where shorter is no longer cheaper."""
    inputs, leaves = make_inputs([-2.0, 0.3, 8.7, 11.0], 9, 4, [40])
    fractions = gradients(inputs.pattern.attend(inputs), leaves)[3]
    assert fractions[0] != 0
    assert fractions[3] == 0  # nothing to see beyond the maximum: no push further out
    own = AdaptiveSpan(HEADS, 9)
    own.fraction.data = torch.tensor([-0.2, 0.1, 0.9, 1.2])
    (penalty,) = torch.autograd.grad(own.penalty(), [own.fraction])
    torch.testing.assert_close(penalty, torch.tensor([0, 9 / 4, 9 / 4, 9 / 4]))


def test_the_output_changes_continuously_with_the_span():
    """Also where a key comes in or reaches its full weight: a step of 1e-6 in the span is no step in the output."""

    def output(span):
        torch.manual_seed(0)
        inputs, _ = make_inputs([span] * HEADS, 12, 5, [30])
        return inputs.pattern.attend(inputs).detach()

    for span in [0.25 * quarter for quarter in range(47)]:
        before, after, later = output(span), output(span + 1e-6), output(span + 0.25)
        assert (after - before).abs().max() < 1e-5
        assert (later - before).abs().max() > 1e-3  # and the span has an effect


# What it equals -------------------------------------------------------------------------------------------------------


@pytest.mark.promise("A7")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", ["eager", "longembed_varlen"])
def test_the_largest_span_is_a_sliding_window(build_adaptive_span, scheme, kernel):
    model = build_adaptive_span(adaptive(20, 4), kernel, **SCHEMES[scheme])
    sliding = build_adaptive_span({"type": "sliding", "window": 20}, kernel, **SCHEMES[scheme])
    sliding.load_state_dict({name: x for name, x in model.state_dict().items() if not name.endswith("own.fraction")})
    batch = torch.randint(1, 64, (2, 60)), (torch.arange(60) < torch.tensor([60, 33])[:, None]).long()
    with torch.no_grad():
        ours, theirs = model(*batch).last_hidden_state, sliding(*batch).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_paths_agree_in_every_position_scheme(build_adaptive_span, scheme):
    batch = torch.randint(1, 64, (2, 60)), (torch.arange(60) < torch.tensor([60, 33])[:, None]).long()
    outputs = []
    for kernel in ("eager", "longembed_varlen"):
        model = build_adaptive_span(adaptive(20, 4), kernel, **SCHEMES[scheme])
        for span in model.adaptive_spans():
            span.fraction.data = torch.tensor([0.0, 0.21, 0.5, 0.83], dtype=torch.float64)
        outputs.append(model(*batch).last_hidden_state)
    torch.testing.assert_close(*outputs, atol=1e-10, rtol=0)


@pytest.mark.promise("A7")
@pytest.mark.parametrize("spans", [[0, 1, 2, 3], [0.5, 4.25, 7.0, 2.1]], ids=str)
def test_trimmed_equals_untrimmed(spans):
    windows = []
    real = attention_kernels_longembed.window_attention

    def untrimmed(query, key, value, window, *rest):
        windows.append(window)
        return real(query, key, value, 30, *rest)

    inputs, leaves = make_inputs(spans, 30, 3, [80])
    trimmed = inputs.pattern.attend(inputs)
    with patch.object(pattern_adaptive_span_longembed, "window_attention", untrimmed):
        whole = inputs.pattern.attend(inputs)
    assert windows == [{3: 5, 7.0: 9}[max(spans)]]  # the last key before z + R
    torch.testing.assert_close(trimmed, whole, atol=1e-12, rtol=0)
    for ours, theirs in zip(gradients(trimmed, leaves), gradients(whole, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_no_document_sees_another():
    inputs, leaves = make_inputs([2.0, 5.0, 9.0, 30.0], 30, 4, [9, 70, 1, 12])
    output = inputs.pattern.attend(inputs)
    for start, end in inputs.documents.bounds:
        for gradient in torch.autograd.grad(output[start:end].sum(), leaves[:3], retain_graph=True):
            assert not gradient[:start].any()
            assert not gradient[end:].any()


def test_some_of_the_heads_have_their_own_spans():
    """As under tensor parallelism: a process has some of the heads, and all spans."""
    inputs, _ = make_inputs([1.0, 4.0, 8.0, 12.0], 12, 3, [50])
    output = inputs.pattern.attend(inputs)
    for heads in (slice(0, 2), slice(2, 4), slice(1, 2)):
        part = inputs.heads(heads)
        torch.testing.assert_close(inputs.pattern.attend(part), output[:, heads], atol=1e-12, rtol=0)
        dense, _ = inputs.pattern.dense(part, slice(0, 50))
        torch.testing.assert_close(dense, output[:, heads], atol=1e-12, rtol=0)


def test_dropout_is_on_the_weights():
    inputs, _ = make_inputs([1.0, 4.0, 8.0, 12.0], 12, 3, [300])
    inputs = inputs._replace(value=torch.ones_like(inputs.value), dropout=0.5)
    for kernel in ("eager", "longembed_varlen"):
        output = KERNELS[kernel].function(inputs)[0]
        assert output.std() > 0.1
        torch.testing.assert_close(output.mean().item(), 1.0, atol=0.1, rtol=0)


def test_half_precision_loses_no_more_than_the_formula_would():
    inputs, leaves = make_inputs([3.3, 10.0, 25.5, 60.0], 60, 16, [67, 131], dtype=torch.bfloat16)
    expected = reference(inputs, leaves, 60, 16)
    loss = (reference(inputs, leaves, 60, 16, dtype=torch.bfloat16).double() - expected).norm()
    for kernel in ("eager", "longembed_varlen"):
        output = KERNELS[kernel].function(inputs)[0]
        assert output.dtype == torch.bfloat16
        assert (output.double() - expected).norm() <= 3 * loss


# What it costs --------------------------------------------------------------------------------------------------------


def elements_of(spans, length, max_span=400):
    inputs, _ = make_inputs(spans, max_span, 8, [length], dtype=torch.float32)
    with torch.no_grad(), Allocated() as allocated:
        inputs.pattern.attend(inputs)
    return allocated


@pytest.mark.promise("A7")
def test_keys_beyond_the_spans_are_not_read():
    """At 1,600 tokens, by the elements of all tensors of a forward pass: half of the span is about half of the work."""
    whole, half, little = (elements_of([0, 1, 2, span], 1600).total for span in (400, 192, 30))
    assert half < 0.6 * whole
    assert little < 0.15 * whole
    assert elements_of([30] * HEADS, 1600).total == little  # one long head makes all of the sublayer's pay


def test_memory_grows_with_the_length_and_not_its_square():
    with patch.object(attention_kernels_longembed, "MAX_SCORES", 2**15):
        assert elements_of([9, 9, 9, 20], 4000).largest <= 1.1 * 2 * elements_of([9, 9, 9, 20], 2000).largest


def test_no_scores_are_kept_for_the_backward_pass():
    length, budget = 2048, 2**18
    inputs, leaves = make_inputs([9, 9, 9, 64], 64, 8, [length], dtype=torch.float32)
    with patch.object(attention_kernels_longembed, "MAX_SCORES", budget), KeptForBackward() as kept:
        output = inputs.pattern.attend(inputs)
    assert length * length == 16 * budget
    assert kept.total <= 4 * budget  # the scores of all chunks would be 32
    assert all(gradient.isfinite().all() for gradient in gradients(output, leaves))


# The penalty ----------------------------------------------------------------------------------------------------------


def test_the_penalty_is_the_papers(build_adaptive_span):
    model = build_adaptive_span([adaptive(20, 4), "full", adaptive(40, 4)], num_hidden_layers=3)
    first, second = model.adaptive_spans()
    first.fraction.data = torch.tensor([0.0, 0.5, 1.0, 0.1], dtype=torch.float64)
    second.fraction.data = torch.tensor([0.25, 0.25, -0.5, -0.1], dtype=torch.float64)
    spans = [0, 10, 20, 2], [10, 10, 0, 0]
    penalty = model.span_penalty()
    torch.testing.assert_close(penalty.item(), sum(sum(heads) / HEADS for heads in spans))
    penalty.backward()
    torch.testing.assert_close(second.fraction.grad, torch.tensor([10, 10, 0, 0], dtype=torch.float64))


@pytest.mark.promise("A7")
def test_a_heavier_penalty_makes_shorter_spans(build_adaptive_span):
    """Gradient descent from equal models on the same random data: every step shrinks, and more under more weight."""
    batch, target = torch.randint(1, 64, (4, 40)), torch.randn(4, 40, 32, dtype=torch.float64)
    ends = []
    for weight in (0.01, 0.03, 0.1):
        model = build_adaptive_span(adaptive(30, 8))
        spans = [span.fraction for span in model.adaptive_spans()]
        optimizer = torch.optim.SGD(spans, lr=0.01)
        course = [model.span_penalty().item()]
        for _ in range(8):
            loss = (model(batch).last_hidden_state - target).square().mean() + weight * model.span_penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            course.append(model.span_penalty().item())
        assert all(after < before for before, after in pairwise(course))
        ends.append(course[-1])
    assert ends[0] > ends[1] > ends[2]


def test_a_model_without_spans_has_no_penalty(build_adaptive_span):
    with pytest.raises(ValueError, match=r"^span_penalty: no entry of attention_patterns is 'adaptive'"):
        build_adaptive_span("full").span_penalty()


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "initial"), [(adaptive(20, 4), 1.0), (adaptive(20, 4, initial_span=5), 0.25)])
def test_spans_start_where_the_config_says(build_adaptive_span, entry, initial):
    model = build_adaptive_span(entry)
    assert model.config.attention_patterns[0]["initial_span"] == 20 * initial
    for span in model.adaptive_spans():
        torch.testing.assert_close(span.fraction, torch.full((HEADS,), initial, dtype=torch.float64))


@pytest.mark.parametrize("remote", [False, True], ids=["here", "remote code"])
def test_learned_spans_survive_the_folder(build_adaptive_span, tmp_path, remote):
    model = build_adaptive_span(adaptive(20, 4, initial_span=0))
    model.adaptive_spans()[1].fraction.data = torch.tensor([0.1, 0.4, 0.9, -0.2], dtype=torch.float64)
    model.save_pretrained(tmp_path / "adaptive")
    load = AutoModel if remote else LongEmbedModel
    again = load.from_pretrained(tmp_path / "adaptive", trust_remote_code=remote, dtype=torch.float64).eval()
    ids = torch.randint(1, 64, (1, 50))
    assert torch.equal(again(ids).pooler_output, model(ids).pooler_output)
    assert again.span_penalty() == model.span_penalty()


def test_spans_train_with_the_rest_and_several_passes_may_come_before_one_backward(build_adaptive_span):
    model = build_adaptive_span(adaptive(20, 4, initial_span=7), hidden_dropout_prob=0.0).train()
    batches = torch.randint(1, 64, (2, 3, 40))
    together = sum(model(batch).pooler_output.sin().sum() for batch in batches)
    together.backward()
    expected = model.adaptive_spans()[0].fraction.grad.clone()
    assert expected.abs().min() > 0
    model.zero_grad()
    for batch in batches:
        model(batch).pooler_output.sin().sum().backward()
    torch.testing.assert_close(model.adaptive_spans()[0].fraction.grad, expected, atol=1e-12, rtol=0)


def test_lora_merges_and_leaves_the_spans_alone(build_adaptive_span):
    model, ids = build_adaptive_span(adaptive(20, 4, initial_span=7)), torch.randint(1, 64, (1, 50))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    expected = adapted(ids).pooler_output
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).pooler_output, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(merged.span_penalty().item(), 14.0)


@pytest.mark.parametrize("family", ["bert", "longformer"])
def test_a_converted_model_starts_as_a_window_and_says_so(tmp_path, capsys, family):
    original = save_checkpoint(tmp_path, family)
    model = LongEmbedModel.from_encoder(tmp_path, attention_patterns=adaptive(CONTEXT, 8))
    assert model.span_penalty() == 2 * CONTEXT
    said = capsys.readouterr().out
    assert "2 weights that belong to attention patterns are not in the checkpoint and start new, such as " in said
    assert "layers.0.attention.own.fraction" in said
    if family == "bert":  # the check stays: all is seen
        assert f"documents of up to {CONTEXT} tokens" in said
        batch = random_batch([CONTEXT, 17], 0)
        with torch.no_grad():
            ours, theirs = model(**batch).last_hidden_state, original(**batch).last_hidden_state
        seen = batch["attention_mask"] == 1
        torch.testing.assert_close(ours[seen], theirs[seen], atol=1e-5, rtol=0)
    else:
        assert "12 weights that belong to attention patterns are left out" in said


def test_a_converted_model_may_start_without_spans(tmp_path, capsys):
    save_checkpoint(tmp_path, "bert")
    model = LongEmbedModel.from_encoder(tmp_path, attention_patterns=adaptive(CONTEXT, 8, initial_span=0))
    assert model.span_penalty() == 0
    assert "documents of up to 1 tokens" in capsys.readouterr().out  # beyond, a key counts less than it did


@pytest.mark.parametrize("remote", [False, True], ids=["here", "remote code"])
def test_a_folder_whose_config_was_edited_starts_at_the_initial_span(build_adaptive_span, tmp_path, remote):
    build_adaptive_span({"type": "sliding", "window": 20}).save_pretrained(tmp_path / "edited")
    config = json.loads((tmp_path / "edited" / "config.json").read_text())
    config["attention_patterns"] = [adaptive(20, 4, initial_span=5)] * 2
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config))
    load = AutoModel if remote else LongEmbedModel
    again, loading = load.from_pretrained(tmp_path / "edited", trust_remote_code=remote, output_loading_info=True)
    assert loading["missing_keys"] == {f"layers.{layer}.attention.own.fraction" for layer in (0, 2)}
    assert again.span_penalty() == 10


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_patterns": adaptive(100, 4)}, r"^attention_patterns: max_span=100 of 'adaptive' is more than "),
        ({"attention_patterns": adaptive(20, 4, initial_span=21)}, r"^attention_patterns: initial_span=21 .* max_span"),
        ({"attention_patterns": adaptive(20, 0)}, r"^attention_patterns: 'ramp' .* is 0; give a whole number"),
        (
            {"attention_patterns": adaptive(24, 4)} | SCHEMES["rope+group"],
            r"^position_extension: Self-Extend .* 'yarn'",
        ),
        (
            {"attention_patterns": adaptive(20, 4), "training_attention_patterns": "full"},
            r"^training_attention_patterns: 'full' cannot replace 'adaptive'",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(fields, message):
    with pytest.raises(ValueError, match=message) as refusal:
        LongEmbedConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64, **fields)
    assert "\n" not in str(refusal.value)


def test_kernels_that_compute_masks_alone_refuse(build_adaptive_span):
    with pytest.raises(ValueError, match=r"^attn_implementation='sdpa' computes masks alone, .* 'adaptive' is more"):
        build_adaptive_span(adaptive(20, 4), "sdpa")(torch.ones(1, 4, dtype=torch.long))


def test_the_pattern_is_frozen_and_its_mask_is_the_widest_window():
    pattern = build_pattern(adaptive(5, 4))
    assert replace(pattern, max_span=6).initial_span == 5
    assert not pattern.is_mask
    assert pattern.at_start == build_pattern({"type": "sliding", "window": 5})
    assert build_pattern(adaptive(5, 4, initial_span=3)).at_start.type == "adaptive"
