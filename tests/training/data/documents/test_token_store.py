"""Tokenised texts: the tokenizer's tokens, computed once, and nothing of what was interrupted."""

from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from tests.training.tiny_training import SPECIALS, WORDS, random_documents, write_jsonl
from training.data.documents.next_sentence import Segment
from training.data.documents.token_store import tokenize_documents, with_token_offsets, word_starts
from training.data.sources import OFFSET_COLUMNS, TEXTS, Source, read_sources

TEXT = ["river stone", " night. paper", "cloud " * 200]


@pytest.fixture
def source(tmp_path):
    """A source of texts in a file, because only what comes from files is cached."""

    def read(texts: list[str]) -> Source:
        return read_sources([str(write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts]))], TEXTS)[0]

    return read


def test_documents_have_the_tokens_of_the_tokenizer(source, word_tokenizer):
    word_tokenizer(TEXT, truncation=True, max_length=9)  # leaves no trace
    found = tokenize_documents(source(TEXT), word_tokenizer)
    expected = [word_tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXT]
    assert found.lengths.tolist() == [2, 3, 200]
    assert found.total == 205
    for number, ids in enumerate(expected):
        assert found.read(Segment(number, 0, len(ids)))[0].tolist() == ids
        assert found.read(Segment(number, 1, 2))[0].tolist() == ids[1:2]
    counts = found.token_counts(len(word_tokenizer)).tolist()
    assert counts == [sum(ids.count(token) for ids in expected) for token in range(len(word_tokenizer))]


def test_documents_without_tokens_are_left_out(word_tokenizer):
    texts = datasets.Dataset.from_dict({"text": [" ", "river stone", "\n"]})
    assert tokenize_documents(Source("documents", texts, ("text",)), word_tokenizer).lengths.tolist() == [2]
    with pytest.raises(UserError, match="its texts hold no token"):
        tokenize_documents(Source("documents", texts.select([0, 2]), ("text",)), word_tokenizer)


@pytest.mark.parametrize("characters", [1, 100, 10**6])
def test_so_many_characters_are_tokenised_together(word_tokenizer, monkeypatch, tokenized, characters):
    """What a tokenizer returns takes many times the memory of the texts, which may be books."""
    monkeypatch.setattr("training.data.documents.token_store.CHARACTERS_AT_ONCE", characters)
    texts = [*TEXT, " ", *(text["text"] for text in random_documents(20)), "paper " * 200]
    rows = datasets.Dataset.from_dict({"text": texts})
    found = tokenize_documents(Source("documents", rows, ("text",)), word_tokenizer).rows.to_dict()
    assert [text for call in tokenized for text in call] == texts
    assert all(sum(map(len, call[:-1])) < characters for call in tokenized)
    ids = [word_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts if text != " "]
    assert found == {"input_ids": ids, "starts_word": [[True] * len(row) for row in ids]}


@pytest.mark.parametrize("tokenize", [tokenize_documents, with_token_offsets])
def test_a_source_is_tokenised_once(source, word_tokenizer, monkeypatch, tokenize):
    texts = source(TEXT)
    first = tokenize(texts, word_tokenizer)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", None)  # would fail
    (reopened,) = read_sources([texts.name], TEXTS)
    again = tokenize(reopened, word_tokenizer)
    assert again.rows.to_dict() == first.rows.to_dict()
    with pytest.raises(TypeError):
        tokenize(source(["another text"]), word_tokenizer)


@pytest.mark.parametrize("tokenize", [tokenize_documents, with_token_offsets])
def test_tokens_of_other_code_or_another_version_are_not_taken(
    source, word_tokenizer, monkeypatch, edit_code, tokenize
):
    texts = source(TEXT)
    tokenize(texts, word_tokenizer)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", None)  # would fail
    tokenize(texts, word_tokenizer)
    edit_code("training.data.document")
    with pytest.raises(TypeError):
        tokenize(texts, word_tokenizer)


def test_offsets_are_those_of_the_tokenizer(source, word_tokenizer):
    rows = with_token_offsets(source(TEXT), word_tokenizer).rows
    expected = word_tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts, stops, words = (rows[name] for name in OFFSET_COLUMNS)
    assert [list(zip(*offsets, strict=True)) for offsets in zip(starts, stops, strict=True)] == expected
    assert words[0] == [0, 1]


def test_an_interrupted_tokenisation_leaves_nothing(source, word_tokenizer, monkeypatch):
    texts = source(TEXT)
    folder = Path(texts.rows.cache_files[0]["filename"]).parent
    before = sorted(folder.iterdir())

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_documents(texts, word_tokenizer)
    assert sorted(folder.iterdir()) == before


def test_words_are_the_tokenizers():
    vocabulary = [*SPECIALS, "ri", "##ver", "##s", ".", *WORDS]
    core = Tokenizer(WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    encoded = wordpiece(["rivers stone. ris"], add_special_tokens=False)
    expected = [True, False, True, True, True, False]  # river ##s stone . ri ##s
    assert word_starts(wordpiece, encoded["input_ids"][0], encoded.encodings).tolist() == expected
    assert word_starts(wordpiece, encoded["input_ids"][0]).tolist() == expected  # by the marks alone
