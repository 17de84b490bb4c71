"""Texts to token ids: only the beginning of a text that will be cut off is tokenised, and ids are kept in arrays."""

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

# Tokenizers that treat each word on its own: what stands behind a space has no effect on the tokens before it.
LOCAL_NORMALIZERS = {
    *("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Nmt", "Precompiled", "Strip"),
    "Prepend",
}
LOCAL_REPLACEMENTS = ({"String": "``"}, {"String": "''"}, {"Regex": " {2,}"})
LOCAL_PRE_TOKENIZERS = {
    *("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "Metaspace", "ByteLevel"),
}
SPLITTING_PRE_TOKENIZERS = LOCAL_PRE_TOKENIZERS - {"Punctuation", "Digits"}
LOCAL_MODELS = {"WordPiece", "BPE", "Unigram", "WordLevel"}
# A place where a word of any of these tokenizers ends: the characters on both sides are in no other character's
# normalization.
WORD_END = re.compile(r"[A-Za-z0-9](?= )")
# Characters that are tokenised at first for each token that is read; English text has about five.
CHARACTERS_PER_TOKEN = 6
# Characters that are tokenised in one call. What a tokenizer returns takes about 40 bytes for each.
CHARACTERS_PER_CALL = 2**20


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the special tokens that a tokenizer puts before and after a text, e.g. `[CLS]` and `[SEP]`."""
    marked = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
    ids, special = marked["input_ids"], marked["special_tokens_mask"]
    words = [position for position, flag in enumerate(special) if not flag] or [len(ids) - 1]
    return ids[: words[0]], ids[words[-1] + 1 :]


def is_local(tokenizer: Any) -> bool:
    """Return whether the tokens of a text up to the end of a word are the first tokens of the whole text.

    This is read off the parts of a fast tokenizer, all of which must be known; of others, nothing is known.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ not in LOCAL_MODELS:
        return False
    if any(re.search(r"\s", token.content) for token in backend.get_added_tokens_decoder().values()):
        return False  # such a token may lie across the place where a text is cut
    try:
        normalizers, pre_tokenizers = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    except Exception:  # written in Python: tokenizers cannot describe it, and raises a bare Exception
        return False
    for part in normalizers:
        if part["type"] not in LOCAL_NORMALIZERS and part.get("pattern") not in LOCAL_REPLACEMENTS:
            return False
    for part in pre_tokenizers:
        if part["type"] not in LOCAL_PRE_TOKENIZERS or not part.get("split", True) or not part.get("use_regex", True):
            return False
    return any(part["type"] in SPLITTING_PRE_TOKENIZERS for part in pre_tokenizers)


def _parts(component: Any) -> list[dict[str, Any]]:
    """Return the settings of the parts of a normalizer or pre-tokenizer, in a flat list."""
    if component is None:
        return []
    parts, found = [json.loads(component.__getstate__())], []
    while parts:
        part = parts.pop(0)
        inner = part.get("normalizers", part.get("pretokenizers"))
        if inner is None:
            found.append(part)
        else:
            parts = [*inner, *parts]
    return found


def tokenize_beginnings(tokenizer: Any, texts: Sequence[str], limit: int, prompt: str = "") -> Iterator[array]:
    """Tokenise the texts, or as much of each as has more than `limit` tokens.

    Args:
        tokenizer: of the model.
        texts: any strings.
        limit: number of tokens that are read of a text, with special tokens.
        prompt: text that is put in front of every text.

    Yields:
        The token ids of each text with special tokens: those of the whole text, or more than `limit`, of which all but
        the special tokens at the end are the first ones of the whole text.
    """
    may_cut = is_local(tokenizer)
    sizes = [CHARACTERS_PER_TOKEN * limit if may_cut else len(text) for text in texts]
    start = 0
    while start < len(texts):
        stop, total = start, 0
        while stop == start or (stop < len(texts) and total < CHARACTERS_PER_CALL):
            total += min(len(texts[stop]), sizes[stop])
            stop += 1
        done: dict[int, array] = {}
        while waiting := [index for index in range(start, stop) if index not in done]:
            parts = [_up_to_a_word_end(texts[index], sizes[index]) for index in waiting]
            for index, part, ids in zip(waiting, parts, _tokenize(tokenizer, parts, prompt), strict=True):
                if len(ids) > limit or len(part) == len(texts[index]):
                    done[index] = ids
                sizes[index] *= 2
        for index in range(start, stop):
            yield done.pop(index)
        start = stop


def _up_to_a_word_end(text: str, size: int) -> str:
    """Return the shortest beginning of a text that ends with a word and has at least `size` characters."""
    found = WORD_END.search(text, max(0, size - 1)) if size < len(text) else None
    return text if found is None else text[: found.end()]


def _tokenize(tokenizer: Any, texts: list[str], prompt: str) -> list[array]:
    encoded = tokenizer(
        [prompt + text for text in texts],
        add_special_tokens=True,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [array("i", ids) for ids in encoded["input_ids"]]


def cut_off(ids: array, limit: int, closing: Sequence[int]) -> array:
    """Return token ids of which those beyond `limit` are cut off, but not the special tokens at the end.

    Args:
        ids: token ids of a text with special tokens.
        limit: most tokens that are left.
        closing: the special tokens after a text.
    """
    return ids if len(ids) <= limit else ids[: max(0, limit - len(closing))] + array("i", closing)
