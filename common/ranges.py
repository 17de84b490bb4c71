"""The range of a numeric option, declared beside its help text and checked by `common.arguments.parse`.

    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta", "within": "[0, 1)"})

A bracket includes its end, a parenthesis does not: `(0, inf)` holds the positive numbers, `[-inf, inf)` all numbers and
minus infinity.
"""

import re

_INTERVAL = re.compile(r"([\[(])([^,]+), ([^\])]+)([\])])")


def words_of_range(interval: str) -> str:
    """Return an interval in words, such as `at least 0 and less than 1`."""
    opening, low, high, closing = _parts(interval)
    words = [] if low == "-inf" else [f"{'at least' if opening == '[' else 'more than'} {low}"]
    words += [] if high == "inf" else [f"{'at most' if closing == ']' else 'less than'} {high}"]
    return " and ".join(words or ["less than infinity"])  # `[-inf, inf)`, which refuses inf and NaN


def contains(interval: str, value: float) -> bool:
    """Return whether a number is in an interval."""
    opening, low, high, closing = _parts(interval)
    above = float(low) <= value if opening == "[" else float(low) < value
    return above and (value <= float(high) if closing == "]" else value < float(high))


def _parts(interval: str) -> tuple[str, str, str, str]:
    match = _INTERVAL.fullmatch(interval)
    assert match, f"{interval} is no interval"
    opening, low, high, closing = match.groups()
    return opening, low, high, closing
