"""One folder for AutoModel, SentenceTransformer and MultiVectorEncoder: the same vectors in all three."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.output_pooling_longembed import POOLINGS
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, random_text, randomize, save_checkpoint

st = pytest.importorskip("sentence_transformers")
if not hasattr(st, "MultiVectorEncoder"):
    pytest.skip("this release of sentence-transformers has no MultiVectorEncoder", allow_module_level=True)

TEXTS = [random_text(n, seed=n) for n in (20, 3, 9, 31)]
PROMPTS = {"query": "w1 w2 ", "document": "w3 "}
MODELS = {
    "the states themselves": {},
    "a head": {"token_dim": 8, "normalize": False, "similarity_fn_name": "dot"},
    "two layers, weights of query tokens, and weights in the pooling": {
        "token_dim": 12,
        "token_head": "mlp",
        "query_token_weights": "state",
        "token_min_weight": 0.7,
        "pooling": "weighted_mean",
        "token_weighting": "generalized_max",
        "token_weighting_regularization": 2.0,
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    save_checkpoint(folder, "bert")
    return LongEmbedModel.from_encoder(folder).tokenizer


def build(tokenizer, **settings) -> LongEmbedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = LongEmbedConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, prompts=PROMPTS, **settings
    )
    model = randomize(LongEmbedModel(config))
    model.tokenizer = tokenizer
    return model


def load(kind, folder, **settings):
    return kind(str(folder), device="cpu", trust_remote_code=True, **settings)


def token_vectors(model, name: str) -> list[np.ndarray]:
    """What `MultiVectorEncoder` gives for each text alone."""
    return [getattr(model, f"encode_{name}")(text, convert_to_numpy=True) for text in TEXTS]


def our_token_vectors(model, name: str) -> list[np.ndarray]:
    return [model.encode(text, prompt_name=name, output_value="tokens", precision="float32") for text in TEXTS]


def assert_equal(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def assert_serves(folder, model, settings: dict) -> dict:
    """Check what all three classes give for a folder of this model; return what they load."""
    widths = {st.SentenceTransformer: 32, st.MultiVectorEncoder: settings.get("token_dim", 32)}
    similarities = {st.SentenceTransformer: model.config.similarity_fn_name, st.MultiVectorEncoder: "maxsim"}
    loaded = {kind: load(kind, folder) for kind in widths}
    for kind, served in loaded.items():
        assert served.prompts == PROMPTS
        assert (served.get_embedding_dimension(), served.similarity_fn_name) == (widths[kind], similarities[kind])
    alone = AutoModel.from_pretrained(folder)
    for side in PROMPTS:
        tokens = our_token_vectors(model, side)
        assert_equal(token_vectors(loaded[st.MultiVectorEncoder], side), tokens)
        assert_equal(our_token_vectors(alone, side), tokens)
        served = getattr(loaded[st.SentenceTransformer], f"encode_{side}")
        ours = [model.encode(text, side, precision="float32") for text in TEXTS]
        np.testing.assert_allclose([served(text) for text in TEXTS], ours, atol=1e-6)
    return {kind.__name__: served for kind, served in loaded.items()} | {"LongEmbedModel": alone}


@pytest.mark.promise("T6")
@pytest.mark.parametrize("name", MODELS)
def test_one_folder_loads_in_all_three_classes(tokenizer, tmp_path, name):
    """Token vectors bitwise; sentence-transformers' pooling adds up in another order than ours."""
    model = build(tokenizer, **MODELS[name])
    model.save_pretrained(tmp_path)
    assert_serves(tmp_path, model, MODELS[name])
    assert json.loads((tmp_path / "config.json").read_text())["architectures"][0] == "LongEmbedModel"


@pytest.mark.promise("T6")
def test_what_one_class_saves_loads_in_all_three(tokenizer, tmp_path):
    settings = {"token_dim": 8, "query_token_weights": "idf", "normalize": False, "similarity_fn_name": "dot"}
    model = build(tokenizer, **settings)
    model.save_pretrained(tmp_path / "ours")
    for name, loaded in assert_serves(tmp_path / "ours", model, settings).items():
        loaded.save_pretrained(str(tmp_path / name))
        assert_serves(tmp_path / name, model, settings)


def test_batches_prompts_and_sides_are_those_of_the_class(tokenizer, tmp_path):
    """Texts of a padded batch get the vectors that each has alone; only `encode_query` weighs tokens."""
    model = build(tokenizer, token_dim=8, query_token_weights="table")
    model.save_pretrained(tmp_path)
    encoder = load(st.MultiVectorEncoder, tmp_path)
    for side in PROMPTS:
        batch = getattr(encoder, f"encode_{side}")(TEXTS, convert_to_numpy=True)
        for ours, theirs in zip(our_token_vectors(model, side), batch, strict=True):
            np.testing.assert_allclose(theirs, ours, atol=1e-6)
    lengths = [np.linalg.norm(rows, axis=1) for rows in token_vectors(encoder, "document")]
    np.testing.assert_allclose(np.concatenate(lengths), 1, atol=1e-5)
    assert [len(rows) for rows in lengths] == [21, 4, 10, 32]  # the prompt, and no special tokens
    weights = model.token_output.query_table.detach().abs()
    for text, rows in zip(TEXTS, token_vectors(encoder, "query"), strict=True):
        ids = tokenizer(PROMPTS["query"] + text, add_special_tokens=False)["input_ids"]
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), weights[ids], atol=1e-5)


def test_its_maxsim_is_the_weighted_sum_of_maxima(tokenizer, tmp_path):
    """The double loop over unit vectors and weights that it knows nothing of."""
    model = build(tokenizer, token_dim=8, query_token_weights="table")
    model.save_pretrained(tmp_path)
    encoder = load(st.MultiVectorEncoder, tmp_path)
    scores = encoder.similarity(encoder.encode_query(TEXTS[:2]), encoder.encode_document(TEXTS))
    weights = model.token_output.query_table.detach().abs().numpy()
    for row, query in zip(scores, TEXTS, strict=False):
        ids = tokenizer(PROMPTS["query"] + query, add_special_tokens=False)["input_ids"]
        unit = model.encode(PROMPTS["query"] + query, output_value="tokens", is_query=False, precision="float32")
        for score, document in zip(row, our_token_vectors(model, "document"), strict=True):
            pairs = zip(ids, unit, strict=True)
            expected = sum(weights[i] * max(vector @ other for other in document) for i, vector in pairs)
            assert score.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_one_vector_is_pooled_from_the_states(tokenizer, tmp_path, pooling):
    model = build(tokenizer, token_dim=8, pooling=pooling)
    model.save_pretrained(tmp_path)
    served = load(st.SentenceTransformer, tmp_path)
    ours = model.encode(TEXTS, prompt_name="document", precision="float32")
    np.testing.assert_allclose(served.encode_document(TEXTS), ours, atol=1e-6)


def test_what_it_trains_is_the_head_of_the_model(tokenizer, tmp_path):
    """There is one copy of the weights: a step of its own loss moves head and query weights of the folder it saves."""
    model = build(tokenizer, token_dim=8, query_token_weights="state")
    model.save_pretrained(tmp_path / "ours")
    encoder = load(st.MultiVectorEncoder, tmp_path / "ours")
    losses = pytest.importorskip("sentence_transformers.multi_vector_encoder.losses")
    loss = losses.MultiVectorMultipleNegativesRankingLoss(encoder)
    columns = [encoder.preprocess(TEXTS[:2], task="query"), encoder.preprocess(TEXTS[2:], task="document")]
    encoder.train()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    loss(columns, None).backward()
    optimizer.step()
    encoder.save_pretrained(str(tmp_path / "tuned"), create_model_card=False)
    before, after = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("ours", "tuned"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"token_output.head.weight"} < moved
    again, tuned = load(st.MultiVectorEncoder, tmp_path / "tuned"), AutoModel.from_pretrained(tmp_path / "tuned")
    assert_equal(token_vectors(again, "query"), our_token_vectors(tuned, "query"))


def test_a_module_that_changes_the_states_first_is_named(tokenizer, tmp_path):
    build(tokenizer).save_pretrained(tmp_path)
    encoder = load(st.MultiVectorEncoder, tmp_path)
    dense = st.sentence_transformer.modules.Dense(32, 32, module_input_name="token_embeddings")
    changed = st.MultiVectorEncoder(modules=[encoder[0], dense, encoder[2]], device="cpu")
    with pytest.raises(ValueError, match="TokenVectors finds no token vectors"):
        changed.encode_query(TEXTS)


def test_what_it_is_told_stays_with_the_folder(tokenizer, tmp_path):
    """Prompts and the mean over query tokens, also for the class that knows neither."""
    build(tokenizer, token_dim=8).save_pretrained(tmp_path / "ours")
    encoder = load(st.MultiVectorEncoder, tmp_path / "ours", prompts={"query": "w9 "}, similarity_fn_name="meanmaxsim")
    encoder.save_pretrained(str(tmp_path / "told"), create_model_card=False)
    again = load(st.MultiVectorEncoder, tmp_path / "told")
    assert (again.prompts, again.similarity_fn_name) == (PROMPTS | {"query": "w9 "}, "meanmaxsim")
    served = load(st.SentenceTransformer, tmp_path / "told")
    assert (served.prompts["query"], served.similarity_fn_name) == ("w9 ", "cosine")
    assert LongEmbedModel.from_pretrained(tmp_path / "told").config.prompts["query"] == "w9 "
