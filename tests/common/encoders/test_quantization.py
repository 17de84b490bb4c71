"""Weights in 8 bits: which layers have them, how close they are, and what they change in the vectors of a model."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as Int8Linear

from common.encoders.encoder import Encoder
from common.encoders.model_folder import ModelFolder
from common.encoders.quantization import int8_weights
from modeling_longembed.attention_longembed import ResidualLinear

pytestmark = pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="torch has no int8 kernels here")


def test_a_weight_is_within_half_a_step_of_its_row():
    """256 steps from the row's largest value down to its negative; of subclasses of Linear too, bias untouched."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(40, 8), nn.Sequential(ResidualLinear(8, 30, bias=False)), nn.LayerNorm(30))
    with torch.no_grad():
        layers[0].weight.mul_(torch.logspace(-3, 1, 8)[:, None])  # rows of very different sizes
    weights, bias = [layers[0].weight.clone(), layers[1][0].weight.clone()], layers[0].bias.clone()
    inputs = torch.randn(5, 40)
    before = layers(inputs)
    assert int8_weights(layers) is layers
    assert [type(layer) for layer in (layers[0], layers[1][0], layers[2])] == [Int8Linear, Int8Linear, nn.LayerNorm]
    for layer, weight in zip((layers[0], layers[1][0]), weights, strict=True):
        error = (layer.weight().dequantize() - weight).abs()
        assert (error <= weight.abs().amax(1, keepdim=True) / 127.5 * 0.501).all()
        assert error.max() > 0
    assert torch.equal(layers[0].bias(), bias)
    assert nn.functional.cosine_similarity(layers(inputs), before).min() > 0.99


@pytest.mark.parametrize("name", ["tiny_sentence_transformer", "tiny_longembed"])
def test_an_encoder_of_8_bits_says_nearly_the_same(request, name):
    """A model of sentence-transformers and one of ours; what is cached of one precision is not taken for another."""
    folder = ModelFolder.find(str(request.getfixturevalue(name)))
    texts = ["Rivers carry stones to the sea.", "a winter garden " * 12, "night"]
    plain, small = Encoder(folder), Encoder(folder, precision="int8")
    vectors = [np.concatenate(encoder(texts, None)) for encoder in (plain, small)]
    cosines = (vectors[0] * vectors[1]).sum(1) / np.prod([np.linalg.norm(rows, axis=1) for rows in vectors], axis=0)
    assert (cosines > 0.98).all()
    assert (cosines < 1 - 1e-7).all()
    assert plain.identity != small.identity
    assert not [module for module in small.model.modules() if isinstance(module, nn.Linear)]
