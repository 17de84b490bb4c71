"""Conversion: within the original context a converted model IS the original (oracle: transformers' own models).

Beyond it, the extension does what its definition says (oracle: the original under position ids or tables made here).
"""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel, GPT2Config

from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from modeling_longembed import conversion_longembed as conversion
from modeling_longembed.conversion_families_longembed import FAMILIES
from tests.modeling_longembed.tiny_checkpoints import (
    CONFIGS,
    CONTEXT,
    random_batch,
    random_text,
    save_checkpoint,
    tiny_tokenizer,
)

LENGTHS = [CONTEXT, 17, 1, CONTEXT - 1, 2]
LEARNED = [family for family in FAMILIES if family not in ("modernbert", "nomic_bert")]


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory):
    """`checkpoint(family, **changes)` gives folder and original model, each made once."""
    made = {}

    def get(family, **changes):
        key = (family, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = folder, save_checkpoint(folder, family, **changes)
        return made[key]

    return get


def largest_difference(ours, theirs, attention_mask):
    return (ours - theirs)[attention_mask == 1].abs().max().item()


def by_key(weights: torch.Tensor) -> torch.Tensor:
    """Longformer's weights of the keys around each query, `(B, H, S, W + 1)`, as `(B, H, S, S)`."""
    length, sides = weights.shape[2], weights.shape[3] // 2
    place = torch.arange(length)[:, None] + torch.arange(2 * sides + 1)
    dense = weights.new_zeros(*weights.shape[:2], length, length + 2 * sides)
    return dense.scatter(3, place.expand_as(weights), weights)[..., sides : sides + length]


def one_sentence(error) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def test_every_family_has_a_checkpoint_here():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_is_the_originals(family, make_checkpoint):
    folder, original = make_checkpoint(family)
    model = LongEmbedModel.from_encoder(folder, attn_implementation="eager")
    batch = random_batch(LENGTHS, original.config.pad_token_id)
    mask = batch["attention_mask"]
    with torch.no_grad():
        theirs = original(**batch, output_hidden_states=True, output_attentions=True)
        ours = model(**batch, output_hidden_states=True, output_attentions=True)
    assert largest_difference(ours.last_hidden_state, theirs.last_hidden_state, mask) <= 1e-5
    layers = original.config.num_hidden_layers
    assert len(theirs.hidden_states) == layers + 1
    assert len(ours.hidden_states) == 2 * layers + 1
    for ours_state, theirs_state in zip(ours.hidden_states[::2], theirs.hidden_states, strict=True):
        assert largest_difference(ours_state, theirs_state, mask) <= 1e-5
    attentions = map(by_key, theirs.attentions) if family == "longformer" else theirs.attentions
    for ours_weights, theirs_weights in zip(ours.attentions, attentions, strict=True):
        seen = mask[:, None, :, None].bool() & mask[:, None, None, :].bool()
        assert (ours_weights - theirs_weights).masked_fill(~seen, 0).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_default_kernel_gives_the_originals_outputs(family, make_checkpoint):
    folder, original = make_checkpoint(family)
    batch = random_batch(LENGTHS, original.config.pad_token_id)
    with torch.no_grad():
        ours = LongEmbedModel.from_encoder(folder)(**batch).last_hidden_state
        theirs = original(**batch).last_hidden_state
    assert largest_difference(ours, theirs, batch["attention_mask"]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padding_id_inside_a_document_is_a_token(family, make_checkpoint):
    folder, original = make_checkpoint(family)
    pad = original.config.pad_token_id
    batch = random_batch([30], pad)
    batch["input_ids"][0, 10:12] = pad
    reserved = FAMILIES[family].reserved_rows(original.config)
    # RoBERTa's relatives count positions by "is it the padding id": told to count tokens, they have to agree with us.
    places = {"position_ids": torch.arange(30)[None] + reserved} if reserved else {}
    with torch.no_grad():
        theirs = original(**batch, **places).last_hidden_state
        ours = LongEmbedModel.from_encoder(folder)(**batch).last_hidden_state
    assert largest_difference(ours, theirs, batch["attention_mask"]) <= 1e-5


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-3}),
        ("bert", {"hidden_size": 24, "num_attention_heads": 3}),
        ("roberta", {"pad_token_id": 3, "hidden_act": "relu", "max_position_embeddings": CONTEXT + 4}),
        ("distilbert", {"sinusoidal_pos_embds": True, "activation": "relu"}),
        ("modernbert", {"norm_bias": True, "mlp_bias": True, "attention_bias": True, "hidden_activation": "silu"}),
        ("modernbert", {"layer_types": ["sliding_attention", "full_attention"] * 2, "local_attention": 6}),
    ],
)
def test_variants_of_the_families(family, changes, make_checkpoint, tmp_path):
    original = save_checkpoint(tmp_path, family, **changes)
    batch = random_batch(LENGTHS, original.config.pad_token_id)
    with torch.no_grad():
        ours = LongEmbedModel.from_encoder(tmp_path)(**batch).last_hidden_state
        theirs = original(**batch).last_hidden_state
    assert largest_difference(ours, theirs, batch["attention_mask"]) <= 1e-5


def test_segments_are_read_as_the_original_reads_them(make_checkpoint):
    folder, original = make_checkpoint("bert")
    batch = random_batch(LENGTHS, 0)
    batch["token_type_ids"] = batch["input_ids"] % 2
    with torch.no_grad():
        ours = LongEmbedModel.from_encoder(folder)(**batch).last_hidden_state
        theirs = original(**batch).last_hidden_state
    assert largest_difference(ours, theirs, batch["attention_mask"]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_language_model_heads(family, tmp_path):
    original = save_checkpoint(tmp_path, family, with_head=True)
    model = LongEmbedForMaskedLM.from_encoder(tmp_path)
    batch = random_batch(LENGTHS, original.config.pad_token_id)
    with torch.no_grad():
        ours, theirs = model(**batch).logits, original(**batch).logits
    scale = theirs.abs().max()
    assert largest_difference(ours, theirs, batch["attention_mask"]) <= 1e-5 * max(1, scale)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- extensions ---------------------------------------------------------------------------------------------------


def extended(folder, extension, context=3 * CONTEXT, **choices):
    return LongEmbedModel.from_encoder(folder, context, extension, **choices)


METHODS = [("bert", method) for method in ("repeat", "interpolate", "group", {"method": "restart", "period": 16})] + [
    ("modernbert", method)
    for method in (
        "linear",
        "dynamic",
        "ntk",
        {"method": "theta", "rope_theta": 500_000.0},
        "yarn",
        {"method": "group", "neighbours": 16},
    )
]


@pytest.mark.promise("P9")
@pytest.mark.parametrize(("family", "method"), METHODS, ids=str)
def test_short_documents_do_not_change_beside_long_ones(family, method, make_checkpoint):
    folder, _ = make_checkpoint(family)
    short = 16 if isinstance(method, dict) and method["method"] == "restart" else CONTEXT
    plain, model = LongEmbedModel.from_encoder(folder), extended(folder, method)
    batch = random_batch([short, 3 * CONTEXT, 5], 0)
    with torch.no_grad():
        beside = model(**batch).last_hidden_state
        for row, length in ((0, short), (2, 5)):
            alone = plain(batch["input_ids"][row : row + 1, :length]).last_hidden_state[0]
            assert torch.equal(model(batch["input_ids"][row : row + 1, :length]).last_hidden_state[0], alone)
            torch.testing.assert_close(beside[row, :length], alone, atol=5e-6, rtol=0)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("extension", "places"),
    [
        ("repeat", lambda p: p % CONTEXT),
        ("group", lambda p: p // 3),
        ({"method": "restart", "period": 16}, lambda p: p % 16),
        ({"method": "restart", "period": CONTEXT}, lambda p: p % CONTEXT),
    ],
    ids=["repeat", "group", "restart-16", "restart-40"],
)
def test_long_documents_read_the_rows_of_the_definition(family, extension, places, make_checkpoint):
    folder, original = make_checkpoint(family)
    length = 3 * CONTEXT
    ids = random_batch([length], original.config.pad_token_id)["input_ids"]
    position_ids = places(torch.arange(length))[None] + FAMILIES[family].reserved_rows(original.config)
    with torch.no_grad():
        theirs = original(
            ids, torch.ones_like(ids), token_type_ids=torch.zeros_like(ids), position_ids=position_ids
        ).last_hidden_state
        ours = extended(folder, extension)(ids).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.promise("P9")
@pytest.mark.parametrize("family", LEARNED)
def test_repeated_table_is_periodic(family, make_checkpoint):
    folder, original = make_checkpoint(family)
    table = extended(folder, "repeat").embeddings.position_embeddings.weight
    theirs = original.embeddings.position_embeddings.weight[FAMILIES[family].reserved_rows(original.config) :]
    for copy in range(3):  # the reserved rows are dropped once, not once a copy
        assert torch.equal(table[copy * CONTEXT : (copy + 1) * CONTEXT], theirs)


@pytest.mark.promise("P9")
@pytest.mark.parametrize("family", LEARNED)
@pytest.mark.parametrize("context", [3 * CONTEXT, 2 * CONTEXT + 7])
def test_interpolated_table_hits_the_original_rows(family, context, make_checkpoint):
    folder, original = make_checkpoint(family)
    table = extended(folder, "interpolate", context).embeddings.position_embeddings.weight.detach()
    theirs = original.embeddings.position_embeddings.weight[FAMILIES[family].reserved_rows(original.config) :].detach()
    assert torch.equal(table[::3], theirs)
    places = np.arange(len(table)) / 3
    between = [np.interp(places, np.arange(CONTEXT), column) for column in theirs.double().numpy().T]
    torch.testing.assert_close(table.double(), torch.tensor(np.stack(between, 1)), atol=1e-6, rtol=0)


def test_every_short_document_under_keep_short_false_follows_the_extension(make_checkpoint, capsys):
    folder, original = make_checkpoint("bert")
    model = extended(folder, {"method": "group", "keep_short": False})
    assert "nothing was compared" in capsys.readouterr().out
    ids = random_batch([20], 0)["input_ids"]
    with torch.no_grad():
        theirs = original(ids, position_ids=torch.arange(20)[None] // 3).last_hidden_state
        torch.testing.assert_close(model(ids).last_hidden_state, theirs, atol=1e-5, rtol=0)


def head_dim(config):
    return config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize(
    ("extension", "stretch"),
    [
        ("linear", lambda base, D: {"rope_type": "linear", "factor": 3.0, "rope_theta": base}),
        ("yarn", lambda base, D: {"rope_type": "yarn", "factor": 3.0, "rope_theta": base}),
        ({"method": "yarn", "factor": 2.0}, lambda base, D: {"rope_type": "yarn", "factor": 2.0, "rope_theta": base}),
        # transformers' factor f scales by f len / L - (f - 1); as long as the document is, that is f = 1
        ("dynamic", lambda base, D: {"rope_type": "dynamic", "factor": 1.0, "rope_theta": base}),
        ("ntk", lambda base, D: {"rope_type": "default", "rope_theta": base * 3.0 ** (D / (D - 2))}),
        ({"method": "theta", "rope_theta": 7e5}, lambda base, D: {"rope_type": "default", "rope_theta": 7e5}),
    ],
    ids=["linear", "yarn", "yarn-2", "dynamic", "ntk", "theta"],
)
def test_long_documents_are_rotated_as_transformers_rotates_them(extension, stretch, make_checkpoint):
    folder, original = make_checkpoint("modernbert")
    config = type(original.config).from_dict(original.config.to_dict())
    for kind, parameters in original.config.rope_parameters.items():
        config.rope_parameters[kind] = stretch(parameters["rope_theta"], head_dim(config))
        if config.rope_parameters[kind]["rope_type"] == "yarn":
            config.rope_parameters[kind]["original_max_position_embeddings"] = CONTEXT
    stretched = AutoModel.from_config(config, attn_implementation="eager").eval()
    stretched.load_state_dict(original.state_dict())
    ids = random_batch([3 * CONTEXT - 1], 0)["input_ids"]
    with torch.no_grad():
        theirs, ours = stretched(ids).last_hidden_state, extended(folder, extension)(ids).last_hidden_state
        unstretched = original(ids).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (theirs - unstretched).abs().max() > 1e-3  # the stretch is seen at all


@pytest.mark.parametrize(
    ("family", "patterns", "expected"),
    [
        ("bert", None, {"method": "repeat"}),
        ("bert", {"type": "block", "size": 20}, {"method": "restart", "period": 20}),
        ("bert", {"type": "sliding", "window": 8}, {"method": "repeat"}),
        ("modernbert", None, {"method": "dynamic"}),
    ],
)
def test_default_extension_of_a_longer_context(family, patterns, expected, make_checkpoint):
    model = LongEmbedModel.from_encoder(make_checkpoint(family)[0], 3 * CONTEXT, attention_patterns=patterns)
    assert expected.items() <= model.config.position_extension.items()
    assert model.config.position_extension["original_max_position_embeddings"] == CONTEXT
    assert model.config.max_position_embeddings == model.tokenizer.model_max_length == 3 * CONTEXT


def test_a_shorter_context_keeps_its_rows(make_checkpoint):
    folder, original = make_checkpoint("roberta")
    model = LongEmbedModel.from_encoder(folder, max_position_embeddings=16)
    batch = random_batch([16, 7], 1)
    with torch.no_grad():
        ours, theirs = model(**batch).last_hidden_state, original(**batch).last_hidden_state
    assert largest_difference(ours, theirs, batch["attention_mask"]) <= 1e-5
    assert len(model.embeddings.position_embeddings.weight) == 16


# --- patterns -----------------------------------------------------------------------------------------------------


def mean_over_blocks(original: BertModel, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Cut into blocks, embed each with the original, mean over all tokens: `(T,)` to `(d,)`."""
    states = [original(block[None]).last_hidden_state[0] for block in ids.split(size)]
    return torch.cat(states).mean(0)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 120])
def test_blocks_with_restarting_positions_are_chunks_of_the_original(length, make_checkpoint):
    folder, original = make_checkpoint("bert")
    model = LongEmbedModel.from_encoder(folder, 3 * CONTEXT, attention_patterns={"type": "block", "size": 16})
    batch = random_batch([length, 33], 0)
    with torch.no_grad():
        ours = model(**batch).pooler_output
        theirs = torch.stack(
            [mean_over_blocks(original, batch["input_ids"][row, :n], 16) for row, n in enumerate((length, 33))]
        )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [4, CONTEXT])
def test_a_window_over_full_attention_changes_what_it_cuts_off_and_nothing_else(window, make_checkpoint, capsys):
    folder, original = make_checkpoint("bert")
    model = LongEmbedModel.from_encoder(folder, attention_patterns={"type": "sliding", "window": window})
    compared = int(re.search(r"documents of up to (\d+) tokens", capsys.readouterr().out).group(1))
    assert compared == min(window + 1, CONTEXT)
    batch = random_batch([CONTEXT, compared], 0)
    with torch.no_grad():
        difference = (model(**batch).last_hidden_state - original(**batch).last_hidden_state).abs().amax(-1)
    assert difference[1, :compared].max() <= 1e-5
    assert (difference[0].max() > 1e-3) == (window < CONTEXT - 1)


# --- the real model -------------------------------------------------------------------------------------------------

PARAGRAPH = (
    "The committee met in the morning to discuss the budget for the coming year. Several members asked for more money "
    "for roads and schools, while others thought that taxes are high enough. Nobody mentioned the bridge that closed. "
)


def test_the_real_minilm(minilm, capsys):
    model = LongEmbedModel.from_encoder(minilm, attn_implementation="longembed_varlen")
    printed = float(re.search(r"tokens: (\S+)", capsys.readouterr().out).group(1))
    assert printed <= 1e-5
    original, tokenizer = BertModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)
    texts = [PARAGRAPH * 30, PARAGRAPH, "A word.", ""]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = model(**batch).last_hidden_state, original(**batch).last_hidden_state
    assert batch["input_ids"].shape[1] == 512
    assert largest_difference(ours, theirs, batch["attention_mask"]) <= 1e-5
    assert model.config.pooling == "mean"
    assert model.config.license == "apache-2.0"


def test_the_real_minilm_in_blocks(minilm):
    model = LongEmbedModel.from_encoder(minilm, 2048, attention_patterns={"type": "block", "size": 254})
    text = PARAGRAPH * 20
    original, tokenizer = BertModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)
    ids = tokenizer(text, return_tensors="pt", truncation=False)["input_ids"][0]
    assert 3 * 254 < len(ids) < 2048
    with torch.no_grad():
        theirs = mean_over_blocks(original, ids, 254)
    ours = model.encode([text], normalize=False, output="torch", precision="float32")[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# --- what sentence-transformers knows -------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "ours"), [("mean", "mean"), ("cls", "cls"), ("lasttoken", "last")])
def test_pooling_and_prompts_of_sentence_transformers_are_taken_over(theirs, ours, make_checkpoint, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    folder, _ = make_checkpoint("bert")
    parts = [modules.Transformer(str(folder)), modules.Pooling(32, theirs)]
    reference = st.SentenceTransformer(modules=parts, prompts={"query": "w1 w2 ", "passage": "w3 "}, device="cpu")
    reference.save(str(tmp_path))
    model = LongEmbedModel.from_encoder(tmp_path)
    assert model.config.pooling == ours
    assert model.config.prompts == {"query": "w1 w2 ", "document": "", "passage": "w3 "}
    texts = [random_text(20), random_text(7, seed=1), "w5"]
    vectors = model.encode(texts, prompt_name="query", normalize=False, precision="float32")
    np.testing.assert_allclose(vectors, reference.encode(texts, prompt_name="query"), atol=1e-5)
    chosen = LongEmbedModel.from_encoder(tmp_path, pooling="weighted_mean", prompts={"query": "w9 "})
    assert (chosen.config.pooling, chosen.config.prompts) == ("weighted_mean", {"query": "w9 ", "document": ""})


def with_modules(source, folder, *kinds, **pooling):
    """A copy of a checkpoint with sentence-transformers' files of older releases."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    return folder


@pytest.mark.parametrize(
    ("kinds", "pooling", "feature"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, "Dense"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "max_tokens"),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls_token"),
    ],
)
def test_modules_that_we_do_not_have_are_refused(kinds, pooling, feature, make_checkpoint, tmp_path):
    folder = with_modules(make_checkpoint("bert")[0], tmp_path / "st", *kinds, **pooling)
    with pytest.raises(ValueError, match=feature) as error:
        LongEmbedModel.from_encoder(folder)
    one_sentence(error)


def test_a_chosen_pooling_takes_the_place_of_one_that_we_do_not_have(make_checkpoint, tmp_path):
    kinds, source = ("Transformer", "Pooling"), make_checkpoint("bert")[0]
    folder = with_modules(source, tmp_path / "st", *kinds, pooling_mode_max_tokens=True)
    assert LongEmbedModel.from_encoder(folder, pooling="cls").config.pooling == "cls"


# --- refusals -------------------------------------------------------------------------------------------------------


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


def test_a_checkpoint_without_a_tokenizer_converts(make_checkpoint, tmp_path):
    original = make_checkpoint("bert")[1]
    original.save_pretrained(tmp_path)
    model = LongEmbedModel.from_encoder(tmp_path)
    with pytest.raises(ValueError, match="tokenizer") as error:
        model.encode(["w1"])
    one_sentence(error)
    model.tokenizer = tiny_tokenizer(0)
    assert model.encode(["w1"]).shape == (1, 32)


# --- the conversion checks itself -----------------------------------------------------------------------------------


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
