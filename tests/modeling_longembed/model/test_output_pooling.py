"""Weights of tokens before the mean: generalized max pooling, against scikit-learn's ridge regression."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from modeling_longembed.output_pooling_longembed import token_weights
from modeling_longembed.packing_longembed import PackedDocuments
from tests.modeling_longembed.tiny_checkpoints import tiny_tokenizer

GENERALIZED_MAX = {"token_weighting": "generalized_max"}


def packed(lengths: list[int]) -> PackedDocuments:
    return PackedDocuments(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths))


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    width=st.integers(2, 12),
    regularization=st.floats(0.01, 100),
    is_weighed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_token_counts_what_ridge_regression_to_one_leaves_of_it(lengths, width, regularization, is_weighed, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(sum(lengths), width, dtype=torch.float64, generator=generator) + 0.5
    rarity = 3 * torch.rand(sum(lengths), dtype=torch.float64, generator=generator) if is_weighed else None
    found = token_weights(states, packed(lengths), regularization, rarity).split(lengths)
    rarities = (torch.ones(sum(lengths), dtype=torch.float64) if rarity is None else rarity).split(lengths)
    for tokens, sample_weight, weights in zip(states.split(lengths), rarities, found, strict=True):
        if len(tokens):
            unit = (tokens / tokens.norm(dim=1, keepdim=True)).numpy()
            ridge = Ridge(alpha=regularization, fit_intercept=False)
            ridge.fit(unit, torch.ones(len(tokens)).numpy(), sample_weight.numpy())
            expected = sample_weight * torch.from_numpy(1 - ridge.predict(unit))
            torch.testing.assert_close(weights, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("counts", [[1], [7, 1, 3], [400, 2]])
def test_orthogonal_tokens_saturate_with_how_often_they_come(counts):
    states = torch.eye(4)[torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))] * 3
    weights = token_weights(states, packed([len(states)]), 5.0)
    expected = torch.tensor([5 / (count + 5) for count in counts for _ in range(count)])
    torch.testing.assert_close(weights, expected)


def test_short_documents_and_large_penalties_leave_the_mean(build_tiny_model):
    ids = torch.randint(1, 64, (1, 12))
    mean = build_tiny_model()(ids)
    weighed = build_tiny_model(**GENERALIZED_MAX, token_weighting_regularization=1e6)(ids)
    torch.testing.assert_close(weighed.pooler_output, mean.pooler_output, atol=1e-4, rtol=0)
    assert not torch.allclose(build_tiny_model(**GENERALIZED_MAX)(ids).pooler_output, mean.pooler_output, atol=1e-2)


def test_padding_and_neighbours_do_not_matter_nor_for_the_gradient(build_tiny_model):
    model, lengths = build_tiny_model(**GENERALIZED_MAX, token_weighting_regularization=2.0).double(), [5, 0, 50, 1]
    documents = [torch.randint(1, 64, (length,)) for length in lengths]
    mask = torch.arange(50) < torch.tensor(lengths)[:, None]
    padded = torch.zeros(4, 50, dtype=torch.long).masked_scatter(mask, torch.cat(documents))
    expected = torch.zeros(4, 32, dtype=torch.float64)
    for place in (0, 2, 3):
        expected[place] = model(documents[place][None]).pooler_output[0]
    direction = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((expected * direction).sum(), model.embeddings.norm.weight)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    for output in (
        model(padded, attention_mask=mask.long()),
        model(torch.cat(documents)[None], cu_seq_lens_q=cu_seqlens),
    ):
        torch.testing.assert_close(output.pooler_output, expected, atol=1e-10, rtol=0)
        (found,) = torch.autograd.grad((output.pooler_output * direction).sum(), model.embeddings.norm.weight)
        torch.testing.assert_close(found, gradient, atol=1e-8, rtol=0)


@pytest.mark.parametrize("length", [4, 9])  # by inner products of tokens, and of channels
def test_the_gradient_is_that_of_differences(length):
    states = torch.randn(length, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda states: token_weights(states, packed([3, length - 3]), 0.7), states)


def test_half_precision_is_weighed_in_full(build_tiny_model):
    states = (torch.randn(3000, 32) + 1).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        weights = token_weights(states, packed([3000]), 50.0)
    expected = token_weights(states.double(), packed([3000]), 50.0)
    torch.testing.assert_close(weights.double(), expected, atol=1e-3, rtol=0)


def test_weights_switched_on_at_load_are_those_a_model_is_made_with(build_tiny_model, tmp_path):
    ids, options = torch.randint(1, 64, (1, 40)), GENERALIZED_MAX | {"token_weighting_regularization": 2.0}
    plain = build_tiny_model()
    plain.save_pretrained(tmp_path)
    loaded = LongEmbedModel.from_pretrained(tmp_path, **options)
    found = loaded(ids).pooler_output
    torch.testing.assert_close(found, build_tiny_model(**options)(ids).pooler_output, atol=0, rtol=0)
    assert not torch.allclose(found, plain(ids).pooler_output, atol=1e-2)
    loaded.save_pretrained(tmp_path)
    assert LongEmbedModel.from_pretrained(tmp_path)(ids).pooler_output.equal(found)  # saved, it stays switched on


def test_a_head_for_masked_words_reads_the_states_as_they_are(build_tiny_model):
    ids = torch.randint(1, 64, (1, 40))
    weighed = build_tiny_model(LongEmbedForMaskedLM, **GENERALIZED_MAX, token_weighting_regularization=0.1)
    torch.testing.assert_close(weighed(ids).logits, build_tiny_model(LongEmbedForMaskedLM)(ids).logits)


RARE = {"query_token_weights": "idf", "token_weighting_power": 0.5}


def with_table(model):
    """Give a model a table of weights, some of which are 0."""
    table = torch.rand(model.config.vocab_size, generator=torch.Generator().manual_seed(0)) * 4
    table[::5] = 0
    model.token_output.set_table(table)
    return model


@pytest.mark.parametrize("power", [0.5, 1, 2.0])
def test_rare_words_count_in_the_mean_by_the_power_of_their_entry(build_tiny_model, power):
    ids = torch.randint(1, 64, (1, 40))
    model = with_table(build_tiny_model(**RARE | {"token_weighting_power": power}))
    found = model(ids).pooler_output[0]
    states = build_tiny_model()(ids).last_hidden_state[0].detach().double().numpy()
    weights = model.token_output.query_table[ids[0]].numpy().astype("float64") ** power
    expected = numpy.average(states, axis=0, weights=weights) * weights.mean()
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [RARE, RARE | GENERALIZED_MAX | {"token_weighting_regularization": 2.0}])
def test_rarity_is_that_of_each_token_in_a_batch_and_leaves_token_vectors(build_tiny_model, options):
    model = with_table(build_tiny_model(**options))
    model.tokenizer = tiny_tokenizer(0)
    documents = [torch.randint(5, 20, (length,)) for length in (30, 4)]
    alone = torch.cat([model(document[None]).pooler_output for document in documents])
    mask = torch.tensor([[1] * 30, [0] * 26 + [1] * 4])
    padded = torch.stack([documents[0], torch.cat([torch.full((26,), 7), documents[1]])])
    output = model(padded, attention_mask=mask, token_vectors="document")
    torch.testing.assert_close(output.pooler_output, alone, atol=1e-5, rtol=0)
    model.config.token_weighting_power = 0.0
    plain = model(padded, attention_mask=mask, token_vectors="document")
    assert output.token_vectors.equal(plain.token_vectors)
    assert not torch.allclose(plain.pooler_output, output.pooler_output, atol=1e-2)


def test_pooling_trains_the_encoder_and_not_the_table(build_tiny_model):
    """The root of the entry of a special token, 0, has an infinite derivative."""
    model = with_table(build_tiny_model(**RARE | {"query_token_weights": "table"}))
    model(torch.arange(64)[None]).pooler_output.sum().backward()
    assert model.token_output.query_table.grad is None
    assert model.embeddings.norm.weight.grad.isfinite().all()


def test_rarity_needs_ids(build_tiny_model):
    with pytest.raises(ValueError, match=r"token_weighting_power=0\.5 needs input_ids"):
        build_tiny_model(**RARE)(inputs_embeds=torch.zeros(1, 4, 32))
