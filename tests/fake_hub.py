"""A Hub on 127.0.0.1 that answers as a test says, for what happens when the real one does not."""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import close_session, constants

COMMIT = "a" * 40


class FakeHub:
    """Answers the requests of huggingface_hub.

    Attributes:
        url: address of the server.
        requests: method and path of each request so far.
        bodies: what was sent with each of them.
        answer: method and path -> status, headers, body.
    """

    def __init__(self, answer: Callable[[str, str], tuple[int, dict[str, str], bytes]]):
        self.answer, self.requests, self.bodies = answer, list[tuple[str, str]](), list[bytes]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self):
                hub.bodies.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
                hub.requests.append((self.command, self.path))
                status, headers, body = hub.answer(self.command, self.path)
                if status == 0:  # the connection breaks in the middle of an answer
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        """Stop the server: from now on there is no connection."""
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def fake_hub(monkeypatch, cache, answer):
    """Let huggingface_hub ask a `FakeHub` and use an empty cache, without waiting before it asks again."""
    hub = FakeHub(answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    close_session()
    try:
        yield hub
    finally:
        close_session()
        hub.close()
