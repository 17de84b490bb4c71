"""The page answers beside the server for programs, and asks for nothing from elsewhere."""

import re

import pytest

from retrieval.documents.document import Document
from retrieval.index.index import Index
from tests.retrieval.server.conftest import ask, running

pytest.importorskip("gradio", reason="needs gradio, of the extra serve")

from retrieval.server.api import make_app
from retrieval.server.page import make_page, mount_page
from retrieval.server.service import Service


@pytest.mark.promise("S4")
def test_the_page_shows_what_is_found(tmp_path, tiny_model):
    text = "river stone <script>alert(1)</script> cloud"
    service = Service(Index.build(tmp_path / "index", [Document("d", text)], tiny_model, segments="late:8"))
    page = make_page(service)
    (search,) = [block.fn for block in page.fns.values()]
    assert "&lt;script&gt;" in search("river", 10)
    assert "<script>" not in search("river", 10)
    assert search("", 10) == "<p>Nothing was found.</p>"
    assert "shorter" in search("x" * 100_001, 10)
    assert "half a surrogate pair" in search("\ud83d", 10)
    with running(mount_page(make_app(service), page)) as port:
        status, shown = ask(port, "/")
        assert status == 200
        loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)=["'](https?:[^"']*)""", shown)
        assert not [address for address in loaded if f"127.0.0.1:{port}" not in address]
        assert "fonts.googleapis" not in shown + str(ask(port, "/theme.css"))
        assert ask(port, "/search", {"query": "river"})[1]["hits"][0]["id"] == "d"
        assert ask(port, "/health")[0] == 200
        for path in (
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/file=../../../etc/passwd",
            "/static/../../../etc/passwd",
        ):
            assert ask(port, path)[0] in (403, 404)
    assert not service.worker.is_alive
