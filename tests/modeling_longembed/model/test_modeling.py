"""The encoder as a whole: its outputs, its memory, its heads, its precision."""

import pytest
import torch
from sentence_transformers.models import Pooling
from transformers import BertConfig, BertModel

from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel, attention_kernels_longembed, modeling_longembed
from modeling_longembed.attention_longembed import KERNELS
from modeling_longembed.hub_sentence_transformers_longembed import ST_POOLINGS
from modeling_longembed.output_pooling_longembed import POOLINGS
from modeling_longembed.pattern_registry_longembed import PATTERNS
from tests.modeling_longembed.memory_use import Allocated, KeptForBackward
from tests.modeling_longembed.pattern_settings import refused

CPU_KERNELS = [name for name in KERNELS if name != "flash_attention_2"]
MIXED = [{"type": "sliding", "window": 3, "global_tokens": 1}, {"type": "block", "size": 4}]
RELATIVE = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
GROUP = {"method": "group", "original_max_position_embeddings": 8, "factor": 3, "neighbours": 8}
POSITIONS = {
    "absolute": {},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "rope": {"position_embedding_type": "rope"},
    "rope+group": {"position_embedding_type": "rope", "position_extension": GROUP},
    "alibi": {"position_embedding_type": "alibi"},
    "relative": RELATIVE,
}


def make_batch(lengths=(17, 9, 1)):
    attention_mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {"input_ids": torch.randint(1, 64, attention_mask.shape), "attention_mask": attention_mask}


def parameter_gradients(model, batch, step=0):
    torch.manual_seed(step)  # dropout
    model.zero_grad()
    output = model(**batch)
    (output.pooler_output.square().mean() + output.last_hidden_state.sin().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Outputs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bert_and_ours(tmp_path):
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        num_hidden_layers=3,
        initializer_range=0.3,
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    bert.save_pretrained(tmp_path)
    bert.set_attn_implementation("eager")
    return bert, LongEmbedModel.from_encoder(tmp_path, attn_implementation="eager")


def test_hidden_states_and_attentions_are_those_of_bert(bert_and_ours):
    batch = make_batch()
    mask = batch["attention_mask"] == 1
    with torch.no_grad():
        theirs, ours = (m(**batch, output_hidden_states=True, output_attentions=True) for m in bert_and_ours)
    # Ours come after every sublayer: every second one is a layer of BERT.
    assert len(ours.hidden_states) == 2 * 3 + 1
    for expected, states in zip(theirs.hidden_states, ours.hidden_states[::2], strict=True):
        assert states.shape == expected.shape
        torch.testing.assert_close(states[mask], expected[mask], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.hidden_states[-1], ours.last_hidden_state)
    assert len(ours.attentions) == 3
    for expected, weights in zip(theirs.attentions, ours.attentions, strict=True):
        assert weights.shape == expected.shape
        kept = expected * mask[:, None, :, None]  # BERT lets padding attend
        torch.testing.assert_close(weights, kept, atol=1e-6, rtol=0)


def test_attentions_of_a_pack_stand_on_the_diagonal(build_tiny_model):
    model = build_tiny_model(attn_implementation="eager")
    documents = torch.randint(1, 64, (1, 9))
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    with torch.no_grad():
        packed = model(documents, cu_seq_lens_q=cu_seqlens, output_attentions=True).attentions
        for start, end in ((0, 4), (4, 9)):
            alone = model(documents[:, start:end], output_attentions=True).attentions
            for together, expected in zip(packed, alone, strict=True):
                torch.testing.assert_close(together[:, :, start:end, start:end], expected, atol=1e-6, rtol=0)
    assert all(weights.sum().isclose(torch.tensor(4.0 * 9)) for weights in packed)


def test_attentions_need_the_eager_kernel(build_tiny_model):
    with pytest.raises(ValueError, match=r"attention weights exist in the eager kernel only; call model"):
        build_tiny_model()(**make_batch(), output_attentions=True)


def test_the_last_hidden_state_of_pre_norm_is_the_output(build_tiny_model):
    model = build_tiny_model(norm_placement="pre", final_norm=True)
    output = model(**make_batch(), output_hidden_states=True)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_a_tuple_on_request(build_tiny_model):
    model, batch = build_tiny_model(), make_batch()
    states, pooled = model(**batch, return_dict=False)
    assert torch.equal(states, model(**batch).last_hidden_state)
    assert torch.equal(pooled, model(**batch).pooler_output)


def test_word_vectors_and_places_can_be_given(build_tiny_model):
    model, batch = build_tiny_model(), make_batch()
    expected = model(**batch).last_hidden_state
    words = model.get_input_embeddings()(batch["input_ids"])
    places = torch.arange(words.shape[1])[None]
    output = model(inputs_embeds=words, attention_mask=batch["attention_mask"], position_ids=places)
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_that_of_sentence_transformers(build_tiny_model, pooling):
    model, batch = build_tiny_model(pooling=pooling), make_batch()
    output = model(**batch)
    features = {"token_embeddings": output.last_hidden_state, "attention_mask": batch["attention_mask"]}
    mode = ST_POOLINGS[pooling].removesuffix("_tokens").removesuffix("_token")
    expected = Pooling(32, pooling_mode=mode)(features)["sentence_embedding"]
    torch.testing.assert_close(output.pooler_output, expected, atol=1e-6, rtol=1e-5)


# Kernels and checkpoints of the graph ---------------------------------------------------------------------------------


@pytest.mark.promise("X5")
def test_the_kernel_can_be_changed_and_changed_back(build_tiny_model):
    model, batch = build_tiny_model(attention_patterns=MIXED), make_batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        first = model(**batch).last_hidden_state
        for kernel in CPU_KERNELS:
            model.set_attn_implementation(kernel)
            assert model.config._attn_implementation == kernel
            torch.testing.assert_close(model(**batch).last_hidden_state, first, atol=1e-5, rtol=0)
        model.set_attn_implementation("longembed_varlen")
        assert torch.equal(model(**batch).last_hidden_state, first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.promise("X5")
def test_the_pattern_can_be_changed_at_load(build_tiny_model, tmp_path):
    model = build_tiny_model(attention_patterns=MIXED)
    model.save_pretrained(tmp_path)
    full = LongEmbedModel.from_pretrained(tmp_path, attention_patterns="full")
    assert all(torch.equal(tensor, full.state_dict()[name]) for name, tensor in model.state_dict().items())
    batch = make_batch()
    with torch.no_grad():
        expected = build_tiny_model(attention_patterns="full")(**batch).pooler_output
        assert torch.equal(full(**batch).pooler_output, expected)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_gives_the_same_gradients(build_tiny_model, positions, dropout):
    patterns = "full" if positions == "rope+group" else MIXED
    model = build_tiny_model(attention_patterns=patterns, hidden_dropout_prob=dropout, **POSITIONS[positions]).train()
    batch = make_batch()
    plain = parameter_gradients(model, batch)
    model.gradient_checkpointing_enable()
    calls = []
    model.layers[0].attention.q_proj.register_forward_hook(lambda *_: calls.append(None))
    checkpointed = parameter_gradients(model, batch)
    assert len(calls) == 2  # computed again in the backward pass
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-7, rtol=1e-5)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "positions"),
    [
        ({"type": "sliding", "window": 32}, "absolute"),
        ({"type": "sliding", "window": 32, "global_tokens": 2}, "absolute"),
        ({"type": "sliding", "window": 32}, "alibi"),
        ({"type": "sliding", "window": 32, "global_tokens": 2}, "relative"),
        ({"type": "block", "size": 64}, "absolute"),
        ({"type": "block", "size": 64}, "alibi"),
        ("full", "absolute"),
        ("full", "alibi"),
        ("full", "relative"),
    ],
    ids=str,
)
def test_no_tensor_of_length_times_length(build_tiny_model, monkeypatch, pattern, positions):
    """Neither kept for the backward pass nor allocated on the way, forward and backward, at 4,096 tokens."""
    length, budget = 4096, 2**20
    monkeypatch.setattr(attention_kernels_longembed, "MAX_SCORES", budget)
    model = build_tiny_model(
        attention_patterns=pattern,
        num_hidden_layers=1,
        max_position_embeddings=length,
        hidden_size=16,
        num_attention_heads=2,
        **POSITIONS[positions],
    ).train()
    with Allocated() as allocated, KeptForBackward() as kept:
        model(torch.randint(1, 64, (1, length))).pooler_output.sum().backward()
    assert length * length == 16 * budget
    assert kept.largest <= budget
    assert kept.total <= 4 * budget  # chunks of scores that are each small would add up to 32
    assert allocated.largest <= 1.1 * budget


@pytest.mark.parametrize("gated", [False, True])
def test_inner_states_are_computed_in_chunks_on_a_cpu(build_tiny_model, monkeypatch, gated):
    model = build_tiny_model(feed_forward_gated=gated).eval()
    sublayer = next(layer.feed_forward for layer in model.layers if layer.feed_forward is not None)
    states, inner = torch.randn(103, model.config.hidden_size), model.config.intermediate_size
    whole = sublayer(states)  # with gradients: at once
    monkeypatch.setattr(modeling_longembed, "MAX_INNER_STATES", 10 * inner)
    with torch.no_grad(), Allocated() as allocated:
        pieces = sublayer(states)
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-5)
    assert allocated.largest == max(10 * inner, states.numel())


# The head -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_all_scores(build_tiny_model):
    model, batch = build_tiny_model(LongEmbedForMaskedLM, attention_patterns=MIXED), make_batch()
    labels = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.6, -100)
    labels[batch["attention_mask"] == 0] = -100
    output, scores = model(**batch, labels=labels), model(**batch).logits
    assert scores.shape == (*labels.shape, 64)
    expected = torch.nn.functional.cross_entropy(scores.transpose(1, 2), labels)
    torch.testing.assert_close(output.loss, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.logits, scores, atol=1e-6, rtol=0)
    chosen = model(**batch, labels=labels, only_predicted=True)
    torch.testing.assert_close(chosen.logits, scores[labels != -100], atol=1e-6, rtol=0)
    lengths = batch["attention_mask"].sum(1)
    real = batch["attention_mask"] > 0
    packed = {"input_ids": batch["input_ids"][real][None], "labels": labels[real][None]}
    packed["cu_seq_lens_q"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    rows = model(**packed)
    torch.testing.assert_close(rows.logits[0], scores[real], atol=1e-5, rtol=0)
    losses = (expected, output.loss, chosen.loss, rows.loss, model(**packed, only_predicted=True).loss)
    theirs, *gradients = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    for ours in gradients:
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match=r"^only_predicted=True needs labels"):
        model(**batch, only_predicted=True)


def test_the_projection_is_tied_to_the_word_embeddings(build_tiny_model):
    model = build_tiny_model(LongEmbedForMaskedLM)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("X2")
@pytest.mark.parametrize(
    "patterns",
    [
        pytest.param(["full"], id="full"),
        # That a sliding window is one graph is a fast test in tests/experiments/gpu.
        pytest.param(MIXED, id="sliding and block", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_equals_the_eager_one(build_tiny_model, patterns):
    """`aot_eager` traces forward and backward as the default compiler does, and needs no C++ compiler."""
    torch._dynamo.reset()
    input_ids = torch.arange(1, 25).view(2, 12)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 7:] = 0
    gradients = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        model = build_tiny_model(attention_patterns=patterns, num_hidden_layers=len(patterns))
        output = wrap(model)(input_ids, attention_mask=attention_mask).pooler_output
        output.sin().sum().backward()
        gradients.append({"output": output.detach()} | {n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-5)


@pytest.mark.promise("X3")
@pytest.mark.parametrize(
    ("pattern", "positions"),
    [(pattern, name) for pattern in PATTERNS for name in POSITIONS if refused(pattern, POSITIONS[name]) is None],
)
def test_autocast_bfloat16_points_where_float32_does(build_tiny_model, pattern, positions):
    # Weights of a usual size: random ones of 0.3 amplify every rounding.
    model = build_tiny_model(attention_patterns=pattern, initializer_range=0.1, **POSITIONS[positions])
    batch = make_batch((60, 33, 2))
    with torch.no_grad():
        expected = model(**batch).pooler_output
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch).pooler_output
    assert torch.nn.functional.cosine_similarity(output.float(), expected).min() > 1 - 2e-2
    assert output.dtype == torch.float32  # pooled in full precision


@pytest.mark.promise("X3")
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_a_model_in_bfloat16(build_tiny_model, kernel):
    model, batch = (
        build_tiny_model(attention_patterns=MIXED, initializer_range=0.1, attn_implementation=kernel),
        make_batch(),
    )
    with torch.no_grad():
        expected = model(**batch).pooler_output
        output = model.bfloat16()(**batch).pooler_output
    assert torch.nn.functional.cosine_similarity(output.float(), expected).min() > 1 - 2e-2
