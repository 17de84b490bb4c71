"""`switch_positions`: the model that a config of the new scheme describes, with the weights that both have."""

import pytest
import torch

from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel

CONTEXT = 64
SLIDING = {"type": "sliding", "window": 2}
SCHEMES = ["rope", "alibi", "sinusoidal", "relative"]


def build(build_tiny_model, scheme, cls=LongEmbedModel, **fields):
    return build_tiny_model(
        cls, position_embedding_type=scheme, **{"max_position_embeddings": CONTEXT} | fields
    ).double()


def tokens(*shape, seed=0):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cls", [LongEmbedModel, LongEmbedForMaskedLM])
@pytest.mark.parametrize(
    ("before", "after"), [*(("absolute", scheme) for scheme in SCHEMES), ("rope", "alibi"), ("relative", "rope")]
)
def test_it_is_the_model_of_a_config_with_the_new_scheme(build_tiny_model, tmp_path, cls, before, after):
    model = build(build_tiny_model, before, cls)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"rope_theta": 500.0} if after == "rope" else {}
    assert model.switch_positions(after, max_position_embeddings=2 * CONTEXT, keep_mean=False, **options) is model
    rope = {"rope_type": "default", "rope_theta": 500.0} if after == "rope" else None
    expected = build(build_tiny_model, after, cls, max_position_embeddings=2 * CONTEXT, rope_parameters=rope)
    assert model.config.to_dict() == expected.config.to_dict()
    absent, unexpected = expected.load_state_dict(kept, strict=False)
    assert all("distance." in name for name in absent)
    assert all("distance." in name or "position_embeddings" in name for name in unexpected)
    assert bool(unexpected) == (before in ("absolute", "relative"))
    expected.load_state_dict({name: model.state_dict()[name] for name in absent}, strict=False)

    documents = tokens(2, 2 * CONTEXT)  # longer than the old table
    output = model(documents)[0]
    torch.testing.assert_close(output, expected(documents)[0], atol=1e-12, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(documents)[0], output, atol=1e-12, rtol=0)
    assert {*loaded.state_dict()} == {*model.state_dict()}


@pytest.mark.parametrize("segments", [0, 2])
def test_the_mean_of_the_table_stays(build_tiny_model, tmp_path, segments):
    """A table whose rows are all the same is nothing but its mean: without places, all of it stays."""
    model = build(build_tiny_model, "absolute", is_causal=True, type_vocab_size=segments)
    table = model.embeddings.position_embeddings.weight
    with torch.no_grad():
        table.copy_(table[3].expand_as(table))
    documents, inputs = tokens(2, 20), {}
    if segments:
        inputs["token_type_ids"] = tokens(2, 20, seed=1) % 2
    before = model(documents, **inputs)[0]
    without = build(build_tiny_model, "absolute", is_causal=True, type_vocab_size=segments)
    without.load_state_dict(model.state_dict())

    model.switch_positions("none")
    torch.testing.assert_close(model(documents, **inputs)[0], before, atol=1e-12, rtol=0)
    assert (without.switch_positions("none", keep_mean=False)(documents, **inputs)[0] - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = LongEmbedModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(documents, **inputs)[0], before, atol=1e-12, rtol=0)


def test_the_mean_is_that_of_the_rows(build_tiny_model):
    """With tables that differ, the embedding of a word is the mean, over all places, of what it was."""
    model = build(build_tiny_model, "absolute", embedding_norm=False)
    words = [model(torch.full((1, CONTEXT), word), output_hidden_states=True).hidden_states[0] for word in (5, 9)]
    model.switch_positions("rope")
    switched = model(torch.tensor([[5, 9]]), output_hidden_states=True).hidden_states[0][0]
    torch.testing.assert_close(switched, torch.cat(words).mean(1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scheme", ["rope", "alibi", "relative"])
def test_only_distances_count(build_tiny_model, scheme):
    """What two layers of windows cannot see moves a text to other places; its states stay the same."""
    text, moved = tokens(1, 12), torch.cat([tokens(1, 5, seed=1), tokens(1, 12)], dim=1)
    model = build(build_tiny_model, "absolute", attention_patterns=SLIDING)
    beyond = 2 * SLIDING["window"]

    def states(documents, model=model):
        return model(documents)[0][0, -12:][beyond:]

    assert (states(text) - states(moved)).abs().max() > 1e-3
    model.switch_positions(scheme)
    torch.testing.assert_close(states(text), states(moved), atol=1e-5, rtol=0)  # angles are fp32
    reordered = text.clone()
    reordered[0, -1], reordered[0, -2] = text[0, -2], text[0, -1]
    pooled = [model(documents).pooler_output for documents in (text, reordered)]
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3  # the order of words still does


def test_rope_is_the_same_wherever_the_count_starts(build_tiny_model):
    model = build(build_tiny_model, "absolute").switch_positions("rope")
    documents, places = tokens(2, 20), torch.arange(20)[None]
    moved = model(documents, position_ids=places + 1000)[0]
    torch.testing.assert_close(moved, model(documents)[0], atol=1e-4, rtol=0)  # angles are fp32


def test_an_extension_goes_with_the_scheme_and_another_can_follow(build_tiny_model):
    model = build(build_tiny_model, "absolute").extend_context(4 * CONTEXT, "repeat").switch_positions("rope")
    assert model.config.position_extension is None
    assert model.config.max_position_embeddings == 4 * CONTEXT
    model.extend_context(8 * CONTEXT, "yarn")
    assert model(tokens(1, 8 * CONTEXT))[0].isfinite().all()
    model.switch_positions("alibi", max_position_embeddings=CONTEXT)
    assert model.config.rope_parameters is None
    assert model.config.position_extension is None
    assert model.config.max_position_embeddings == CONTEXT


def test_every_kind_of_sublayer_rotates_by_the_same_base(build_tiny_model):
    patterns = ["full", SLIDING]
    model = build(build_tiny_model, "absolute", attention_patterns=patterns)
    model.switch_positions("rope", rope_theta=500.0, keep_mean=False)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    nested = {"full_attention": rope, "sliding_attention": rope}
    expected = build(build_tiny_model, "rope", attention_patterns=patterns, rope_parameters=nested)
    expected.load_state_dict(model.state_dict())
    documents = tokens(2, 30)
    assert torch.equal(model(documents)[0], expected(documents)[0])
    nested_model = expected.switch_positions("alibi")
    assert nested_model.config.rope_parameters is None


def test_what_trains_goes_on_training(build_tiny_model):
    model = build(build_tiny_model, "absolute").train()
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    model.switch_positions("relative")(tokens(1, 9)).pooler_output.square().sum().backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got == {name for name, _ in model.named_parameters()} - {"embeddings.word_embeddings.weight"}


@pytest.mark.parametrize(
    ("fields", "options", "complaint"),
    [
        ({}, {"scheme": "absolute"}, "'absolute' already; use extend_context"),
        ({"position_embedding_type": "rope"}, {"scheme": "rope"}, "'rope' already"),
        ({"position_embedding_type": "rope"}, {"scheme": "absolute"}, "a learned table would start untrained"),
        ({}, {"scheme": "rotary"}, "position_embedding_type.*rotary"),
        ({}, {"scheme": "none"}, "is_causal"),
        ({}, {"scheme": "alibi", "rope_theta": 1e5}, "'alibi' has no rope_theta"),
        ({}, {"scheme": "rope", "rope_theta": 0.5}, "rope_theta=0.5; give a number of at least 1"),
        ({}, {"scheme": "rope", "max_position_embeddings": -1}, "max_position_embeddings=-1"),
        ({}, {"scheme": "rope", "max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"relative_attention_num_buckets": 8}, {"scheme": "alibi"}, "both a bias by distance"),
        ({"num_attention_heads": 32}, {"scheme": "rope"}, "head_dim=1 is odd"),
        ({"attention_patterns": {"type": "block", "size": 16}}, {"scheme": "rope", "max_position_embeddings": 8}, "16"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_has_changed(build_tiny_model, fields, options, complaint):
    model = build_tiny_model(**{"max_position_embeddings": CONTEXT} | fields)
    config, weights = model.config.to_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=complaint) as refusal:
        model.switch_positions(**options)
    assert "\n" not in str(refusal.value)
    assert model.config.to_dict() == config
    torch.testing.assert_close(dict(model.state_dict()), weights, atol=0, rtol=0)
