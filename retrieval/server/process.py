"""The process that serves, until Ctrl-C."""

import socket
from typing import Any

import uvicorn

# Connections that are open at a time; a request beyond is answered by 503.
MAX_CONNECTIONS = 512
# Seconds that requests have to be answered after Ctrl-C.
GRACE = 10


class Server(uvicorn.Server):
    """A server that first ends the connections by which open pages show that they are open: they would never end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is under way, and end.

        Args:
            sockets: that are listened at.
        """
        for route in getattr(self.config.app, "routes", ()):
            if (stop := getattr(getattr(route, "app", None), "stop_event", None)) is not None:  # the page
                stop.set()
        await super().shutdown(sockets)


def make_server(app: Any) -> Server:
    """Make a server.

    Args:
        app: the application.
    """
    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=GRACE,
        )
    )


def serve(app: Any, listening: socket.socket) -> None:
    """Serve an application until the process is asked to end.

    Args:
        app: the application.
        listening: a socket that listens.
    """
    make_server(app).run([listening])
