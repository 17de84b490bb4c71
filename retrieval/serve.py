"""Serve an index: a page for people, and for programs the embeddings API of OpenAI and a search.

python -m retrieval.serve --index my-index

It needs the extra `serve`, or with `--no_page` the extra `api` alone.
"""

import socket
from dataclasses import dataclass, field

from common.arguments import parse
from common.errors import UserError, one_line, run
from retrieval.index.index import Index
from retrieval.server.limits import Limits, OwnLimits


@dataclass
class ServeArguments:
    """The index, and where and how it is served."""

    index: str = field(metadata={"help": "folder of the index"})
    model: str | None = field(
        default=None, metadata={"help": "where the model of the index is now, if it is not where it was"}
    )
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "address to listen at; 0.0.0.0 makes the documents readable for the whole network"},
    )
    port: int = field(default=8000, metadata={"help": "port; 0: any that is free", "within": "[0, 65535]"})
    page: bool = field(default=True, metadata={"help": "serve the page for people, which needs the extra serve"})
    batch_tokens: int = field(default=16_384, metadata={"help": "tokens in one forward pass", "within": "[1, inf)"})
    queue_tokens: int = field(
        default=1_000_000,
        metadata={
            "help": "tokens that may wait, of which a search counts as 512; a request beyond is answered by 429",
            "within": "[512, inf)",
        },
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: name or address.
        port: 0 for any that is free.

    Raises:
        UserError: the port is taken, or there is no such address.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:  # the second of a name that cannot be one, such as a..b
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot listen at {host}:{port} ({reason}); give another --host or --port") from None


def main() -> None:
    """Run the script.

    Raises:
        UserError: a package is missing, the address cannot be listened at, or the index does not open.
    """
    arguments, limits, own_limits = parse(ServeArguments, Limits, OwnLimits)
    # Before packages: who misspelt the folder need not install any to be told.
    index = Index.open(arguments.index, arguments.model)
    try:
        from retrieval.server.api import make_app
        from retrieval.server.process import serve
        from retrieval.server.service import Service

        if arguments.page:
            from retrieval.server.page import make_page, mount_page
    except ImportError as error:
        raise UserError(
            f"serving needs {error.name}, which is not installed: pip install -e '.[serve]', or '.[api]' for --no_page"
        ) from None
    if own_limits.own_mb * 1.5 > limits.max_request_mb:
        raise UserError(
            f"--own_mb {own_limits.own_mb:g} needs requests of {own_limits.own_mb * 1.5:g} MiB, since files are sent "
            "as text; raise --max_request_mb"
        )
    with listen(arguments.host, arguments.port) as listening:
        service = Service(index, arguments.batch_tokens, arguments.queue_tokens, own_limits)
        app = make_app(service, limits)
        if arguments.page:
            app = mount_page(app, make_page(service, limits.timeout))
        host, port = listening.getsockname()[:2]
        print(f"{len(service.index):,} documents at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        serve(app, listening)


if __name__ == "__main__":
    run(main, "start it again")
