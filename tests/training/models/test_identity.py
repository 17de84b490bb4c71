"""Which models have one identity: those that compute the same, whatever version wrote their config."""

import pytest
import torch

from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import tiny_config
from training.models.identity import model_identity

LATER = (
    "token_dim",
    "token_head",
    "token_skip_punctuation",
    "query_token_weights",
    "token_min_weight",
    "token_weighting_power",
)


def model_of(**fields) -> LongEmbedModel:
    torch.manual_seed(0)
    return LongEmbedModel(tiny_config(**fields))


def test_fields_that_came_later_leave_the_identity_of_earlier_models(word_tokenizer, monkeypatch):
    """A config of an earlier version has none of them."""
    now, model = model_identity(model_of(), word_tokenizer), model_of()
    fields = model.config.to_dict()
    assert fields.keys() >= set(LATER)
    earlier = {name: value for name, value in fields.items() if name not in LATER}
    monkeypatch.setattr(type(model.config), "to_dict", lambda self: earlier)
    assert model_identity(model, word_tokenizer) == now


@pytest.mark.parametrize("field", [{"token_dim": 8}, {"token_skip_punctuation": True}, {"query_token_weights": "idf"}])
def test_a_model_with_token_vectors_of_its_own_is_another(word_tokenizer, field):
    assert model_identity(model_of(**field), word_tokenizer) != model_identity(model_of(), word_tokenizer)
