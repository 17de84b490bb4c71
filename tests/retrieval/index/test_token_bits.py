"""Codes of one bit a dimension: blocks hold what was put in, and MaxSim over them is that of the decoded vectors."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_longembed.output_token_codes_longembed import TokenCodec
from retrieval.documents.document import Document
from retrieval.index import token_bits
from retrieval.index.index import Index
from retrieval.index.shards import ShardContent
from retrieval.index.token_bits import TokenBits
from retrieval.index.tokens import TokenScores
from tests.retrieval.conftest import make_documents


@given(st.integers(0, 70), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_blocks_hold_the_codes(count, width, seed):
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, (count, width), dtype=np.uint8)
    bits = TokenBits.pack(codes)
    assert bits.blocks.shape == (-(-count // 32), 32 * width)
    np.testing.assert_array_equal(bits.codes, codes)
    if count:
        rows = random.integers(0, count, 5)
        np.testing.assert_array_equal(bits.take(rows), codes[rows])


@pytest.mark.promise("R2")
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("width", [8, 20, 64])
def test_maxsim_of_bits_is_that_of_the_decoded_vectors(monkeypatch, width, fitted):
    monkeypatch.setattr(token_bits, "VECTORS_AT_A_TIME", 100)
    monkeypatch.setattr(token_bits, "PAIRS_AT_A_TIME", 20)
    random = torch.Generator().manual_seed(width)
    codec = TokenCodec("binary", rotate=True)
    vectors = [torch.randn(length, width, generator=random) for length in (40, 0, 1, 31, 32, 33, 0, 2, 3, 150, 5)]
    if fitted:
        codec.fit(torch.cat(vectors) + 0.3)
    codes = [codec.encode(rows) for rows in vectors]
    query = torch.randn(6, width, generator=random) * torch.tensor([1.0, 0.0, 3.0, 0.01, 1.0, 1.0])[:, None]
    expected = torch.zeros(len(codes))
    for number, of_document in enumerate(codes):
        for token in query:
            if len(of_document):
                expected[number] += max(token @ vector for vector in codec.decode(of_document))
    # Each of two products is rounded by at most half a step for each 4 bits, of which `nearest_tokens` says more.
    numbers = codec.prepare(query)[0]
    padded = torch.nn.functional.pad(numbers, (0, -width % 8)).abs().view(len(query), -1, 4).sum(2)
    bound = float(padded.amax(1).sum()) * 2 / 255 * padded.shape[1]
    scores = TokenScores(codec, query)
    for documents in ([TokenBits.pack(rows.numpy()) for rows in codes], [rows.numpy() for rows in codes]):
        found = scores.of_documents(documents)
        assert (found <= expected.numpy() + 1e-4).all()
        assert (found >= expected.numpy() - bound).all()
        np.testing.assert_allclose(found, expected, atol=1e-4)  # of these, all were found
    assert not TokenScores(codec, torch.zeros(0, width)).of_documents(documents).any()
    assert scores.of_documents([]).shape == (0,)


@pytest.mark.promise("I3")
@pytest.mark.parametrize("kind", ["binary", "int8", "float16"])
def test_maxsim_of_passages_is_that_of_the_decoded_vectors(kind):
    random = torch.Generator().manual_seed(0)
    vectors, query = torch.randn(50, 20, generator=random), torch.randn(3, 20, generator=random)
    codec = TokenCodec(kind).fit(vectors)
    codes = codec.encode(vectors)
    passages = [(0, 10), (4, 14), (50, 50), (14, 15), (0, 0), (20, 50), (0, 50), (49, 50)]  # in no order, overlapping
    decoded = codec.decode(codes)
    expected = [
        sum(max(token @ vector for vector in decoded[start:end]) for token in query) if end > start else -torch.inf
        for start, end in passages
    ]
    found = TokenScores(codec, query).of_passages(codes.numpy(), np.array(passages))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert TokenScores(codec, query).of_passages(codes.numpy()[:0], np.zeros((2, 2), int)).tolist() == [-np.inf] * 2


@pytest.mark.promise("I5")
def test_an_index_whose_codes_are_not_in_blocks_is_read_and_added_to(tmp_path, tiny_model, monkeypatch):
    documents = make_documents(6)
    options = {"segments": "late:8", "token_precision": "binary"}
    new = Index.build(tmp_path / "new", documents, tiny_model, **options)
    write = ShardContent.write
    monkeypatch.setattr(ShardContent, "write", lambda content, path, words, bits: write(content, path, words))
    old = Index.build(tmp_path / "old", documents, tiny_model, **options)
    monkeypatch.undo()
    manifest = tmp_path / "old" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 1}))
    old = Index.open(tmp_path / "old", tiny_model)
    assert "codes" in old.snapshot.shards[0].arrays
    more = [Document("more", "river stone house")]
    for change in (lambda index: None, lambda index: index.add(more), lambda index: index.compact()):
        change(old)
        change(new)
        for query in ("river stone", "winter house"):
            assert old.search(query, 9) == new.search(query, 9)
    assert "code_blocks" in old.snapshot.shards[0].arrays
