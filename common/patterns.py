"""Options written as `name:parameter=value,...` on the command line: attention patterns and position extensions."""

import re

from common.errors import UserError


def parse_pattern(text: str, *, option: str = "attention_patterns", key: str = "type") -> dict:
    """Parse `name` or `name:parameter=value,...` into an entry of `config.attention_patterns`, or a similar dictionary.

    Args:
        text: the value on the command line.
        option: the name of the option, for the error message.
        key: the key under which the name is stored: `type` for a pattern, `method` for a position extension.

    Returns:
        The name under `key`, and the parameters with values of type int, float, bool or str.

    Raises:
        UserError: the text does not have this form. The config checks the names and the parameters.
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
