"""Documents refuse what could not be kept, and know where their pages and headings begin."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from retrieval import Document, Mark

MARKS = st.lists(st.builds(Mark, st.integers(0, 20), st.sampled_from(["page", "heading"]), st.text(max_size=3)))


@given(MARKS, st.integers(0, 20))
def test_a_character_stands_under_the_last_mark_before_it(marks, position):
    marks.sort(key=lambda mark: mark.start)
    document = Document("d", "x" * 20, marks=tuple(marks))
    for kind in ("page", "heading"):
        before = [mark.value for mark in marks if mark.kind == kind and mark.start <= position]
        assert document.mark(kind, position) == (before[-1] if before else None)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"id": "", "text": "t"}, "empty id"),
        ({"id": "\ud800", "text": "t"}, "id has half a surrogate pair at character 0"),
        ({"id": "d", "text": "ab\udfff"}, "text has half a surrogate pair at character 2"),
        ({"id": "d", "text": "t", "metadata": {"title": "\ud800"}}, "metadata 'title' has half"),
        ({"id": "d", "text": "t", "metadata": {"year": [1]}}, r"metadata 'year' is \[1\]"),
        ({"id": "d", "text": "t", "metadata": {"year": math.nan}}, "metadata 'year' is nan"),
        ({"id": "d", "text": "t", "marks": (Mark(1, "page", "2"), Mark(0, "page", "1"))}, "order of the text"),
        ({"id": "d", "text": "t", "marks": (Mark(2, "page", "1"),)}, "order of the text"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_one_sentence(values, told):
    with pytest.raises(UserError, match=told):
        Document(**values)
