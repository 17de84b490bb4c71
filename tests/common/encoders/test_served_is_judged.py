"""What is judged is what is served: the vectors of `SentenceTransformer(folder)`, whatever the folder says."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, StaticEmbedding
from transformers import AutoModel

from common.encoders.encoder import ChunkEncoder, Encoder
from common.encoders.model_folder import ModelFolder
from common.errors import UserError
from eval.models.mteb_models import EvaluatedModel
from tests.common.encoders.test_encoder import random_texts

TEXTS = [*random_texts(5, 100), "", "tea", "a lazy dog"]
PROMPTS = {"query": "quick: ", "passage": "lazy dog: ", "other": "kettles "}
# The folder whose transformer is taken, modules after it, settings of the model, and tokens that it reads.
FOLDERS = {
    "as we save it": ("tiny_longembed", [Pooling(32), Normalize()], {}, None),
    "another pooling, not normalized, a default prompt": (
        "tiny_longembed",
        [Pooling(32, "cls")],
        {"prompts": PROMPTS, "default_prompt_name": "other"},
        None,
    ),
    "two poolings, a dense layer after the norm, fewer dimensions": (
        "tiny_longembed",
        [Pooling(32, ("max", "mean")), Normalize(), Dense(64, 20, activation_function=torch.nn.Tanh())],
        {"truncate_dim": 8},
        None,
    ),
    "a passage prompt that is not pooled, fewer tokens": (
        "tiny_longembed",
        [Pooling(32, include_prompt=False), Normalize()],
        {"prompts": PROMPTS | {"document": "lazy dog: "}},
        16,
    ),
    "another architecture": (
        "tiny_sentence_transformer",
        [Pooling(32, "lasttoken", include_prompt=False), Normalize()],
        {"prompts": PROMPTS, "truncate_dim": 30},
        20,
    ),
}


def save(folder, source, modules, settings, max_seq_length=None):
    """Save the transformer of a folder with other modules behind it, by sentence-transformers."""
    transformer = SentenceTransformer(str(source), device="cpu", trust_remote_code=True)[0]
    model = SentenceTransformer(modules=[transformer, *modules], device="cpu", **settings)
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    model.save(str(folder), create_model_card=False)
    return ModelFolder.find(str(folder))


def served(folder: ModelFolder) -> dict[str | None, np.ndarray]:
    model = SentenceTransformer(str(folder.path), device="cpu")
    ways = {"query": model.encode_query, "document": model.encode_document, None: model.encode}
    return {prompt_type: encode(TEXTS) for prompt_type, encode in ways.items()}


def judged(encoder: Encoder, prompt_type) -> np.ndarray:
    return np.concatenate(encoder(TEXTS, prompt_type))


@pytest.mark.parametrize("name", FOLDERS)
def test_the_vectors_are_those_that_sentence_transformers_serve(request, tmp_path, name):
    source, *choices = FOLDERS[name]
    folder = save(tmp_path / "model", request.getfixturevalue(source), *choices)
    encoder, chunks = Encoder(folder, batch_tokens=150), ChunkEncoder(folder, batch_tokens=150)
    for prompt_type, expected in served(folder).items():
        np.testing.assert_allclose(judged(encoder, prompt_type), expected, atol=1e-5)
        assert encoder.dimension == expected.shape[1]
        # A text of one chunk has the direction that is served.
        rows = chunks(TEXTS, prompt_type)
        whole = [(matrix[0], vector) for matrix, vector in zip(rows, expected, strict=True) if len(matrix) == 1]
        assert len(whole) > 1
        for row, vector in whole:
            np.testing.assert_allclose(row / np.linalg.norm(row), vector / np.linalg.norm(vector), atol=1e-5)


def test_routes_and_static_vectors_are_judged_as_they_are_served_and_have_no_chunks(
    tiny_sentence_transformer, minilm_tokenizer, tmp_path
):
    static = StaticEmbedding(minilm_tokenizer.backend_tokenizer, embedding_dim=32)
    transformer = SentenceTransformer(str(tiny_sentence_transformer), device="cpu")
    router = Router.for_query_document([static], [transformer[0], Pooling(32)], default_route="document")
    for name, modules in (("static", [static]), ("router", [router, Normalize()])):
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / name), create_model_card=False)
        # These folders have their weights in the folders of their modules.
        folder = ModelFolder(tmp_path / name, f"local/{name}", "0")
        encoder = Encoder(folder)
        for prompt_type, expected in served(folder).items():
            np.testing.assert_allclose(judged(encoder, prompt_type), expected, atol=1e-5)
        with pytest.raises(UserError, match=f"{name} begins with a .*; evaluate it without chunks"):
            ChunkEncoder(folder)
    with pytest.raises(UserError, match="static reads texts to their end and cannot be limited to 16 tokens"):
        Encoder(ModelFolder(tmp_path / "static", "local/static", "0"), 16)


def test_vectors_that_are_not_normalized_are_the_models_before_the_last_module(tiny_longembed):
    encoder = Encoder(ModelFolder.find(str(tiny_longembed)), normalize=False)
    reference = AutoModel.from_pretrained(tiny_longembed).eval()
    expected = reference.encode(TEXTS, normalize=False, precision="float32")
    np.testing.assert_allclose(judged(encoder, "document"), expected, atol=1e-5)
    assert encoder.identity != Encoder(ModelFolder.find(str(tiny_longembed))).identity


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder", "MultiVectorEncoder"])
def test_another_kind_of_model_is_refused(tiny_longembed, tmp_path, kind):
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=f"is saved as a {kind}, which does not give one vector per text"):
        Encoder(ModelFolder(tmp_path, "local/other", "0"))


def test_scores_are_by_the_similarity_that_the_folder_names(tiny_longembed, tmp_path):
    folder = save(tmp_path / "model", tiny_longembed, [Pooling(32)], {"similarity_fn_name": "euclidean"})
    model = EvaluatedModel.parse(str(folder.path)).load(None, 1000, False)
    assert model.mteb_model_meta.similarity_fn_name.value == "euclidean"
    vectors = torch.rand(3, 32)
    torch.testing.assert_close(model.similarity(vectors, vectors), -torch.cdist(vectors, vectors))
