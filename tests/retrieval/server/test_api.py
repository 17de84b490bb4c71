"""The server answers each request with what `encode` and `Index.search` give, and refuses the rest in a sentence."""

import base64
import http.client
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from common.errors import UserError
from retrieval import serve
from retrieval.index.index import Index
from retrieval.server.limits import Limits
from tests.retrieval.conftest import WORDS, make_documents
from tests.retrieval.server.conftest import ask, running

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"needs {package}, of the extra api")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from retrieval.server.api import make_app  # noqa: E402
from retrieval.server.service import SEARCH_TOKENS, Service  # noqa: E402


@pytest.fixture(scope="module")
def service(index):
    return Service(index, batch_tokens=256, queue_tokens=12_700)


@pytest.fixture(scope="module")
def port(service):
    with running(make_app(service, Limits(max_inputs=50, max_request_mb=0.1))) as port:
        yield port


def embed(port, service, given, **options):
    status, answer = ask(port, "/v1/embeddings", {"input": given, "model": service.name, **options})
    assert status == 200, answer
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return [entry["embedding"] for entry in answer["data"]], answer["usage"]


@pytest.mark.promise("S1")
def test_embeddings_are_those_of_encode(port, service, tiny_model):
    texts = ["river stone", "", "green paper music", "Ünï 漢字 😀\r\n"]
    vectors, usage = embed(port, service, texts)
    assert np.array(vectors) == pytest.approx(tiny_model.encode(texts), abs=1e-6)
    ids = tiny_model.tokenizer(texts)["input_ids"]
    assert usage == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    assert np.array(embed(port, service, ids)[0]) == pytest.approx(tiny_model.encode(texts), abs=1e-6)
    for one in ("river stone", ids[0]):
        assert np.array(embed(port, service, one)[0]) == pytest.approx(tiny_model.encode(texts[:1]), abs=1e-6)
    (short,), _ = embed(port, service, "river", dimensions=5, prompt_name="query")
    assert short == pytest.approx(tiny_model.encode("river", truncate_dim=5, prompt_name="query").tolist(), abs=1e-6)
    (text,), _ = embed(port, service, "river", encoding_format="base64", user="somebody")
    assert np.frombuffer(base64.b64decode(text), "<f4") == pytest.approx(tiny_model.encode("river"), abs=1e-6)


@pytest.mark.promise("S2")
def test_no_request_is_lost_or_answered_with_the_vectors_of_another(port, service, tiny_model, index):
    """64 clients at a time, with embeddings of some texts each and searches between them."""
    draw = random.Random(0)
    requests = [
        [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(draw.randint(1, 3))] for _ in range(128)
    ]
    searches = range(0, 128, 8)
    start = threading.Barrier(64)

    def send(number: int):
        if number < 64:
            start.wait()
        if number in searches:
            return ask(port, "/search", {"query": requests[number][0], "k": 3, "passages": 0})
        return embed(port, service, requests[number])[0]

    before = service.metrics.batch_tokens._sum.get()
    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(send, range(128)))
    for number in searches:
        status, answer = answers[number]
        assert status == 200
        expected = index.search(requests[number][0], 3, passages=0)
        assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in expected]
    embedded = [number for number in range(128) if number not in searches]
    assert [len(answers[number]) for number in embedded] == [len(requests[number]) for number in embedded]
    texts = [text for number in embedded for text in requests[number]]
    vectors = [vector for number in embedded for vector in answers[number]]
    assert np.array(vectors) == pytest.approx(tiny_model.encode(texts), abs=1e-5)
    read = sum(map(len, tiny_model.tokenizer(texts)["input_ids"])) + len(searches) * SEARCH_TOKENS
    assert service.metrics.batch_tokens._sum.get() - before == read
    assert service.worker.waiting_tokens == 0


@pytest.mark.promise("S1")
def test_a_search_answers_what_the_index_finds(port, index):
    body = {"query": "river green", "k": 4, "passages": 2, "weight": 0.3, "filters": {"number": {"<": 9}}}
    status, answer = ask(port, "/search", body)
    assert status == 200
    expected = index.search("river green", 4, passages=2, weight=0.3, filters={"number": {"<": 9}})
    assert len(expected) == 4
    for found, hit in zip(answer["hits"], expected, strict=True):
        assert found["id"] == hit.id
        assert found["metadata"] == hit.metadata
        assert found["score"] == pytest.approx(hit.score, abs=1e-6)
        assert found["parts"] == pytest.approx(hit.parts, abs=1e-6)
        assert [(one["start"], one["end"], one["text"]) for one in found["passages"]] == [
            (one.start, one.end, one.text) for one in hit.passages
        ]
    assert ask(port, "/search", {"query": " "}) == (200, {"hits": []})
    assert ask(port, "/search", {"query": "river " * 10_000, "k": 1})[0] == 200


@pytest.mark.promise("S3")
@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/embeddings", b"{", 400, "JSON"),
        ("/v1/embeddings", {"input": "a"}, 400, "model: Field required"),
        ("/v1/embeddings", {"input": "a", "model": "gpt"}, 404, "ask for 'tiny-longembed'"),
        ("/v1/embeddings", {"input": [["a"]], "model": "tiny-longembed"}, 400, "input: give a text"),
        ("/v1/embeddings", {"input": [], "model": "tiny-longembed"}, 400, "1 to 50"),
        ("/v1/embeddings", {"input": ["a"] * 51, "model": "tiny-longembed"}, 400, "1 to 50"),
        ("/v1/embeddings", {"input": "cat " * 300, "model": "tiny-longembed"}, 400, "context of 256 tokens"),
        ("/v1/embeddings", {"input": ["a", "\ud83d"], "model": "tiny-longembed"}, 400, "text 1 holds half"),
        ("/v1/embeddings", {"input": [[10**6]], "model": "tiny-longembed"}, 400, "another tokenizer"),
        ("/v1/embeddings", {"input": [[]], "model": "tiny-longembed"}, 400, "has 0 token ids"),
        ("/v1/embeddings", {"input": [[7] * 256] * 50, "model": "tiny-longembed"}, 400, "12,800 tokens"),
        ("/v1/embeddings", {"input": "a", "model": "tiny-longembed", "dimensions": 33}, 400, "dimensions"),
        ("/v1/embeddings", {"input": "a", "model": "tiny-longembed", "dimensions": 0}, 400, "dimensions"),
        ("/v1/embeddings", {"input": "a", "model": "tiny-longembed", "prompt_name": "x"}, 400, "prompt_name='x'"),
        ("/v1/embeddings", {"input": [5], "model": "tiny-longembed", "prompt_name": "query"}, 400, "for texts"),
        ("/v1/embeddings", {"input": "a", "model": "tiny-longembed", "encoding": "x"}, 400, "encoding: Extra"),
        ("/search", {"query": "a", "parts": ["pictures"]}, 400, "choose from vector, tokens, words"),
        ("/search", {"query": "a", "k": 10**9}, 400, "k: "),
        ("/search", {"query": "a", "weight": 2}, 400, "weight: "),
        ("/search", {"query": "a", "filters": {"number": {"~": 3}}}, 400, "is no comparison"),
        ("/search", {"query": "\ud83d"}, 400, "the query has half"),
        ("/search", {"query": 5}, 400, "query: "),
        ("/search", b'{"query": "\xff"}', 400, "parsing the body"),
        ("/search", b'{"query": "' + b"x" * 150_000 + b'"}', 413, "104,857 bytes"),
        ("/../../etc/passwd", None, 404, "Not Found"),
        ("/search", None, 405, "Method Not Allowed"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_a_sentence(port, path, body, status, words):
    found, answer = ask(port, path, body)
    assert found == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert words in answer["error"]["message"]
    assert "/index" not in answer["error"]["message"]


@pytest.mark.promise("S3")
def test_a_body_of_unknown_size_is_not_read_beyond_the_limit(port):
    chunks = b"".join(b"%x\r\n%s\r\n" % (50_000, b" " * 50_000) for _ in range(4)) + b"0\r\n\r\n"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("POST", "/search")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.putheader("Content-Type", "application/json")
    connection.endheaders(chunks)
    answer = connection.getresponse()
    assert answer.status == 413
    assert "104,857 bytes" in json.loads(answer.read())["error"]["message"]


@pytest.mark.promise("S3")
def test_a_full_queue_and_a_late_answer_are_told_and_leave_nothing_behind(index):
    service = Service(index, batch_tokens=256, queue_tokens=100)
    entered, leave = threading.Event(), threading.Event()

    def block(items):
        entered.set()
        leave.wait(60)
        return items

    with running(make_app(service, Limits(timeout=0.3))) as port:
        service.worker.submit(block, [None], [1])
        assert entered.wait(60)
        body = {"input": "cat " * 50, "model": service.name}
        with ThreadPoolExecutor(2) as threads:
            waits = threads.submit(ask, port, "/v1/embeddings", body)
            while service.worker.waiting_tokens == 0:
                pass
            status, answer = ask(port, "/v1/embeddings", body)
            assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
            status, answer = waits.result()
            assert status == 503
            assert "no answer after 0.3 seconds" in answer["error"]["message"]
        assert service.worker.waiting_tokens == 0
        assert ask(port, "/v1/embeddings", {"input": "cat " * 200, "model": service.name})[0] == 400
        leave.set()
        assert ask(port, "/v1/embeddings", {"input": "cat", "model": service.name})[0] == 200
    assert not service.worker.is_alive


@pytest.mark.promise("S3")
def test_what_is_left_of_a_request_that_failed_is_not_computed(index, monkeypatch):
    service = Service(index, batch_tokens=1)
    computed, leave = [], threading.Event()

    def embed_one(rows):
        computed.append(rows)
        if len(computed) == 1:
            raise RuntimeError("no memory")
        leave.wait(60)
        return [None]

    monkeypatch.setattr(service, "_embed", embed_one)
    with running(make_app(service)) as port:
        status, answer = ask(port, "/v1/embeddings", {"input": ["a", "b", "c"], "model": service.name})
        assert (status, answer["error"]["type"]) == (500, "server_error")
        leave.set()
    assert len(computed) < 3  # the second may have begun when the first failed


def test_the_page_reads_a_question_once(index, monkeypatch):
    service, texts = Service(index), []
    encode = index.model.encode
    monkeypatch.setattr(index.model, "encode", lambda text, **options: texts.append(text) or encode(text, **options))
    found = service.look("river stone", 5).result(60)
    service.close()
    assert texts == ["river stone"]
    for one, hit in zip(found, index.search("river stone", 5), strict=True):
        assert one.hit == hit
        assert one.document == index.document(hit.id)
        assert one.passages == index.passages("river stone", hit.id)


def test_health_models_and_metrics(port, service):
    assert ask(port, "/health") == (200, {"status": "ok", "model": "tiny-longembed", "documents": 12})
    assert ask(port, "/v1/models")[1]["data"][0]["id"] == "tiny-longembed"
    embed(port, service, "river")
    status, text = ask(port, "/metrics")
    assert status == 200
    samples = {
        (one.name, *one.labels.values()): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }
    assert samples["longembed_requests_total", "/v1/embeddings", "200"] >= 1
    assert samples["longembed_documents",] == 12
    assert samples["longembed_queue_tokens",] == 0
    assert samples["longembed_batch_tokens_count",] >= 1


def test_documents_that_another_process_adds_are_found(tmp_path, tiny_model):
    first, second = make_documents(2)
    index = Index.build(tmp_path / "index", [first], tiny_model, segments="late:8")
    service = Service(index)
    Index.open(tmp_path / "index", tiny_model).add([second])
    assert {hit.id for hit in service.search(second.text).result()} == {first.id, second.id}
    service.close()


def test_the_script_listens_at_this_machine_alone_unless_told(index, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: served.append(sockets[0].getsockname()))
    monkeypatch.setattr("sys.argv", ["serve.py", "--index", str(index.folder), "--port", "0", "--no_page"])
    serve.main()
    assert served[0][0] == "127.0.0.1"
    assert capsys.readouterr().out == f"12 documents at http://127.0.0.1:{served[0][1]}\n"
    with serve.listen("127.0.0.1", 0) as taken:
        monkeypatch.setattr(
            "sys.argv", ["serve.py", "--index", str(index.folder), "--no_page", "--port", str(taken.getsockname()[1])]
        )
        with pytest.raises(UserError, match="give another --host or --port"):
            serve.main()
    with pytest.raises(UserError, match=r"cannot listen at a\.\.b:0"):
        serve.listen("a..b", 0)
    monkeypatch.setattr("sys.argv", ["serve.py", "--index", str(index.folder / "none"), "--port", "0", "--no_page"])
    with pytest.raises(UserError, match="none"):
        serve.main()
