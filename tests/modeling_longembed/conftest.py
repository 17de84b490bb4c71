"""A tiny random encoder whose weights are so large that positions and masks show in what it returns."""

import pytest
import torch

from modeling_longembed import LongEmbedConfig, LongEmbedModel
from tests.modeling_longembed.tiny_checkpoints import leave_out_code

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
}


@pytest.fixture
def without_code(monkeypatch):
    """Folders that are saved have no copy of the package."""
    leave_out_code(monkeypatch)


@pytest.fixture(scope="session")
def build_tiny_model():
    """`build(cls, attn_implementation, **config_fields)`: the same weights whenever their shapes are the same."""

    def build(cls=LongEmbedModel, attn_implementation=None, **fields):
        torch.manual_seed(0)
        config = LongEmbedConfig(**SIZES | fields)
        return cls._from_config(config, attn_implementation=attn_implementation).eval()

    return build
