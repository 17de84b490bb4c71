"""LayerDrop, pruning and the scaled initialisation: against models built of the sublayers that are left."""

import re
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from modeling_longembed import LongEmbedConfig, LongEmbedForMaskedLM, LongEmbedModel, modeling_longembed
from modeling_longembed.layout_layerdrop_longembed import draw_layers, every_other
from modeling_longembed.layout_registry_longembed import layers_of
from modeling_longembed.packing_longembed import PackedDocuments

LAYOUTS = ["sfsfsf", "ssfsff", "sfffsff", "fsfs"]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    attention_mask = torch.ones(3, 20, dtype=torch.long)
    attention_mask[1, 7:] = 0
    return {"input_ids": torch.randint(1, 64, (3, 20)), "attention_mask": attention_mask}


def build(build_tiny_model, cls=LongEmbedModel, **fields):
    return build_tiny_model(cls, num_hidden_layers=None, hidden_dropout_prob=0.0, **fields).double()


@pytest.mark.promise("L3")
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("unit", ["layer", "sublayer"])
def test_evaluation_and_rate_zero_use_every_layer(build_tiny_model, batch, rate, unit):
    plain = build(build_tiny_model, sublayer_pattern="sfsfsf")
    dropping = build(build_tiny_model, sublayer_pattern="sfsfsf", layerdrop=rate, layerdrop_unit=unit)
    expected = plain(**batch).last_hidden_state
    assert torch.equal(dropping(**batch).last_hidden_state, expected)
    differs = [not torch.equal(dropping.train()(**batch).last_hidden_state, expected) for _ in range(8)]
    assert any(differs) == (rate > 0)


@pytest.mark.promise("L3")
@pytest.mark.parametrize("unit", ["layer", "sublayer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_forward_pass_of_training_is_that_of_the_model_with_the_layers_that_were_drawn(
    build_tiny_model, batch, layout, unit, monkeypatch
):
    model = build(build_tiny_model, sublayer_pattern=layout, layerdrop=0.5, layerdrop_unit=unit).train()
    drawn = []

    def record(*args):
        drawn.append(draw_layers(*args))
        return drawn[-1]

    monkeypatch.setattr(modeling_longembed, "draw_layers", record)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        output = model(**batch)
        tokens = batch["input_ids"][:1]
        documents = PackedDocuments.from_inputs(tokens)
        states = model.embeddings(model.embeddings.prepare(tokens, None, documents.token_index, documents))
        kept = [index for index, take in enumerate(drawn[-1]) if take]
        if not any(layout[index] == "s" for index in kept):
            if not kept:  # only the embeddings are left
                torch.testing.assert_close(output.last_hidden_state[0], states, atol=0, rtol=0)
            continue
        part = build(build_tiny_model, sublayer_pattern=layout)
        part.load_state_dict(model.state_dict())
        part.keep_sublayers(kept)
        torch.testing.assert_close(output.last_hidden_state, part(**batch).last_hidden_state, atol=1e-12, rtol=0)
        seen.add(tuple(kept))
        if unit == "layer":
            assert all(len({drawn[-1][index] for index in layer}) == 1 for layer in layers_of(layout))
    assert len(seen) > 1


def test_the_share_of_layers_is_one_minus_the_rate():
    torch.manual_seed(0)
    for unit in ("layer", "sublayer"):
        taken = [sum(draw_layers("sfsfsfsf", 0.3, unit)) for _ in range(2000)]
        assert sum(taken) / (8 * len(taken)) == pytest.approx(0.7, abs=0.02)
    assert draw_layers("sfsf", 0.0, "layer") == [True] * 4
    assert draw_layers("sfsf", 1.0, "sublayer") == [False] * 4


def test_the_draw_is_the_same_again_where_the_generator_is_restored(build_tiny_model, batch):
    model = build(build_tiny_model, sublayer_pattern="sfsfsfsf", layerdrop=0.5).train()
    state = torch.get_rng_state()
    first = model(**batch).last_hidden_state
    torch.set_rng_state(state)
    assert torch.equal(model(**batch).last_hidden_state, first)
    assert not all(torch.equal(model(**batch).last_hidden_state, first) for _ in range(8))


def test_gradient_checkpointing_recomputes_what_was_drawn(build_tiny_model, batch):
    gradients = []
    for checkpointing in (False, True):
        model = build(build_tiny_model, sublayer_pattern="sfsfsfsf", layerdrop=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(**batch).pooler_output.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=0)


def test_a_layer_that_is_left_out_has_gradient_zero_not_none(build_tiny_model, batch):
    model = build(build_tiny_model, sublayer_pattern="sfsf", layerdrop=0.5).train()
    zeros = Counter()
    for _ in range(10):
        model.zero_grad(set_to_none=True)
        model(**batch).pooler_output.square().sum().backward()
        gradients = [model.layers[n].norm.weight.grad for n in range(4)]
        assert all(gradient is not None for gradient in gradients)
        zeros[sum(not gradient.any() for gradient in gradients)] += 1
    assert len(zeros) > 1
    assert all(count % 2 == 0 for count in zeros)  # layers go as wholes


@pytest.mark.promise("L3")
@pytest.mark.parametrize("cls", [LongEmbedModel, LongEmbedForMaskedLM])
@pytest.mark.parametrize("norm_placement", ["post", "pre"])
def test_a_pruned_model_is_the_slice_and_comes_back_from_disk(build_tiny_model, batch, tmp_path, cls, norm_placement):
    fields = {"norm_placement": norm_placement, "first_attention_norm": norm_placement == "post", "layerdrop": 0.2}
    patterns = [{"type": "block", "size": 8}, "full", {"type": "sliding", "window": 3}]
    model = build(build_tiny_model, cls, sublayer_pattern="sfssff", attention_patterns=patterns, **fields).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.keep_sublayers([5, 2, 3])
    assert model.config.sublayer_pattern == "ssf"
    assert [entry["type"] for entry in model.config.attention_patterns] == ["full", "sliding"]
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.num_hidden_layers == 2

    # The slice, by hand: a model of the short layout with the weights of those sublayers.
    short = build(
        build_tiny_model, cls, sublayer_pattern="ssf", attention_patterns=patterns[1:], norm_placement=norm_placement
    )
    renamed = {}
    for name, tensor in weights.items():
        number = re.search(r"layers\.(\d)\.", name)
        if number is None:
            renamed[name] = tensor
        elif number[1] in "235":
            renamed[name.replace(number[0], f"layers.{'235'.index(number[1])}.")] = tensor
    short.load_state_dict(renamed)
    output = model(**batch)[0]
    assert torch.equal(output, short(**batch)[0])

    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(loaded(**batch)[0], output, atol=1e-12, rtol=0)


@pytest.mark.promise("L3")
def test_every_other(build_tiny_model, batch):
    assert every_other(12, 0.5) == [0, 2, 4, 6, 8, 10]
    assert every_other(12, 1 / 3) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert every_other(6, 0) == list(range(6))
    model = build(build_tiny_model, sublayer_pattern="sfsfsfsf").keep_layers(every_other(4, 0.5))
    assert model.config.sublayer_pattern == "sfsf"
    for rate in (0.7, -0.1):
        with pytest.raises(ValueError, match=r"^rate=.*; give 0 to 0.5"):
            every_other(12, rate)


def test_what_cannot_be_pruned_is_refused(build_tiny_model):
    model = build(build_tiny_model, sublayer_pattern="sfsf")
    for keep, refusal in (([4], "there is no sublayer 4"), ([1, 3], "no attention sublayer is left"), ([], "no att")):
        with pytest.raises(ValueError, match=f"^keep_sublayers: {refusal}"):
            model.keep_sublayers(keep)
    with pytest.raises(ValueError, match=r"^keep_layers: there is no layer 2; this model has 0 to 1"):
        model.keep_layers([0, 2])
    assert len(model.layers) == 4


@pytest.mark.promise("L4")
@pytest.mark.parametrize("layout", ["sf" * 4, "sandwich(3)", "sfff"])
def test_the_scaled_initialisation_of_what_adds_to_the_residual_stream(layout):
    torch.manual_seed(0)
    config = LongEmbedConfig(
        vocab_size=8, hidden_size=512, num_attention_heads=8, intermediate_size=512, sublayer_pattern=layout,
        num_hidden_layers=None if set(layout) <= set("sf") else 4, scaled_initialization=True,
    )  # fmt: skip
    model = LongEmbedModel._from_config(config)
    sublayers = len(config.sublayer_pattern)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert parameter.std().item() == pytest.approx(0.02 / sublayers**0.5, rel=0.02)
        elif name.endswith("proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)


def test_the_scaled_initialisation_does_not_touch_loaded_weights(build_tiny_model, tmp_path):
    model = build(build_tiny_model, sublayer_pattern="sfsf", scaled_initialization=True)
    model.save_pretrained(tmp_path)
    loaded = LongEmbedModel.from_pretrained(tmp_path, dtype=torch.float64)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("unit", ["layer", "sublayer"])
def test_training_with_layerdrop_lowers_a_loss(build_tiny_model, unit):
    torch.manual_seed(0)
    model = build_tiny_model(
        sublayer_pattern="sfsf", num_hidden_layers=None, layerdrop=0.3, layerdrop_unit=unit
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target = torch.nn.functional.normalize(torch.randn(16, 32), dim=-1)
    data = TensorDataset(torch.randint(1, 64, (16, 12)), target)

    def loss():
        ids, wanted = next(iter(DataLoader(data, batch_size=16)))
        return (torch.nn.functional.normalize(model(ids).pooler_output, dim=-1) - wanted).square().sum(-1).mean()

    before = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * before
