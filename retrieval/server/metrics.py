"""Metrics of the server, in the format of Prometheus."""

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Requests are counted by these paths; all others are the page's.
PATHS = ("/v1/embeddings", "/v1/models", "/search", "/health", "/metrics")


class Metrics:
    """What is counted while the server runs."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "longembed_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "longembed_request_seconds", "Time from a request to its answer", ["path"], registry=self.registry
        )
        self.batch_tokens = Histogram(
            "longembed_batch_tokens",
            "Tokens that were computed together",
            buckets=[4**power for power in range(2, 11)],
            registry=self.registry,
        )
        self.queue_tokens = Gauge("longembed_queue_tokens", "Tokens that wait", registry=self.registry)
        self.documents = Gauge("longembed_documents", "Documents of the index", registry=self.registry)

    def watch(self, queue_tokens: Callable[[], int], documents: Callable[[], int]) -> None:
        """Set the functions that tell what there is when the metrics are asked for.

        Args:
            queue_tokens: returns the tokens that wait.
            documents: returns the number of documents.
        """
        self.queue_tokens.set_function(queue_tokens)
        self.documents.set_function(documents)

    def text(self) -> bytes:
        """Return all metrics in the format of Prometheus."""
        return generate_latest(self.registry)


class Counted:
    """An application whose requests are counted and timed.

    Args:
        app: the application.
        metrics: where they are counted.
    """

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "page"
        status, begin = 500, time.perf_counter()

        async def noting(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begin)
