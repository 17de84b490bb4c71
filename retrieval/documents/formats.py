"""Files of documents as text: plain text, Markdown, HTML, PDF and Word, with their pages and headings."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from common.errors import UserError, one_line
from retrieval.documents.document import Mark, Value

_BYTE_ORDER_MARKS = {  # that of UTF-32 begins with that of UTF-16
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_LINE_END = re.compile(r"\r\n?|\n")
# A dot takes a carriage return too: one more way to match the end of a line would double the time for each line.
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(?:.*\n)*?(?:---|\.\.\.)[ \t]*(?:\r?\n|$)")
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_SEPARATORS = ("", " ", "\t", "\n", "\n\n")  # between two pieces of text; of several the last of these counts
_LEFT_OUT = {
    *("head", "script", "style", "template", "svg", "iframe", "object", "canvas", "audio", "video"),
    *("select", "button", "textarea", "datalist"),
}
_BLOCKS = {
    **dict.fromkeys(("td", "th"), "\t"),
    **dict.fromkeys(("br", "div", "li", "tr", "dt", "dd", "option", "caption", "figcaption", "summary"), "\n"),
    **dict.fromkeys(("p", "pre", "blockquote", "ul", "ol", "dl", "table", "figure", "hr", "form", "fieldset"), "\n\n"),
    **dict.fromkeys(("section", "article", "main", "nav", "aside", "header", "footer", "address", "details"), "\n\n"),
    **dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), "\n\n"),
}
# Elements that may be left open without a mistake, that have no content, or whose content is not read.
_NOT_NESTED = {
    *("html", "body", "p", "li", "dt", "dd", "option", "tr", "td", "th", "thead", "tbody", "tfoot", "rt", "rp"),
    *("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"),
    *("title", "noscript", "noframes", "xmp"),
    *_LEFT_OUT,
}
_TAG = re.compile(r"<(/?)([a-z][a-z0-9-]*)", re.IGNORECASE)
_DEEPEST = 512  # elements in each other, as in browsers


class UnreadableFile(Exception):
    """A file has no text that can be read; the message says why, as the end of a sentence about the file."""


@dataclass
class Text:
    """The text of a file while it is put together.

    Args:
        pieces: what was written.
        marks: where pages and headings begin.
        metadata: what the file says about itself.
    """

    pieces: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    metadata: dict[str, Value] = field(default_factory=dict)
    _length: int = 0
    _separator: str = ""

    def __str__(self) -> str:
        return "".join(self.pieces)

    def separate(self, separator: str) -> None:
        """Put a separator in front of what is written next; nothing is put in front of the first piece."""
        self._separator = max(self._separator, separator, key=_SEPARATORS.index)

    def write(self, text: str) -> None:
        """Write a piece of text."""
        if not text:
            return
        text = _with_whole_pairs(text)
        self.pieces += [self._separator, text] if self._length else [text]
        self._length = self.place + len(text)
        self._separator = ""

    @property
    def place(self) -> int:
        """The character with which the next piece begins."""
        return self._length + len(self._separator) if self._length else 0

    def mark(self, kind: str, value: str, start: int | None = None) -> None:
        """Say that a page or a section begins.

        Args:
            kind: `page` or `heading`.
            value: its number or its heading.
            start: the character with which it begins; None: the next one.
        """
        value = " ".join(_with_whole_pairs(value).split())
        if value:
            self.marks.append(Mark(self.place if start is None else start, kind, value))

    def marks_in_order(self) -> tuple[Mark, ...]:
        """Return the marks in the order of the text. A page without text at the end begins at the end."""
        marks = [Mark(min(mark.start, self._length), mark.kind, mark.value) for mark in self.marks]
        return tuple(sorted(marks, key=lambda mark: mark.start))


def _with_whole_pairs(text: str) -> str:
    """Return text whose halves of surrogate pairs, which some files have, are joined or replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_file(path: str | Path, open_file: Callable[[], BinaryIO] | None = None) -> Text:
    """Read a file in the format that its name says.

    Args:
        path: a file with one of the `FORMATS`.
        open_file: opens it, if it is not a file of this machine.

    Returns:
        Its text.

    Raises:
        UnreadableFile: it cannot be opened, is damaged, or has no text.
        UserError: a package that reads the format is not installed.
    """
    try:
        with open(path, "rb") if open_file is None else open_file() as file:
            data = file.read()
    except OSError as error:
        raise UnreadableFile(f"cannot be read: {error.strerror or one_line(error)}") from None
    return read_data(data, PurePath(path).suffix.lower())


def read_data(data: bytes, suffix: str) -> Text:
    """Read what is in a file in the format of a suffix.

    Args:
        data: the whole file.
        suffix: one of the `FORMATS`.

    Returns:
        Its text.

    Raises:
        UnreadableFile: it is damaged, or has no text.
        UserError: a package that reads the format is not installed.
    """
    try:
        text = FORMATS[suffix](data)
    except (UserError, UnreadableFile):
        raise
    except Exception as error:  # readers of formats meet damage in the middle of anything
        raise UnreadableFile(f"is damaged ({type(error).__name__}: {one_line(error, most=200)})") from None
    if not any(piece.strip() for piece in text.pieces):
        raise UnreadableFile("has no text" + "; it may be a scan" * (suffix == ".pdf"))
    return text


def _package(name: str, suffix: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"reading {suffix} files needs the extra 'files' ({error.name} is missing)") from None


def read_text(data: bytes) -> Text:
    """Read plain text as it stands, in UTF-8 or with a byte order mark. Form feeds are the ends of pages."""
    text = Text()
    text.write(_decode(data))
    ends = [match.end() for match in re.finditer("\f", str(text))]
    for number, start in enumerate([0, *ends] if ends else [], start=1):
        if start < text.place:
            text.mark("page", str(number), start)
    return text


def read_markdown(data: bytes) -> Text:
    """Read Markdown as it stands, and find its headings."""
    parser = _package("markdown_it", ".md").MarkdownIt("commonmark")
    text = Text()
    text.write(_decode(data))
    source = str(text)
    front_matter = _FRONT_MATTER.match(source)
    begin = front_matter.end() if front_matter else 0
    lines = [begin, *(match.end() for match in _LINE_END.finditer(source, begin))]
    parser.disable("inline")  # of all but the headings, where it would take most of the time
    tokens = parser.parse(source[begin:])
    parser.enable("inline")
    for opening, words in pairwise(tokens):
        if opening.type == "heading_open":
            (heading,) = parser.parseInline(words.content)
            shown = "".join(part.content or " " for part in heading.children)
            text.mark("heading", shown, lines[opening.map[0]])
    return text


def _decode(data: bytes) -> str:
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"is not {encoding.upper()} at byte {error.start}; convert it") from None


def read_html(data: bytes) -> Text:
    """Read what a page of HTML says: its text without scripts, forms and drawings, a line break after each block."""
    parser = _package("selectolax.lexbor", ".html").LexborHTMLParser
    declared = _CHARSET.search(data[:1024])
    try:
        if declared and not data.startswith(tuple(_BYTE_ORDER_MARKS)):
            source = data.decode(declared[1].decode())
        else:
            source = _decode(data)
    except (LookupError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"is not what its charset says ({one_line(error)}); correct one of them") from None
    tree, text = parser(_flattened(source)), Text()
    if (title := tree.css_first("head > title")) is not None and title.text().strip():
        text.metadata["title"] = " ".join(title.text().split())
    headings: list[tuple[int, int]] = []  # the characters and the pieces with which the headings around a node begin
    verbatim = 0
    for node, begins in _nodes(tree.root):
        if node.tag == "-text" and begins:
            _write_words(text, node.text_content or "", verbatim > 0)
            continue
        text.separate(_BLOCKS.get(node.tag, ""))
        if node.tag == "pre":
            verbatim += 1 if begins else -1
        elif re.fullmatch("h[1-6]", node.tag) and begins:
            headings.append((text.place, len(text.pieces)))
        elif re.fullmatch("h[1-6]", node.tag):
            start, pieces = headings.pop()
            text.mark("heading", "".join(text.pieces[pieces:]), start)
    return text


def _flattened(source: str) -> str:
    """Return HTML in which no more than 512 elements are in each other; blocks beyond are line breaks.

    At each new block the parser looks through all elements that are open, so that a page of a megabyte that opens
    100,000 of them would take minutes.
    """
    opened: Counter[str] = Counter()
    depth = 0

    def shallow(match: re.Match[str]) -> str:
        nonlocal depth
        name, ends = match[2].lower(), bool(match[1])
        if name in _NOT_NESTED or (ends and not opened[name]):
            return match[0]
        opened[name] += -1 if ends else 1
        depth += -1 if ends else 1
        if depth + ends <= _DEEPEST:
            return match[0]
        return "<br" if name in _BLOCKS else "<wbr"

    return _TAG.sub(shallow, source)


def _nodes(node: Any) -> Iterator[tuple[Any, bool]]:
    """Yield each node below one when it begins (True) and when it ends; without recursion, as pages nest deeply."""
    while True:
        yield node, True
        if node.child is not None and node.tag not in _LEFT_OUT:
            node = node.child
            continue
        yield node, False
        while node.next is None:
            node = node.parent
            if node is None:
                return
            yield node, False
        node = node.next


def _write_words(text: Text, words: str, verbatim: bool) -> None:
    """Write the text of a node, in which white space is one blank unless it is `verbatim`."""
    if verbatim:
        text.write(words)
        return
    inner = words.strip(" \t\n\r\f")
    if words[:1] != inner[:1]:
        text.separate(" ")
    text.write(re.sub(r"[ \t\n\r\f]+", " ", inner))
    if words[-1:] != inner[-1:]:
        text.separate(" ")


def read_pdf(data: bytes) -> Text:
    """Read the text of a PDF, its pages, and the headings of its outline where they stand on their pages."""
    pypdf = _package("pypdf", ".pdf")
    reader = pypdf.PdfReader(BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise UnreadableFile("is encrypted; save it without a password")
    text = Text()
    if reader.metadata is not None and (reader.metadata.title or "").strip():
        text.metadata["title"] = " ".join(reader.metadata.title.split())
    headings: dict[int, list[str]] = {}
    for entry in _flat(reader.outline):
        page = reader.get_destination_page_number(entry)
        headings.setdefault(-1 if page is None else page, []).append(str(entry.title))
    for number, page in enumerate(reader.pages):
        text.separate("\n\n")
        start, shown = text.place, _with_whole_pairs(page.extract_text())
        text.mark("page", str(number + 1))
        text.write(shown)
        for heading in headings.get(number, ()):
            found = re.search(r"\s+".join(map(re.escape, heading.split())), shown, re.IGNORECASE)
            text.mark("heading", heading, start + (found.start() if found else 0))
    return text


def _flat(outline: list[Any]) -> Iterator[Any]:
    for entry in outline:
        if isinstance(entry, list):
            yield from _flat(entry)
        else:
            yield entry


def read_docx(data: bytes) -> Text:
    """Read the paragraphs and tables of a Word document, its headings, and its pages as Word last laid them out."""
    document, text = _package("docx", ".docx").Document(BytesIO(data)), Text()
    if (document.core_properties.title or "").strip():
        text.metadata["title"] = " ".join(document.core_properties.title.split())
    headings = {style.style_id for style in document.styles if _is_heading(style)}
    body = document.element.body
    page = 1
    if body.xpath(".//w:lastRenderedPageBreak"):
        text.mark("page", "1")
    # Not python-docx's own paragraphs and tables: they leave out what was inserted while changes were tracked, and the
    # content of fields to fill in, and repeat merged cells. Text boxes are left out: they stand there twice.
    parts = ".//w:t | .//w:tab[parent::w:r] | .//w:br | .//w:cr | .//w:noBreakHyphen | .//w:lastRenderedPageBreak"
    row: Any = None
    cell: Any = None
    for paragraph in body.xpath(".//w:p[not(ancestor::w:txbxContent)]"):
        row_before, cell_before = row, cell
        row, cell = (next(iter(paragraph.xpath(f"ancestor::w:{tag}[1]")), None) for tag in ("tr", "tc"))
        if row is None or row_before is None or row.getparent() is not row_before.getparent():
            text.separate("\n\n")
        else:
            text.separate("\t" if row is row_before and cell is not cell_before else "\n")
        start, pieces = text.place, len(text.pieces)
        for part in paragraph.xpath(parts):
            if part.tag.endswith("}lastRenderedPageBreak"):
                page += 1
                text.mark("page", str(page))
            elif not part.xpath("ancestor::w:txbxContent"):
                text.write(str(part))
        if paragraph.style in headings:
            text.mark("heading", "".join(text.pieces[pieces:]), start)
    return text


def _is_heading(style: Any) -> bool:
    """Check whether a style of a Word document is that of a heading, or is made from one."""
    while style is not None:
        if re.fullmatch(r"Title|Heading \d", style.name or ""):
            return True
        style = getattr(style, "base_style", None)
    return False


FORMATS: dict[str, Callable[[bytes], Text]] = {
    ".txt": read_text,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
    ".pdf": read_pdf,
    ".docx": read_docx,
}
