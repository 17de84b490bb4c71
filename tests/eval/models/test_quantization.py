"""Vectors in fewer bits: what is reconstructed, and that evaluations use it."""

from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import strategies as st
from mteb.types import PromptType
from sentence_transformers.util import quantize_embeddings

from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from eval.models.mteb_models import EvaluatedModel
from eval.models.quantization import quantize
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval

TEXTS = [f"A story about one {animal} in the wood. " * 8 for animal in ("fox", "whale", "frog", "heron", "badger")]
QUERIES = [f"Which story is about the {animal}?" for animal in ("fox", "whale", "frog", "heron", "badger")]


@hypothesis.given(count=st.integers(2, 20), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_int8_is_within_half_a_step(count, width, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    back = quantize(vectors, "int8")
    step = (vectors.max(0) - vectors.min(0)) / 255
    assert (np.abs(back - vectors) <= 0.501 * step + 1e-6).all()
    assert max(len(set(column)) for column in back.T) <= 256
    assert np.array_equal(quantize(vectors, "float32"), vectors)


def test_binary_ranks_by_the_bits_that_differ():
    """Cosines of signs are 1 - 2 h / d, with h of sentence-transformers' packed bits that differ."""
    vectors = np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)
    back = quantize(vectors, "binary")
    assert set(back.flat) == {-1.0, 1.0}
    packed = quantize_embeddings(vectors, "ubinary")
    for i in range(6):
        for j in range(6):
            different = np.unpackbits(packed[i] ^ packed[j]).sum()
            assert back[i] @ back[j] / 20 == pytest.approx(1 - 2 * different / 20)


def evaluate(tiny_longembed, tmp_path, **settings):
    arguments = RetrievalArguments(
        model=[str(tiny_longembed), "bm25"], output_dir=str(tmp_path / "r"), data_dir=str(tmp_path / "data"), **settings
    )
    return evaluate_retrieval(arguments)


def test_scores_of_fewer_bits_lie_beside_the_others(make_task, tiny_longembed, tmp_path, monkeypatch):
    """The documents alone are quantised, from vectors that are encoded once, and results of all bits are kept."""
    make_task("Animals", TEXTS, QUERIES)
    seen = []

    def recording(vectors, precision):
        seen.append((vectors.shape[0], precision))
        return quantize(vectors, precision)

    monkeypatch.setattr("eval.models.mteb_models.quantize", recording)
    names = [evaluate(tiny_longembed, tmp_path, vectors=bits)[0].model for bits in ("float32", "int8", "binary")]
    assert names == ["local/tiny-longembed", *(f"local/tiny-longembed (vectors={b})" for b in ("int8", "binary"))]
    assert seen == [(5, "int8"), (5, "binary")]
    assert evaluate(tiny_longembed, tmp_path, vectors="int8", precision="int8")[1].value == 100.0  # BM25 has no vectors


def test_chunk_mean_is_stored_by_its_direction(tiny_sentence_transformer, tmp_path):
    """Where no text is longer than a chunk it is the model itself, in 8 bits too: the number of tokens of a text, which
    its row is multiplied by, has no part in the steps.
    """
    texts = ["fox " * 3, "whale and frog " * 8, "heron", "a badger in the wood " * 5]
    loader = SimpleNamespace(dataset=Dataset.from_dict({"text": [text.strip() for text in texts]}))
    names = {str(tiny_sentence_transformer): "float32", f"chunk-mean:{tiny_sentence_transformer}:60": "int8"}
    models = [EvaluatedModel.parse(name).storing(bits) for name, bits in names.items()]
    cache = VectorCache(tmp_path / "v.sqlite")
    exact, found = (each.load(cache, 400, False).encode(loader, prompt_type=PromptType.document) for each in models)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    steps = (exact.max(0) - exact.min(0)) / 255
    assert (np.abs(found - exact) <= 0.51 * steps + 1e-5).all()


def test_what_cannot_be_stored_so_is_refused(make_task, tiny_longembed, tiny_sentence_transformer, tmp_path):
    make_task("Animals", TEXTS, QUERIES)
    with pytest.raises(UserError, match="--vectors int4 is not one of float32, int8, binary"):
        evaluate(tiny_longembed, tmp_path, vectors="int4")
    with pytest.raises(UserError, match="--precision int4 is not one of auto, float32, bfloat16, int8"):
        evaluate(tiny_longembed, tmp_path, precision="int4")
    with pytest.raises(UserError, match="chunk-max has a vector a chunk"):
        EvaluatedModel.parse(f"chunk-max:{tiny_sentence_transformer}:32").storing("int8")
