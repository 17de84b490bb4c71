"""A feature that the reference drops as well: no comparison of outputs finds it, so that it is refused by its name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from modeling_longembed.conversion_families_longembed import FAMILIES
from tests.modeling_longembed.tiny_checkpoints import CONFIGS, save_checkpoint

# Beside the weights of the encoder: what older releases saved, and heads of all kinds.
PASS = [
    "pooler.dense.weight",
    "cls.seq_relationship.weight",
    "classifier.out_proj.weight",
    "pre_classifier.bias",
    "qa_outputs.weight",
    "score.weight",
    "embeddings.position_ids",
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def original(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family)
    save_checkpoint(folder, family, with_head=True)
    return folder


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def add_weights(folder, *names):
    weights = load_file(folder / "model.safetensors")
    weights |= {name: torch.ones(32, 32) for name in names}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def encoder_weight(folder, containing: str = "") -> str:
    """The name of a weight of the first layer, in the checkpoint's own names."""
    names = load_file(folder / "model.safetensors")
    return next(name for name in names if ".0." in name and containing in name and name.endswith(".weight"))


def refused(cls, folder, named):
    with pytest.raises(ValueError, match="cannot be converted") as error:
        cls.from_encoder(folder)
    assert "\n" not in str(error.value)
    assert named in str(error.value)


@pytest.mark.parametrize("cls", [LongEmbedModel, LongEmbedForMaskedLM])
def test_heads_poolers_and_buffers_pass(copy, cls):
    add_weights(copy, *PASS)
    cls.from_encoder(copy)


def test_a_weight_inside_a_layer_is_refused_by_its_name(copy):
    layer = encoder_weight(copy).rpartition(".")[0]
    add_weights(copy, f"{layer}.q_norm.weight")
    refused(LongEmbedModel, copy, "q_norm.weight")


@pytest.mark.parametrize("cls", [LongEmbedModel, LongEmbedForMaskedLM])
@pytest.mark.parametrize("suffix", ["adapter.down.weight", "extra_bias"])
def test_a_weight_of_any_name_inside_a_layer_is_refused(suffix, cls, tmp_path):
    save_checkpoint(tmp_path, "bert", with_head=True)
    add_weights(tmp_path, f"{encoder_weight(tmp_path).rpartition('.')[0]}.{suffix}")
    refused(cls, tmp_path, suffix)


def test_a_weight_of_a_module_that_nobody_knows_is_refused_by_its_name(copy):
    prefix = encoder_weight(copy).partition(".")[0]
    add_weights(copy, f"{prefix}.rotary_mixer.weight")
    refused(LongEmbedModel, copy, "rotary_mixer.weight")


def test_a_weight_of_the_head_is_refused_only_where_the_head_is_converted(family, copy):
    add_weights(copy, f"{FAMILIES[family].head['dense']}.gate")
    LongEmbedModel.from_encoder(copy)
    refused(LongEmbedForMaskedLM, copy, "gate")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_experts", 8), ("qk_norm", True), ("residual_scale", 0.5), ("rope_fraction", 0.5), ("norm_type", "rms")],
)
def test_a_field_that_nobody_reads_is_refused_by_its_name(copy, field, value):
    edit_config(copy, **{field: value})
    refused(LongEmbedModel, copy, f"{field}={json.dumps(value)}")


def test_fields_that_are_off_or_have_no_effect_pass(family, copy):
    inert = {
        "_name_or_path": "org/name",
        "gradient_checkpointing": True,
        "torch_dtype": "float32",
        "output_past": True,
        "pooler_num_fc_layers": 3,
        "directionality": "bidi",
        "tie_weights_": True,
        "task_specific_params": {"x": 1},
        "embedding_size": 32,
        "id2label": {"0": "LABEL_0"},
    }
    edit_config(copy, **inert, num_experts=0, qk_norm=False, rope_fraction=None)
    LongEmbedModel.from_encoder(copy)
    edit_config(copy, embedding_size=16)
    refused(LongEmbedModel, copy, "embedding_size=16")


# --- NomicBERT: the fields of its first code, which transformers does not read --------------------------------------

NOMIC = {
    "activation_function": "swiglu",
    "attn_pdrop": 0.0,
    "causal": False,
    "fused_bias_fc": True,
    "layer_norm_epsilon": 1e-12,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "n_embd": 32,
    "n_head": 4,
    "n_inner": 48,
    "n_layer": 2,
    "n_positions": 8192,
    "pad_vocab_size_multiple": 64,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_base": 1000.0,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "scale_attn_weights": True,
    "summary_type": "cls_index",
    "use_flash_attn": True,
    "use_rms_norm": False,
    "use_xentropy": True,
}


@pytest.fixture
def nomic(tmp_path):
    assert "nomic_bert" in CONFIGS
    save_checkpoint(tmp_path, "nomic_bert")
    edit_config(tmp_path, **NOMIC)
    return tmp_path


def test_older_names_that_say_the_same_pass(nomic):
    LongEmbedModel.from_encoder(nomic)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rotary_scaling_factor", 2),
        ("prenorm", True),
        ("num_experts", 8),
        ("rotary_emb_fraction", 0.5),
        ("rotary_emb_base", 10_000),
        ("rotary_emb_interleaved", True),
        ("qkv_proj_bias", True),
        ("activation_function", "geglu"),
        ("layer_norm_epsilon", 1e-5),
        ("use_rms_norm", True),
        ("causal", True),
        ("n_head", 8),
    ],
)
def test_older_names_that_say_something_else_are_refused(nomic, field, value):
    edit_config(nomic, **{field: value})
    refused(LongEmbedModel, nomic, f"{field}={json.dumps(value)}")


def test_a_bias_of_the_fused_projection_of_nomic_is_refused(nomic):
    weight = encoder_weight(nomic, "attn")
    add_weights(nomic, weight.replace(".weight", ".bias"))
    refused(LongEmbedModel, nomic, ".bias")
