"""A document: its text, what is known about it, and where its pages and headings begin."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.errors import UserError

Value = str | int | float | bool


@dataclass(frozen=True)
class Mark:
    """A place in a text where a page begins, or a section under a heading.

    Args:
        start: the character with which it begins.
        kind: `page` or `heading`.
        value: the number of the page, from 1, or the heading.
    """

    start: int
    kind: str
    value: str


@dataclass(frozen=True)
class Document:
    """A text that is searched.

    Args:
        id: what names it in answers; no two documents of an index have the same.
        text: the whole text.
        metadata: what is known about it, by name; searches can be limited to documents by these.
        marks: where its pages and headings begin, in the order of the text.

    Raises:
        UserError: the id is empty, a string cannot be written as UTF-8, a mark is outside the text or before the one in
            front of it, or a value of the metadata is none of a text, a finite number, true and false.
    """

    id: str
    text: str
    metadata: Mapping[str, Value] = field(default_factory=dict)
    marks: tuple[Mark, ...] = ()

    def __post_init__(self) -> None:
        if not self.id:
            raise UserError("a document has an empty id; give each document an id of its own")
        names = {"id": self.id, "text": self.text}
        names |= {f"metadata {name!r}": name + value for name, value in self.metadata.items() if isinstance(value, str)}
        for name, text in names.items():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"document {self.id!r}: {name} has half a surrogate pair at character {error.start}; leave it out"
                ) from None
        for name, value in self.metadata.items():
            if not isinstance(value, Value) or (isinstance(value, float) and not math.isfinite(value)):
                raise UserError(
                    f"document {self.id!r}: metadata {name!r} is {value!r}; give a text, a finite number, true or false"
                )
        starts = [0, *(mark.start for mark in self.marks), len(self.text)]
        if starts != sorted(starts):
            raise UserError(f"document {self.id!r}: its marks are not in the order of the text; sort them")

    def mark(self, kind: str, position: int) -> str | None:
        """Return the page or the heading that a character stands under.

        Args:
            kind: `page` or `heading`.
            position: the character.

        Returns:
            The value of the last mark of this kind that begins there or before; None if there is none.
        """
        marks = self.marks[: bisect_right(self.marks, position, key=lambda mark: mark.start)]
        return next((mark.value for mark in reversed(marks) if mark.kind == kind), None)
