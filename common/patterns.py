"""Choices that a command line writes as `name:parameter=value,...`: attention patterns, position extensions."""

import re

from common.errors import UserError


def parse_pattern(text: str, *, option: str = "attention_patterns", key: str = "type") -> dict:
    """An entry of `config.attention_patterns`, or another choice by name, from `name` or `name:parameter=value,...`.

    Args:
        text: what the user wrote.
        option: the argument that it was given as, for the message.
        key: the field that takes the name: `type` of a pattern, `method` of a position extension.

    Raises:
        UserError: the text is not of this form. Which names and parameters there are is for the config to say.
    """
    match = re.fullmatch(r"(\w+)(?::(\w+=[\w.+-]+(?:,\w+=[\w.+-]+)*))?", text)
    if match is None:
        raise UserError(f"--{option}: {text!r} is no choice; write a name, or name:parameter=value,parameter=value")
    entry: dict = {key: match[1]}
    for pair in (match[2] or "").split(",") if match[2] else ():
        name, _, value = pair.partition("=")
        entry[name] = _value(value)
    return entry


def _value(text: str) -> int | float | bool | str:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text, text)
