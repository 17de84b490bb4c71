"""The real page in a headless Chromium: what a visitor sees, and what the page does not do."""

import shutil
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

import pytest

from retrieval.documents.document import Document
from retrieval.index.index import Index
from tests.retrieval.conftest import make_documents
from tests.retrieval.server.conftest import running

pytest.importorskip("gradio", reason="needs gradio, of the extra serve")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra browser")

from retrieval.server.api import make_app  # noqa: E402
from retrieval.server.page import make_page, mount_page  # noqa: E402
from retrieval.server.service import Service  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.promise("S4"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
SCRIPT = "<script>window.ran = true</script><img src=x onerror='window.ran = true'>"
PATIENCE = 30_000  # milliseconds that a slow machine may take


@pytest.fixture
def service(tmp_path, tiny_model):
    text = "violin. " + " ".join(f"{document.text} {SCRIPT}." for document in make_documents(40, most=10))
    documents = [Document("long.txt", text), *make_documents(3)]
    return Service(Index.build(tmp_path / "index", documents, tiny_model, segments="late:8"))


@pytest.fixture
def visit():
    """Return a function that opens an address in Chromium, which finds no other host; and what was asked for."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        asked: list[str] = []

        def open_page(address: str):
            page = browser.new_page()
            page.set_default_timeout(PATIENCE)
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            return page, asked

        yield open_page
        browser.close()


def hosts(asked: list[str]) -> set[str | None]:
    return {urlsplit(address).hostname for address in asked if not address.startswith(("data:", "blob:"))}


def test_a_visitor_searches_and_sees_passages_where_they_stand(service, visit):
    with running(mount_page(make_app(service), make_page(service))) as port:
        page, asked = visit(f"http://127.0.0.1:{port}/")
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.get_by_label("Question").fill("violin")
        page.get_by_role("button", name="Search", exact=True).click()
        article = page.locator("article", has_text="long.txt")
        article.wait_for()
        document = service.index.document("long.txt").text
        assert article.locator("mark").count() == 3
        for passage in article.locator("blockquote").all():
            marked, shown = passage.locator("mark").text_content(), passage.text_content()
            assert marked in document
            assert len(marked) < len(shown) < len(document)
            assert shown.strip("…") in document
            assert passage.locator("mark").is_visible()
            box, inner = passage.bounding_box(), passage.locator("mark").bounding_box()
            assert box["y"] <= inner["y"] < inner["y"] + inner["height"] <= box["y"] + box["height"] + 1
        # The script is read as text, and none was run.
        assert any(SCRIPT in text for text in article.locator("blockquote").all_text_contents())
        assert page.locator("article script, article img").count() == 0
        assert page.evaluate("window.ran") is None
        curve = article.locator("svg path").bounding_box()
        assert curve["width"] > 100
        assert curve["height"] > 10
        assert hosts(asked) == {"127.0.0.1"}
        assert not errors


def test_a_visitor_searches_files_of_their_own(service, visit, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text(f"The cello {SCRIPT} was sold.")
    (tmp_path / "other.txt").write_text("The roof is new. " * 200)
    (tmp_path / "large.txt").write_bytes(b"a" * (service.own_files.most_bytes + 1))
    seen = Event()
    build = service.own_files.build

    def build_in_view(session, sent, on_progress):
        def wait_half_way(part: float) -> None:
            on_progress(part / 2)
            seen.wait(PATIENCE / 1000)

        return build(session, sent, wait_half_way)

    monkeypatch.setattr(service.own_files, "build", build_in_view)
    with running(mount_page(make_app(service), make_page(service))) as port:
        page, asked = visit(f"http://127.0.0.1:{port}/")

        def choose(*names: str) -> None:
            with page.expect_file_chooser() as chooser:
                page.get_by_role("button", name="Search text files of your own").click()
            chooser.value.set_files([tmp_path / name for name in names])

        choose("large.txt")
        page.get_by_text("Your files were not read: the files have more than 2 MiB together").wait_for()
        choose("mine.txt", "other.txt")
        page.get_by_text("Reading your files").wait_for()
        page.locator(".progress-bar").wait_for()
        seen.set()
        page.get_by_text("Searched now: mine.txt, other.txt").wait_for()
        page.get_by_label("Question").fill("cello")
        page.get_by_label("Question").press("Enter")
        article = page.locator("article", has_text="mine.txt")
        article.wait_for()
        assert SCRIPT in article.locator("blockquote").first.text_content()
        assert page.evaluate("window.ran") is None
        page.get_by_label("the index").check()
        page.get_by_label("Question").press("Enter")
        page.locator("article", has_text="long.txt").wait_for()
        assert page.locator("article", has_text="mine.txt").count() == 0
        (own,) = service.own_files._owned.values()
        folder = Path(own.folder.name)
        assert folder.exists()
        page.close()
        for _ in range(200):
            if not folder.exists():
                break
            Event().wait(0.1)
        assert not folder.exists()
        assert hosts(asked) == {"127.0.0.1"}
