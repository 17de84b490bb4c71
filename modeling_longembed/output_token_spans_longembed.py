"""Which characters of a text a token vector stands for, for a highlight of what a query has found."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .encoding_choices_longembed import EncodingChoices
from .encoding_longembed import tokenize_texts
from .encoding_tokens_longembed import special_tokens_around


def token_spans(
    model: Any,
    texts: str | Sequence[str],
    prompt_name: str | None = None,
    is_query: bool | None = None,
    overflow: str = "warn",
) -> Tensor | list[Tensor]:
    """Return the characters of each token that has a vector: row i is of vector i of `encode(output_value="tokens")`.

    The tokens of one pooled vector are those that `groups` of `pool_tokens` and `keep_tokens` number alike:
    `spans[groups == j]`.

    Args:
        model: the encoder, with a fast tokenizer.
        texts: one string or several.
        prompt_name, is_query, overflow: as in `encode`.

    Returns:
        For each text int64 `(tokens, 2)`, where a token starts and ends, so that `text[start:end]` is the token; tokens
        of the prompt start and end at 0. Not a list, if `texts` is a string.

    Raises:
        ValueError: an argument is not valid, or the tokenizer does not know the offsets of its tokens.
    """
    choices = EncodingChoices(prompt_name=prompt_name, is_query=is_query, overflow=overflow, output_value="tokens")
    choices.check(model.config)
    _, prompt = choices.prompt(model.config)
    tokenizer = model.encode_tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("token_spans: this tokenizer does not know offsets; save the model with its tokenizer.json")
    given = [texts] if isinstance(texts, str) else list(texts)
    left_out, side = model.left_out_tokens(model.device), choices.side(model.config)
    spans = []
    for text, row in zip(given, tokenize_texts(model, given, prompt, overflow), strict=True):
        offsets = tokenizer(prompt + text, return_offsets_mapping=True, truncation=False, verbose=False)
        places = torch.tensor(offsets["offset_mapping"], dtype=torch.long).view(-1, 2) - len(prompt)
        closing = len(special_tokens_around(tokenizer)[1]) if len(places) > len(row) else 0
        places = places[: len(row) - closing]  # of a text that is cut off, what comes after it is special
        ids = torch.tensor(row[: len(places)], device=model.device)
        kept = model.token_output.has_vector(ids, left_out, side)
        spans.append(places.clamp(min=0)[kept.cpu()])
    return spans[0] if isinstance(texts, str) else spans
