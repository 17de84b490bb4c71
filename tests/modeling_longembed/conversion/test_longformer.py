"""Sliding windows with global tokens are Longformer's (oracle: transformers' own), and so is what is read of one."""

import json
import re
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModel, LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from modeling_longembed import LongEmbedModel
from modeling_longembed.attention_longembed import KERNELS, AttentionInputs
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_registry_longembed import build_pattern
from tests.modeling_longembed.tiny_checkpoints import CONFIGS, CONTEXT, random_batch, save_checkpoint

HEADS, DIM, WINDOW = 4, 8, 6  # keys on each side
PATHS = ["eager", "longembed_varlen"]


@pytest.fixture(scope="module")
def longformer():
    """Their self-attention, fp64, its six projections all different."""
    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        attention_window=[2 * WINDOW],
        attention_probs_dropout_prob=0.0,
    )
    module = LongformerSelfAttention(config, 0).double().eval()
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return module


def theirs(module, states, marked):
    """One document `(L, d)`, tokens `marked` `(L,)` global; they need a whole number of windows: the rest is masked.

    Their softmax is in fp32 whatever the model is in; here it is as wide as the rest.
    """
    rest = -len(states) % (2 * WINDOW)
    mask = torch.cat([10000.0 * marked, torch.full((rest,), -10000.0)])[None].double()
    padded = functional.pad(states, (0, 0, 0, rest))[None]
    with patch.object(functional, "softmax", lambda scores, dim, dtype: torch.softmax(scores, dim)):
        output = module(padded, mask, mask < 0, mask > 0, bool(marked.any()))[0]
    return output[0, : len(states)].detach()


def ours(module, states, lengths, marked, pattern, kernel):
    """Packed documents `(T, d)` through our path with their projections: `(T, d)`."""

    def project(*names):
        return [getattr(module, name)(states).unflatten(-1, (HEADS, DIM)) for name in names]

    documents = PackedDocuments(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths), marked)
    pattern = build_pattern(pattern)
    own = project("query_global", "key_global", "value_global") if pattern.global_projections else None
    inputs = AttentionInputs(
        *project("query", "key", "value"),
        pattern,
        documents,
        scaling=DIM**-0.5,
        dropout=0.0,
        own=None if own is None else tuple(own),
    )
    return KERNELS[kernel].function(inputs)[0].flatten(1)


def sliding(**parameters):
    return {"type": "sliding", "window": WINDOW} | parameters


@pytest.mark.promise("A1")
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=3),
    share=st.sampled_from([0, 0.03, 0.3]),
    seed=st.integers(0, 99),
)
def test_window_and_global_tokens_are_longformers(longformer, lengths, share, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(sum(lengths), HEADS * DIM, dtype=torch.float64, generator=generator)
    marked = torch.rand(sum(lengths), generator=generator) < share
    expected = [theirs(longformer, x, m) for x, m in zip(states.split(lengths), marked.split(lengths), strict=True)]
    for kernel in PATHS:
        output = ours(longformer, states, lengths, marked, sliding(global_projections=True), kernel)
        torch.testing.assert_close(output, torch.cat(expected), atol=1e-10, rtol=0)


@pytest.mark.promise("A1")
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "flash_attention_2"])
@pytest.mark.parametrize("marked", [[], [0], [0, 5, 33]], ids=str)
def test_with_one_set_of_projections_every_kernel_computes_it(longformer, marked, kernel):
    """As Longformer starts: the global projections are copies."""
    alike = LongformerSelfAttention(longformer.config, 0).double().eval()
    alike.load_state_dict({name: longformer.state_dict()[name.replace("_global", "")] for name in alike.state_dict()})
    states, is_global = torch.randn(100, HEADS * DIM, dtype=torch.float64), torch.zeros(100, dtype=torch.bool)
    is_global[marked] = True
    with torch.no_grad():
        output = ours(alike, states, [100], is_global, sliding(), kernel)
    torch.testing.assert_close(output, theirs(alike, states, is_global), atol=1e-10, rtol=0)


@pytest.mark.promise("A1")
@pytest.mark.parametrize("kernel", PATHS)
@pytest.mark.parametrize("length", [1, 2, 3, 13, 36, 100])
@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
def test_a_dilated_window_is_a_longformer_on_every_residue_class(longformer, dilation, length, kernel):
    states, none = torch.randn(length, HEADS * DIM, dtype=torch.float64), torch.zeros(length, dtype=torch.bool)
    output = ours(longformer, states, [length], none, sliding(dilation=dilation), kernel)
    for residue in range(min(dilation, length)):
        expected = theirs(longformer, states[residue::dilation], none[residue::dilation])
        torch.testing.assert_close(output[residue::dilation], expected, atol=1e-10, rtol=0)


@pytest.mark.promise("A1")
@pytest.mark.parametrize("kernel", PATHS)
@pytest.mark.parametrize("marked", [[], [0, 20]], ids=str)
def test_dilation_with_global_tokens_is_the_explicit_mask(longformer, marked, kernel):
    length, dilation = 70, 3
    states, is_global = torch.randn(length, HEADS * DIM, dtype=torch.float64), torch.zeros(length, dtype=torch.bool)
    is_global[marked] = True
    distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    visible = ((distance % dilation == 0) & (distance <= dilation * WINDOW)) | is_global

    def attended(suffix, mask):
        query, key, value = (
            getattr(longformer, name + suffix)(states).unflatten(-1, (HEADS, DIM)) for name in ("query", "key", "value")
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) / DIM**0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), value).flatten(1)

    expected = torch.where(is_global[:, None], attended("_global", torch.ones_like(visible)), attended("", visible))
    output = ours(longformer, states, [length], is_global, sliding(dilation=dilation, global_projections=True), kernel)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", PATHS)
@pytest.mark.parametrize("marked", [[], [0], [0, 3, 16]], ids=str)
def test_a_converted_longformer_reads_global_attention_masks(tmp_path, capsys, marked, kernel):
    original = save_checkpoint(tmp_path, "longformer")
    model = LongEmbedModel.from_encoder(tmp_path, attn_implementation=kernel)
    assert f"documents of up to {CONTEXT} tokens" in capsys.readouterr().out
    assert [entry["window"] for entry in model.config.attention_patterns] == [2, 4]
    batch = random_batch([CONTEXT, 17, 1], original.config.pad_token_id)
    mask = batch["attention_mask"] == 1
    batch["global_attention_mask"] = torch.zeros_like(batch["input_ids"])
    batch["global_attention_mask"][:, marked] = 1
    with torch.no_grad():
        expected, output = (m(**batch).last_hidden_state for m in (original, model))
    torch.testing.assert_close(output[mask], expected[mask], atol=1e-5, rtol=0)


def test_one_window_for_all_layers_and_none_that_is_not_asked_for(tmp_path, capsys):
    save_checkpoint(tmp_path, "longformer", attention_window=6)
    assert [x["window"] for x in LongEmbedModel.from_encoder(tmp_path).config.attention_patterns] == [3, 3]
    capsys.readouterr()
    model = LongEmbedModel.from_encoder(tmp_path, attention_patterns="full")
    assert not [name for name in model.state_dict() if ".own." in name]
    assert re.search(r"^longembed: 12 weights that belong to attention patterns are left out", capsys.readouterr().out)


def global_projections_of(model):
    return [
        (getattr(layer.attention.own, name), getattr(layer.attention, name))
        for layer in model.layers[::2]
        for name in ("q_proj", "k_proj", "v_proj")
    ]


@pytest.mark.parametrize("family", ["bert", "nomic_bert"])  # with biases and without
def test_global_projections_of_another_checkpoint_start_as_copies(tmp_path, capsys, family):
    save_checkpoint(tmp_path, family)
    entry = {"type": "sliding", "window": 8, "global_tokens": 1, "global_projections": True}
    model = LongEmbedModel.from_encoder(tmp_path, attention_patterns=entry)
    for own, other in global_projections_of(model):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
    said = capsys.readouterr().out
    count = len([name for name in model.state_dict() if ".own." in name])
    assert f"{count} weights that belong to attention patterns are not in the checkpoint and start new" in said
    assert int(re.search(r"documents of up to (\d+) tokens", said).group(1)) == 9  # the check stays
    shared = LongEmbedModel.from_encoder(tmp_path, attention_patterns=entry | {"global_projections": False})
    ids = random_batch([CONTEXT], CONFIGS[family].pad_token_id)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).pooler_output, shared(ids).pooler_output, atol=1e-6, rtol=0)


@pytest.mark.parametrize("remote", [False, True], ids=["here", "remote code"])
def test_a_folder_whose_config_was_edited_starts_new_weights_as_copies_and_names_them(
    build_tiny_model, tmp_path, caplog, remote
):
    model = build_tiny_model(attention_patterns={"type": "sliding", "window": 8})
    model.save_pretrained(tmp_path / "edited")
    config = json.loads((tmp_path / "edited" / "config.json").read_text())
    for entry in config["attention_patterns"]:
        entry["global_projections"] = True
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config))
    load = AutoModel if remote else LongEmbedModel
    again, loading = load.from_pretrained(tmp_path / "edited", trust_remote_code=remote, output_loading_info=True)
    assert {name.split(".own.")[0] for name in loading["missing_keys"]} == {"layers.0.attention", "layers.2.attention"}
    assert len(loading["missing_keys"]) == 12
    warned = caplog.text
    assert "MISSING" in warned
    assert "own.q_proj.weight" in warned
    for own, other in global_projections_of(again):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
