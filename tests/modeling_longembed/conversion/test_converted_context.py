"""Beyond the original context an extension does what its definition says, and blocks are chunks of the original.

The oracle is the original model under position ids, tables or rotations that are made here.
"""

import re

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel

from modeling_longembed import LongEmbedModel
from modeling_longembed.conversion_families_longembed import FAMILIES
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, PARAGRAPH, largest_difference, random_batch

LEARNED = [family for family in FAMILIES if family not in ("modernbert", "nomic_bert")]


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
