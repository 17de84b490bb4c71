"""Files of each format give their text, their pages and their headings, and damaged ones say what is wrong."""

import random
import re
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from retrieval.documents.document import Document
from retrieval.documents.formats import (
    FORMATS,
    UnreadableFile,
    _flattened,
    read_file,
    read_html,
    read_markdown,
    read_text,
)
from tests.retrieval.documents import sample_files

for _package in ("selectolax", "pypdf", "docx", "markdown_it"):
    pytest.importorskip(_package, reason="the extra 'files' is not installed")

from selectolax.lexbor import LexborHTMLParser  # noqa: E402


def write(tmp_path, name: str, data: bytes | str):
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def sections(text) -> dict[str, str]:
    """The text from each mark on to the next of its kind, by the kind and value of the mark."""
    found = {}
    for kind in ("page", "heading"):
        marks = [mark for mark in text.marks_in_order() if mark.kind == kind]
        ends = [*(mark.start for mark in marks), len(str(text))][1:]
        found |= {f"{kind} {mark.value}": str(text)[mark.start : end] for mark, end in zip(marks, ends, strict=True)}
    return found


@pytest.mark.promise("R4")
@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_plain_text_stays_as_it_is(text, encoding):
    if not text.startswith("\ufeff"):
        assert str(read_text(text.encode(encoding))) == text
        assert str(read_markdown(text.encode(encoding))) == text


@pytest.mark.promise("R4")
def test_form_feeds_are_ends_of_pages():
    assert sections(read_text(b"one\r\n\x0ctwo\x0c")) == {"page 1": "one\r\n\x0c", "page 2": "two\x0c"}
    assert not read_text(b"one").marks


@pytest.mark.promise("R4")
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_headings_of_markdown(line_end):
    lines = [
        *("---", "title: No heading", "---", "# One *and* [two](http://x.y) #", "text", "```", "# no", "```"),
        *("Three `four`", "=====", "\x00 text 😀", "", "    # code", "", "#hashtag", "", "Line", "----", "### Last"),
    ]
    source = line_end.join(lines)
    text = read_markdown(source.encode())
    assert str(text) == source
    found = {mark.value: source[mark.start :].split(line_end)[0] for mark in text.marks}
    expected = {"One and two": lines[3], "Three four": lines[8], "Line": "Line", "Last": "### Last"}
    if line_end == "\r":  # front matter is not told apart there
        found.pop("title: No heading", None)
    assert found == expected


def test_front_matter_that_never_ends_is_text():
    """Ended by carriage returns, its lines once took twice the time for each more."""
    text = read_markdown(b"---\r\n" + b"line\r\n" * 10_000 + b"# Last\r\n")
    assert [mark.value for mark in text.marks] == ["Last"]


class Words(HTMLParser):
    """The words of a page by the parser of Python."""

    def __init__(self, page: str):
        super().__init__()
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_data(self, data):
        self.words += data.split()


TAGS = ["<p>", "<div>", "</div>", "<b>", "</b>", "<li>", "<h2>", "</h2>", "<pre>", "</pre>", "<section>", "<em>"]
WORDS = [" alpha ", " beta\n\n gamma ", " x&lt;y ", " &eacute;😀 ", " <br> ", " 漢字 "]
PAGES = st.lists(st.sampled_from(TAGS) | st.sampled_from(WORDS), max_size=25).map("".join)


@pytest.mark.promise("R4")
@given(PAGES)
def test_a_page_has_the_words_that_another_parser_finds(page):
    text = read_html(page.encode())
    assert str(text).split() == Words(page).words
    if "<pre>" not in page:
        assert not re.search("^[ \\n\\t]|[ \\n\\t]$|  ", str(text))


@pytest.mark.promise("R4")
def test_a_page_without_what_is_not_read():
    page = """<!doctype html><head><title> The\nlease </title><style>p {}</style></head><body><script>a<b</script>
    <h1>Rent <b>due</b></h1><p>In&nbsp;<i>Ma</i>y.<br>Not   in June.<!-- ? --><template>x</template>
    <table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table><pre>  x\n    y</pre>
    <h2></h2><h2>Roof</h2>It is new."""
    text = read_html(page.encode())
    assert text.metadata == {"title": "The lease"}
    body = "Rent due\n\nIn\xa0May.\nNot in June.\n\na\tb\nc\n\n  x\n    y\n\nRoof\n\nIt is new."
    assert str(text) == body
    assert sections(text) == {"heading Rent due": body[: body.index("Roof")], "heading Roof": "Roof\n\nIt is new."}


@pytest.mark.promise("R4")
def test_a_page_is_read_in_its_encoding():
    for head, encoding in (('<meta charset="latin-1">', "latin-1"), ("", "utf-8"), ("", "utf-16")):
        assert str(read_html(f"{head}<p>Café".encode(encoding))) == "Café"


def test_a_page_that_is_nested_deeper_than_browsers_go_has_its_text():
    blocks = "".join(f"<div class='a>b'>{n}<!-- ? -->" for n in range(1_000))
    ends = "".join(f"</div><b>{n}</b>c<script>left out</script>" for n in range(1_000))
    lines = [*map(str, range(1_000)), *(f"{n}c" for n in range(1_000))]
    assert str(read_html(f"{blocks}{ends}".encode())) == "\n".join(lines)
    page = "<div>" * 5_000 + "<p>deep" + "</b>" * 9 + "</div>" * 5_000 + "<p>end"
    assert str(read_html(page.encode())) == "deep\n\nend"
    node, depth = LexborHTMLParser(_flattened(page)).root, 0
    while node is not None:
        node, depth = node.child if node.tag != "head" else node.next, depth + 1
    assert 500 < depth < 530


@pytest.mark.promise("R4")
def test_a_pdf_has_its_pages_and_the_headings_of_its_outline(tmp_path):
    outline = (("the rent", 0), ("Not on the page", 1), ("Roof", 1))
    data = sample_files.pdf("Of The rent: due in May.", "The roof is new.", "", outline=outline, title="Lease")
    text = read_file(write(tmp_path, "lease.PDF", data))
    assert text.metadata == {"title": "Lease"}
    first, second = "Of The rent: due in May.", "The roof is new."
    assert str(text) == f"{first}\n\n{second}"
    assert sections(text) == {
        "page 1": first + "\n\n",
        "page 2": second,
        "page 3": "",
        "heading the rent": f"{first[3:]}\n\n",
        "heading Not on the page": "The ",
        "heading Roof": "roof is new.",
    }


@pytest.mark.promise("R4")
def test_a_word_document_has_its_pages_and_headings(tmp_path):
    text = read_file(write(tmp_path, "lease.docx", sample_files.docx()))
    assert text.metadata == {"title": "The lease"}
    body = (
        "Lease\n\nThe rent is due in May.\n\nRoof 😀\n\nThe roof is new.\tYes\n\n"
        "cell 0\tcell 1\nmerged\nlines\n\nThe end."
    )
    assert str(text) == body
    roof, page = body.index("Roof"), body.index("is new")
    assert sections(text) == {
        "page 1": body[:page],
        "page 2": body[page:],
        "heading Lease": body[:roof],
        "heading Roof 😀": body[roof:],
    }


@pytest.mark.promise("R4")
@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("empty.txt", b"", "has no text"),
        ("blank.md", b" \r\n\t", "has no text"),
        ("latin.txt", "Café".encode("latin-1"), "is not UTF-8 at byte 3; convert it"),
        ("odd.txt", b"\xff\xfe\x00", "is not UTF-16 at byte"),
        ("latin.html", "<p>Café".encode("latin-1"), "is not UTF-8 at byte 6"),
        ("charset.html", b"<meta charset=klingon><p>x", "is not what its charset says"),
        ("wrong.html", b"<meta charset=utf-8><p>\xff", "is not what its charset says"),
        ("blank.html", b"<script>x</script>", "has no text"),
        ("text.pdf", b"no pdf", "is damaged"),
        ("half.pdf", b"%PDF-1.4\n1 0 obj", "is damaged"),
        ("scan.pdf", lambda: sample_files.pdf("", ""), "has no text; it may be a scan"),
        (
            "secret.pdf",
            lambda: sample_files.encrypted_pdf("secret", "word"),
            "is encrypted; save it without a password",
        ),
        ("text.docx", b"no docx", "is damaged"),
        ("half.docx", lambda: sample_files.docx()[:2000], "is damaged"),
        ("missing.txt", None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_cannot_be_read_says_why_in_one_sentence(tmp_path, name, data, told):
    path = tmp_path / name
    if data is not None:
        write(tmp_path, name, data if isinstance(data, bytes) else data())
    with pytest.raises(UnreadableFile, match=re.escape(told)) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


INTACT = {
    "pdf": sample_files.pdf("one", "two", outline=(("a", 0),)),
    "docx": sample_files.docx(),
    "html": b"<h1>a</h1><pre>b</pre>" * 40,
}


@pytest.mark.parametrize("kind", INTACT)
def test_damage_in_the_middle_is_unreadable_or_has_a_text(tmp_path, kind):
    whole, generator = INTACT[kind], random.Random(0)
    for _ in range(40):
        start = generator.randrange(len(whole))
        damaged = (
            whole[:start] + generator.randbytes(generator.randrange(20)) + whole[start + generator.randrange(50) :]
        )
        try:
            text = read_file(write(tmp_path, f"damaged.{kind}", damaged))
        except UnreadableFile:
            continue
        Document("damaged", str(text), text.metadata, text.marks_in_order())


@pytest.mark.parametrize("suffix", [".html", ".pdf", ".docx", ".md"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, suffix):
    for package in ("selectolax.lexbor", "pypdf", "docx", "markdown_it"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"{suffix} files needs the extra 'files' \((selectolax|pypdf|docx|markdown_it)"
    ):
        read_file(write(tmp_path, f"file{suffix}", b"text"))
    assert suffix in FORMATS
