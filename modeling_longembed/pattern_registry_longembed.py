"""The registry of attention patterns: importing this module fills it, `build_pattern` builds a pattern by name.

To add a pattern, write a subclass of `AttentionPattern` in a file of its own, register it, and import the file here.
"""

from dataclasses import fields

# The loader of remote code finds only imports of the form `from .file import name`.
from .pattern_adaptive_span_longembed import AdaptiveAttention
from .pattern_base_longembed import PATTERNS, AttentionPattern
from .pattern_focused_longembed import FocusedAttention
from .pattern_landmark_longembed import LandmarkAttention
from .pattern_local_longembed import BlockAttention, FullAttention, ShiftedAttention, SlidingAttention
from .pattern_lsh_longembed import LshAttention
from .pattern_memory_longembed import MemoryAttention

__all__ = [
    "PATTERNS",
    "AdaptiveAttention",
    "BlockAttention",
    "FocusedAttention",
    "FullAttention",
    "LandmarkAttention",
    "LshAttention",
    "MemoryAttention",
    "ShiftedAttention",
    "SlidingAttention",
    "build_pattern",
    "upgrade_entry",
]


def build_pattern(entry: "str | dict", sublayer: int = 0, for_all: bool = False) -> AttentionPattern:
    """Build a pattern from its config entry: a name, or `{"type": name, **parameters}`.

    Args:
        entry: the entry.
        sublayer: number of the attention sublayer. It is added to the default of a parameter that differs between the
            sublayers, such as the seed of random numbers.
        for_all: whether it is added to a value in the entry too, because all sublayers have this entry.

    Returns:
        The pattern.

    Raises:
        ValueError: the name or a parameter is unknown, or a parameter is out of range.
    """
    if not isinstance(entry, (str, dict)):
        raise ValueError(f'attention_patterns: {entry!r} is no pattern; give a name or {{"type": name, **parameters}}')
    entry = {"type": entry} if isinstance(entry, str) else dict(entry)
    name = entry.pop("type", None)
    if name not in PATTERNS:
        raise ValueError(f"attention_patterns: there is no pattern {name!r}; choose from {', '.join(PATTERNS)}")
    known = [parameter.name for parameter in fields(PATTERNS[name])]
    if unknown := sorted(set(entry) - set(known)):
        raise ValueError(
            f"attention_patterns: the pattern {name!r} has no parameter {unknown[0]!r}; "
            f"it has {', '.join(known) or 'none'}"
        )
    for parameter in fields(PATTERNS[name]):
        value = entry.get(parameter.name, parameter.default)
        if parameter.metadata.get("by_sublayer") and type(value) is int and (for_all or parameter.name not in entry):
            entry[parameter.name] = value + sublayer
    return PATTERNS[name](**entry)


def upgrade_entry(entry: "str | dict") -> "str | dict":
    """Return an entry of a saved config with the parameters that there were not when it was saved.

    A saved entry has all parameters of its time, so that one that lacks only newer ones is of an earlier version, and
    computes what that version did.
    """
    if not isinstance(entry, dict) or entry.get("type") not in PATTERNS:
        return entry
    known = {parameter.name: parameter.metadata for parameter in fields(PATTERNS[entry["type"]])}
    newer = {name: metadata["earlier"] for name, metadata in known.items() if "earlier" in metadata}
    is_earlier = known.keys() - newer.keys() <= entry.keys() and not newer.keys() & entry.keys()
    return entry | newer if is_earlier else entry
