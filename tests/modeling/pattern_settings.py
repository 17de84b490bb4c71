"""Settings of every registered pattern, for tests that run over the registry."""

from dataclasses import fields
from itertools import product

from modeling_longembed import LongEmbedConfig
from modeling_longembed.patterns_longembed import PATTERNS


def entries(name: str, reach: int = 5) -> list[dict]:
    """Config entries of a registered pattern: its smallest and about `reach`, its switches off and on."""
    switches = [f.name for f in fields(PATTERNS[name]) if f.metadata["least"] is None]
    numbers = {f.name: f.metadata["least"] for f in fields(PATTERNS[name]) if f.name not in switches}
    settings = []
    for extra, values in product((0, reach), product((False, True), repeat=len(switches))):
        entry = {"type": name} | {key: least + extra for key, least in numbers.items()}
        settings.append(entry | dict(zip(switches, values, strict=True)))
    return [entry for n, entry in enumerate(settings) if entry not in settings[:n]]


def refused(entry: dict, fields: dict) -> str | None:
    """The sentence with which the config refuses a pattern beside other fields."""
    try:
        LongEmbedConfig(attention_patterns=entry, **fields)
    except ValueError as error:
        return str(error)
    return None
