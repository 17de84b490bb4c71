"""The script as a user runs it: the table, refusals in one sentence, and a kill that loses nothing."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from common.encoders.encoder import ChunkEncoder, Encoder
from common.encoders.vector_cache import VectorCache
from common.errors import run
from eval import mteb_long, plot, synthetic
from eval.models.mteb_models import EvaluatedModel
from eval.tasks import evaluation
from modeling_longembed import LongEmbedModel
from tests.forked import run_forked

ANIMALS = "fox whale frog heron badger otter salmon eagle beetle mole".split()  # noqa: SIM905
TEXTS = [f"A story about one {animal} and the {animal}'s many friends in the wood. " * 8 for animal in ANIMALS]
QUERIES = [f"Which story is about the {animal}?" for animal in ANIMALS]


def call(monkeypatch, capsys, module, *arguments) -> tuple[int, str, str]:
    """The script's exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        run(module.main)
    out, err = capsys.readouterr()
    return left.value.code, out, err


def without_times(table: Path) -> list[str]:
    """The lines of a table but for its last column, the time, which is never the same."""
    return [line.rpartition(" | ")[0] for line in table.read_text().splitlines()]


def test_models_and_baselines_side_by_side(
    make_task, tiny_sentence_transformer, tiny_longembed, tmp_path, monkeypatch, capsys
):
    make_task("Animals", TEXTS, QUERIES)
    make_task("Hidden", TEXTS, QUERIES, split="test_64")
    make_task("Hidden", TEXTS, QUERIES, split="test_128")
    models = [tiny_longembed, tiny_sentence_transformer]
    models += [
        f"truncate:{tiny_sentence_transformer}:16",
        f"chunk-mean:{tiny_sentence_transformer}:32",
        f"chunk-max:{tiny_sentence_transformer}:32",
        "bm25",
    ]
    arguments = ["--model", *models, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "r"]
    code, out, _ = call(monkeypatch, capsys, mteb_long, *arguments)
    assert code == 0
    table = (tmp_path / "r" / "table.md").read_text().splitlines()
    assert table[0] == "| model | Animals | Hidden 64 | Hidden 128 | KB a document | ms a query |"
    names = ["tiny-longembed", "tiny", "tiny-truncate-16", "tiny-chunk-mean-32", "tiny-chunk-max-32"]
    assert [line.split(" | ")[0] for line in table[2:]] == [*(f"| local/{name}" for name in names), "| baseline/bm25s"]
    assert table[-1].startswith("| baseline/bm25s | 100.0 | 100.0 | 100.0 | ")
    kilobytes, milliseconds = ([float(line.split(" | ")[at].rstrip(" |")) for line in table[2:]] for at in (-2, -1))
    assert kilobytes[:4] == [0.128] * 4  # 32 numbers of 4 bytes
    assert kilobytes[4] > 0.2
    assert min(milliseconds) > 0
    assert "Hidden" in out
    for folder in (tmp_path / "r" / "results").glob("*/*"):
        assert {"Animals.json", "Hidden.json", "model_meta.json"} <= {file.name for file in folder.iterdir()}

    # A second run loads no model and computes nothing, and says the same.
    monkeypatch.setattr(EvaluatedModel, "load", lambda *_: pytest.fail("loaded a model for finished results"))
    monkeypatch.setattr(evaluation.mteb, "evaluate", lambda *_, **__: pytest.fail("ran a finished task"))
    assert call(monkeypatch, capsys, mteb_long, *arguments)[0] == 0
    assert (tmp_path / "r" / "table.md").read_text().splitlines() == table

    # With intervals it has another table, of all that was measured before.
    assert call(monkeypatch, capsys, mteb_long, *arguments, "--intervals")[0] == 0
    intervals = (tmp_path / "r" / "table.md").read_text().removeprefix("\n".join([*table, "", ""])).splitlines()
    assert intervals[0] == "| 95% intervals | Animals | Hidden 64 | Hidden 128 | mean |"
    assert len(intervals) == 2 + len(models) + len(models) - 1
    assert intervals[-2] == "| baseline/bm25s | 100.0 to 100.0" + " | 100.0 to 100.0" * 3 + " |"

    code, out, _ = call(monkeypatch, capsys, plot, "--results_dir", tmp_path / "r", "--output", tmp_path / "report.png")
    assert (code, out.strip()) == (0, str(tmp_path / "report.png"))


def test_two_models_whose_folders_have_one_name_stay_two(make_task, tiny_longembed, tmp_path, monkeypatch, capsys):
    make_task("Animals", TEXTS, QUERIES)
    folders = [tmp_path / "runs" / run / "final" for run in "ab"]
    for number, folder in enumerate(folders):
        model = LongEmbedModel.from_pretrained(tiny_longembed)
        torch.nn.init.normal_(model.embeddings.word_embeddings.weight, std=number + 1.0)
        model.save_pretrained(folder)
    rows = {}
    for names in ([folders[0]], [folders[1]], folders):
        arguments = ["--model", *names, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "r"]
        assert call(monkeypatch, capsys, mteb_long, *arguments)[0] == 0
        lines = (tmp_path / "r" / "table.md").read_text().splitlines()[2:]
        rows[len(rows)] = [line.strip("| ").split(" | ") for line in lines]
    assert rows[0][0][0] == rows[1][0][0] == "local/final"
    (first, second) = rows[2]
    assert [first[1], second[1]] == [rows[0][0][1], rows[1][0][1]]
    assert first[0] != second[0]


def test_data_that_changed_are_judged_again(make_task, tmp_path, monkeypatch, capsys):
    arguments = ["--model", "bm25", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "r"]
    make_task("Animals", TEXTS, QUERIES)
    call(monkeypatch, capsys, mteb_long, *arguments)
    make_task("Animals", ["nothing of the kind"] * 9 + TEXTS[:1], QUERIES)
    call(monkeypatch, capsys, mteb_long, *arguments)
    score = float((tmp_path / "r" / "table.md").read_text().split("|")[-4])
    assert score < 60


def test_results_and_vectors_of_other_code_are_computed_again(
    make_task, tiny_longembed, tmp_path, monkeypatch, capsys, edit_code
):
    """An edit of the attention of our models leaves results of other models alone; one of the judge leaves vectors."""
    make_task("Animals", TEXTS[:3], QUERIES[:3])
    arguments = ["--model", tiny_longembed, "bm25", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "r"]
    judged, encoded = [], []
    evaluate, encode = evaluation.mteb.evaluate, Encoder.__call__
    monkeypatch.setattr(
        evaluation.mteb,
        "evaluate",
        lambda model, *settings, **options: (
            judged.append(model.mteb_model_meta.name) or evaluate(model, *settings, **options)
        ),
    )
    monkeypatch.setattr(Encoder, "__call__", lambda *call: encoded.extend(call[1]) or encode(*call))
    ours, words = "local/tiny-longembed", "baseline/bm25s"
    for edited, models, texts in (
        (None, [ours, words], 6),
        (None, [], 0),
        ("modeling_longembed", [ours], 6),
        ("eval.tasks", [ours, words], 0),
        ("common.bm25", [words], 0),
    ):
        if edited:
            edit_code(edited)
        judged.clear()
        encoded.clear()
        assert call(monkeypatch, capsys, mteb_long, *arguments)[0] == 0
        assert (judged, len(encoded)) == (models, texts), edited


def test_chunk_vectors_are_computed_once_for_mean_and_max(
    make_task, tiny_sentence_transformer, tmp_path, monkeypatch, capsys
):
    make_task("Animals", TEXTS, QUERIES)
    encoded = []
    original = ChunkEncoder.__call__
    monkeypatch.setattr(
        "common.encoders.encoder.ChunkEncoder.__call__",
        lambda self, texts, kind: encoded.extend(texts) or original(self, texts, kind),
    )
    models = [f"chunk-mean:{tiny_sentence_transformer}:32", f"chunk-max:{tiny_sentence_transformer}:32"]
    code, *_ = call(
        monkeypatch,
        capsys,
        mteb_long,
        "--model",
        *models,
        "--data_dir",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "r",
    )
    assert code == 0
    assert sorted(encoded) == sorted([*(text.strip() for text in TEXTS), *QUERIES])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--model": ["no/where/at/all"]}, "unknown model no/where/at/all"),
        ({"--model": ["truncate:{model}:4096"]}, "4096 tokens are more than the context of local/tiny-truncate"),
        ({"--max_length": ["4096"]}, "4096 tokens are more than the context of local/tiny; give at most 64"),
        ({"--max_length": ["1"]}, "--max_length 1 is too short"),
        ({"--batch_tokens": ["0"]}, "--batch_tokens 0 must be positive"),
        ({"--precision": ["half"]}, "--precision half is not one of auto, float32, bfloat16"),
        ({"--tasks": ["Plants"]}, "Plants holds no task"),
        ({"--task": ["Animals"]}, "did you mean --tasks?"),
        ({"--data_dir": ["/no/such/folder"]}, "--data_dir /no/such/folder is not a folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    make_task, tiny_sentence_transformer, tmp_path, monkeypatch, capsys, change, words
):
    make_task("Animals", TEXTS, QUERIES)
    settings = {"--model": ["{model}"], "--data_dir": [tmp_path / "data"], "--output_dir": [tmp_path / "r"]} | change
    arguments = [word for key, values in settings.items() for word in (key, *values)]
    arguments = [str(word).format(model=tiny_sentence_transformer) for word in arguments]
    code, _, err = call(monkeypatch, capsys, mteb_long, *arguments)
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert "Traceback" not in err
    assert len(told) == 1
    assert words.replace("tiny-truncate", "tiny") in told[0]
    assert not list(tmp_path.glob("r/results/**/*.json"))


def test_synthetic_tasks_are_made_and_judged(minilm, tmp_path, monkeypatch, capsys):
    (tmp_path / "essay.txt").write_text("It rained. The boat left at noon, as it did on most days. " * 40)
    code, out, _ = call(
        monkeypatch, capsys, synthetic, "--output_dir", tmp_path / "data", "--tokenizer", minilm, "--lengths", 64, 128,
        "--queries", 5, "--documents", 10, "--haystack", tmp_path / "essay.txt",
    )  # fmt: skip
    assert (code, out.split()) == (0, [str(tmp_path / "data" / name) for name in ("Passkey", "Needle")])
    call(
        monkeypatch,
        capsys,
        mteb_long,
        "--model",
        "bm25",
        "--data_dir",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "r",
    )
    assert "\n| baseline/bm25s | 100.0 | 100.0 | 100.0 | 100.0 | " in (tmp_path / "r" / "table.md").read_text()
    code, _, err = call(monkeypatch, capsys, synthetic, "--output_dir", tmp_path, "--tokenizer", tmp_path / "none")
    assert code == 2
    assert "there is no tokenizer" in err


def test_a_killed_run_goes_on_where_it_stopped(make_task, tiny_sentence_transformer, tmp_path, monkeypatch, capsys):
    """SIGKILL when the first of the documents are in the cache; the second run encodes only the others."""
    texts = [f"{text} {'and more ' * 600}" for text in TEXTS]
    make_task("Animals", texts, QUERIES)
    arguments = ["--model", "bm25", f"chunk-mean:{tiny_sentence_transformer}:16", "--data_dir", tmp_path / "data"]
    arguments += ["--output_dir", tmp_path / "r", "--batch_tokens", "256"]

    def run_until_killed():
        put = VectorCache.put

        def put_and_die(self, matrices):
            put(self, matrices)
            os.kill(os.getpid(), signal.SIGKILL)

        VectorCache.put, sys.argv = put_and_die, ["mteb_long", *map(str, arguments)]
        run(mteb_long.main)

    assert run_forked(run_until_killed, seconds=300, log=tmp_path / "log").code == -signal.SIGKILL
    assert not (tmp_path / "r" / "table.md").exists()
    (finished,) = (tmp_path / "r" / "results").glob("baseline__bm25s/*/Animals.json")
    before = finished.read_bytes()
    encoded = []
    original = ChunkEncoder.__call__
    monkeypatch.setattr(
        "common.encoders.encoder.ChunkEncoder.__call__",
        lambda self, texts, kind: encoded.extend(texts) or original(self, texts, kind),
    )
    assert call(monkeypatch, capsys, mteb_long, *arguments)[0] == 0
    assert 0 < len(encoded) < len(texts) + len(QUERIES)
    assert finished.read_bytes() == before
    resumed = without_times(tmp_path / "r" / "table.md")
    arguments[arguments.index(tmp_path / "r")] = tmp_path / "whole"
    call(monkeypatch, capsys, mteb_long, *arguments)
    assert without_times(tmp_path / "whole" / "table.md") == resumed
    for file in (tmp_path / "r" / "results").rglob("*.json"):
        json.loads(file.read_text())
