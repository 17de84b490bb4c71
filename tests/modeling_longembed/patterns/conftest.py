"""Models for the tests of patterns."""

import pytest
import torch

from modeling_longembed import LongEmbedModel


@pytest.fixture(scope="session")
def build_memory(build_tiny_model):
    """`build(patterns, **fields)`: an encoder in float64 without dropout; biases are drawn too, not zero."""

    def build(patterns, cls=LongEmbedModel, kernel=None, **fields):
        fields = {"hidden_dropout_prob": 0.0, "max_position_embeddings": 256} | fields
        model = build_tiny_model(cls, kernel, attention_patterns=patterns, **fields).double()
        for name, parameter in model.named_parameters():
            if "bias" in name:  # u and v of Transformer-XL among them
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return build
