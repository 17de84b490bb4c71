"""Segments have the characters of their tokens, lose none of a text, and are as many as the definitions say."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.sentences import SENTENCE_END
from retrieval.segments import Segmenter

# What has been cut wrongly elsewhere: a character of several code points, bytes, jamo or tokens, and none at all.
PIECES = [
    *("w1", "The cat sat. ", "it rains", " ", "  ", "\n\n", "\r\n", "\t", "\x00", "[SEP]", "x" * 120, "?", '." '),
    *("👩‍👩‍👧‍👦", "🏳️‍🌈", "😀", "e\u0301", "a\u0308\u0323", "\u0301", "İ", "ﬁ", "ß", "\u200b", "\ufeff", "\u202e"),
    *("漢字仮名。", "北京", "한국어 문장", "ไทย", "नमस्ते", "مرحبا", "𝔘𝔫𝔦", "\U000e0041"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE without merges: most characters beyond ASCII have several tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    around = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["word pieces", "bytes"])
def tokenizer(request, minilm_tokenizer, byte_level):
    return {"word pieces": minilm_tokenizer, "bytes": byte_level}[request.param]


@pytest.fixture(scope="module")
def model(tiny_longembed):
    """A model of 256 tokens that attends within blocks of 8."""
    from modeling_longembed import LongEmbedModel

    return LongEmbedModel.from_pretrained(tiny_longembed, attention_patterns={"type": "block", "size": 8})


def offsets_of(tokenizer, text: str) -> list[tuple[int, int]]:
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def check_that_nothing_is_lost(spans: list[tuple[int, int]], text: str, overlap: int = 0) -> None:
    """Segments go from the first character to the last, in order, with no more characters in two than `overlap`."""
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    for (start, end), (next_start, next_end) in pairwise(spans):
        assert start <= next_start <= end <= next_end
        assert end - next_start <= overlap


@pytest.mark.promise("R1")
@given(text=TEXTS, size=st.integers(1, 12), data=st.data())
def test_windows_are_counted_by_the_formula_and_hold_their_tokens(tokenizer, text, size, data):
    stride = data.draw(st.integers(1, size))
    offsets = offsets_of(tokenizer, text)
    spans = Segmenter(f"tokens:{size}/{stride}", tokenizer)(text)
    assert len(spans) == max(1, math.ceil((len(offsets) - size) / stride) + 1)
    check_that_nothing_is_lost(spans, text, overlap=len(text))
    for number, (start, end) in enumerate(spans):
        window = offsets[number * stride : number * stride + size]
        assert all(start <= first and last <= end for first, last in window)
        if number:
            assert start == window[0][0]
    if offsets:
        assert all(start < end for start, end in spans)


@pytest.mark.promise("R1")
def test_the_windows_of_the_sources(minilm_tokenizer):
    """288 tokens, 64 further each time."""
    for tokens in (0, 1, 288, 289, 352, 353, 1000):
        spans = Segmenter("tokens:288/64", minilm_tokenizer)("cat " * tokens)
        assert len(spans) == max(1, math.ceil((tokens - 288) / 64) + 1)
        assert [start for start, _ in spans] == [4 * 64 * number for number in range(len(spans))]
        assert [end for _, end in spans] == [min(4 * (64 * number + 288), 4 * tokens) for number in range(len(spans))]


@pytest.mark.promise("R1")
@given(text=TEXTS, size=st.integers(1, 12))
def test_segments_without_overlap_are_the_text_in_pieces(minilm_tokenizer, text, size):
    shared = 0 if text.isascii() else 1  # word pieces divide a syllable of Hangul
    for spec in (f"tokens:{size}", f"late:{size}", f"sentences:{size}"):
        check_that_nothing_is_lost(Segmenter(spec, minilm_tokenizer)(text), text, shared)
    assert Segmenter("document", minilm_tokenizer)(text) == [(0, len(text))]


@pytest.mark.promise("R1")
@given(text=TEXTS, size=st.integers(1, 12))
def test_sentences_stay_together_as_long_as_they_fit(tokenizer, text, size):
    spans = Segmenter(f"sentences:{size}", tokenizer)(text)
    check_that_nothing_is_lost(spans, text, overlap=1)
    starts = np.array([start for start, _ in offsets_of(tokenizer, text)])
    ends_of_sentences = {match.end() for match in SENTENCE_END.finditer(text)}
    # A token that lies across the end of a sentence, such as two line breaks, belongs to the one before.
    cuts = {int(starts[np.searchsorted(starts, end)]) for end in ends_of_sentences if (starts >= end).any()}
    counts = [int(np.sum((start <= starts) & (starts < following))) for (start, _), (following, _) in
              zip(spans, [*spans[1:], (len(text) + 1, 0)], strict=True)]  # fmt: skip
    assert max(counts) <= size or len(set(starts.tolist())) < len(starts)
    for number in range(1, len(spans)):
        start = spans[number][0]
        if start not in cuts:  # within a sentence that is longer than a segment
            assert counts[number - 1] == size or len(set(starts.tolist())) < len(starts)
        else:  # the next sentence did not fit
            until = min([cut for cut in cuts if cut > start], default=len(text) + 1)
            assert counts[number - 1] + int(np.sum((start <= starts) & (starts < until))) > size


@pytest.mark.promise("R1")
@example("antidisestablishmentarianism" + 2 * "honorificabilitudinitatibus", 6, "")  # half a word has more tokens
@given(text=TEXTS, context=st.integers(8, 40), prompt=st.sampled_from(["", "passage: ", "é"]))
def test_a_text_beyond_the_context_is_read_to_its_end(tokenizer, text, context, prompt):
    readings = Segmenter("late:4", tokenizer, context=context + 6 * len(prompt), prompt=prompt).read(text)
    assert "".join(text[reading.start : reading.end] for reading in readings) == text
    for reading in readings:
        part = prompt + text[reading.start : reading.end]
        assert reading.ids.tolist() == tokenizer(part)["input_ids"]
        assert len(reading.ids) <= context + 6 * len(prompt)
        assert (np.diff(reading.offsets[:, 0]) >= 0).all()
        assert reading.offsets.min() >= reading.start
        assert reading.offsets.max() <= reading.end
        behind_the_prompt = [end > len(prompt) for _, end in offsets_of(tokenizer, part)]
        assert reading.is_text.sum() == sum(behind_the_prompt)


@pytest.mark.promise("R1")
@settings(max_examples=settings.default.max_examples // 3)
@given(text=TEXTS, size=st.integers(2, 60), repeated=st.integers(1, 8))
def test_late_chunks_are_the_passages_of_encode(model, text, size, repeated):
    segmenter = Segmenter(f"late:{size}", model.encode_tokenizer, context=model.config.max_position_embeddings)
    parts = [(text * repeated)[reading.start : reading.end] for reading in segmenter.read(text * repeated)]
    passages = model.encode(parts, late_chunk_tokens=size, overflow="error")
    assert sum(map(len, passages)) == len(segmenter(text * repeated))


@pytest.mark.promise("R1")
@pytest.mark.parametrize("prompt", ["", "find: "])
def test_a_late_chunk_is_made_of_its_characters(model, prompt):
    """Where chunks do not attend to each other, other characters in a segment change its vector alone."""
    model.config.prompts = {"document": prompt}
    text = " ".join(["cat", "dog", "house", "water"] * 10) + "  \r\n"
    spans = Segmenter("late:8", model.encode_tokenizer, context=256, prompt=prompt)(text)
    vectors = model.encode(text, prompt_name="document", late_chunk_tokens=8)
    assert len(vectors) == len(spans) > 5
    for number, (start, end) in enumerate(spans):
        other = text[:start] + text[start:end].replace("dog", "sun").replace("water", "money") + text[end:]
        changed = model.encode(other, prompt_name="document", late_chunk_tokens=8)
        assert np.flatnonzero(np.abs(changed - vectors).max(1) > 1e-4).tolist() == [number]


@pytest.mark.parametrize(
    "spec", ["", "words:3", "tokens", "tokens:0", "late:x", "late:254/2", "sentences:-1", "late:0"]
)
def test_an_unknown_kind_of_segments_is_refused(minilm_tokenizer, spec):
    with pytest.raises(UserError, match="choose from tokens:288/64, late:254, sentences:288 and document"):
        Segmenter(spec, minilm_tokenizer)


def test_segments_that_cannot_be_made_are_refused(minilm_tokenizer):
    with pytest.raises(UserError, match="would leave tokens out"):
        Segmenter("tokens:64/288", minilm_tokenizer)
    with pytest.raises(UserError, match="fast tokenizer"):
        Segmenter("document", object())
    with pytest.raises(UserError, match="fills the context of 5 tokens"):
        Segmenter("late:4", minilm_tokenizer, context=5, prompt="a long prompt")
