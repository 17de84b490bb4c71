"""The page answers beside the server for programs, and takes and gives out no file."""

import base64
import http.client
import json
import re

import pytest

from retrieval.documents.document import Document
from retrieval.index.index import Index
from tests.retrieval.server.conftest import ask, running

pytest.importorskip("gradio", reason="needs gradio, of the extra serve")

from retrieval.server.api import make_app
from retrieval.server.page import SERVED, make_page, mount_page
from retrieval.server.service import Service

EVIL = "river stone <script>alert(1)</script> cloud"


@pytest.fixture
def service(tmp_path, tiny_model):
    made = Service(Index.build(tmp_path / "index", [Document("d", EVIL)], tiny_model, segments="late:8"))
    yield made
    made.close()


def call(port: int, page, name: str, data: list) -> dict:
    """Call a function of the page as the browser does, and return how Gradio says that it ended."""
    (number,) = [number for number, block in page.fns.items() if block.fn.__name__ == name]
    request = {"fn_index": number, "data": data, "session_hash": "session", "trigger_id": None, "event_data": None}
    status, answer = ask(port, "/gradio_api/queue/join", request)
    assert status == 200, answer
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/gradio_api/queue/data?session_hash=session")
    for line in connection.getresponse():
        if line.startswith(b"data:") and b'"process_completed"' in line:
            connection.close()
            return json.loads(line[5:])
    raise AssertionError("no end")


@pytest.mark.promise("S4")
def test_the_page_shows_what_is_found_and_searches_files_of_ones_own(service):
    page = make_page(service)
    with running(mount_page(make_app(service), page)) as port:
        status, shown = ask(port, "/")
        assert status == 200
        loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)=["'](https?:[^"']*)""", shown)
        assert not [address for address in loaded if f"127.0.0.1:{port}" not in address]
        assert "fonts.googleapis" not in shown + str(ask(port, "/theme.css"))
        assert ask(port, "/search", {"query": "river"})[1]["hits"][0]["id"] == "d"
        assert ask(port, "/health")[0] == 200

        def search(*data) -> str:
            return call(port, page, "search", list(data))["output"]["data"][0]

        assert "&lt;script&gt;" in search("river", 10, SERVED)
        assert "<script>" not in search("river", 10, SERVED)
        assert search("", 10, SERVED) == "<p>Nothing was found.</p>"
        assert "shorter" in search("x" * 100_001, 10, SERVED)
        assert "choose them again" in search("river", 10, "my files")

        files = [("mine.txt", base64.b64encode(b"violin <b>bow</b>").decode())]
        told, where, kept = call(port, page, "read", [json.dumps(files)])["output"]["data"]
        assert "mine.txt" in told
        assert where["value"] == "my files"
        assert kept == ""
        assert "violin &lt;b&gt;bow" in search("violin", 10, "my files")
        assert "mine.txt" not in search("violin", 10, SERVED)
        told, where, _ = call(port, page, "read", ['[["a.txt", "%"]]'])["output"]["data"]
        assert "Your files were not read: the page sent something else" in told
    assert not service.worker.is_alive
    assert service.own_files.index("session") is None


@pytest.mark.promise("S4")
def test_no_path_and_no_address_of_a_request_is_followed(service, monkeypatch):
    from gradio import processing_utils

    followed = []
    # What Gradio does with a file or an address that stands in the place of a text.
    monkeypatch.setattr(processing_utils, "async_move_files_to_cache", lambda *_, **__: followed.append(1))
    page = make_page(service)
    with running(mount_page(make_app(service), page)) as port:
        for path in ("/etc/passwd", "https://example.org/file.txt"):
            file = {"path": path, "url": path, "orig_name": "a.txt", "meta": {"_type": "gradio.FileData"}}
            for data in ([file, 10, SERVED], ["river", file, SERVED], [[file], 10, SERVED]):
                assert not call(port, page, "search", data)["success"]
            assert not call(port, page, "read", [file])["success"]
        assert not followed
        for path in (
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/file=../../../etc/passwd",
            "/gradio_api/file/etc/passwd",
            "/gradio_api/proxy=https://example.org/",
            "/gradio_api/custom_component/1/client/component/../../../../etc/passwd",
            "/gradio_api/upload",
            "/gradio_api/upload_progress",
            "/static/../../../etc/passwd",
            "/svelte/../../../../../etc/passwd",
            "/assets/..%2f..%2f..%2f..%2fetc/passwd",
        ):
            assert ask(port, path)[0] in (403, 404), path
        assert ask(port, "/gradio_api/upload", b"--x")[0] == 404
        assert ask(port, "/gradio_api/component_server", {"fn_name": "ls", "component_id": 1, "data": ["/"]})[0] == 404
