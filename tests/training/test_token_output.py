"""A head and query weights for a folder: what the model's own methods give, from documents drawn at random."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import random_documents, tiny_config, word_tokenizer, write_jsonl
from training import token_output


@pytest.fixture
def fit(tmp_path):
    """Write a model and documents in two files; return what fits them with options."""
    model = LongEmbedModel(tiny_config(initializer_range=0.5))
    model.tokenizer = word_tokenizer()
    model.save_pretrained(tmp_path / "model")
    rows = random_documents(24)
    files = [write_jsonl(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((rows[:10], rows[10:]))]

    def run(options: str) -> tuple[LongEmbedModel, LongEmbedModel, list[str]]:
        data = " ".join(map(str, files))
        given = f"--model_name_or_path {tmp_path / 'model'} --train_data {data} --output_dir {tmp_path / 'out'} "
        token_output.main((given + options).split())
        fitted = LongEmbedModel.from_pretrained(tmp_path / "out" / "final")
        return LongEmbedModel.from_pretrained(tmp_path / "model"), fitted, [row["text"] for row in rows]

    return run


def queries_of(model, texts):
    return model.encode(texts, output_value="tokens", is_query=True)


def test_the_folder_has_the_head_and_the_weights_of_all_documents(fit, capsys):
    model, fitted, texts = fit("--token_dim 8 --query_token_weights idf")
    np.testing.assert_array_equal(fitted.encode(texts), model.encode(texts))
    assert model.fit_query_token_weights(texts) == 24
    assert fitted.token_output.query_table.tolist() == model.token_output.query_table.tolist()
    kept = model.fit_token_head(texts, 8)  # from all of them too, so that their order does not matter
    for ours, theirs in zip(queries_of(fitted, texts), queries_of(model, texts), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    printed = capsys.readouterr().out
    assert "weights of query tokens: idf, from 24 documents" in printed
    assert f"keeps {kept:.1%} of the token states" in printed


def test_documents_are_drawn_by_the_seed(fit):
    axes = [fit(f"--token_dim 4 --max_tokens 40 --seed {seed}")[1].token_output.head.weight for seed in (0, 0, 1)]
    assert axes[0].equal(axes[1])
    assert not axes[0].allclose(axes[2], atol=1e-3)


def test_two_layers_and_a_gate_start_where_one_layer_and_the_table_do(fit):
    _, plain, texts = fit("--token_dim 8 --query_token_weights idf")
    _, rich, _ = fit("--token_dim 8 --token_head mlp --query_token_weights state --token_skip_punctuation")
    assert rich.config.token_skip_punctuation
    for ours, theirs in zip(queries_of(rich, texts), queries_of(plain, texts), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_frequent_tokens_of_documents_have_no_vector(fit):
    _, whole, texts = fit("--query_token_weights idf")
    table = whole.token_output.query_table
    context = whole.config.max_position_embeddings
    rows = [table[row] for row in whole.tokenizer(texts, truncation=True, max_length=context)["input_ids"]]
    limit = round(torch.cat(rows).median().item(), 4)
    _, fitted, _ = fit(f"--token_dim 8 --query_token_weights idf --token_min_weight {limit}")
    kept = [int((weights >= limit).sum()) for weights in rows]
    assert 0 < sum(kept) < sum(map(len, rows)) - 2 * len(rows)
    assert [len(vectors) for vectors in fitted.encode(texts, output_value="tokens")] == kept
    whole.config.token_min_weight = limit
    whole.fit_token_head(texts, 8)  # to the tokens that have a vector
    np.testing.assert_allclose(*(m.token_output.head.weight.detach() for m in (whole, fitted)), atol=1e-3)


def test_the_vector_of_a_text_weighs_its_tokens_by_a_power(fit):
    _, plain, texts = fit("--query_token_weights idf")
    _, fitted, _ = fit("--query_token_weights idf --token_weighting_power 0.5")
    assert fitted.config.token_weighting_power == 0.5
    plain.config.token_weighting_power = 0.5
    np.testing.assert_array_equal(fitted.encode(texts), plain.encode(texts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "nothing to do: give --token_dim"),
        ("--token_head mlp --query_token_weights idf", "--token_head mlp: needs --token_dim"),
        ("--token_dim 33", "--token_dim 33: must be at least 1 and at most 32"),
        ("--token_dim 0", "--token_dim 0: must be at least 1"),
        ("--token_dim 8 --max_tokens 0", "max_tokens.* must be at least 1"),
        ("--token_min_weight 1", "--token_min_weight 1.0: this model has no weights of query tokens"),
        ("--token_weighting_power 1", "--token_weighting_power 1.0: this model has no weights of query tokens"),
        ("--query_token_weights tf", "--query_token_weights"),
        ("--token_dim 8 --text_column body", "body"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(fit, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        fit(options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
