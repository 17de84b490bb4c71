"""Filters: which documents a search is limited to, by their metadata.

    {"language": "en"}                        # equal
    {"language": ["en", "de"]}                # one of several
    {"year": {">=": 2000, "<": 2010}}         # in a range, of numbers or of texts

All fields must match. A document that does not have a field does not match.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

from common.errors import UserError

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "!=": lambda value, other: not _equal(value, other),
}


def check_filters(filters: Mapping[str, Any]) -> None:
    """Check filters before they are used.

    Raises:
        UserError: one is no value, no list of values and no comparison.
    """
    for name, wanted in filters.items():
        if isinstance(wanted, Mapping) and wanted:
            values = list(wanted.values())
            if unknown := [sign for sign in wanted if sign not in COMPARISONS]:
                raise UserError(f"filter {name}: {unknown[0]!r} is no comparison; use {', '.join(COMPARISONS)}")
        else:
            values = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
        if not all(isinstance(value, str | int | float | bool) for value in values):
            raise UserError(
                f"filter {name}: {wanted!r} is neither a text, a number, true or false nor a list of such nor a "
                f"comparison such as {{'>=': 2000}}"
            )


def matches(filters: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """Return whether the metadata of a document match all filters."""
    return all(name in metadata and _matches(wanted, metadata[name]) for name, wanted in filters.items())


def _matches(wanted: Any, value: Any) -> bool:
    if isinstance(wanted, Mapping):
        return all(
            (sign == "!=" or isinstance(value, str) == isinstance(other, str)) and COMPARISONS[sign](value, other)
            for sign, other in wanted.items()
        )
    if isinstance(wanted, list | tuple | set | frozenset):
        return any(_equal(value, one) for one in wanted)
    return _equal(value, wanted)


def _equal(value: Any, other: Any) -> bool:
    # True is 1 in Python, but not to who asks for the year 1.
    return isinstance(value, bool) == isinstance(other, bool) and value == other
