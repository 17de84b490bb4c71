"""What is kept of token vectors: as small as the settings say, and the same whatever was on disk before."""

import numpy as np
import pytest
import torch

from common.encoders.kept_tokens import KeptTokens, truncated
from common.encoders.token_settings import TokenSettings
from common.encoders.token_store import TokenStore
from common.errors import UserError
from modeling_longembed.output_token_pooling_longembed import pool_tokens

TEXTS = [f"{'word ' * (3 + 7 * number)}{number}" for number in range(6)]


class Known:
    """An encoder of random unit vectors of 16 dimensions, one for each word, that counts what it reads."""

    identity, computed_by, dimension, prompts, batch_tokens, similarity_fn_name = "known", {}, 16, {}, 4, "maxsim"

    def __init__(self):
        self.read = []

    def check_dim(self, dim):
        if dim > 16:
            raise UserError("too many")

    def __call__(self, texts, prompt_type):
        self.read += texts
        return [self.vectors(text) for text in texts]

    def vectors(self, text):
        drawn = np.random.default_rng(len(text)).normal(size=(len(text.split()), 16)) + 0.3
        return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def kept(settings: str, folder, encoder=None) -> tuple[list[np.ndarray], list[int]]:
    """The vectors and the bytes of all texts, in their order."""
    tokens = KeptTokens(encoder or Known(), TokenSettings.parse(settings, "--model"), TokenStore(folder))
    keys = {i: key for window, keys in tokens.windows(TEXTS) for i, key in zip(window, keys, strict=True)}
    assert sorted(keys) == list(range(len(TEXTS)))
    return [tokens.vectors(keys[i]) for i in sorted(keys)], [tokens.size(keys[i]) for i in sorted(keys)]


def test_float32_is_what_the_encoder_gives(tmp_path):
    for found, text in zip(kept("precision=float32", tmp_path)[0], TEXTS, strict=True):
        np.testing.assert_array_equal(found, Known().vectors(text))


@pytest.mark.parametrize(("precision", "bytes_a_vector"), [("float16", 16), ("int8", 8), ("binary", 1)])
def test_settings_add_up(tmp_path, precision, bytes_a_vector):
    """8 dimensions, pooled by 2: the vectors are those of `pool_tokens`, up to the precision; so are the bytes."""
    found, sizes = kept(f"dim=8,pool=2,precision={precision}", tmp_path)
    for vectors, size, text in zip(found, sizes, TEXTS, strict=True):
        half = Known().vectors(text).astype(np.float16).astype(np.float32)
        exact = pool_tokens(torch.from_numpy(truncated(half, 8)), 2)[0].numpy()
        assert vectors.shape == exact.shape
        assert size == len(exact) * bytes_a_vector
        near = {"float16": 1e-3, "int8": 2e-2}.get(precision)
        if near:
            np.testing.assert_allclose(vectors, exact, atol=near)
        else:  # one bit says on which side of the mean a coordinate is, and no more
            cosines = (vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(exact, axis=1)
            assert cosines.mean() > 0.6


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
    for one, other in zip(derived[0], computed[0], strict=True):
        np.testing.assert_array_equal(one, other)
    kept(settings, tmp_path / "b", alone)
    assert sorted(alone.read) == sorted(TEXTS)


def test_codes_of_another_corpus_are_others(tmp_path, monkeypatch):
    """Bits are signs about the mean of the corpus, so that those of one are not read for another."""
    before = kept("precision=binary", tmp_path)[0][0]
    monkeypatch.setattr("tests.common.encoders.test_kept_tokens.TEXTS", [TEXTS[0], "one more text"])
    np.testing.assert_raises(
        AssertionError, np.testing.assert_array_equal, before, kept("precision=binary", tmp_path)[0][0]
    )


def test_too_many_dimensions_are_refused(tmp_path):
    with pytest.raises(UserError, match="too many"):
        kept("dim=17", tmp_path)
