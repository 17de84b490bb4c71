"""Codes of token vectors against sentence-transformers' quantisation, NumPy, and the closed form of the error."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from sentence_transformers.util import quantize_embeddings
from sentence_transformers.util.quantization import _dequantize_embeddings
from torch.nn.functional import normalize

from modeling_longembed.output_token_codes_longembed import BITS, TokenCodec, pack_bits, unpack
from tests.modeling_longembed.memory_use import peak_bytes


def unit_vectors(n: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 2, width)
    return normalize(torch.randn(n, width, generator=generator) * spread + 0.4, dim=-1)


@pytest.mark.promise("T5")
@settings(max_examples=settings.default.max_examples // 2)
@given(n=st.integers(1, 30), width=st.integers(1, 40), seed=st.integers(0, 999))
def test_int8_and_bits_are_those_of_sentence_transformers(n, width, seed):
    sample, vectors = unit_vectors(50, width), unit_vectors(n, width, seed + 1)
    ranges = np.stack([sample.numpy().min(0), sample.numpy().max(0)])
    codec = TokenCodec("int8").fit(sample)
    codes = codec.encode(vectors)
    assert np.array_equal(codes.numpy(), quantize_embeddings(vectors, "int8", ranges=ranges))
    half_a_step = (ranges[1] - ranges[0]) / 510
    found = codec.decode(codes).numpy() - half_a_step
    np.testing.assert_allclose(found, _dequantize_embeddings(codes.numpy(), "int8", ranges), atol=1e-6)
    bits = TokenCodec("binary").encode(vectors)
    assert np.array_equal(bits.numpy(), quantize_embeddings(vectors, "ubinary"))


@pytest.mark.promise("T5")
@settings(max_examples=settings.default.max_examples // 2)
@given(n=st.integers(0, 9), width=st.integers(0, 40), seed=st.integers(0, 999))
def test_bits_are_packed_as_in_numpy(n, width, seed):
    bits = torch.rand(n, width, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack_bits(bits)
    assert np.array_equal(packed.numpy(), np.packbits(bits.numpy(), axis=1))
    assert torch.equal(unpack(packed, torch.tensor([False, True]))[:, :width], bits)


@pytest.mark.promise("T5")
def test_an_int8_number_is_at_most_half_a_step_off():
    vectors = unit_vectors(300)
    vectors[:, 3] = 0.5  # the same in all of them
    codec = TokenCodec("int8").fit(vectors)
    step = (vectors.amax(0) - vectors.amin(0)) / 255
    error = (codec.decode(codec.encode(vectors)) - vectors).abs()
    assert (error <= 0.5 * step + 1e-6).all()


@pytest.mark.promise("T5")
@pytest.mark.parametrize("rotate", [False, True])
def test_the_error_of_a_bit_is_what_the_mean_size_leaves_of_the_square(rotate):
    vectors = unit_vectors(2000, 24)
    codec = TokenCodec("binary", rotate=rotate).fit(vectors)
    error = (codec.decode(codec.encode(vectors)) - vectors).square().sum(1).mean()
    centred = vectors - vectors.mean(0)
    if rotate:
        rotation = codec.state()["rotation"]
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(24), atol=1e-5, rtol=0)
        centred = centred @ rotation
    torch.testing.assert_close(error, (centred.square().mean(0) - centred.abs().mean(0).square()).sum())


def test_rotation_helps_where_few_dimensions_hold_most():
    vectors = normalize(torch.randn(2000, 32) * torch.linspace(2, 0, 32) ** 3, dim=-1)
    errors = []
    for rotate in (False, True):
        codec = TokenCodec("binary", rotate=rotate).fit(vectors)
        found = codec.decode(codec.encode(vectors))
        errors.append((found @ vectors[:100].T - vectors @ vectors[:100].T).square().mean())
    assert errors[1] < errors[0]


@pytest.mark.promise("T5")
def test_the_number_of_centroids_is_the_power_of_two_below_four_roots_of_the_sample():
    for n, expected in ((1, 1), (16, 16), (100, 32), (1023, 64), (1024, 128), (4096, 256)):
        assert len(TokenCodec("residual1").fit(unit_vectors(n, 4)).state()["centroids"]) == expected


def test_the_more_bytes_the_smaller_the_error():
    vectors, errors = unit_vectors(2000), {}
    for kind in BITS:
        codec = TokenCodec(kind).fit(vectors)
        errors[kind] = (codec.decode(codec.encode(vectors)) - vectors).square().mean().item()
    order = ["binary", "residual1", "residual2", "int8", "float16", "float32"]
    assert sorted(order, key=lambda kind: -errors[kind]) == order
    assert errors["float32"] == 0
    more = TokenCodec("residual1", centroids=512).fit(vectors)
    assert (more.decode(more.encode(vectors)) - vectors).square().mean() < errors["residual1"]


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("kind", BITS)
def test_prepared_queries_have_the_products_with_numbers_that_queries_have_with_vectors(kind, rotate):
    vectors, queries = unit_vectors(200, 20), unit_vectors(7, 20, 1)
    for codec in (TokenCodec(kind, rotate=rotate).fit(vectors), TokenCodec(kind)):
        if not codec.is_ready:
            continue
        codes = codec.encode(vectors)
        prepared, constants = codec.prepare(queries)
        found = prepared @ codec.numbers(codes).T + constants[:, None]
        torch.testing.assert_close(found, queries @ codec.decode(codes).T, rtol=0, atol=1e-5)


@pytest.mark.promise("T5")
@pytest.mark.parametrize("kind", list(BITS))
@pytest.mark.parametrize("width", [16, 13])
def test_codes_take_the_stated_bytes_and_come_back_from_a_file(kind, width):
    vectors = unit_vectors(200, width)
    codec = TokenCodec(kind, rotate=kind == "binary", centroids=20).fit(vectors)
    codes = codec.encode(vectors)
    assert codes.nbytes == len(vectors) * codec.bytes_per_vector
    state = codec.state()
    tensors = load(save({name: each.contiguous() for name, each in state.items() if torch.is_tensor(each)}))
    again = TokenCodec.from_state({"kind": state["kind"], "dim": state["dim"], **tensors})
    assert again.bytes_per_vector == codec.bytes_per_vector
    assert torch.equal(again.encode(vectors), codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))
    assert codec.decode(codec.encode(vectors[:0])).shape == (0, width)
    refitted = TokenCodec(kind, rotate=kind == "binary", centroids=20).fit(vectors)
    assert torch.equal(refitted.encode(vectors), codes)


@pytest.mark.promise("T5")
@pytest.mark.parametrize("bits", [1, 2])
def test_the_values_of_a_difference_are_equally_frequent_and_the_centroid_is_the_nearest(bits):
    vectors = unit_vectors(1500)
    codec = TokenCodec(f"residual{bits}", centroids=30).fit(vectors)
    codes, tables = codec.encode(vectors), codec.state()
    nearest = torch.cdist(vectors, tables["centroids"]).argmin(1)
    assert torch.equal(codes[:, 0].long() + 256 * codes[:, 1].long(), nearest)
    difference = (vectors - tables["centroids"][nearest]).numpy().ravel()
    np.testing.assert_allclose(tables["edges"], np.quantile(difference, np.arange(1, 2**bits) / 2**bits), atol=1e-3)
    places = np.searchsorted(tables["edges"].numpy(), difference)
    means = np.bincount(places, difference) / np.bincount(places)
    np.testing.assert_allclose(tables["values"], means, atol=1e-5)
    expected = tables["centroids"][nearest] + torch.from_numpy(means[places]).view(vectors.shape).float()
    torch.testing.assert_close(codec.decode(codes), normalize(expected, dim=-1))


@pytest.mark.promise("T7")
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: TokenCodec("int4"), "kind='int4'; choose from 'float32'"),
        (lambda: TokenCodec("residual1", centroids=70000), "centroids=70000; give a number from 1"),
        (lambda: TokenCodec("int8").encode(unit_vectors(2)), "int8 needs a sample of token vectors first; call fit"),
        (lambda: TokenCodec("int8").fit(torch.zeros(0, 4)), "a sample of shape \\(0, 4\\)"),
        (lambda: TokenCodec("int8").fit(unit_vectors(9)).encode(unit_vectors(2, 5)), "this codec takes \\(n, 16\\)"),
        (lambda: TokenCodec("int8", dim=16).encode(unit_vectors(2)), "int8 needs a sample of token vectors first"),
        (lambda: TokenCodec("residual2").fit(unit_vectors(1, 3)), "a sample of 3 numbers, but a difference has 4"),
        (lambda: TokenCodec("binary", dim=9).decode(torch.zeros(4, 1).byte()), "shape \\(4, 1\\); binary codes of 9"),
        (lambda: TokenCodec("binary").encode(torch.ones(16)), "shape \\(16,\\); this codec takes \\(n, k\\)"),
        (lambda: TokenCodec("float16").bytes_per_vector, "no size yet; call fit or encode"),
    ],
)
def test_what_a_codec_cannot_do_is_refused_in_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.promise("T7")
def test_a_refused_call_changes_nothing():
    codec = TokenCodec("binary")
    with pytest.raises(ValueError, match="shape"):
        codec.encode(torch.ones(16))
    assert codec.encode(unit_vectors(3, 5)).shape == (3, 1)


@pytest.mark.parametrize("kind", list(BITS))
def test_decoding_takes_little_more_memory_than_twice_the_vectors(kind):
    vectors = unit_vectors(20_000, 32)
    codec = TokenCodec(kind, rotate=True, centroids=64).fit(vectors[:2000])
    codes = codec.encode(vectors)
    assert peak_bytes(lambda: codec.decode(codes)) < 2.4 * vectors.nbytes
