"""A teacher and its students in one table: whose numbers they are, and what is measured again."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from eval import compare
from eval.compare import Arguments, short_names
from eval.report.comparison import Row, as_markdown, draw
from eval.speed import interleaved
from eval.speed.measurement import measure
from eval.tasks import evaluation
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval
from modeling_longembed import LongEmbedConfig, LongEmbedModel

TEXTS = [f"A story about one {animal} in the wood. " * 8 for animal in ("fox", "whale", "frog", "heron", "badger")]
QUERIES = [f"Which story is about the {animal}?" for animal in ("fox", "whale", "frog", "heron", "badger")]


@pytest.fixture(scope="module")
def models(minilm_tokenizer, tmp_path_factory) -> list[str]:
    """A teacher of four layers and its pruned half, both in folders called `final`; the student reads less."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("compared")
    config = LongEmbedConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, max_position_embeddings=256,
        initializer_range=0.5,
    )  # fmt: skip
    teacher = LongEmbedModel(config)
    teacher.tokenizer = minilm_tokenizer
    teacher.save_pretrained(folder / "teacher" / "final")
    student = LongEmbedModel.from_pretrained(folder / "teacher" / "final").keep_layers([0, 2])
    student.config.max_position_embeddings = 128
    student.embeddings.position_embeddings = torch.nn.Embedding(128, 32)
    student.save_pretrained(folder / "student" / "final")
    return [str(folder / name / "final") for name in ("teacher", "student")]


def arguments(models, tmp_path, **changes) -> Arguments:
    given = {"model": models, "output_dir": str(tmp_path / "r"), "data_dir": str(tmp_path / "data")}
    given |= {"lengths": ["64,200"], "repeats": 1, "device": "cpu", "max_length": 64}
    return Arguments(**(given | changes))


def test_the_numbers_are_those_of_the_evaluator_and_of_the_files(make_task, models, tmp_path, monkeypatch, capsys):
    make_task("Animals", TEXTS, QUERIES)
    make_task("Hidden", TEXTS, QUERIES, split="test_64")
    make_task("Hidden", TEXTS, QUERIES, split="test_128")
    given = arguments(models, tmp_path)
    monkeypatch.setattr("eval.speed.interleaved.run_case", lambda case, limit: measure(case))  # in this process
    rows = compare.compare(given)
    assert [row.name for row in rows] == ["teacher", "student"]
    for row, path in zip(rows, models, strict=True):
        model = LongEmbedModel.from_pretrained(path)
        assert row.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
        assert row.megabytes == pytest.approx(4 * row.parameters / 1e6, rel=0.02)
        scores = evaluate_retrieval(
            RetrievalArguments(
                model=[path], output_dir=str(tmp_path / path.split("/")[-2]), data_dir=given.data_dir, max_length=64
            )
        )
        animals, *hidden = (score.value for score in scores)
        assert row.scores == pytest.approx({"Animals": animals, "Hidden": sum(hidden) / 2})
        assert row.mean == pytest.approx((animals + sum(hidden) / 2) / 2)
    assert sorted(rows[0].speed) == [64, 200]
    assert sorted(rows[1].speed) == [64]  # 200 tokens are beyond its context
    measured = json.loads((tmp_path / "r" / "speed.json").read_text())
    assert [(m["case"]["length"], m["case"]["workload"]["model_name_or_path"]) for m in measured] == [
        (64, models[0]),
        (64, models[1]),
        (200, models[0]),
    ]
    assert rows[0].speed[64] == pytest.approx(64 / measured[0]["seconds"])

    # The same command measures nothing, and writes the table and the plot.
    monkeypatch.setattr("eval.speed.interleaved.run_case", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(evaluation.mteb, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    options = f"{' '.join(models)} --data_dir {given.data_dir} --output_dir {given.output_dir} --lengths 64,200 "
    options += "--repeats 1 --device cpu --max_length 64"
    monkeypatch.setattr(sys, "argv", ["compare.py", *options.split()])
    compare.main()
    table = (tmp_path / "r" / "table.md").read_text()
    assert table.startswith(as_markdown(rows))
    assert (tmp_path / "r" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_model_has_a_row_in_each_precision(make_task, models, tmp_path, monkeypatch):
    """Its speed and its scores are both in that precision; the scores those of the evaluator by itself."""
    make_task("Animals", TEXTS, QUERIES)
    given = arguments(models[:1], tmp_path, precisions=["float32", "int8"], lengths=["64"])
    rows = compare.compare(given)
    assert [row.name for row in rows] == ["teacher (float32)", "teacher (int8)"]
    measured = json.loads((tmp_path / "r" / "speed.json").read_text())
    workloads = [m["case"]["workload"] for m in measured]
    assert [(each["mode"], each["dtype"]) for each in workloads] == [("encoding", "float32"), ("encoding", "int8")]
    for row, precision in zip(rows, given.precisions, strict=True):
        own = RetrievalArguments(
            model=models[:1],
            output_dir=str(tmp_path / precision),
            data_dir=given.data_dir,
            max_length=64,
            precision=precision,
        )
        assert row.scores == pytest.approx({"Animals": evaluate_retrieval(own)[0].value})
    monkeypatch.setattr("eval.speed.measurement.resolve_device", lambda device: "cuda")
    with pytest.raises(UserError, match="8 bits are for encoding on the CPU"):
        compare.compare(given)


def test_another_metric_is_in_the_place_of_the_main_score(make_task, models, tmp_path, monkeypatch):
    make_task("Animals", TEXTS, QUERIES)
    monkeypatch.setattr(interleaved, "run_case", lambda *_: {"outcome": "measured", "seconds": 1.0})
    (row,) = compare.compare(arguments(models[:1], tmp_path, metrics=["mrr_at_3"], lengths=["64"]))
    own = RetrievalArguments(
        model=models[:1], output_dir=str(tmp_path / "own"), data_dir=str(tmp_path / "data"), max_length=64
    )
    main, mrr = evaluate_retrieval(own)[0].value, evaluate_retrieval(replace(own, metrics=["mrr_at_3"]))[0].value
    assert row.scores == {"Animals": mrr} != {"Animals": main}


def test_with_another_model_beside_it_a_model_is_measured_anew(make_task, models, tmp_path, monkeypatch):
    """So that all numbers of a table come from one run, interleaved; the scores are those that are there."""
    make_task("Animals", TEXTS, QUERIES)
    measured = []

    def counted(case, limit):
        measured.append(case.workload.model_name_or_path)
        return {"outcome": "measured", "seconds": 1.0}

    monkeypatch.setattr(interleaved, "run_case", counted)
    alone = arguments(models[:1], tmp_path, lengths=["64"])
    both = replace(alone, model=models)
    for given, expected in ((alone, models[:1]), (alone, []), (both, models), (both, []), (alone, models[:1])):
        measured.clear()
        compare.compare(given)
        assert measured == expected


def test_the_table_and_what_is_kept(tmp_path):
    rows = [
        Row("teacher", 22_700_000, 90.9, {512: 1000.0, 4096: 500.0}, {"QARetrieval": 80.0, "Story": 60.0}),
        Row("student", 17_400_000, 69.5, {512: 2500.0}, {"QARetrieval": 78.0, "Story": 55.0}),
    ]
    assert as_markdown(rows).splitlines() == [
        "| model | parameters | MB | tokens/s at 512 | tokens/s at 4,096 | QA | Story | mean | kept |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| teacher | 22.7 M | 90.9 | 1,000 (1.00 x) | 500 (1.00 x) | 80.0 | 60.0 | 70.0 | 100.0% |",
        "| student | 17.4 M | 69.5 | 2,500 (2.50 x) |  | 78.0 | 55.0 | 66.5 | 95.0% |",
    ]
    draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_names_tell_models_apart():
    assert short_names(["runs/a/final", "runs/b/final"]) == ["a", "b"]
    assert short_names(["x/minilm", "org/small"]) == ["minilm", "small"]


def test_what_cannot_be_compared_is_refused(models, tiny_sentence_transformer, make_task, tmp_path):
    make_task("Animals", TEXTS, QUERIES)
    for given, complaint in (
        ({"model": [models[0], models[0]]}, "the same model is there twice"),
        ({"model": [models[0], str(tiny_sentence_transformer)]}, "is no LongEmbed model; convert it"),
        ({"lengths": ["500"]}, "has a context of 256 tokens; give one up to that"),
        ({"repeats": 0}, "must be positive"),
        (
            {"metrics": ["ndcg_at_10", "mrr_at_10"]},
            "--metrics ndcg_at_10 mrr_at_10: a mean of several metrics says nothing",
        ),
    ):
        with pytest.raises(UserError, match=complaint):
            compare.compare(arguments(given.pop("model", models), tmp_path, **given))
