"""Hold a server under load: the figures of docs/guides/serve-an-index.md.

    python experiments/serve_load.py --output runs/serve-load.md

64 clients at a time ask `retrieval.serve`, in a process of its own, for vectors and for documents. Each answer is
compared with what the model and the index give, the server's own count with that of the clients, and its memory early
and late. Then a server with a short queue has to refuse some requests, and answer the others. The model is tiny and
random, so that what is measured is the server. It ends with code 1 if a request was lost or got what was another's.
"""

import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.arguments import parse
from common.errors import run
from common.files import atomic_write
from common.memory import resident_memory
from experiments.encoding_memory import build_model, random_texts
from retrieval.documents.document import Document
from retrieval.index.index import Index

# What two computations of a vector may differ by: that of another text differs by far more.
LEAST_COSINE = 0.999
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


@dataclass
class Arguments:
    """The options of the script."""

    clients: int = field(default=64, metadata={"help": "clients at a time", "within": "[1, inf)"})
    seconds: float = field(default=60.0, metadata={"help": "how long they ask", "within": "(0, inf)"})
    early: float = field(
        default=10.0, metadata={"help": "seconds after which memory is first read", "within": "[0, inf)"}
    )
    texts: int = field(default=1000, metadata={"help": "different texts", "within": "[64, inf)"})
    documents: int = field(default=500, metadata={"help": "documents of the index", "within": "[1, inf)"})
    output: str | None = field(default=None, metadata={"help": "file for the table, in Markdown", "output": "file"})


@dataclass(frozen=True)
class Expected:
    """What is asked, and the right answers.

    Args:
        texts: whose vectors are asked for.
        vectors: theirs, of length one, `(n, d)`.
        hits: the ids of the documents that each of the first texts finds.
    """

    texts: Sequence[str]
    vectors: np.ndarray
    hits: Sequence[Sequence[str]]

    def is_right(self, numbers: Sequence[int], answer: Any) -> bool:
        """Return whether an answer holds the vectors of these texts, and not of others."""
        found = np.array([one["embedding"] for one in answer["data"]], np.float32)
        if len(found) != len(numbers):
            return False
        cosines = found @ self.vectors.T / np.linalg.norm(found, axis=1, keepdims=True)
        own = cosines[np.arange(len(numbers)), numbers]
        return bool((own >= LEAST_COSINE).all() and (own >= cosines.max(1) - 1e-6).all())


@dataclass
class Tally:
    """What became of requests.

    Args:
        answered: by path and status.
        wrong: answers that were not those of their request.
        lost: requests without an answer, and why.
        seconds: that each took.
    """

    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def of_status(self, status: int) -> int:
        """Return how many requests were answered with a status."""
        return sum(count for (_, found), count in self.answered.items() if found == status)


def expect(index: Index, count: int) -> Expected:
    """Compute the right answers.

    Args:
        index: that is served.
        count: number of texts, of 1 to 40 words.
    """
    draw = random.Random(1)
    texts = [" ".join(text.split()[: draw.randint(1, 40)]) for text in random_texts(count, 40)]
    vectors = index.model.encode(texts, show_progress_bar=False)
    hits = [[hit.id for hit in index.search(text, 3, passages=0)] for text in texts[:64]]
    return Expected(texts, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), hits)


def load(port: int, expected: Expected, clients: int, seconds: float, each: int = 4) -> Tally:
    """Ask a server by many clients at a time; each asks again when it has its answer.

    Args:
        port: the server's, on 127.0.0.1.
        expected: what is asked.
        clients: how many.
        seconds: after which none asks again.
        each: most texts of a request.

    Returns:
        What became of the requests.
    """
    tally, lock, start, model = Tally(), threading.Lock(), threading.Barrier(clients), served_name(port)

    def ask(client: int) -> None:
        draw, connection = random.Random(client), http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        start.wait()
        end = time.monotonic() + seconds
        with closing(connection):
            while time.monotonic() < end:
                searches = draw.random() < 0.25
                numbers = draw.sample(range(len(expected.texts)), draw.randint(1, each))
                if searches:
                    number = draw.randrange(len(expected.hits))
                    path, body = "/search", {"query": expected.texts[number], "k": 3, "passages": 0}
                else:
                    path = "/v1/embeddings"
                    body = {"model": model, "input": [expected.texts[n] for n in numbers]}
                begin = time.monotonic()
                try:
                    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    status, found = answer.status, json.loads(answer.read())
                except (OSError, http.client.HTTPException, ValueError) as error:
                    connection.close()
                    with lock:
                        tally.lost.append(f"{type(error).__name__}: {error}")
                    continue
                took, right = time.monotonic() - begin, True
                if status == 200 and searches:
                    right = [hit["id"] for hit in found["hits"]] == expected.hits[number]
                elif status == 200:
                    right = expected.is_right(numbers, found)
                with lock:
                    tally.answered[path, status] += 1
                    tally.wrong += not right
                    tally.seconds.append(took)

    with ThreadPoolExecutor(clients) as threads:
        for done in [threads.submit(ask, client) for client in range(clients)]:
            done.result()
    return tally


@contextmanager
def serving(index: Path, *options: str) -> Iterator[tuple[int, int]]:
    """Serve an index in a process of its own; give its port and the number of the process."""
    command = [sys.executable, "-m", "retrieval.serve", "--index", str(index), "--port", "0", "--no_page", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = ADDRESS.search(process.stdout.readline())
            if address is None:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            yield int(address[1]), process.pid
        finally:
            process.terminate()
            process.wait()


def counted(port: int) -> int:
    """Return how many requests for vectors and documents a server says that it has answered with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    found = re.findall(r'longembed_requests_total\{path="/(?:search|v1/embeddings)",status="200"\} (\S+)', text)
    return int(sum(map(float, found)))


def measure(arguments: Arguments, folder: Path) -> tuple[list[str], bool]:
    """Build an index, serve it, and hold it under load.

    Args:
        arguments: of the script.
        folder: for the model and the index.

    Returns:
        The rows of the table, and whether all was as it should be.
    """
    torch.manual_seed(0)
    build_model().save_pretrained(folder / "model")
    documents = [Document(f"d{n}", text) for n, text in enumerate(random_texts(arguments.documents, 300))]
    index = Index.build(folder / "index", documents, folder / "model", segments="late:64")
    expected = expect(index, arguments.texts)
    with serving(folder / "index") as (port, process):
        early: list[int] = []
        timer = threading.Timer(arguments.early, lambda: early.append(resident_memory(process=process)))
        timer.start()
        tally = load(port, expected, arguments.clients, arguments.seconds)
        timer.cancel()
        late, told = resident_memory(process=process), counted(port)
    times = np.percentile(tally.seconds, [50, 99])
    right = not tally.wrong and not tally.lost and told == tally.of_status(200) == len(tally.seconds)
    with serving(folder / "index", "--queue_tokens", "1024") as (port, _):
        burst = load(port, expected, arguments.clients, min(5.0, arguments.seconds), each=16)
        after = load(port, expected, 1, 0.1)
    statuses = {status for _, status in burst.answered}
    right &= not burst.wrong and not burst.lost and statuses == {200, 429}
    right &= not after.lost and {status for _, status in after.answered} == {200}
    first = f"{early[0] / 2**20:.0f} MiB" if early else "not read"
    rows = [
        f"| requests of {arguments.clients} clients in {arguments.seconds:g} s | {len(tally.seconds):,} |",
        f"| answered with 200, by their count and by the server's | {tally.of_status(200):,} and {told:,} |",
        f"| lost; answered with what was another's | {len(tally.lost)}; {tally.wrong} |",
        f"| time of a request, median and 99th percentile | {times[0] * 1000:.0f} ms and {times[1] * 1000:.0f} ms |",
        f"| memory after {arguments.early:g} s and at the end | {first} and {late / 2**20:.0f} MiB |",
        f"| with a queue of 1,024 tokens: answered with 200 | {burst.of_status(200):,} |",
        f"| and with 429 | {burst.of_status(429):,} |",
    ]
    return rows, right


def served_name(port: int) -> str:
    """Return what a server calls its model."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with closing(connection):
        connection.request("GET", "/v1/models")
        return str(json.loads(connection.getresponse().read())["data"][0]["id"])


def main() -> None:
    """Measure, and print a table.

    Raises:
        SystemExit: with 1 if a request was lost or got what was another's, or none was refused.
    """
    (arguments,) = parse(Arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows, right = measure(arguments, Path(folder))
    table = "\n".join(["| | |", "|---|---|", *rows]) + "\n"
    print(table, end="")
    if arguments.output is not None:
        atomic_write(arguments.output, table)
    if not right:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
