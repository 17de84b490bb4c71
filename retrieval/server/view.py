"""What was found as HTML: texts of documents are always escaped, and nothing is loaded from elsewhere."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retrieval.documents.document import Document
from retrieval.ranking import Hit, Passage

# Characters that are shown before and after a passage.
AROUND = 300
# The curve: points in SVG's own unit.
WIDTH, HEIGHT = 600, 48
# Beside HTML's own characters those of the templates that Gradio's HTML component knows.
TEMPLATES = str.maketrans({character: f"&#{ord(character)};" for character in "{}$`\\"})


@dataclass(frozen=True)
class Found:
    """A document that was found, with what is shown of it.

    Args:
        hit: its scores, and its best passages.
        document: its text.
        passages: all of its passages with their scores.
    """

    hit: Hit
    document: Document
    passages: Sequence[Passage]


def escaped(text: object) -> str:
    """Return a text so that a browser shows it as it is."""
    return html.escape(str(text)).translate(TEMPLATES)


def page_of(found: Sequence[Found]) -> str:
    """Return the HTML of the documents that were found, best first."""
    if not found:
        return message("Nothing was found.")
    return "".join(article(rank, one) for rank, one in enumerate(found, 1))


def message(text: str) -> str:
    """Return the HTML of a sentence in the place of documents."""
    return f"<p>{escaped(text)}</p>"


def article(rank: int, found: Found) -> str:
    """Return the HTML of a document: its scores, the curve along it, and its best passages where they stand.

    Args:
        rank: from 1.
        found: the document.
    """
    hit = found.hit
    parts = " · ".join(f"{escaped(name)} {value:.3f}" for name, value in hit.parts.items())
    known = " · ".join(f"{escaped(name)}: {escaped(value)}" for name, value in hit.metadata.items())
    shown = "".join(window(found.document, passage) for passage in hit.passages)
    return (
        f'<article style="margin: 0 0 2em">'
        f"<h3>{rank}. {escaped(hit.id)}</h3>"
        f"<p>score {hit.score:.3f} ({parts})</p>"
        f"{f'<p>{known}</p>' if known else ''}{curve(found)}{shown}</article>"
    )


def window(document: Document, passage: Passage) -> str:
    """Return the HTML of a passage, marked, with what stands around it.

    Args:
        document: that it is in.
        passage: its place.
    """
    text, start, end = document.text, passage.start, passage.end
    first, last = max(0, start - AROUND), min(len(text), end + AROUND)
    places = [f"characters {start:,} to {end:,}"]
    places += [] if passage.page is None else [f"page {passage.page}"]
    places += [] if passage.heading is None else [passage.heading]
    return (
        f"<p><small>{escaped(' · '.join(places))} · score {passage.score:.3f}</small></p>"
        f'<blockquote style="white-space: pre-wrap; overflow-wrap: anywhere">{"…" if first else ""}'
        f"{escaped(text[first:start])}<mark>{escaped(text[start:end])}</mark>{escaped(text[end:last])}"
        f"{'…' if last < len(text) else ''}</blockquote>"
    )


def curve(found: Found) -> str:
    """Return an SVG of the score along a document: the best passage at each place, and lines where passages are shown.

    Args:
        found: the document; one without scores has no curve.
    """
    length = max(1, len(found.document.text))
    heights = np.full(WIDTH, -np.inf)
    for passage in found.passages:
        if math.isfinite(passage.score):
            first = min(WIDTH - 1, passage.start * WIDTH // length)
            place = slice(first, max(first + 1, -(-passage.end * WIDTH // length)))
            heights[place] = np.maximum(heights[place], passage.score)
    scored = heights[np.isfinite(heights)]
    if not len(scored):
        return ""
    low, high = scored.min(), scored.max()
    heights = np.where(np.isfinite(heights), (heights - low) / (high - low or 1), 0)
    # From the bottom, so that a document of one height has a line too.
    levels = HEIGHT - 4 - (HEIGHT - 8) * heights
    steps = np.flatnonzero(np.diff(levels, prepend=np.nan))
    line = f"M0 {levels[0]:.1f} " + " ".join(f"H{x} V{levels[x]:.1f}" for x in steps[1:]) + f" H{WIDTH}"
    marks = "".join(
        f'<line x1="{passage.start * WIDTH / length:.1f}" x2="{passage.end * WIDTH / length:.1f}" '
        f'y1="{HEIGHT - 1}" y2="{HEIGHT - 1}" stroke-width="2" opacity="0.5"/>'
        for passage in found.hit.passages
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" width="100%" height="{HEIGHT}" role="img" '
        f'aria-label="score along the document" fill="none" stroke="currentColor"><path d="{line}"/>{marks}</svg>'
    )
