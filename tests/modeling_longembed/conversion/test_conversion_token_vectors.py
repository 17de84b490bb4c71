"""Models that sentence-transformers' MultiVectorEncoder saved become ours, with the token vectors that it gives."""

import json
import string

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from modeling_longembed import LongEmbedModel
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, VOCAB_SIZE, random_text, randomize, save_checkpoint

st = pytest.importorskip("sentence_transformers")
if not hasattr(st, "MultiVectorEncoder"):
    pytest.skip("this release of sentence-transformers has no MultiVectorEncoder", allow_module_level=True)
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer  # noqa: E402

TEXTS = ["w1 , w2 w3 . w4", random_text(20), "w5"]
PROMPTS = {"query": "w7 ", "document": "w8 w9 "}


def dense(inputs: int, outputs: int, activation=torch.nn.Identity, **settings):
    settings |= {"bias": False, "module_input_name": "token_embeddings"}
    return randomize(Dense(inputs, outputs, activation_function=activation(), **settings))


HEADS = {
    "no head": [],
    "linear": [dense(32, 8)],
    "linear, with a residual connection": [dense(32, 8, use_residual=True)],
    "as wide as the states, with a residual connection": [dense(32, 32, use_residual=True)],
    "two layers without an activation": [dense(32, 48), dense(48, 8)],
    "two layers": [dense(32, 40, torch.nn.GELU), dense(40, 8)],
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A checkpoint whose tokenizer knows two punctuation marks."""
    folder = tmp_path_factory.mktemp("bert")
    save_checkpoint(folder, "bert", vocab_size=VOCAB_SIZE + 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([",", "."])
    tokenizer.save_pretrained(folder)
    return folder


def save(folder, backbone, *modules, words=(), tasks=None, settings=None, **transformer):
    """Save a model of these modules behind its encoder; without any, of those that every such model ends with."""
    end = (MultiVectorMask(list(words), skiplist_tasks=tasks), Normalize("token_embeddings"))
    modules = [Transformer(str(backbone), **transformer), *modules, *end, *(settings or {}).pop("behind", [])]
    model = st.MultiVectorEncoder(modules=modules, device="cpu", prompts=PROMPTS, **(settings or {}))
    model.save_pretrained(str(folder), create_model_card=False)
    return model


@pytest.mark.promise("T8")
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("words", [(), string.punctuation], ids=["all words", "no punctuation"])
def test_the_token_vectors_are_those_of_the_original(backbone, tmp_path, name, words):
    """Of all tokens but special ones, and but punctuation where documents have none of it."""
    theirs = save(tmp_path / "theirs", backbone, *HEADS[name], words=words)
    ours = LongEmbedModel.from_encoder(tmp_path / "theirs")
    assert (ours.config.prompts, ours.config.token_skip_punctuation) == (PROMPTS, bool(words))
    marks = ours.tokenizer.convert_tokens_to_ids([",", "."]) if words else []
    for side in PROMPTS:
        for text in TEXTS:
            ids = ours.tokenizer(PROMPTS[side] + text)["input_ids"]
            rows = getattr(theirs, f"encode_{side}")(text, convert_to_numpy=True)
            has_row = [number for number in ids if side == "query" or number not in marks]
            kept = [number not in {*marks, *ours.tokenizer.all_special_ids} for number in has_row]
            vectors = ours.encode(text, prompt_name=side, output_value="tokens", precision="float32")
            np.testing.assert_allclose(vectors, rows[kept], atol=1e-6)


def test_what_is_converted_is_saved_for_it_again(backbone, tmp_path):
    save(tmp_path / "theirs", backbone, *HEADS["two layers"])
    model = LongEmbedModel.from_encoder(tmp_path / "theirs", 3 * CONTEXT)
    model.save_pretrained(tmp_path / "ours")
    again = st.MultiVectorEncoder(str(tmp_path / "ours"), device="cpu", trust_remote_code=True)
    text = random_text(80)
    ours = model.encode(text, prompt_name="query", output_value="tokens", precision="float32")
    np.testing.assert_array_equal(again.encode_query(text, convert_to_numpy=True), ours)


def test_another_head_may_be_chosen(backbone, tmp_path):
    save(tmp_path / "theirs", backbone, *HEADS["two layers"])
    config = LongEmbedModel.from_encoder(tmp_path / "theirs", token_dim=4, token_head="linear").config
    assert (config.token_dim, config.token_head) == (4, "linear")


def test_lengths_say_what_the_original_reads(backbone, tmp_path, capsys):
    save(tmp_path, backbone, query_length=8, document_length=16)
    assert LongEmbedModel.from_encoder(tmp_path).tokenizer.model_max_length == CONTEXT
    assert "the original cuts texts off after 16 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("modules", "settings", "feature"),
    [
        ([], {"query_expansion": {"strategy": "fixed", "length": 32}}, "query_expansion="),
        ([], {"words": ["w3", "w4"]}, r"a skip list of other words than punctuation marks \(w3, w4 \.\.\.\)"),
        ([], {"words": string.punctuation, "tasks": ["query"]}, "skiplist_tasks"),
        ([], {"settings": {"behind": [HierarchicalTokenPooling(2)]}}, "HierarchicalTokenPooling in this order"),
        ([Pooling(32)], {}, "Pooling, MultiVectorMask, Normalize in this order"),
        ([dense(32, 8, torch.nn.Tanh)], {}, "activation torch.nn.modules.activation.Tanh"),
        ([dense(32, 8, torch.nn.GELU)], {}, "a GELU behind the last dense layer"),
        ([dense(32, 65, torch.nn.GELU), dense(65, 8)], {}, "a head with 65 inner units over states of 32"),
        ([dense(32, 33)], {}, "token vectors of 33 dimensions from states of 32"),
        ([Dense(32, 8, module_input_name="token_embeddings")], {}, "bias=true"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(backbone, tmp_path, modules, settings, feature):
    save(tmp_path, backbone, *modules, **settings)
    with pytest.raises(ValueError, match=f"cannot be converted: LongEmbed cannot express .*{feature}"):
        LongEmbedModel.from_encoder(tmp_path)


def test_a_folder_of_pylate_is_refused_with_what_to_do(backbone, tmp_path):
    save(tmp_path, backbone, *HEADS["linear"])
    file = tmp_path / "config_sentence_transformers.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "ColBERT"}))
    with pytest.raises(ValueError, match="load it with sentence-transformers' MultiVectorEncoder, save it"):
        LongEmbedModel.from_encoder(tmp_path)
