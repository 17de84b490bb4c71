"""Native export: transformers' own BERT, ModernBERT and NomicBERT, without our code, give the model's outputs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, ModernBertConfig

from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from modeling_longembed import export_native_longembed as native
from modeling_longembed.hub_sentence_transformers_longembed import ST_POOLINGS
from tests.modeling_longembed.tiny_checkpoints import (
    CONFIGS,
    CONTEXT,
    SAVED_BESIDE_CODE,
    random_batch,
    random_text,
    save_checkpoint,
    tiny_tokenizer,
)

LENGTHS = [CONTEXT, 17, 1, CONTEXT - 1]
# The architecture that each family is written as; MPNet's bias by distance has none.
WRITTEN_AS = {
    "bert": "bert",
    "roberta": "bert",
    "xlm-roberta": "bert",
    "distilbert": "bert",
    "modernbert": "modernbert",
    "nomic_bert": "nomic_bert",
}
SAME = [family for family, model_type in WRITTEN_AS.items() if family == model_type]
ROPE = {"position_embedding_type": "rope", "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
LIKE_NOMIC = ROPE | {
    "feed_forward_gated": True,
    "feed_forward_bias": False,
    "attention_bias": False,
    "hidden_act": "silu",
}
LIKE_MODERN = ROPE | {
    "type_vocab_size": 0,
    "norm_placement": "pre",
    "final_norm": True,
    "first_attention_norm": False,
    "feed_forward_gated": True,
    "norm_bias": False,
    "attention_patterns": ["full", {"type": "sliding", "window": 6}],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(family, with_head)`: folder of the original, our model, folder that it was written to; made once."""
    made = {}

    def get(family, with_head=False):
        if (family, with_head) not in made:
            folder = tmp_path_factory.mktemp(family)
            save_checkpoint(folder / "original", family, with_head=with_head)
            cls = LongEmbedForMaskedLM if with_head else LongEmbedModel
            model = cls.from_encoder(folder / "original")
            model.to_native(folder / "native")
            made[family, with_head] = folder / "original", model, folder / "native"
        return made[family, with_head]

    return get


@pytest.fixture
def built(build_tiny_model):
    """`built(**fields)`: a random model of these choices, every parameter away from its initial value."""

    def build(cls=LongEmbedModel, **fields):
        model = build_tiny_model(cls, **{"max_position_embeddings": CONTEXT} | fields)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return build


def load(folder, auto=AutoModel):
    """The model as somebody without our code loads it."""
    return auto.from_pretrained(folder, trust_remote_code=False, attn_implementation="eager")


def batch_of(model, lengths) -> dict[str, torch.Tensor]:
    batch = random_batch(lengths, 0)
    return batch | {"input_ids": batch["input_ids"] % model.config.vocab_size}


@torch.no_grad()
def assert_same_outputs(model, folder, lengths=LENGTHS):
    batch = batch_of(model, lengths)
    assert_close(model(**batch).last_hidden_state, load(folder)(**batch).last_hidden_state, batch)


def assert_close(ours, theirs, batch):
    """Equal on real tokens, up to rounding of the largest."""
    ours, theirs = ours[batch["attention_mask"] == 1], theirs[batch["attention_mask"] == 1]
    torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1, theirs.abs().max().item()), rtol=0)


def refused(model, folder: Path) -> str:
    """The one sentence that `to_native` refuses the model with, having left nothing."""
    with pytest.raises(ValueError, match=r"^to_native: ") as error:
        model.to_native(folder / "native")
    assert not list(folder.iterdir())
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is written ------------------------------------------------------------------------------------------------


def test_every_family_is_written_or_refused():
    assert set(WRITTEN_AS) | {"mpnet", "longformer"} == set(CONFIGS)


@pytest.mark.promise("X6")
@pytest.mark.parametrize("family", WRITTEN_AS)
def test_transformers_own_model_gives_the_same_outputs(family, exported):
    _, model, folder = exported(family)
    assert load(folder).config.model_type == WRITTEN_AS[family]
    assert_same_outputs(model, folder)


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("family", WRITTEN_AS)
def test_no_weight_is_missing_or_too_many(family, with_head, exported):
    _, _, folder = exported(family, with_head)
    auto = AutoModelForMaskedLM if with_head else AutoModel
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    if WRITTEN_AS[family] == "bert" and not with_head:
        assert (model(**random_batch(LENGTHS, 0)).pooler_output == 0).all()  # nobody takes it for the embedding


@pytest.mark.promise("X6")
@pytest.mark.parametrize("family", WRITTEN_AS)
def test_the_head_is_written_too(family, exported):
    _, model, folder = exported(family, with_head=True)
    batch = random_batch(LENGTHS, 0)
    with torch.no_grad():
        assert_close(model(**batch).logits, load(folder, AutoModelForMaskedLM)(**batch).logits, batch)


@pytest.mark.promise("X6")
@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("family", WRITTEN_AS)
def test_written_and_read_again_it_is_the_same_model(family, with_head, exported):
    _, model, folder = exported(family, with_head)
    again = type(model).from_encoder(folder, original_model=model.config.original_model)
    ours, theirs = model.state_dict(), again.state_dict()
    fields, fields_again = model.config.to_dict(), again.config.to_dict()
    if family == "distilbert":  # BERT always has segments: theirs is one row of zeros
        (added,) = theirs.keys() - ours.keys()
        assert added.endswith("token_type_embeddings.weight")
        assert not theirs.pop(added).any()
        assert (fields.pop("type_vocab_size"), fields_again.pop("type_vocab_size")) == (0, 1)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert fields == fields_again


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("family", SAME)
def test_the_same_architecture_gets_its_own_weights_back(family, with_head, exported):
    original, _, folder = exported(family, with_head)
    theirs, written = (load_file(path / "model.safetensors") for path in (original, folder))
    # a dense layer over the first token, which is not part of the embedding
    poolers = [{name: weights.pop(name) for name in list(weights) if "pooler" in name} for weights in (theirs, written)]
    assert poolers[1].keys() >= poolers[0].keys()
    assert not any(tensor.any() for tensor in poolers[1].values())
    assert theirs.keys() == written.keys()
    assert all(torch.equal(theirs[name], written[name]) for name in theirs)
    fields, written_fields = (AutoConfig.from_pretrained(path).to_dict() for path in (original, folder))
    not_ours = {"_name_or_path", "bos_token_id", "eos_token_id"}
    assert not {name: value for name, value in fields.items() if name not in not_ours and written_fields[name] != value}


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("family", WRITTEN_AS)
def test_the_folder_holds_no_code(family, with_head, exported):
    _, _, folder = exported(family, with_head)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == SAVED_BESIDE_CODE
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("family", ["bert", "modernbert", "nomic_bert"])
@pytest.mark.parametrize("pooling", ST_POOLINGS)
def test_sentence_transformers_gives_the_vectors_of_encode(family, pooling, exported, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    prompts = {"query": "w1 w2 ", "document": "w3 "}
    model = LongEmbedModel.from_encoder(exported(family)[0], pooling=pooling, prompts=prompts)
    model.to_native(tmp_path / "native")
    theirs = st.SentenceTransformer(str(tmp_path / "native"), device="cpu", trust_remote_code=False)
    texts = [random_text(30), random_text(7, seed=1), "w5"]
    for prompt in prompts:
        expected = model.encode(texts, prompt_name=prompt, precision="float32")
        np.testing.assert_allclose(theirs.encode(texts, prompt_name=prompt), expected, atol=1e-5)


def test_the_card_carries_the_licence(exported, tmp_path):
    model = LongEmbedModel.from_encoder(exported("bert")[0])
    model.config.license = "apache-2.0"
    model.to_native(tmp_path / "native")
    card = ModelCard.load(tmp_path / "native" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "sentence-transformers")
    assert "trust_remote_code" not in card.text
    assert LongEmbedModel.from_encoder(tmp_path / "native").config.license == "apache-2.0"


# --- choices that are no field of the architecture, and yet can be said --------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
    "extension",
    [
        "repeat",
        {"method": "restart", "period": 16},
        {"method": "interpolate", "keep_short": False},
        {"method": "group", "keep_short": False},
    ],
    ids=str,
)
def test_an_extension_by_place_is_a_longer_table(family, extension, exported, tmp_path):
    model = LongEmbedModel.from_encoder(exported(family)[0], 3 * CONTEXT - 7, extension)
    model.to_native(tmp_path / "native")
    assert load(tmp_path / "native").config.max_position_embeddings == 3 * CONTEXT - 7
    assert_same_outputs(model, tmp_path / "native", [3 * CONTEXT - 7, CONTEXT, 50])


def test_sinusoids_are_a_table(built, tmp_path):
    model = built(position_embedding_type="sinusoidal")
    model.to_native(tmp_path / "native")
    assert_same_outputs(model, tmp_path / "native")


@pytest.mark.parametrize("like", [LIKE_NOMIC, LIKE_MODERN], ids=["nomic", "modern"])
@pytest.mark.parametrize(
    "method",
    ["linear", "yarn", "ntk", {"method": "theta", "rope_theta": 7e4}, {"method": "yarn", "beta_fast": 16.0}],
    ids=str,
)
def test_one_stretched_rotation_for_every_document_is_that_rotation(like, method, built, tmp_path):
    extension = {"original_max_position_embeddings": CONTEXT, "keep_short": False}
    extension |= method if isinstance(method, dict) else {"method": method}
    model = built(**like, max_position_embeddings=3 * CONTEXT, position_extension=extension)
    model.to_native(tmp_path / "native")
    assert_same_outputs(model, tmp_path / "native", [3 * CONTEXT, 50, 7])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 20},
    ],
    ids=["linear", "yarn"],
)
@pytest.mark.parametrize("like", [LIKE_NOMIC, LIKE_MODERN], ids=["nomic", "modern"])
def test_a_scaled_rotation_is_written_as_it_is(like, rope, built, tmp_path):
    model = built(**like | {"rope_parameters": rope})
    model.to_native(tmp_path / "native")
    assert_same_outputs(model, tmp_path / "native")


def test_an_extension_that_never_applies_is_none(built, tmp_path):
    extension = {"method": "dynamic", "original_max_position_embeddings": CONTEXT}
    model = built(**LIKE_NOMIC, position_extension=extension)
    model.to_native(tmp_path / "native")
    assert_same_outputs(model, tmp_path / "native")


@pytest.mark.parametrize(
    "pattern", [{"type": "sliding", "window": CONTEXT - 1}, {"type": "block", "size": CONTEXT}], ids=str
)
def test_a_window_as_long_as_the_context_is_none(pattern, built, tmp_path):
    model = built(attention_patterns=[pattern, "full"])
    model.to_native(tmp_path / "native")
    assert_same_outputs(model, tmp_path / "native")


def test_windows_and_bases_of_modernbert_are_those_of_each_layer(built, tmp_path):
    window = {"type": "sliding", "window": 5}
    bases = {"full_attention": 90.0, "sliding_attention": 11.0}
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}
    patterns = [window, "full", "full", window]
    model = built(**LIKE_MODERN | {"rope_parameters": rope, "attention_patterns": patterns}, num_hidden_layers=4)
    model.to_native(tmp_path / "native")
    assert_same_outputs(model, tmp_path / "native")


def test_what_only_training_reads_is_no_hindrance(built, tmp_path):
    shifted = {"type": "shifted", "size": 8}
    training = {"layerdrop": 0.2, "hidden_dropout_prob": 0.3, "training_attention_patterns": shifted}
    model = built(**training, scaled_initialization=True)
    model.to_native(tmp_path / "native")
    assert load(tmp_path / "native").config.hidden_dropout_prob == 0.3
    assert_same_outputs(model, tmp_path / "native")


def test_half_precision_stays(exported, tmp_path):
    model = LongEmbedModel.from_encoder(exported("bert")[0]).to(torch.bfloat16)
    model.to_native(tmp_path / "native")
    weights, ours = load_file(tmp_path / "native" / "model.safetensors"), model.state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    table = "embeddings.position_embeddings.weight"
    assert torch.equal(weights[table], ours[table])


def test_a_model_without_a_tokenizer_or_padding_is_written(built, tmp_path):
    for name, like in {"bert": {}, "modernbert": LIKE_MODERN, "nomic_bert": LIKE_NOMIC}.items():
        model = built(**like, pad_token_id=None)
        model.to_native(tmp_path / name)
        assert load(tmp_path / name).config.model_type == name
        assert_same_outputs(model, tmp_path / name)


# --- older names, which servers read --------------------------------------------------------------------------------


def one_kind_of_layer() -> bool:
    """Whether this release of transformers can build a ModernBERT whose layers all attend alike."""
    try:
        return bool(ModernBertConfig(global_attn_every_n_layers=1))
    except Exception:
        return False


@pytest.mark.parametrize(
    "period",
    [
        pytest.param(1, marks=pytest.mark.skipif(not one_kind_of_layer(), reason="not with this transformers")),
        *(2, 3, 4),
    ],
)
def test_the_older_names_of_modernbert_describe_the_same_model(period, built, tmp_path):
    window = {"type": "sliding", "window": 4}
    patterns = [window if layer % period else "full" for layer in range(4)]
    bases = {"full_attention": 90.0, "sliding_attention": 11.0}
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}
    model = built(**LIKE_MODERN | {"rope_parameters": rope, "attention_patterns": patterns}, num_hidden_layers=4)
    model.to_native(tmp_path / "native")
    written = json.loads((tmp_path / "native" / "config.json").read_text())
    assert written["global_attn_every_n_layers"] == period
    # transformers reads configs of before these two fields by the names that they replaced
    older = {name: value for name, value in written.items() if name not in ("layer_types", "rope_parameters")}
    native_model = AutoModel.from_config(ModernBertConfig(**older), attn_implementation="eager").eval()
    native_model.load_state_dict(load(tmp_path / "native").state_dict())
    batch = batch_of(model, LENGTHS)
    with torch.no_grad():
        assert_close(model(**batch).last_hidden_state, native_model(**batch).last_hidden_state, batch)


def test_special_tokens_of_the_config_are_those_of_the_tokenizer(exported, built, tmp_path):
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    written = load(exported("modernbert")[2]).config
    assert [getattr(written, name) for name in names] == [1, 2, 1, 2]
    built(**LIKE_MODERN).to_native(tmp_path / "native")  # has none: no defaults of another vocabulary
    written = load(tmp_path / "native").config
    assert [getattr(written, name) for name in names] == [None] * 4


def test_the_older_names_of_nomic_bert_are_those_of_its_first_code(exported):
    _, model, folder = exported("nomic_bert")
    written = json.loads((folder / "config.json").read_text())
    expected = {"n_embd": 32, "n_head": 4, "n_inner": 48, "n_layer": 2, "n_positions": CONTEXT, "prenorm": False}
    expected |= {"activation_function": "swiglu", "rotary_emb_base": 1000.0, "rotary_emb_fraction": 1.0}
    expected |= {"qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "layer_norm_epsilon": 1e-12}
    assert expected.items() <= written.items()
    weights, ours = load_file(folder / "model.safetensors"), model.state_dict()
    # `fc12` is the activated projection
    assert torch.equal(weights["encoder.layers.1.mlp.fc12.weight"], ours["layers.3.feed_forward.up_proj.weight"])
    assert torch.equal(weights["encoder.layers.1.mlp.fc11.weight"], ours["layers.3.feed_forward.gate_proj.weight"])
    fused = torch.cat([ours[f"layers.0.attention.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(weights["encoder.layers.0.attn.Wqkv.weight"], fused)


@pytest.mark.parametrize(
    "changes",
    [
        LIKE_MODERN | {"norm_bias": True},
        LIKE_MODERN | {"attention_patterns": [{"type": "sliding", "window": 4}, "full"]},
        LIKE_MODERN | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
        LIKE_NOMIC | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
        LIKE_NOMIC | {"hidden_act": "gelu"},
    ],
    ids=["norm_bias", "layer_types", "linear", "nomic-linear", "nomic-gelu"],
)
def test_what_the_older_names_cannot_say_is_written_without_them(changes, built, tmp_path):
    model = built(**changes)
    model.to_native(tmp_path / "native")
    written = json.loads((tmp_path / "native" / "config.json").read_text())
    assert not {"global_attn_every_n_layers", "global_rope_theta", "n_embd", "rotary_emb_base"} & written.keys()
    assert_same_outputs(model, tmp_path / "native")


# --- refusals -------------------------------------------------------------------------------------------------------

EXTENDED = {"original_max_position_embeddings": CONTEXT // 2}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sublayer_pattern": "ssff"}, "BERT.* no sublayer_pattern='ssff'"),
        ({"sublayer_pattern": "sfsff"}, "sublayer_pattern='sfsff'"),
        ({"attention_patterns": {"type": "block", "size": 8}}, "attention_patterns=2 x block .size 8."),
        ({"attention_patterns": ["full", {"type": "shifted", "size": 8}]}, "attention_patterns=.*shifted"),
        ({"attention_patterns": {"type": "sliding", "window": 8}}, "attention_patterns=2 x sliding"),
        (LIKE_NOMIC | {"attention_patterns": {"type": "sliding", "window": 8}}, "NomicBERT.*attention_patterns="),
        (
            LIKE_MODERN | {"attention_patterns": ["full", {"type": "sliding", "window": 8, "global_tokens": 1}]},
            "ModernBERT.*global_tokens 1",
        ),
        (
            LIKE_MODERN
            | {
                "num_hidden_layers": 3,
                "attention_patterns": ["full", {"type": "sliding", "window": 4}, {"type": "sliding", "window": 8}],
            },
            "ModernBERT.*window 4.*window 8",
        ),
        (
            LIKE_MODERN | {"attention_patterns": [{"type": "block", "size": 8}, {"type": "sliding", "window": 6}]},
            "ModernBERT.*attention_patterns=1 x block",
        ),
        ({"position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
        ({"position_embedding_type": "relative"}, "position_embedding_type='relative'"),
        ({"relative_attention_num_buckets": 8}, "relative_attention_num_buckets=8"),
        ({"position_extension": EXTENDED | {"method": "interpolate"}}, "position_extension=.*'interpolate'"),
        ({"position_extension": EXTENDED | {"method": "group"}}, "position_extension=.*'group'"),
        (
            {"position_embedding_type": "sinusoidal", "position_extension": EXTENDED | {"method": "group"}},
            "position_extension=.*'group'",
        ),
        (LIKE_NOMIC | {"position_extension": EXTENDED | {"method": "yarn"}}, "NomicBERT.*position_extension=.*'yarn'"),
        (
            LIKE_NOMIC | {"position_extension": EXTENDED | {"method": "dynamic", "keep_short": False}},
            "position_extension=.*'dynamic'",
        ),
        (
            LIKE_MODERN | {"position_extension": EXTENDED | {"method": "group", "keep_short": False}},
            "ModernBERT.*position_extension=.*'group'",
        ),
        ({"final_norm": True}, "final_norm=True"),
        ({"norm_placement": "pre"}, "norm_placement='pre'"),
        ({"norm_bias": False}, "norm_bias=False"),
        ({"embedding_norm": False}, "embedding_norm=False"),
        ({"first_attention_norm": False}, "first_attention_norm=False"),
        ({"feed_forward_gated": True}, "feed_forward_gated=True"),
        ({"feed_forward_bias": False}, "feed_forward_bias=False"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"is_causal": True}, "is_causal=True"),
        ({"token_weighting": "generalized_max"}, "token_weighting='generalized_max'"),
        (LIKE_NOMIC | {"attention_bias": True}, "NomicBERT.*attention_bias=True"),
        (LIKE_MODERN | {"type_vocab_size": 2}, "ModernBERT.*type_vocab_size=2"),
        (LIKE_MODERN | {"type_vocab_size": 1}, "ModernBERT.*type_vocab_size=1"),
        # no rotation of an odd head_dim: the refusal is about the block all the same
        ({"hidden_size": 36, "attention_patterns": {"type": "block", "size": 8}}, "attention_patterns=2 x block"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_architecture_can_say_is_named(fields, named, built, tmp_path):
    message = refused(built(**fields), tmp_path)
    assert re.search(named, message), message


@pytest.mark.parametrize("changes", [{"mlm_head_bias": False}, {"tie_word_embeddings": False}], ids=str)
def test_what_a_head_cannot_be_is_named_where_there_is_a_head(changes, built, tmp_path):
    (name,) = changes
    assert f"BERT, the nearest architecture of transformers, has no {name}=False" in refused(
        built(LongEmbedForMaskedLM, **changes), tmp_path
    )
    built(**changes).to_native(tmp_path / "native")


def test_two_choices_are_both_named(built, tmp_path):
    message = refused(built(is_causal=True, final_norm=True), tmp_path)
    assert "is_causal=True and final_norm=True" in message


def test_mpnet_is_refused(tmp_path):
    save_checkpoint(tmp_path / "original", "mpnet")
    (tmp_path / "empty").mkdir()
    assert "relative_attention_num_buckets=32" in refused(
        LongEmbedModel.from_encoder(tmp_path / "original"), tmp_path / "empty"
    )


def test_a_pooling_that_sentence_transformers_does_not_have_is_named(built, tmp_path, monkeypatch):
    monkeypatch.delitem(ST_POOLINGS, "last")
    assert "pooling='last'" in refused(built(pooling="last"), tmp_path)


def test_a_folder_with_something_in_it_is_not_touched(built, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=f"{name} exists"):
            built().to_native(tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"full", "file", "mine.txt"}
    (tmp_path / "empty").mkdir()
    built().to_native(tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


# --- the export checks itself ---------------------------------------------------------------------------------------


def test_the_export_prints_the_difference(built, tmp_path, capsys):
    built().to_native(tmp_path / "native")
    printed = capsys.readouterr().out
    assert "written as BERT" in printed
    assert 0 <= float(re.search(r"up to 40 tokens: (\S+)\n", printed).group(1)) <= 1e-5


@pytest.mark.parametrize(
    "like",
    [
        pytest.param({}, id="bert"),
        # The check is one for all families.
        pytest.param(LIKE_MODERN, id="modernbert", marks=pytest.mark.slow),
        pytest.param(LIKE_NOMIC, id="nomic_bert", marks=pytest.mark.slow),
    ],
)
def test_every_weight_that_is_written_wrongly_is_found(like, built, tmp_path, monkeypatch):
    model, write = built(**like), native.native_weights
    (tmp_path / "probe").mkdir()
    model.to_native(tmp_path / "probe")
    names = list(write(model, native.FAMILIES[load(tmp_path / "probe").config.model_type]))
    (tmp_path / "bad").mkdir()
    for name in names:
        # Softmax does not see a bias of the keys; one layer is enough: the names of all are made by one rule.
        if name.endswith("key.bias") or re.search(r"\blayers?\.0\.", name):
            continue

        def corrupted(*arguments, name=name):
            weights = write(*arguments)
            return weights | {name: weights[name] + 0.05 * torch.randn_like(weights[name])}

        monkeypatch.setattr(native, "native_weights", corrupted)
        assert "changes the outputs" in refused(model, tmp_path / "bad")


def test_an_export_leaves_the_model_and_the_random_numbers_alone(built, tmp_path):
    model = built().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model.to_native(tmp_path / "native")
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    assert model.config.position_embedding_type == "absolute"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_export_that_fails_leaves_nothing(built, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "largest_difference", lambda *_: float("nan"))
    assert "changes the outputs" in refused(built(), tmp_path)
    model = built()
    model.tokenizer = tiny_tokenizer(0)
    monkeypatch.setattr(
        type(model.tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        model.to_native(tmp_path / "native")
    assert not list(tmp_path.iterdir())
