"""What cannot be converted is refused by name, and the conversion finds each weight that it has converted wrongly."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from transformers import GPT2Config

from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from modeling_longembed import conversion_longembed as conversion
from modeling_longembed.conversion_families_longembed import FAMILIES
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, one_sentence, save_checkpoint


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True, "is_decoder": True}, "is_decoder|add_cross_attention"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"position_embedding_type": "relative_key_query"}, "relative_key_query"),
    ],
)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_features_that_a_config_cannot_say_are_refused_by_name(family, changes, feature, make_checkpoint, tmp_path):
    folder, _ = make_checkpoint(family)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=feature) as error:
        LongEmbedModel.from_encoder(tmp_path)
    one_sentence(error)


def test_an_architecture_that_we_do_not_read_is_named(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'gpt2'.*bert") as error:
        LongEmbedModel.from_encoder(tmp_path)
    one_sentence(error)


def test_our_own_models_are_not_converted_again(make_checkpoint, tmp_path):
    LongEmbedModel.from_encoder(make_checkpoint("bert")[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'longembed'") as error:
        LongEmbedModel.from_encoder(tmp_path)
    one_sentence(error)


def test_a_masked_language_model_needs_its_head(make_checkpoint):
    with pytest.raises(ValueError, match=r"head.*LongEmbedModel") as error:
        LongEmbedForMaskedLM.from_encoder(make_checkpoint("bert")[0])
    one_sentence(error)


def test_a_head_with_another_activation_is_refused(tmp_path):
    save_checkpoint(tmp_path, "roberta", with_head=True, hidden_act="relu")
    with pytest.raises(ValueError, match=r"'gelu'.*'relu'") as error:
        LongEmbedForMaskedLM.from_encoder(tmp_path)
    one_sentence(error)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"hidden_size": 64}, "hidden_size"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"position_embedding_type": "rope"}, "position_embedding_type"),
        ({"max_position": 100}, "max_position"),
        ({"max_position_embeddings": 16, "position_extension": "repeat"}, "max_position_embeddings=16"),
        ({"max_position_embeddings": 100, "position_extension": "yarn"}, "yarn"),
        ({"max_position_embeddings": 100, "position_extension": {"method": "restart"}}, "period"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"max_position_embeddings": "8192"}, "max_position_embeddings"),
        ({"attention_patterns": "local"}, "local"),
        ({"attention_patterns": ["full"] * 3}, "attention_patterns"),
        ({"pooling": "max"}, "pooling"),
        ({"attn_implementation": "nonsense"}, "nonsense"),
    ],
    ids=str,
)
def test_choices_that_cannot_work_are_refused_by_name(arguments, named, make_checkpoint):
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        LongEmbedModel.from_encoder(make_checkpoint("bert")[0], **arguments)
    one_sentence(error)


def test_sublayers_with_other_patterns_keep_the_rotation_that_they_were_trained_with(make_checkpoint):
    folder, original = make_checkpoint("modernbert")  # full, sliding, sliding, full
    rope = original.config.rope_parameters
    assert rope["full_attention"]["rope_theta"] != rope["sliding_attention"]["rope_theta"]
    block = {"type": "block", "size": 32}
    model = LongEmbedModel.from_encoder(folder, attention_patterns=["full", block, block, "full"])
    assert model.config.rope_parameters["full_attention"] == rope["full_attention"]
    assert model.config.rope_parameters["chunked_attention"] == rope["sliding_attention"]
    for patterns in ("full", block, ["full", "full", {"type": "sliding", "window": 4}, "full"]):
        with pytest.raises(ValueError, match=r"^attention_patterns: .* different rope_parameters") as error:
            LongEmbedModel.from_encoder(folder, attention_patterns=patterns)
        one_sentence(error)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises((OSError, ValueError)) as error:
        LongEmbedModel.from_encoder(tmp_path / "nothing")
    assert "nothing" in str(error.value)


def test_the_conversion_prints_the_difference(make_checkpoint, capsys):
    folder, _ = make_checkpoint("bert")
    LongEmbedModel.from_encoder(folder, 3 * CONTEXT)
    printed = re.search(r"up to 40 tokens: (\S+)\n", capsys.readouterr().out)
    assert 0 <= float(printed.group(1)) <= 1e-5


@pytest.mark.parametrize(
    "family",
    # The check is one for all families; these two differ most in their weights.
    [name if name in ("bert", "modernbert") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_every_weight_that_is_converted_wrongly_is_found(family, make_checkpoint, monkeypatch):
    folder, _ = make_checkpoint(family)
    convert = conversion.converted_weights
    model = LongEmbedModel.from_encoder(folder)
    # One layer is enough, its attention and its feed-forward block: the names of all are made by one rule.
    last = tuple(f"layers.{len(model.layers) - place}." for place in (1, 2))
    assert [layer.attention is None for layer in model.layers[-2:]] == [False, True]
    # softmax does not see a bias of the keys, which adds the same number to all scores of a query
    for name, _ in model.named_parameters():
        if name.endswith("k_proj.bias") or (name.startswith("layers.") and not name.startswith(last)):
            continue

        def corrupted(*arguments, name=name):
            weights = convert(*arguments)
            return weights | {name: weights[name] + 0.05 * torch.randn_like(weights[name])}

        monkeypatch.setattr(conversion, "converted_weights", corrupted)
        with pytest.raises(ValueError, match="changed its outputs") as error:
            LongEmbedModel.from_encoder(folder)
        one_sentence(error)


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"layer_norm_eps": 0.1}])
def test_a_field_that_is_read_wrongly_is_found(change, make_checkpoint, monkeypatch):
    folder, _ = make_checkpoint("bert")
    names = {"hidden_act": "hidden_act", "layer_norm_eps": "norm_eps"}
    wrong = {names[key]: value for key, value in change.items()}
    monkeypatch.setitem(FAMILIES, "bert", dataclasses.replace(FAMILIES["bert"], constants=wrong))
    with pytest.raises(ValueError, match="changed its outputs"):
        LongEmbedModel.from_encoder(folder)


def test_a_head_that_is_converted_wrongly_is_found(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, "bert", with_head=True)
    take = conversion.take

    def corrupted(weights, theirs, suffix):
        tensor = take(weights, theirs, suffix)
        return tensor + 0.05 if theirs == "cls.predictions.transform.dense" else tensor

    monkeypatch.setattr(conversion, "take", corrupted)
    with pytest.raises(ValueError, match="changed its outputs"):
        LongEmbedForMaskedLM.from_encoder(tmp_path)


def test_weights_without_a_counterpart_are_refused(make_checkpoint, tmp_path):
    shutil.copytree(make_checkpoint("bert")[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="cannot be converted") as error:
        LongEmbedModel.from_encoder(tmp_path)
    one_sentence(error)
