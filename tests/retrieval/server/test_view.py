"""What is shown of a document: its text as it is, and the curve of its scores."""

import html
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.documents.document import Document
from retrieval.ranking import Hit, Passage
from retrieval.server.view import AROUND, HEIGHT, WIDTH, Found, curve, page_of

EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)> & ${alert(3)} {{value}} `${4}`'


def found_in(text, scores, id="d", metadata=None):
    """A document of passages of equal length, of which the first is shown."""
    size = len(text) // len(scores)
    passages = [
        Passage(size * n, size * (n + 1), text[size * n : size * (n + 1)], score, EVIL, EVIL)
        for n, score in enumerate(scores)
    ]
    return Found(Hit(id, 1.0, {"words": 2.0}, passages[:1], metadata or {}), Document(id, text), passages)


@pytest.mark.promise("S4")
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1) | st.just(EVIL))
def test_the_text_of_a_document_is_shown_and_never_read_as_html(text):
    shown = page_of([found_in(EVIL + text, [1.0], EVIL + text, {EVIL: text})])
    assert set(re.findall(r"</?([A-Za-z0-9!]*)", shown)) <= {
        *["article", "h3", "p", "small", "blockquote", "mark", "svg", "path", "line"]
    }
    assert not re.search(r"[{}$`]", shown)
    (marked,) = re.findall("<mark>(.*?)</mark>", shown, re.DOTALL)
    assert html.unescape(marked) == EVIL + text
    assert html.unescape(re.findall("<h3>1. (.*?)</h3>", shown, re.DOTALL)[0]) == EVIL + text


def test_a_passage_is_marked_in_a_window_of_its_document():
    text = "".join(chr(0x4E00 + n) for n in range(3000))
    passage = Passage(1000, 1100, text[1000:1100], 0.5, "7", None)
    shown = page_of([Found(Hit("d", 1.0, {}, [passage]), Document("d", text), [passage])])
    before, after = text[1000 - AROUND : 1000], text[1100 : 1100 + AROUND]
    assert f">…{before}<mark>{text[1000:1100]}</mark>{after}…<" in shown
    assert "characters 1,000 to 1,100 · page 7 · score 0.500" in shown


@pytest.mark.parametrize(
    ("scores", "levels"), [([0, 5, 10, float("-inf")], [0, 0.5, 1, 0]), ([3], [0]), ([2, 2], [0, 0])]
)
def test_the_curve_is_the_scores_along_the_document(scores, levels):
    drawn = ElementTree.fromstring(curve(found_in("x" * 1200, scores)))
    steps = re.findall(r"([MHV])([\d.]+)(?: ([\d.]+))?", drawn.find("path").get("d"))
    heights, x, y = [0.0] * WIDTH, 0, 0.0
    for kind, first, second in steps:
        if kind == "H":
            heights[x : int(first)] = [y] * (int(first) - x)
            x = int(first)
        else:
            y = 1 - (float(second or first) - 4) / (HEIGHT - 8)
    assert x == WIDTH
    for place, level in enumerate(levels):
        middle = int((place + 0.5) * WIDTH / len(levels))
        assert heights[middle] == pytest.approx(level, abs=0.01)


def test_where_nothing_has_a_score_there_is_no_curve():
    assert curve(found_in("x", [float("-inf")])) == ""
    assert page_of([]) == "<p>Nothing was found.</p>"
