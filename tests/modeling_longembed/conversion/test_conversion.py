"""Conversion: within the original context a converted model IS the original (oracle: transformers' own models)."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from modeling_longembed.conversion_families_longembed import FAMILIES
from tests.modeling_longembed.tiny_checkpoints import (
    CONFIGS,
    CONTEXT,
    PARAGRAPH,
    largest_difference,
    one_sentence,
    random_batch,
    random_text,
    save_checkpoint,
    tiny_tokenizer,
)

LENGTHS = [CONTEXT, 17, 1, CONTEXT - 1, 2]


def by_key(weights: torch.Tensor) -> torch.Tensor:
    """Longformer's weights of the keys around each query, `(B, H, S, W + 1)`, as `(B, H, S, S)`."""
    length, sides = weights.shape[2], weights.shape[3] // 2
    place = torch.arange(length)[:, None] + torch.arange(2 * sides + 1)
    dense = weights.new_zeros(*weights.shape[:2], length, length + 2 * sides)
    return dense.scatter(3, place.expand_as(weights), weights)[..., sides : sides + length]


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


def test_a_checkpoint_without_a_tokenizer_converts(make_checkpoint, tmp_path):
    original = make_checkpoint("bert")[1]
    original.save_pretrained(tmp_path)
    model = LongEmbedModel.from_encoder(tmp_path)
    with pytest.raises(ValueError, match="tokenizer") as error:
        model.encode(["w1"])
    one_sentence(error)
    model.tokenizer = tiny_tokenizer(0)
    assert model.encode(["w1"]).shape == (1, 32)
