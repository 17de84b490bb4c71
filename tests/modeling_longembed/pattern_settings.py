"""Settings of every registered pattern and position scheme, for tests that run over the registries."""

from dataclasses import fields

from modeling_longembed import LongEmbedConfig
from modeling_longembed.pattern_registry_longembed import PATTERNS

SCHEMES = {
    "absolute": {"position_embedding_type": "absolute"},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "rope": {"position_embedding_type": "rope"},
    "rope+group": {
        "position_embedding_type": "rope",
        "position_extension": {
            "method": "group",
            "original_max_position_embeddings": 16,
            "factor": 3,
            "neighbours": 40,
        },
    },
    "alibi": {"position_embedding_type": "alibi"},
    "relative": {"position_embedding_type": "relative"},
    "buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    "none": {"position_embedding_type": "none", "is_causal": True},
}


def entries(name: str, reach: int = 6) -> list[dict]:
    """Config entries of a registered pattern: its smallest and about `reach`, switches all off, all on, and one alone.

    `reach` must be even: LSH attention has an even number of buckets.
    """
    switches = [f.name for f in fields(PATTERNS[name]) if f.metadata["least"] is None]
    numbers = {f.name: f.metadata["least"] for f in fields(PATTERNS[name]) if f.name not in switches}
    turned = [set(), *({switch} for switch in switches), set(switches)]
    settings = []
    for extra in (0, reach):
        for on in turned if extra else (turned[0], turned[-1]):
            sizes = {key: least + extra for key, least in numbers.items()}
            settings.append({"type": name} | sizes | {switch: switch in on for switch in switches})
    return [entry for n, entry in enumerate(settings) if entry not in settings[:n]]


def refused(entry: dict | str, fields: dict) -> str | None:
    """The sentence with which the config refuses a pattern beside other fields."""
    try:
        LongEmbedConfig(attention_patterns=entry, **fields)
    except ValueError as error:
        return str(error)
    return None
