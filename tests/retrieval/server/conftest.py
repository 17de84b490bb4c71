"""A server of a tiny index on 127.0.0.1, and how a client asks it."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from retrieval.index.index import Index
from retrieval.serve import listen
from tests.retrieval.conftest import make_documents


def ask(port: int, path: str, body: Any = None, *, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Send a request, with JSON, bytes or nothing, and return the status and what the answer holds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if "json" in answer.headers["Content-Type"] else text


@contextmanager
def running(app: Any) -> Iterator[int]:
    """Serve an application in a thread, and give its port."""
    from retrieval.server.process import make_server

    with listen("127.0.0.1", 0) as listening:
        server = make_server(app)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def index(tiny_model, tmp_path_factory):
    """Twelve documents; float32 also where the processor is fast in bfloat16, which rounds differently in a batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_longembed.encoding_longembed.is_fast_in_bfloat16", lambda device: False)
        folder = tmp_path_factory.mktemp("served") / "index"
        yield Index.build(folder, make_documents(12), tiny_model, segments="late:8")
