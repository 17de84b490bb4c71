"""The characters that a token vector stands for: those from which the tokenizer makes the token."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.output_token_pooling_longembed import pool_tokens
from tests.modeling_longembed.tiny_checkpoints import randomize

CONTEXT = 24
SAMPLE = ["The colour of the remote control, decided by whom?", "naïve café — 東京 é\r\n\0 x 🙂", "query: passage:"]


@pytest.fixture(scope="module")
def model():
    """Return a random model with a WordPiece tokenizer as BERT's, prompts, and words that have no vector."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(SAMPLE, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
    model = randomize(
        LongEmbedModel(
            LongEmbedConfig(
                vocab_size=backend.get_vocab_size(),
                max_position_embeddings=CONTEXT,
                query_token_weights="idf",
                token_min_weight=0.5,
                prompts={"query": "query: ", "document": ""},
                **sizes,
            )
        )
    )
    torch.manual_seed(0)
    model.token_output.query_table.copy_(torch.rand(model.config.vocab_size) + 0.2)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    return model


WORDS = st.sampled_from(
    [*"aeiou thrmcd,.?\r\n\0", "the ", "remote", "control ", "é", "e\u0301", "東", "🙂", "👩\u200d💻"]
)


@pytest.mark.promise("T18")
@given(pieces=st.lists(WORDS, max_size=40), side=st.sampled_from(["query", "document"]))
def test_a_span_is_what_the_tokenizer_makes_the_token_of(model, pieces, side):
    text = "".join(pieces)
    spans = model.token_spans(text, prompt_name=side)
    assert len(spans) == len(model.encode(text, prompt_name=side, output_value="tokens", precision="float32"))
    table, left_out = model.token_output.query_table, set(model.tokenizer.all_special_ids)
    whole = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    prompt = model.tokenizer(model.config.prompts[side], add_special_tokens=False)["input_ids"]
    rows = [(number, (0, 0)) for number in prompt] + [*zip(whole["input_ids"], whole["offset_mapping"], strict=True)]
    expected = [
        place
        for number, place in rows[: CONTEXT - 2]
        if number not in left_out and (side == "query" or table[number] >= 0.5)
    ]
    assert [tuple(span) for span in spans.tolist()] == expected


@pytest.mark.promise("T18")
def test_pooled_vectors_know_the_characters_of_their_tokens(model):
    text = "the remote control, the colour of the control"
    vectors = torch.tensor(model.encode(text, output_value="tokens", precision="float32"))
    spans, (pooled, groups) = model.token_spans(text), pool_tokens(vectors, 3)
    ids = model.tokenizer(text, add_special_tokens=False)
    for number in range(len(pooled)):
        members = vectors[groups == number]
        np.testing.assert_allclose(pooled[number], torch.nn.functional.normalize(members.mean(0), dim=0), atol=1e-6)
        assert all(text[start:end].strip() == text[start:end] != "" for start, end in spans[groups == number].tolist())
    assert len(spans) < len(ids["input_ids"])


def test_several_texts_are_a_list_and_mistakes_are_said(model):
    spans = model.token_spans(["the control", ""])
    assert [len(part) for part in spans] == [len(model.token_spans("the control")), 0]
    with pytest.raises(ValueError, match="prompt_name='x'; choose from"):
        model.token_spans("the", prompt_name="x")
    with pytest.raises(ValueError, match="text 0 is longer than the context"):
        model.token_spans("control " * CONTEXT, overflow="error")
