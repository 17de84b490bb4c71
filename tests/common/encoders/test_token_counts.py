"""Encoders count tokens to form batches, and do not tokenise a long text to its end for that."""

import pytest

from common.encoders import encoder, multi_vector_encoder
from common.encoders.encoder import Encoder
from common.encoders.model_folder import ModelFolder
from common.encoders.multi_vector_encoder import MultiVectorTokenEncoder
from modeling_longembed.encoding_longembed import budget_batches
from tests.common.encoders.test_encoder import WORDS

TEXTS = ["", "fox", " ".join(WORDS * 500), *(" ".join(WORDS[:count]) for count in range(9, 16))]


def one_vector(folder, tmp_path):
    return Encoder(ModelFolder.find(str(folder)), 16), encoder


def a_vector_a_token(folder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.0")
    from sentence_transformers.base.modules import Dense, Normalize, Transformer

    modules = [
        Transformer(str(folder)),
        Dense(32, 8, bias=False, activation_function=None, module_input_name="token_embeddings"),
        Normalize(module_input_name="token_embeddings"),
    ]
    sentence_transformers.MultiVectorEncoder(modules=modules, device="cpu").save(str(tmp_path / "colbert"))
    return MultiVectorTokenEncoder(ModelFolder.find(str(tmp_path / "colbert")), 16), multi_vector_encoder


@pytest.mark.parametrize("build", [one_vector, a_vector_a_token])
def test_tokens_are_counted_up_to_the_length_that_is_read(
    tiny_sentence_transformer, minilm_tokenizer, tmp_path, monkeypatch, tokenized, build
):
    encode, module = build(tiny_sentence_transformer, tmp_path)
    counted = []

    def recording(counts, *args, **options):
        counted.extend(counts)
        return budget_batches(counts, *args, **options)

    monkeypatch.setattr(module, "budget_batches", recording)
    tokenized.clear()
    encode(TEXTS, "document")
    whole = [text for call in tokenized for text in call if text == TEXTS[2]]
    assert len(whole) == 1  # by the model itself
    assert counted == [min(len(minilm_tokenizer(text)["input_ids"]), 16) for text in TEXTS]
