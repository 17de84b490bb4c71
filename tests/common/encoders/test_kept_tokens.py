"""What is kept of token vectors: as small as the settings say, and the same whatever was on disk before."""

import numpy as np
import pytest
import torch

from common.encoders import kept_tokens
from common.encoders.kept_tokens import KeptTokens, packed, query_vectors, truncated
from common.encoders.token_settings import TokenSettings
from common.encoders.token_store import TokenStore
from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from modeling_longembed.output_token_codes_longembed import TokenCodec
from modeling_longembed.output_token_pooling_longembed import pool_tokens

TEXTS = [f"{'word ' * (3 + 7 * number)}{number}" for number in range(6)]


class Known:
    """An encoder of random unit vectors of 16 dimensions, one for each word, that counts what it reads."""

    identity, computed_by, dimension, prompts, batch_tokens, similarity_fn_name = "known", {}, 16, {}, 4, "maxsim"

    def __init__(self, is_ordered=False):
        self.read, self.is_ordered = [], is_ordered

    def check_dim(self, dim):
        if dim > 16:
            raise UserError("too many")

    def __call__(self, texts, prompt_type):
        self.read += texts
        return [self.vectors(text) for text in texts]

    def vectors(self, text):
        drawn = np.random.default_rng(len(text)).normal(size=(len(text.split()), 16)) + 0.3
        return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def kept(settings: str, folder, encoder=None, texts=TEXTS) -> tuple[list[np.ndarray], list[int]]:
    """The vectors and the bytes of all texts, in their order."""
    tokens = KeptTokens(encoder or Known(), TokenSettings.parse(settings, "--model"), TokenStore(folder))
    keys = {i: key for window, keys in tokens.windows(texts) for i, key in zip(window, keys, strict=True)}
    assert sorted(keys) == list(range(len(texts)))
    found = [tokens.vectors(keys[i]) for i in sorted(keys)]
    sizes = [tokens.store.get(keys[i])["codes"].nbytes for i in sorted(keys)]
    assert sizes == [len(vectors) * tokens.bytes_per_vector for vectors in found]
    return found, sizes


def same(one: tuple[list[np.ndarray], list[int]], other: tuple[list[np.ndarray], list[int]]) -> bool:
    """Whether the vectors are the same, bit by bit."""
    return all(np.array_equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def test_float32_is_what_the_encoder_gives(tmp_path):
    for found, text in zip(kept("precision=float32", tmp_path)[0], TEXTS, strict=True):
        np.testing.assert_array_equal(found, Known().vectors(text))


@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize(
    ("precision", "bytes_a_vector"),
    [("float16", 16), ("int8", 8), ("binary", 1), ("residual1", 3), ("residual2", 4)],
)
def test_settings_add_up(tmp_path, precision, bytes_a_vector, is_ordered):
    """8 dimensions, pooled by 2: the codes are those of a codec that is fitted to the pooled vectors of all texts."""
    found, sizes = kept(f"dim=8,pool=2,precision={precision}", tmp_path, Known(is_ordered))
    half = [Known().vectors(text).astype(np.float16).astype(np.float32) for text in TEXTS]
    exact = [pool_tokens(torch.from_numpy(truncated(vectors, 8)), 2)[0] for vectors in half]
    codec = TokenCodec(precision, rotate=is_ordered and precision == "binary").fit(torch.cat(exact))
    codec.tables = {name: table.contiguous() for name, table in codec.tables.items()}  # as they are in a file
    for vectors, size, pooled in zip(found, sizes, exact, strict=True):
        np.testing.assert_array_equal(vectors, codec.decode(codec.encode(pooled)).numpy())
        assert size == len(pooled) * bytes_a_vector


def test_a_sample_has_at_most_so_many_vectors_of_a_document(tmp_path, monkeypatch):
    """Of 4, 11, 18, 25, 32 and 39 tokens, at most 30 each: of the last two every second one."""
    monkeypatch.setattr(kept_tokens, "SAMPLE_VECTORS", 30)
    sizes, fit = [], TokenCodec.fit
    monkeypatch.setattr(TokenCodec, "fit", lambda self, sample: sizes.append(len(sample)) or fit(self, sample))
    kept("precision=int8", tmp_path)
    assert sizes == [4 + 11 + 18 + 25 + 16 + 20]


@pytest.mark.parametrize("settings", ["dim=8", "pool=2", "precision=int8", "pool=2,precision=binary"])
def test_what_was_there_before_changes_nothing(tmp_path, settings):
    """Derived from the vectors of all tokens, or computed alone: the same bits, and no text is read twice."""
    first = Known()
    kept("", tmp_path / "a", first)
    assert sorted(first.read) == sorted(TEXTS)
    first.read.clear()
    derived = kept(settings, tmp_path / "a", first)
    assert not first.read
    alone = Known()
    computed = kept(settings, tmp_path / "b", alone)
    assert sorted(alone.read) == sorted(TEXTS)
    assert same(derived, computed)
    assert same(kept(settings, tmp_path / "b", alone), computed)
    assert sorted(alone.read) == sorted(TEXTS)


@pytest.mark.parametrize("precision", ["int8", "binary", "residual1", "residual2"])
@pytest.mark.parametrize("texts", [[TEXTS[0], "one more text"], TEXTS[::-1], [*TEXTS[1:], TEXTS[0]]])
def test_codes_are_those_of_this_corpus_in_this_order(tmp_path, precision, texts):
    """What a codec learns depends on the corpus, and centroids on its order: those of another are not read with it."""
    kept(f"precision={precision}", tmp_path / "a")
    found = kept(f"precision={precision}", tmp_path / "a", texts=texts)
    assert same(found, kept(f"precision={precision}", tmp_path / "b", texts=texts))
    assert not same(([found[0][0]], []), kept("", tmp_path / "a", texts=texts[:1]))


def test_codes_are_read_with_what_they_were_made_with(tmp_path, monkeypatch):
    """Fitting again may end elsewhere, on another machine or with more threads."""
    before = kept("precision=residual2", tmp_path)
    monkeypatch.setattr(TokenCodec, "fit", None)
    assert same(kept("precision=residual2", tmp_path), before)


def test_documents_without_tokens_fit_nothing(tmp_path):
    for settings, left in (("", 2), ("pool=2", 1), ("precision=float32", 2)):
        assert [v.shape for v in kept(settings, tmp_path, texts=["", "a text"])[0]] == [(0, 16), (left, 16)]
    assert kept("precision=residual1", tmp_path, texts=["", "a text"])[0][0].shape == (0, 16)
    with pytest.raises(UserError, match=r"precision=int8 is fitted to 1 of the documents, and none .* use float16"):
        kept("precision=int8", tmp_path, texts=[""])


def test_a_query_without_tokens_is_the_same_from_the_cache(tmp_path):
    cache = VectorCache(tmp_path / "v.sqlite")
    for settings in (TokenSettings(), TokenSettings(dim=3, weights=False)):
        for _ in range(2):  # computed, and read from the cache
            vectors = query_vectors(["two words", "", "a"], Known(), settings, cache)
            assert [v.shape for v in vectors] == [(n, settings.dim or 16) for n in (2, 0, 1)]
            assert packed(vectors)[1].tolist() == [0, 2, 2, 3]


def test_too_many_dimensions_are_refused(tmp_path):
    with pytest.raises(UserError, match="too many"):
        kept("dim=17", tmp_path)
