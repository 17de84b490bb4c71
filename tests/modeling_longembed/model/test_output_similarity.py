"""`model.similarity` against sentence-transformers, for one vector a text and a vector a token."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import similarity

from modeling_longembed.output_token_codes_longembed import BITS, TokenCodec
from tests.modeling_longembed.memory_use import peak_bytes


def arrays(lengths, width=5, seed=0):
    numbers = np.random.default_rng(seed)
    return [numbers.standard_normal((length, width)).astype(np.float32) for length in lengths]


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_plain_vectors_compare_as_in_sentence_transformers(name, build_tiny_model):
    model = build_tiny_model(similarity_fn_name=name)
    expected_by = SentenceTransformer(modules=[torch.nn.Identity()], similarity_fn_name=name)
    queries, documents = arrays([3, 7])
    expected = expected_by.similarity(queries, documents)
    torch.testing.assert_close(model.similarity(queries, documents), expected)
    torch.testing.assert_close(model.similarity(list(queries), torch.from_numpy(documents)), expected)
    torch.testing.assert_close(model.similarity(queries[0], documents), expected[:1])
    assert model.similarity([], documents).shape == (0, 7)
    assert model.similarity([], []).shape == (0, 0)


@pytest.mark.promise("T1")
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("memory_mb", [256, 0.001])
def test_token_vectors_compare_as_in_sentence_transformers(mean, memory_mb, build_tiny_model):
    queries, documents = arrays([3, 1, 9]), arrays([4, 30, 1, 2], seed=1)
    expected = similarity.maxsim(queries, documents, length_normalize=mean)
    compare = build_tiny_model().similarity
    torch.testing.assert_close(compare(queries, documents, mean, memory_mb), expected)
    torch.testing.assert_close(
        compare([torch.from_numpy(queries[0])], documents, mean=mean, memory_mb=memory_mb), expected[:1]
    )
    halves = [document.astype(np.float16) for document in documents]
    torch.testing.assert_close(compare(queries, halves, mean, memory_mb), expected, atol=0.02, rtol=0.02)
    assert compare(queries, arrays([0, 2]), mean).count_nonzero(0).tolist() == [0, 3]
    assert compare(queries, []).shape == (3, 0)
    assert compare([], documents).shape == (0, 4)


@pytest.mark.promise("T5")
@pytest.mark.parametrize("kind", list(BITS))
@pytest.mark.parametrize("memory_mb", [256, 0.001])
def test_codes_compare_as_what_they_stand_for(kind, memory_mb, build_tiny_model):
    queries, documents, compare = arrays([3, 1]), arrays([40, 30, 0, 2], seed=1), build_tiny_model().similarity
    codec = TokenCodec(kind).fit(np.concatenate(documents))
    codes = [codec.encode(document) for document in documents]
    expected = compare(queries, [codec.decode(each) for each in codes])
    torch.testing.assert_close(compare(queries, codes, memory_mb=memory_mb, codec=codec), expected)
    as_arrays = [each.numpy() for each in codes]
    torch.testing.assert_close(compare(queries, as_arrays, memory_mb=memory_mb, codec=codec), expected)


@pytest.mark.promise("T5")
@pytest.mark.parametrize("kind", ["float32", "float16", "binary"])
def test_a_codec_without_a_sample_reads_what_another_has_encoded(kind, build_tiny_model):
    queries, documents, compare = arrays([3, 1], 13), arrays([4, 7], 13, seed=1), build_tiny_model().similarity
    used = TokenCodec(kind)
    codes = [used.encode(document) for document in documents]
    expected = compare(queries, [used.decode(each) for each in codes])
    torch.testing.assert_close(compare(queries, codes, codec=TokenCodec(kind)), expected)
    assert compare([], codes, codec=TokenCodec(kind)).shape == (0, 2)


@pytest.mark.promise("T7")
def test_codes_and_codecs_come_together(build_tiny_model):
    codec, documents = TokenCodec("int8").fit(arrays([9])[0]), arrays([4])
    with pytest.raises(ValueError, match="the documents are codes; give the TokenCodec"):
        build_tiny_model().similarity(arrays([3]), [codec.encode(documents[0])])
    with pytest.raises(ValueError, match="the documents are plain vectors"):
        build_tiny_model().similarity(arrays([3])[0], documents[0], codec=codec)
    with pytest.raises(ValueError, match="the queries are codes"):
        build_tiny_model().similarity([codec.encode(documents[0])], [codec.encode(documents[0])], codec=codec)
    with pytest.raises(ValueError, match="the queries are codes"):
        build_tiny_model().similarity([np.ones(5, np.int8)], documents[0])
    with pytest.raises(ValueError, match="this int8 codec has seen no sample"):
        build_tiny_model().similarity(arrays([3]), [codec.encode(documents[0])], codec=TokenCodec("int8"))
    with pytest.raises(ValueError, match=r"codes of shape .* have 2 bytes a vector"):
        build_tiny_model().similarity(arrays([3], 9), [codec.encode(documents[0])], codec=TokenCodec("binary"))
    with pytest.raises(ValueError, match="of 5 and 6 dimensions cannot be compared"):
        build_tiny_model().similarity(arrays([3], 6), [codec.encode(documents[0])], codec=codec)


def test_the_gradient_reaches_the_vectors(build_tiny_model):
    vectors = [torch.tensor(each).requires_grad_() for each in arrays([4, 3])]
    build_tiny_model().similarity(vectors[:1], vectors[1:]).sum().backward()
    products = vectors[0] @ vectors[1].T
    expected = torch.autograd.grad(products.amax(1).sum(), vectors)
    torch.testing.assert_close([each.grad for each in vectors], list(expected))


@pytest.mark.promise("T2")
def test_memory_is_bounded_for_many_documents_and_for_long_ones(build_tiny_model):
    compare, queries = build_tiny_model().similarity, [torch.randn(100, 32)]
    for documents in ([torch.randn(200, 32)] * 300, [torch.randn(60_000, 32)]):
        assert peak_bytes(lambda documents=documents: compare(queries, documents, memory_mb=1)) < 1.1 * 2**20
    for kind in BITS:
        codec = TokenCodec(kind).fit(torch.randn(100, 32))
        codes = [codec.encode(torch.randn(200, 32))] * 300
        peak = peak_bytes(lambda codec=codec, codes=codes: compare(queries, codes, memory_mb=1, codec=codec))
        assert peak < 1.1 * 2**20


@pytest.mark.promise("T7")
@pytest.mark.parametrize(
    ("queries", "documents", "sentence"),
    [
        (arrays([3]), arrays([4])[0], "queries are token vectors and documents plain vectors"),
        (arrays([3])[0], arrays([4]), "put the token vectors of one text into a list"),
        (arrays([3]), arrays([4], 6), "vectors of 5 and 6 dimensions cannot be compared"),
        (arrays([3])[0], arrays([4], 6)[0], "vectors of 5 and 6 dimensions cannot be compared"),
        (arrays([3]), [*arrays([4]), np.ones(5)], "documents hold arrays of 1 and 2 dimensions"),
        (np.ones((2, 3, 4, 5)), arrays([4]), "queries hold arrays of 4 dimensions"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_sentence(queries, documents, sentence, build_tiny_model):
    with pytest.raises(ValueError, match=sentence) as error:
        build_tiny_model().similarity(queries, documents)
    assert str(error.value).startswith("similarity: ")
    assert "\n" not in str(error.value)


def test_the_mean_over_tokens_is_refused_for_plain_vectors(build_tiny_model):
    with pytest.raises(ValueError, match="mean=True is for token vectors"):
        build_tiny_model().similarity(np.ones((2, 4)), np.ones((2, 4)), mean=True)
