"""`retrieval.build` and `retrieval.search`: from a folder of files to passages with their page and heading."""

import json
import sys

import pytest

from common.errors import UserError, run
from retrieval import Index, build, search
from tests.retrieval.conftest import make_documents
from tests.retrieval.documents import sample_files

pytest.importorskip("pypdf", reason="the extra 'files' is not installed")


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs a script as its command would, and returns its exit code, output and errors."""

    def start(script, *words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run(script.main)
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    return start


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """JSON lines of 12 documents of random words."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    documents = make_documents(12)
    path.write_text(
        "".join(json.dumps({"id": d.id, "text": d.text, "number": d.metadata["number"]}) + "\n" for d in documents)
    )
    return path


@pytest.fixture(scope="module")
def index_of_rows(tmp_path_factory, tiny_model, rows):
    from retrieval.documents.sources import read_documents

    folder = tmp_path_factory.mktemp("index") / "index"
    Index.build(folder, read_documents([rows]), tiny_model, segments="late:8").close()
    return folder


@pytest.mark.promise("R5")
def test_a_folder_of_files_is_built_searched_and_added_to(tmp_path, tiny_longembed, command, caplog):
    docs = tmp_path / "docs"
    docs.mkdir()
    outline = (("The roof", 1),)
    (docs / "lease.pdf").write_bytes(sample_files.pdf("The rent is due in May.", "The roof is new.", outline=outline))
    (docs / "house.md").write_text("# House\n\nThe door is green \x1b[31m.\n\n# Garden\n\nThe pond is deep.\n")
    (docs / "broken.pdf").write_bytes(b"no pdf")
    place = tmp_path / "index"
    options = ["--segments", "sentences:8", "--memory", "1GB"]
    code, output, errors = command(build, "--model", tiny_longembed, "--data", docs, "--index", place, *options)
    assert (code, output.splitlines()[0]) == (0, f"{place}: 2 documents; 1 could not be read and were skipped"), errors
    assert "broken.pdf is damaged" in caplog.text

    code, output, _ = command(search, "--index", place, "--json", "--parts", "words", "--query", "the roof is new")
    first = json.loads(output)["hits"][0]
    assert first["id"] == "lease.pdf"
    assert first["metadata"] == {"type": "pdf"}
    passages = {passage["text"].strip(): passage for passage in first["passages"]}
    roof = passages["The roof is new."]
    assert (roof["page"], roof["heading"]) == ("2", "The roof")
    with Index.open(place) as opened:
        assert opened.document("lease.pdf").text[roof["start"] : roof["end"]] == roof["text"]

    code, output, _ = command(search, "--index", place, "green door")
    assert code == 0
    assert "house.md" in output
    assert "House" in output
    assert "\x1b" not in output

    (docs / "house.md").write_text("The violin is old.")
    (docs / "new.txt").write_text("The violin was sold.")
    code, output, errors = command(build, "--add", "--data", docs / "house.md", docs / "new.txt", "--index", place)
    assert (code, output.splitlines()[0]) == (0, f"{place}: 3 documents; 0 could not be read and were skipped"), errors
    _, output, _ = command(search, "--index", place, "--json", "--parts", "words", "--query", "violin")
    assert {hit["id"] for hit in json.loads(output)["hits"]} == {"house.md", "new.txt"}


@pytest.mark.promise("R5")
def test_many_queries_give_what_one_gives_and_a_run_file(tmp_path, index_of_rows, command, tiny_model):
    queries = tmp_path / "queries.jsonl"
    texts = ["river stone", "   ", "bread " * 16_667, "green paper"]  # one is blank, one has 100,000 characters
    queries.write_text("".join(json.dumps({"qid": f"q{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    code, output, _ = command(search, "--index", index_of_rows, "--queries", queries, "--json", "--k", 3)
    assert code == 0
    answers = [json.loads(line) for line in output.splitlines()]
    assert [(answer["id"], answer["query"]) for answer in answers] == [(f"q{n}", text) for n, text in enumerate(texts)]
    assert [len(answer["hits"]) for answer in answers] == [3, 0, 3, 3]
    with Index.open(index_of_rows, tiny_model) as opened:
        for answer, text in zip(answers, texts, strict=True):
            hits = opened.search(text, 3)
            assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in hits]
            assert [hit["score"] for hit in answer["hits"]] == pytest.approx([hit.score for hit in hits])

    run_file = tmp_path / "run.txt"
    assert command(search, "--index", index_of_rows, "--queries", queries, "--run_file", run_file, "--k", 3)[0] == 0
    pytrec_eval = pytest.importorskip("pytrec_eval")
    with open(run_file) as file:
        parsed = pytrec_eval.parse_run(file)
    assert parsed == {
        answer["id"]: {hit["id"]: pytest.approx(hit["score"]) for hit in answer["hits"]}
        for answer in answers
        if answer["hits"]
    }


@pytest.mark.promise("R5")
def test_filters_limit_the_answer(index_of_rows, command):
    filters = '{"number": {">=": 3, "<": 5}}'
    _, output, _ = command(search, "--index", index_of_rows, "--json", "--filters", filters, "river stone house")
    assert {hit["id"] for hit in json.loads(output)["hits"]} == {"d3", "d4"}


@pytest.mark.promise("R5")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "there is no query"),
        (["--query", ""], "is empty"),
        (["bad \udcff byte"], "half a surrogate pair at character 4"),
        (["one", "--queries", "q.jsonl"], "queries: applies only"),
        (["--queries", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["one", "--filters", "[1]"], "give a JSON object"),
        (["one", "--filters", "{"], "is not JSON"),
        (["one", "--parts", "tones"], "choose from vector, tokens, words"),
        (["one", "--weight", "2"], "at most 1"),
        (["one", "--k", "0"], "at least 1"),
        (["one", "--run_file", "r.txt"], "run_file: applies only"),
        (["--queries", "q.jsonl", "--run_file", "r.txt", "--json"], "json: applies only"),
        (["--queries", "q.jsonl", "--run_file", "r.txt", "--passages", "5"], "passages: applies only"),
    ],
)
def test_a_search_that_cannot_be_made_is_one_sentence(index_of_rows, command, words, told):
    code, output, errors = command(search, "--index", index_of_rows, *words)
    assert (code, output) == (2, "")
    assert told in errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.promise("R5")
def test_queries_that_cannot_be_read_are_one_sentence(tmp_path, index_of_rows, command):
    for data, told in (
        (b'{"text": "caf\xe9"}\n', "row 1: is not JSON"),
        (b'{"text": "a", "id": "q"}\n{"text": "b", "id": "q"}\n', "row 2: another query is called q"),
        (b'{"text": "\\udcff"}\n', "row 1: text has half a surrogate pair"),
    ):
        (tmp_path / "queries.jsonl").write_bytes(data)
        code, output, errors = command(search, "--index", index_of_rows, "--queries", tmp_path / "queries.jsonl")
        assert (code, output) == (2, "")
        assert told in errors


@pytest.mark.promise("R5")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "no/where", "--memory", "much"], "--memory much: give a number"),
        ([], "--model is missing"),
        (["--add", "--segments", "late:8"], "segments: applies only"),
        (["--add"], "index"),
    ],
)
def test_a_build_that_cannot_begin_is_one_sentence_and_leaves_nothing(tmp_path, rows, command, words, told):
    code, _, errors = command(build, "--data", rows, "--index", tmp_path / "index", *words)
    assert code == 2
    assert told in errors
    assert not (tmp_path / "index").exists()


def test_a_name_with_a_blank_does_not_fit_in_a_run_file():
    from retrieval.ranking import Hit

    with pytest.raises(UserError, match=r"'my file\.txt' has a blank"):
        list(search.run_lines("q", [Hit("my file.txt", 1.0, {}, [])]))
