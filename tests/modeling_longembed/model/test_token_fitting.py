"""A token head and query weights from documents alone: the optimum of PCA, and inverse document frequencies."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD

from modeling_longembed import LongEmbedModel
from tests.modeling_longembed.model.test_token_vectors import TEXTS, token_model, tokens_of
from tests.modeling_longembed.tiny_checkpoints import VOCAB_SIZE, random_text

DOCUMENTS = [random_text(38, seed=n) for n in range(20, 40)]


@pytest.mark.promise("T14")
@pytest.mark.parametrize("token_head", ["linear", "mlp"])
def test_the_head_keeps_as_much_of_the_states_as_the_best_projection(token_head):
    model = token_model()
    states = np.concatenate(tokens_of(model, DOCUMENTS, prompt_name="document")).astype(np.float64)
    values = np.linalg.svd(states, compute_uv=False) ** 2
    kept = model.fit_token_head(DOCUMENTS, token_dim=6, token_head=token_head, precision="float32")
    assert kept == pytest.approx(values[:6].sum() / values.sum(), rel=1e-5)
    with torch.no_grad():
        projected = model.token_output.head(torch.from_numpy(states).float()).double().numpy()
    assert (projected**2).sum() == pytest.approx(values[:6].sum(), rel=1e-5)
    theirs = TruncatedSVD(6, algorithm="arpack").fit(states)
    np.testing.assert_allclose(np.abs(projected), np.abs(theirs.transform(states)), atol=1e-4)
    unit = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    ours = np.concatenate(tokens_of(model, DOCUMENTS, prompt_name="document"))
    np.testing.assert_allclose(ours, unit, atol=1e-4)


@pytest.mark.promise("T14")
def test_the_first_dimensions_are_a_smaller_head():
    wide, narrow = token_model(), token_model()
    wide.fit_token_head(DOCUMENTS, token_dim=8)
    narrow.fit_token_head(DOCUMENTS, token_dim=3)
    for few, fewer in zip(tokens_of(wide, token_dim=3), tokens_of(narrow), strict=True):
        np.testing.assert_allclose(few, fewer, atol=1e-5)


@pytest.mark.promise("T14")
def test_a_head_of_all_dimensions_changes_no_inner_product():
    model = token_model()
    before = np.concatenate(tokens_of(model))
    model.fit_token_head(DOCUMENTS, token_dim=32)
    after = np.concatenate(tokens_of(model))
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-5)


@pytest.mark.promise("T15")
@pytest.mark.parametrize("kind", ["idf", "table", "state"])
@pytest.mark.parametrize("earlier", ["none", "state"])
def test_weights_are_inverse_document_frequencies_whatever_they_were(kind, earlier):
    model = token_model(token_dim=4, query_token_weights=earlier)
    with torch.no_grad():
        model.token_output.head.weight.uniform_()
    head = model.token_output.head.weight.clone()
    texts = ["w1 w2 w2", "w2 w3", "w2", "", "w2 w1"]
    assert model.fit_query_token_weights(iter(texts), kind) == 5
    frequencies = Counter(word for text in texts for word in set(text.split()))
    query = "w2 w1 w3 w9"
    lengths = np.linalg.norm(tokens_of(model, query, is_query=True), axis=1)
    expected = [math.log((5 + 1) / (frequencies[word] + 0.5)) for word in query.split()]
    np.testing.assert_allclose(lengths, expected, rtol=1e-5)
    assert not model.token_output.query_table[model.tokenizer.all_special_ids].any()
    assert torch.equal(model.token_output.head.weight, head)
    assert isinstance(model.token_output.query_table, torch.nn.Parameter) == (kind != "idf")


def test_both_are_fitted_and_saved(tmp_path):
    model = token_model()
    model.fit_query_token_weights(DOCUMENTS)
    model.fit_token_head(DOCUMENTS, token_dim=4)
    assert (model.token_output.query_table > 0).sum() == VOCAB_SIZE - 5
    model.save_pretrained(tmp_path)
    again, loading = LongEmbedModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    for ours, theirs in zip(tokens_of(again, is_query=True), tokens_of(model, is_query=True), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_more_documents_are_read_than_needed():
    read = []

    def endless():
        while True:
            read.append(1)
            yield DOCUMENTS[0]

    token_model().fit_token_head(endless(), token_dim=2, max_tokens=50, batch_tokens=40)
    assert len(read) < 200


def test_new_tokens_weigh_as_much_as_the_rarest_and_removed_ones_are_gone():
    model = token_model()
    model.fit_query_token_weights(DOCUMENTS, "table")
    with torch.no_grad():  # a trained table, in which the largest weight is that of a negative number
        model.token_output.query_table[9] = -9
    table = model.token_output.query_table.detach().clone()
    model.resize_token_embeddings(VOCAB_SIZE + 3)
    assert torch.equal(model.token_output.query_table, torch.cat([table, torch.full((3,), 9.0)]))
    model.resize_token_embeddings(VOCAB_SIZE - 2)
    assert torch.equal(model.token_output.query_table, table[:-2])
    assert tokens_of(model, TEXTS[0], is_query=True).shape == (5, 32)


@pytest.mark.parametrize(
    ("method", "documents", "choices", "message"),
    [
        ("fit_token_head", DOCUMENTS, {"token_dim": 0}, "token_dim=0; give at least 1"),
        ("fit_token_head", DOCUMENTS, {"token_dim": 33}, "token_dim=33; give"),
        ("fit_token_head", DOCUMENTS, {"token_head": "deep"}, "token_head"),
        ("fit_token_head", ["w1 w2"], {"token_dim": 8}, "fit_token_head: the documents have 2 tokens, and the head 8"),
        ("fit_token_head", "w1 w2", {}, "fit_token_head: takes several documents"),
        ("fit_query_token_weights", [], {}, "fit_query_token_weights: there are no documents"),
        ("fit_query_token_weights", DOCUMENTS, {"kind": "tf"}, "fit_query_token_weights: kind='tf'; choose from"),
        ("fit_query_token_weights", [1], {}, "encode: text 0 is a int, not a string"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(method, documents, choices, message):
    model = token_model()
    before, output = model.config.to_dict(), model.token_output
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(documents, **choices)
    assert model.config.to_dict() == before
    assert model.token_output is output
