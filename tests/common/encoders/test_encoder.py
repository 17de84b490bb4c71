"""Vectors of texts equal those of sentence-transformers, of the model itself, and of chunks encoded by hand."""

import json
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, BertModel, RobertaConfig, RobertaModel

from common.encoders.encoder import ChunkEncoder, Encoder
from common.encoders.model_folder import ModelFolder
from common.encoders.model_spec import ModelSpec
from common.errors import UserError

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly brew tea in large kettles".split()  # noqa: SIM905
texts_of_words = st.lists(st.lists(st.sampled_from(WORDS), max_size=150).map(" ".join), min_size=1, max_size=6)


def random_texts(count: int, longest: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, longest))) for _ in range(count)]


@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("prompt_type", ["query", "document"])
def test_one_vector_per_text_equals_sentence_transformers(tiny_sentence_transformer, max_length, prompt_type):
    encoder = Encoder(ModelFolder.find(str(tiny_sentence_transformer)), max_length, batch_tokens=200)
    reference = SentenceTransformer(str(tiny_sentence_transformer), device="cpu")
    reference.max_seq_length = max_length or 64
    texts = random_texts(12, 100)
    encode = reference.encode_query if prompt_type == "query" else reference.encode_document
    vectors = np.concatenate(encoder(texts, prompt_type))
    np.testing.assert_allclose(vectors, encode(texts), atol=1e-6)


@pytest.fixture(scope="module")
def chunk_encoders(tiny_sentence_transformer) -> dict[int, ChunkEncoder]:
    folder = ModelFolder.find(str(tiny_sentence_transformer))
    return {size: ChunkEncoder(folder, size, batch_tokens=300) for size in (8, 31, 64)}


@pytest.fixture(scope="module")
def bert(tiny_sentence_transformer) -> BertModel:
    return BertModel.from_pretrained(tiny_sentence_transformer).eval()


@hypothesis.settings(max_examples=15)
@hypothesis.given(texts=texts_of_words, size=st.sampled_from([8, 31, 64]))
def test_the_sum_of_chunks_is_the_sum_of_all_token_vectors(bert, chunk_encoders, minilm_tokenizer, texts, size):
    """By hand: cut the ids, put [CLS] and [SEP] around each chunk, add up BERT's last hidden states."""
    rows = chunk_encoders[size](texts, "document")
    for text, matrix in zip(texts, rows, strict=True):
        ids = minilm_tokenizer(text, add_special_tokens=False)["input_ids"]
        chunks = [ids[i : i + size - 2] for i in range(0, max(1, len(ids)), size - 2)]
        assert len(matrix) == len(chunks)
        for chunk, row in zip(chunks, matrix, strict=True):
            with torch.no_grad():
                states = bert(
                    torch.tensor([[minilm_tokenizer.cls_token_id, *chunk, minilm_tokenizer.sep_token_id]])
                ).last_hidden_state
            np.testing.assert_allclose(row, states[0].sum(0), rtol=1e-4, atol=1e-3)


def test_a_prompt_is_in_front_of_every_chunk_and_within_its_size(tiny_sentence_transformer, minilm_tokenizer):
    encoder = ChunkEncoder(ModelFolder.find(str(tiny_sentence_transformer)), 16)
    prompt, text = "ask: ", " ".join(WORDS * 3)
    ids = minilm_tokenizer(text, add_special_tokens=False)["input_ids"]
    room = 16 - 2 - len(minilm_tokenizer(prompt, add_special_tokens=False)["input_ids"])
    by_hand = [prompt + minilm_tokenizer.decode(ids[i : i + room]) for i in range(0, len(ids), room)]
    unprompted = Encoder(ModelFolder.find(str(tiny_sentence_transformer)), 64)(by_hand, "document")
    (rows,) = encoder([text], "query")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, np.concatenate(unprompted), atol=1e-5)


def test_a_folder_of_ours_gives_what_its_own_encode_gives(tiny_longembed):
    reference = AutoModel.from_pretrained(tiny_longembed).eval()
    texts = random_texts(8, 120)
    encoder = Encoder(ModelFolder.find(str(tiny_longembed)), batch_tokens=300)
    for prompt_type in ("query", "document"):
        expected = reference.encode(texts, prompt_name=prompt_type, precision="float32")
        np.testing.assert_allclose(np.concatenate(encoder(texts, prompt_type)), expected, atol=1e-5)


def test_max_length_cuts_what_a_model_of_ours_reads(tiny_longembed, minilm_tokenizer):
    encoder = Encoder(ModelFolder.find(str(tiny_longembed)), 20)
    texts = random_texts(6, 120)
    ids = [
        minilm_tokenizer(text, truncation=True, max_length=20, add_special_tokens=True)["input_ids"] for text in texts
    ]
    cut = [minilm_tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    assert any(len(row) == 20 for row in ids)
    expected = AutoModel.from_pretrained(tiny_longembed).eval().encode(cut, prompt_name="document", precision="float32")
    np.testing.assert_allclose(np.concatenate(encoder(texts, "document")), expected, atol=1e-5)


def test_vectors_of_first_and_of_last_tokens_have_different_keys(tiny_sentence_transformer, tmp_path):
    """A model that cuts off beginnings reads other tokens than the same model with a limit, be it the same number."""
    folder = tmp_path / "left"
    shutil.copytree(tiny_sentence_transformer, folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"truncation_side": "left"}))
    for path, same in ((tiny_sentence_transformer, True), (folder, False)):
        plain = Encoder(ModelFolder.find(str(path)), batch_tokens=200)
        limited = Encoder(ModelFolder.find(str(path)), max_length=plain.max_length, batch_tokens=200)
        text = [" ".join(random_texts(1, 100))]
        assert np.array_equal(plain(text, "document")[0], limited(text, "document")[0]) == same
        assert (plain.identity == limited.identity) == same


@pytest.mark.parametrize("name", ["tiny_sentence_transformer", "tiny_longembed"])
@pytest.mark.parametrize("kind", ["truncate", "chunk-mean"])
def test_the_first_tokens_are_read_whatever_side_the_folder_cuts_off(request, name, kind, minilm_tokenizer, tmp_path):
    """With `truncation_side: left` a model cuts off the beginning, and `truncate:PATH:16` reads it all the same."""
    folder = tmp_path / "left"
    shutil.copytree(request.getfixturevalue(name), folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"truncation_side": "left"}))
    texts = [" ".join([text, *WORDS]) for text in random_texts(4, 40)]
    assert all(len(ids) > 16 for ids in minilm_tokenizer(texts)["input_ids"])
    found = [
        ModelSpec.parse(f"{kind}:{model}:16").load_encoder(200, False)(texts, "document")
        for model in (folder, request.getfixturevalue(name))
    ]
    for left, right in zip(*found, strict=True):
        np.testing.assert_array_equal(left, right)
    if kind == "truncate":  # what follows the first tokens does not matter
        beginnings = [minilm_tokenizer.decode(ids[1:15]) for ids in minilm_tokenizer(texts)["input_ids"]]
        again = Encoder(ModelFolder.find(str(folder)), batch_tokens=200)(beginnings, "document")
        np.testing.assert_allclose(np.concatenate(found[0]), np.concatenate(again), atol=1e-5)


def test_a_length_beyond_the_context_is_refused(tiny_sentence_transformer, tiny_longembed, minilm_tokenizer, tmp_path):
    # RoBERTa has two rows more than positions: its table of 66 reads 64 tokens.
    RobertaModel(
        RobertaConfig(
            vocab_size=minilm_tokenizer.vocab_size,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=66,
        )
    ).save_pretrained(tmp_path / "roberta")
    minilm_tokenizer.save_pretrained(tmp_path / "roberta")
    for folder, context in ((tiny_sentence_transformer, 64), (tiny_longembed, 256), (tmp_path / "roberta", 64)):
        found = ModelFolder.find(str(folder))
        assert Encoder(found, context).max_length == context
        with pytest.raises(UserError, match=f"{context + 1} tokens are more than the context .* at most {context}"):
            Encoder(found, context + 1)


def test_a_tokenizer_without_a_padding_token_serves_chunks_alone(tiny_sentence_transformer, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sentence_transformer, folder)
    whole = ChunkEncoder(ModelFolder.find(str(folder)), 16)(random_texts(5, 60), "document")
    for file in folder.rglob("tokenizer_config.json"):
        settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": None}
        file.write_text(json.dumps(settings))
    for file in folder.rglob("special_tokens_map.json"):
        file.unlink()
    found = ModelFolder.find(str(folder))
    with pytest.raises(UserError, match="has no padding token; name one"):
        Encoder(found)
    encoder = ChunkEncoder(found, 16)
    assert encoder.model.tokenizer.pad_token is None
    for one, two in zip(encoder(random_texts(5, 60), "document"), whole, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
