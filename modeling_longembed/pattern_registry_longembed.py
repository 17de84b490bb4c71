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
]


def build_pattern(entry: "str | dict") -> AttentionPattern:
    """Build a pattern from its config entry: a name, or `{"type": name, **parameters}`.

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
    return PATTERNS[name](**entry)
