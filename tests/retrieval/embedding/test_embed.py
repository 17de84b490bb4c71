"""`retrieval.embed` and `retrieval.build --embedded`: the commands, and processes of `accelerate launch`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import run
from retrieval import Index, build, embed
from retrieval.embedding.embedded import Embedded
from tests.retrieval.conftest import make_documents

pytest.importorskip("pyarrow", reason="the extra 'files' is not installed")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """JSON lines of 12 documents, and one without text."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"id": document.id, "text": document.text} for document in make_documents(12)] + [{"id": "x", "text": " "}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


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


@pytest.mark.promise("I9")
def test_what_processes_embed_becomes_an_index(tmp_path, rows, tiny_longembed, tiny_model, command, monkeypatch):
    output = tmp_path / "out"
    options = ["--model", tiny_longembed, "--data", rows, "--output_dir", output, "--shard_documents", 5]
    read: list[str] = []
    for rank, told in ((1, "this process is done, and others are not"), (0, "12 documents; 1 could not be read")):
        state = SimpleNamespace(process_index=rank, num_processes=2, main_process_first=nullcontext)
        monkeypatch.setattr(embed, "_state_of_launch", lambda engine, state=state: state)
        code, printed, errors = command(embed, "--engine", "accelerate", *options)
        assert code == 0, errors
        assert told in printed
        read.append(re.search(rf"process {rank} of 2 has read ([\d,]+) tokens", printed)[1])
    texts = [document.text for document in make_documents(12)]
    tokens = sum(len(ids) for ids in tiny_model.tokenizer(texts)["input_ids"])
    assert sum(int(count.replace(",", "")) for count in read) == tokens
    code, printed, errors = command(build, "--embedded", output, "--index", tmp_path / "index", "--memory", "1GB")
    assert (code, printed.splitlines()[0]) == (
        0,
        f"{tmp_path / 'index'}: 12 documents; 0 could not be read and were skipped",
    )
    with Index.open(tmp_path / "index") as index:
        assert index.search("river stone")
        assert index.manifest.settings.parts == ("vector", "words")


@pytest.mark.promise("I9")
def test_a_command_that_cannot_be_run_is_refused_in_a_sentence(tmp_path, rows, tiny_longembed, command, monkeypatch):
    options = ["--model", tiny_longembed, "--data", rows, "--output_dir", tmp_path / "out"]
    for words, told in (
        (["--parts", "tones"], "choose from vector, tokens, words"),
        (["--token_precision", "float12"], "choose from float32"),
        (["--actors", "2"], "actors: applies only"),
        (["--segments", "late:0"], "late"),
    ):
        code, _, errors = command(embed, *options, *words)
        assert code == 2
        assert told in errors
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--engine accelerate" in command(embed, *options)[2]
    index = ["--index", tmp_path / "index"]
    assert "--data is missing" in command(build, *index, "--model", tiny_longembed)[2]
    assert "holds no embedded documents" in command(build, *index, "--embedded", tmp_path)[2]
    assert "applies only" in command(build, *index, "--embedded", tmp_path, "--segments", "late:254")[2]


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have started."""
    children = [int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()]
    return [one for child in children for one in (child, *descendants(child))]


@pytest.mark.slow  # two processes load torch, twice
@pytest.mark.promise("I9")
def test_a_launch_that_is_killed_goes_on(tmp_path, rows, tiny_longembed):
    pytest.importorskip("accelerate", reason="the extra 'train' is not installed")
    output = tmp_path / "out"
    words = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words += ["-m", "retrieval.embed", "--engine", "accelerate", "--model", str(tiny_longembed), "--data", str(rows)]
    words += ["--output_dir", str(output), "--shard_documents", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    launch = subprocess.Popen([sys.executable, *words], env=environment)
    while not list(output.glob("done/0*.json")) and launch.poll() is None:
        time.sleep(0.01)
    for pid in [launch.pid, *descendants(launch.pid)]:
        os.kill(pid, signal.SIGKILL)
    launch.wait()
    subprocess.run([sys.executable, *words], env=environment, check=True)
    found = Counter(record.document.id for record in Embedded(output).records())
    assert found == Counter(document.id for document in make_documents(12))
