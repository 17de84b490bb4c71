"""Only the beginning of a long text is tokenised, and gives the tokens that the whole text gives."""

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modeling_longembed import encoding_tokens_longembed
from modeling_longembed.encoding_tokens_longembed import (
    CHARACTERS_PER_CALL,
    cut_off,
    is_local,
    special_tokens_around,
    tokenize_beginnings,
)
from tests.modeling_longembed.tiny_checkpoints import random_text, tiny_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "ist",
    "über",
    "İstanbul",
    "naïve",
    "ΣΑΣ",
    "日本",
    "don't",
    "3.14",
    "x_y",
    "co-op",
]
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def trained(model, trainer, pre_tokenizer, normalizer=None) -> PreTrainedTokenizerFast:
    """A tokenizer trained on a few words, with special tokens around a text."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([" ".join(WORDS) + " " + " ".join(WORDS[::-1])] * 3, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


def byte_pairs(**settings) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(**settings), normalizers.NFC())


def unigram(pre_tokenizer) -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    steps = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")]
    return trained(models.Unigram(), trainer, pre_tokenizer, normalizers.Sequence(steps))


TOKENIZERS = {
    "words": lambda: tiny_tokenizer(0),
    "byte pairs": lambda: byte_pairs(add_prefix_space=False),
    "unigram": lambda: unigram(pre_tokenizers.Metaspace()),
    "unigram of words": lambda: unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    ),
}
OTHERS = {
    "pieces across spaces": lambda: unigram(pre_tokenizers.Metaspace(split=False)),
    "bytes across spaces": lambda: byte_pairs(use_regex=False),
}
_built: dict[str, PreTrainedTokenizerFast] = {}


def build(name: str) -> PreTrainedTokenizerFast:
    if name not in _built:
        _built[name] = (TOKENIZERS | OTHERS)[name]()
    return _built[name]


class Recording:
    """A tokenizer that notes the texts of its calls."""

    def __init__(self, tokenizer, read: list[str]):
        self.tokenizer, self.read, self.backend_tokenizer = tokenizer, read, tokenizer.backend_tokenizer

    def __call__(self, texts, **choices):
        self.read.extend(texts)
        return self.tokenizer(texts, **choices)


# Words, anything that Unicode has, special tokens, and spaces of all kinds between them.
pieces = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=6),
    st.sampled_from([*SPECIAL, "a\u0301", "\u0600", "\u200d", "e\u0327\u0301"]),
)
separators = st.sampled_from([" ", " ", " ", "  ", "\n", "\t", "", "\u00a0", "\u3000", " \u0301"])
texts_of_any_kind = st.lists(st.tuples(pieces, separators), max_size=60).map(lambda parts: "".join(map("".join, parts)))


@pytest.mark.parametrize("name", [*TOKENIZERS, *OTHERS])
@hypothesis.given(
    texts=st.lists(texts_of_any_kind, min_size=1, max_size=3), limit=st.integers(3, 12), characters=st.integers(1, 6)
)
def test_the_tokens_are_those_of_the_whole_text(name, texts, limit, characters):
    """Whole and cut off by the tokenizer itself, with a prompt and without; at first with too few characters."""
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]  # no lone surrogates
    tokenizer = build(name)
    _, closing = special_tokens_around(tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding_tokens_longembed, "CHARACTERS_PER_TOKEN", characters)
        for prompt in ("", "fox the "):
            found = tokenize_beginnings(tokenizer, texts, limit, prompt)
            expected = tokenizer([prompt + text for text in texts], truncation=True, max_length=limit)["input_ids"]
            assert [cut_off(ids, limit, closing).tolist() for ids in found] == expected
    tokenizer.backend_tokenizer.no_truncation()


@pytest.mark.parametrize("name", [*TOKENIZERS, *OTHERS])
def test_a_long_text_is_read_as_far_as_it_counts(name):
    tokenizer, text = build(name), " ".join(WORDS * 3000)
    read: list[str] = []
    (ids,) = tokenize_beginnings(Recording(tokenizer, read), [text], 100)
    assert all(text.startswith(part) for part in read)
    assert is_local(tokenizer) == (name in TOKENIZERS)
    if name in TOKENIZERS:
        assert sum(map(len, read)) < 4000
        assert 100 < len(ids) < 1000
    else:
        assert read == [text]


def test_tokenizers_of_which_nothing_is_known_read_whole_texts(minilm_tokenizer):
    assert is_local(minilm_tokenizer)
    added = tiny_tokenizer(0)
    added.add_tokens(["w1 w2"])  # lies across a space
    assert not is_local(added)
    replacing = tiny_tokenizer(0)
    replacing.backend_tokenizer.normalizer = normalizers.Replace("1 w", "2")
    assert not is_local(replacing)
    whole = tiny_tokenizer(0)
    whole.backend_tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()
    assert not is_local(whole)
    assert not is_local(object())


def test_a_call_of_the_tokenizer_gets_so_many_characters(monkeypatch):
    """What it returns takes many times the memory of the text."""
    tokenizer, read = tiny_tokenizer(0), []
    calls, recording = [], Recording(tokenizer, read)
    monkeypatch.setattr("modeling_longembed.encoding_tokens_longembed.CHARACTERS_PER_CALL", 500)
    assert CHARACTERS_PER_CALL > 500

    texts = [random_text(n % 40, seed=n) for n in range(200)]
    found = []
    for ids in tokenize_beginnings(recording, texts, 1000):
        found.append(ids.tolist())
        calls += [sum(map(len, read))] if read else []
        read.clear()
    assert found == tokenizer(texts)["input_ids"]
    assert max(calls) < 500 + max(map(len, texts))


def test_the_parts_of_a_tokenizer_are_read_once_for_all_texts_of_a_call(monkeypatch):
    """They are described as JSON each time, which takes longer than to tokenise a short text."""
    calls = []
    monkeypatch.setattr(encoding_tokens_longembed, "is_local", lambda tokenizer: calls.append(tokenizer) or True)
    tokenizer, texts = tiny_tokenizer(0), [random_text(5, seed=n) for n in range(20)]
    assert [ids.tolist() for ids in tokenize_beginnings(tokenizer, texts, 9)] == tokenizer(texts)["input_ids"]
    assert calls == [tokenizer]
