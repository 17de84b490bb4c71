"""The load test of the server passes a server that is right, and no other."""

import pytest

from experiments.encoding_memory import build_model, random_texts
from experiments.serve_load import counted, expect, load
from retrieval.documents.document import Document
from retrieval.index.index import Index
from tests.retrieval.server.conftest import running

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"needs {package}, of the extra api")

from retrieval.server.api import make_app  # noqa: E402
from retrieval.server.service import Service  # noqa: E402


@pytest.mark.promise("S2")
def test_answers_that_are_anothers_are_seen(tmp_path, monkeypatch):
    documents = [Document(f"d{n}", text) for n, text in enumerate(random_texts(20, 30))]
    index = Index.build(tmp_path / "index", documents, build_model(), segments="late:64")
    expected = expect(index, 64)
    service = Service(index)
    with running(make_app(service)) as port:
        tally = load(port, expected, clients=8, seconds=0.2)
        assert (tally.wrong, tally.lost) == (0, [])
        assert counted(port) == tally.of_status(200) == len(tally.seconds) >= 8
        finish = service.finish
        monkeypatch.setattr(service, "finish", lambda vectors, size: finish(vectors[1:] + vectors[:1], size))
        assert load(port, expected, clients=8, seconds=0.2).wrong
        monkeypatch.undo()
        monkeypatch.setattr(service, "search", lambda query, **given: Service.search(service, "word1 word2", **given))
        assert load(port, expected, clients=8, seconds=0.2).wrong
