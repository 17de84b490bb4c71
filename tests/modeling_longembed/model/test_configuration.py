"""The config: every field survives its file, what cannot work is refused in one sentence that names the fields."""

import dataclasses
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.pattern_registry_longembed import PATTERNS, build_pattern
from modeling_longembed.position_schemes_longembed import POSITION_SCHEMES

SMALL = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
CONTEXT = 64


@st.composite
def valid_fields(draw) -> dict:
    """Fields of a config that can be built: every choice on every axis."""
    layout = draw(st.text("sf", min_size=1, max_size=8).filter(lambda letters: "s" in letters))
    heads, head_dim = draw(st.sampled_from([(1, 8), (2, 8), (3, 4)]))
    scheme = draw(st.sampled_from(sorted(set(POSITION_SCHEMES) - {"none"})))
    one_pattern = st.one_of(
        st.sampled_from(sorted(PATTERNS)),
        st.fixed_dictionaries(
            {"type": st.just("sliding"), "window": st.integers(1, 9), "global_tokens": st.integers(0, 3)}
        ),
        st.fixed_dictionaries({"type": st.just("block"), "size": st.integers(1, 32)}),
    )
    count = layout.count("s")
    patterns = draw(st.one_of(one_pattern, st.lists(one_pattern, min_size=count, max_size=count)))
    fields = {
        "vocab_size": draw(st.integers(1, 50)),
        "type_vocab_size": draw(st.integers(0, 3)),
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 40)),
        "sublayer_pattern": layout,
        "attention_patterns": patterns,
        "max_position_embeddings": draw(st.integers(256, 500)),
        "position_embedding_type": scheme,
        "relative_attention_num_buckets": 0 if scheme in ("alibi", "relative") else draw(st.sampled_from([0, 8, 32])),
        "layerdrop": draw(st.floats(0, 0.9)),
        "layerdrop_unit": draw(st.sampled_from(["layer", "sublayer"])),
        "scaled_initialization": draw(st.booleans()),
        "norm_placement": draw(st.sampled_from(["post", "pre"])),
        "norm_eps": draw(st.floats(1e-12, 1e-3)),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "silu"])),
        "hidden_dropout_prob": draw(st.floats(0, 0.9)),
        "attention_dropout": draw(st.floats(0, 0.9)),
        "initializer_range": draw(st.floats(0.001, 1)),
        "pooling": draw(st.sampled_from(["mean", "cls", "last", "weighted_mean"])),
        "token_weighting_regularization": draw(st.floats(1e-3, 1e3)),
        "prompts": draw(st.none() | st.dictionaries(st.sampled_from(["query", "document", "x"]), st.text(max_size=9))),
        "original_model": draw(st.none() | st.text(max_size=9)),
        "license": draw(st.none() | st.just("mit")),
        "pad_token_id": draw(st.none() | st.just(0)),
    }
    for flag in (
        "norm_bias",
        "embedding_norm",
        "final_norm",
        "first_attention_norm",
        "feed_forward_gated",
        "attention_bias",
        "feed_forward_bias",
        "mlm_head_bias",
        "tie_word_embeddings",
    ):
        fields[flag] = draw(st.booleans())
    if scheme == "rope":
        theta = {"rope_theta": draw(st.floats(100.0, 1e6))}
        fields["rope_parameters"] = {"rope_type": "default", **theta}
    methods = [name for name in POSITION_SCHEMES[scheme].extensions if not (scheme == "rope" and name == "group")]
    if methods and draw(st.booleans()):
        extension = {"method": draw(st.sampled_from(methods)), "original_max_position_embeddings": CONTEXT}
        extension["keep_short"] = draw(st.booleans())
        if extension["method"] == "restart":
            extension["period"] = draw(st.integers(1, CONTEXT))
        fields["position_extension"] = extension
    if draw(st.booleans()):
        fields |= {"is_causal": True, "pooling": draw(st.sampled_from(["mean", "last"]))}
    plain = {"full", "block", "shifted"}
    if (
        draw(st.booleans())
        and {build_pattern(p).type for p in (patterns if isinstance(patterns, list) else [patterns])} <= plain
    ):
        fields["training_attention_patterns"] = draw(st.sampled_from(sorted(plain)))
    try:
        LongEmbedConfig(**fields)
    except ValueError as refusal:  # a pattern that says no to the rest; those refusals have tests of their own
        assume(not str(refusal).startswith("attention_patterns: "))
        raise
    return fields


@pytest.mark.promise("X4")
@given(fields=valid_fields())
def test_every_field_comes_back_from_its_file(fields, tmp_path_factory):
    config = LongEmbedConfig(**fields)
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    loaded = LongEmbedConfig.from_pretrained(folder)
    assert loaded.to_dict() == {**config.to_dict(), "transformers_version": loaded.to_dict()["transformers_version"]}
    completed = ("position_extension", "prompts", "rope_parameters")
    for name, value in fields.items():
        if name not in (*completed, "attention_patterns", "training_attention_patterns"):
            assert getattr(loaded, name) == value
    for name in completed:
        assert (fields.get(name) or {}).items() <= (getattr(loaded, name) or {}).items()
    # a config is its own fixed point: built from what it says, it says the same
    again = LongEmbedConfig(**{name: getattr(loaded, name) for name in fields})
    assert again.to_dict() == LongEmbedConfig(**fields).to_dict()


@given(fields=valid_fields())
def test_what_transformers_reads_is_derived(fields):
    config = LongEmbedConfig(**fields)
    assert config.num_hidden_layers == config.num_layers == fields["sublayer_pattern"].count("s")
    assert len(config.layer_types) == len(config.attention_patterns) == config.num_hidden_layers
    expected = {"full": "full_attention", "sliding": "sliding_attention", "block": "chunked_attention"}
    for entry, layer_type in zip(config.attention_patterns, config.layer_types, strict=True):
        assert layer_type == expected.get(entry["type"], layer_type)
    assert set(config.layer_types) <= set(ALLOWED_LAYER_TYPES)
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    for entry in config.attention_patterns:  # every parameter is written out: a later default changes no saved model
        assert set(entry) == {"type", *(field.name for field in dataclasses.fields(PATTERNS[entry["type"]]))}


@pytest.mark.parametrize(
    ("scheme", "method"), [(name, method) for name, scheme in POSITION_SCHEMES.items() for method in scheme.extensions]
)
def test_an_extension_is_written_out_with_all_its_parameters(scheme, method):
    extension = {"method": method, "original_max_position_embeddings": CONTEXT}
    if method == "restart":
        extension["period"] = CONTEXT
    config = LongEmbedConfig(
        **SMALL, position_embedding_type=scheme, position_extension=extension, max_position_embeddings=4 * CONTEXT
    )
    known = {"method", "original_max_position_embeddings", "keep_short", *POSITION_SCHEMES[scheme].extensions[method]}
    assert set(config.position_extension) == known


def test_defaults_of_the_layout():
    assert LongEmbedConfig(num_hidden_layers=3).sublayer_pattern == "sfsfsf"
    assert LongEmbedConfig(sublayer_pattern="ssff").num_hidden_layers == 2
    assert LongEmbedConfig(sublayer_pattern="sandwich(2)", num_hidden_layers=3).sublayer_pattern == "sssfff"
    par = LongEmbedConfig(sublayer_pattern="par(5)", num_hidden_layers=16)
    assert par.sublayer_pattern == "sffsfffsfffsffsfffsfffffffffffff"
    assert par.num_hidden_layers == 6
    assert LongEmbedConfig().prompts == {"query": "", "document": ""}
    block = LongEmbedConfig(
        attention_patterns={"type": "block", "size": 100},
        position_extension={"method": "restart", "original_max_position_embeddings": 512},
    )
    assert block.position_extension["period"] == 100


def test_how_is_never_saved(tmp_path):
    model = LongEmbedModel._from_config(LongEmbedConfig(**SMALL, num_hidden_layers=1), attn_implementation="sdpa")
    assert model.config._attn_implementation == "sdpa"
    model.config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "sdpa" not in text
    assert "attn_implementation" not in text


# --- refusals -------------------------------------------------------------------------------------------------------

ROPE = {"position_embedding_type": "rope"}
SLIDING = {"attention_patterns": {"type": "sliding", "window": 16}}


def stretched(method, **parameters):
    return {"position_extension": {"method": method, "original_max_position_embeddings": CONTEXT, **parameters}}


REFUSALS = [
    # types and literals
    ({"hidden_size": "16"}, ["hidden_size", "int", "str"]),
    ({"norm_eps": "small"}, ["norm_eps"]),
    ({"norm_placement": "middle"}, ["norm_placement", "post", "pre", "middle"]),
    ({"pooling": "max"}, ["pooling", "weighted_mean", "max"]),
    ({"position_embedding_type": "learned"}, ["position_embedding_type", "alibi", "learned"]),
    ({"attention_patterns": 3}, ["attention_patterns", "3"]),
    ({"position_extension": "repeat"}, ["position_extension", "dict"]),
    ({"token_weighting": "idf"}, ["token_weighting", "generalized_max", "idf"]),
    ({"token_weighting": "generalized_max", "pooling": "cls"}, ["token_weighting", "pooling='cls'", "'mean'"]),
    ({"token_weighting_regularization": 0.0}, ["token_weighting_regularization=0.0", "positive"]),
    # sizes
    ({"hidden_size": 0}, ["hidden_size=0"]),
    ({"vocab_size": -1}, ["vocab_size=-1"]),
    ({"num_attention_heads": 0}, ["num_attention_heads=0"]),
    ({"max_position_embeddings": 0}, ["max_position_embeddings=0"]),
    ({"hidden_size": 30, "num_attention_heads": 4}, ["hidden_size=30", "num_attention_heads=4"]),
    ({"head_dim": 5}, ["head_dim=5", "hidden_size=16"]),
    ({"hidden_act": "snake"}, ["hidden_act='snake'"]),
    ({"hidden_dropout_prob": 1.0}, ["hidden_dropout_prob=1.0"]),
    ({"attention_dropout": -0.1}, ["attention_dropout=-0.1"]),
    ({"pad_token_id": 30}, ["pad_token_id=30", "vocab_size=30"]),
    # layout
    ({"sublayer_pattern": ""}, ["sublayer_pattern=''"]),
    ({"sublayer_pattern": "sfx"}, ["sublayer_pattern='sfx'"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers=0"]),
    ({"num_hidden_layers": 3, "sublayer_pattern": "sf"}, ["num_hidden_layers=3", "sublayer_pattern='sf'"]),
    # patterns
    ({"attention_patterns": "local"}, ["attention_patterns", "'local'", "full, ", "sliding"]),
    ({"attention_patterns": ["full"] * 5}, ["attention_patterns has 5", "6 attention"]),
    ({"attention_patterns": [None] * 6}, ["attention_patterns", "None"]),
    ({"attention_patterns": {"type": "full", "size": 3}}, ["'full'", "'size'"]),
    ({"attention_patterns": {"type": "sliding", "width": 3}}, ["'sliding'", "'width'", "window, global_tokens"]),
    ({"attention_patterns": {"type": "sliding", "window": 0}}, ["'window'", "'sliding'", "0"]),
    ({"attention_patterns": {"type": "block", "size": 2.5}}, ["'size'", "'block'", "2.5"]),
    ({"attention_patterns": {"type": "sliding", "window": 600}}, ["window=600", "max_position_embeddings=512"]),
    ({"layer_types": ["full_attention"] * 6, **SLIDING}, ["layer_types", "attention_patterns"]),
    # positions
    ({"rope_parameters": {"rope_type": "default"}}, ["rope_parameters", "position_embedding_type='absolute'"]),
    ({**ROPE, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type='dynamic'", "position_ext"]),
    ({**ROPE, "rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters", "yarn", "factor"]),
    ({**ROPE, "rope_parameters": {"rope_type": "linear", "factor": 0.5}}, ["rope_parameters", "factor=0.5"]),
    ({**ROPE, "rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, ["rope_parameters", "rope_theta=-1.0"]),
    ({**ROPE, "hidden_size": 15, "num_attention_heads": 3}, ["position_embedding_type='rope'", "head_dim=5"]),
    ({"position_embedding_type": "sinusoidal", "hidden_size": 5, "num_attention_heads": 1}, ["sinusoidal", "hidden_"]),
    ({"relative_attention_num_buckets": 6}, ["relative_attention_num_buckets=6"]),
    (
        {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 8},
        ["relative_attention_max_distance=8", "relative_attention_num_buckets=32"],
    ),
    (
        {"relative_attention_num_buckets": 32, "position_embedding_type": "alibi"},
        ["relative_attention_num_buckets", "position_embedding_type='alibi'"],
    ),
    # extensions
    ({**stretched("repeat"), "position_embedding_type": "alibi"}, ["position_extension", "'alibi'"]),
    (stretched("yarn"), ["position_extension", "'yarn'", "'absolute'", "repeat"]),
    ({**ROPE, **stretched("repeat")}, ["position_extension", "'repeat'", "'rope'", "dynamic"]),
    (stretched("repeat", factor=2), ["position_extension", "'repeat'", "'factor'"]),
    (stretched("group", neighbours=4), ["position_extension", "'group'", "'neighbours'"]),
    (stretched("restart"), ["position_extension", "period=None"]),
    (stretched("restart", period=65), ["position_extension", "period=65", "64"]),
    (stretched("restart", period=0), ["position_extension", "period=0"]),
    (stretched("group", factor=0.5), ["position_extension", "factor=0.5"]),
    (stretched("interpolate", factor=2.5), ["position_extension", "factor=2.5"]),
    (stretched("repeat", keep_short="yes"), ["position_extension", "keep_short='yes'"]),
    ({"position_extension": {"method": "repeat"}}, ["position_extension", "original_max_position_embeddings=None"]),
    (
        {**stretched("repeat"), "max_position_embeddings": 32},
        ["original_max_position_embeddings=64", "max_position_embeddings=32"],
    ),
    (
        {**ROPE, **stretched("linear"), "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        ["position_extension", "yarn"],
    ),
    ({**ROPE, **stretched("group", neighbours=0)}, ["position_extension", "neighbours=0"]),
    ({**ROPE, **stretched("group", neighbours=16), **SLIDING}, ["neighbours=16", "window 16"]),
    (
        {**ROPE, **stretched("group"), "relative_attention_num_buckets": 32},
        ["'group'", "relative_attention_num_buckets"],
    ),
    ({**ROPE, **stretched("theta", rope_theta=0)}, ["position_extension", "rope_theta=0"]),
    # causal
    ({"position_embedding_type": "none"}, ["position_embedding_type='none'", "is_causal=true"]),
    ({"is_causal": True, "pooling": "cls"}, ["is_causal=true", "pooling"]),
    ({"position_embedding_type": "relative", "hidden_size": 5, "num_attention_heads": 1}, ["'relative'", "hidden_"]),
    (
        {"relative_attention_num_buckets": 32, "position_embedding_type": "relative"},
        ["relative_attention_num_buckets", "position_embedding_type='relative'"],
    ),
    ({"is_causal": True, "attention_patterns": {"type": "shifted", "wrap": True}}, ["wrap=true", "is_causal=true"]),
    (
        {**ROPE, **stretched("group"), "attention_patterns": {"type": "shifted", "wrap": True}},
        ["wrap=true", "Self-Extend"],
    ),
    ({"num_attention_heads": 1, "attention_patterns": "shifted"}, ["'shifted'", "num_attention_heads=1"]),
    ({"attention_patterns": {"type": "shifted", "wrap": 1}}, ["'wrap'", "'shifted'", "true or false"]),
    ({"attention_patterns": {"type": "sliding", "window": 100, "dilation": 6}}, ["dilation=6", "max_position_emb"]),
    ({"training_attention_patterns": ["full"] * 2}, ["training_attention_patterns has 2", "6 attention"]),
    (
        {"training_attention_patterns": {"type": "sliding", "global_projections": True}},
        ["training_attention_patterns", "'sliding'", "'full'", "weights of its own"],
    ),
    ({"layerdrop": 1.0}, ["layerdrop=1.0"]),
    ({"layerdrop_unit": "block"}, ["layerdrop_unit", "sublayer"]),
    ({"sublayer_pattern": "sandwich(6)"}, ["sandwich(6)", "num_hidden_layers=6"]),
    ({"sublayer_pattern": "fff"}, ["sublayer_pattern='fff'", "'s'"]),
    # the rest
    ({"prompts": {"query": 3}}, ["prompts", "'query'", "3"]),
    ({"default_prompt_name": "passage"}, ["default_prompt_name", "'passage'", "'query'"]),
    ({"similarity_fn_name": "maxsim"}, ["similarity_fn_name", "maxsim"]),
    ({"_attn_implementation_internal": "someone/kernel"}, ["_attn_implementation_internal"]),
    ({"max_position_embedings": 8192}, ["'max_position_embedings'", "'max_position_embeddings'"]),
    ({"attention_pattern": "full"}, ["'attention_pattern'", "'attention_patterns'"]),
]


@pytest.mark.parametrize(("fields", "named"), REFUSALS, ids=[str(fields)[:70] for fields, _ in REFUSALS])
def test_what_cannot_work_is_refused_in_one_sentence(fields, named):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are checked below)
        LongEmbedConfig(**(SMALL | fields))
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 300
    for word in named:
        assert word in message


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"hidden_size": "16"}, "hidden_size"),
        ({"attention_patterns": [{"type": "sliding", "window": 0}] * 6}, "window"),
        ({"layer_types": ["sliding_attention"] * 6}, "layer_types"),
        ({"num_hidden_layers": 5}, "num_hidden_layers=5"),
        ({"_attn_implementation_internal": "someone/kernel"}, "_attn_implementation_internal"),
        ({"position_extension": {"method": "yarn"}}, "yarn"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
    ],
)
@pytest.mark.parametrize(
    "load", [LongEmbedConfig.from_pretrained, AutoConfig.from_pretrained, LongEmbedModel.from_pretrained]
)
def test_a_file_edited_by_hand_is_refused_in_one_sentence(edit, named, load, tmp_path):
    LongEmbedModel(LongEmbedConfig(**SMALL)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(ValueError, match=named) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_edited_by_hand_that_says_something_else_is_read(tmp_path):
    LongEmbedConfig(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for derived in ("layer_types", "num_hidden_layers", "head_dim"):
        fields.pop(derived, None)
    path.write_text(json.dumps(fields | {"sublayer_pattern": "sfs", "attention_patterns": ["full", "block"]}))
    config = LongEmbedConfig.from_pretrained(tmp_path)
    assert config.layer_types == ["full_attention", "chunked_attention"]
    assert config.attention_patterns == [{"type": "full"}, {"type": "block", "size": 256}]


def test_unknown_fields_of_other_libraries_are_kept():
    assert LongEmbedConfig(**SMALL, matryoshka_dimensions=[8, 16]).matryoshka_dimensions == [8, 16]


def test_a_config_that_was_changed_to_nonsense_is_not_saved(tmp_path):
    config = LongEmbedConfig(**SMALL)
    config.num_attention_heads = 3
    with pytest.raises(Exception, match="num_attention_heads=3"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
