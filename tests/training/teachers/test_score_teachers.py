"""Score teachers: a cross-encoder's scores, computed once; scores of a column, row by row; a student of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import random_pairs, tiny_config, write_jsonl
from training import distillation
from training.data.pairs.batches import PairBatch
from training.data.sources import Columns, Source, read_sources
from training.objectives.losses.soft_targets import margin_mse, soft_targets
from training.teachers.arguments import TeachingArguments
from training.teachers.objective import Teaching
from training.teachers.score_teachers import ColumnScores, CrossEncoderScores

TEXTS = ("anchor", "positive", "negative_0", "negative_1")
COLUMNS = "--text_columns anchor positive negative_0 negative_1 "


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Queries with three candidates, scored by the words that they share."""
    found = random_pairs(40, negatives=2)
    for row in found:
        query = set(row["anchor"].split())
        row["label"] = [float(len(query & set(row[name].split()))) for name in TEXTS[1:]]
    return found


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("scores") / "rows.jsonl", rows))


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory, word_tokenizer) -> str:
    folder = tmp_path_factory.mktemp("cross-encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**sizes, vocab_size=len(word_tokenizer), num_labels=1, initializer_range=0.5)
    BertForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return str(folder)


def read_source(file: str, **more) -> Source:
    return read_sources([file], Columns(TEXTS, None, "texts", **more))[0]


def batch_of(source: Source, rows: list[int]) -> PairBatch:
    """Rows of a source by their number from 0, as batches name them."""
    empty = PairBatch([], torch.empty(0), len(rows), 0, (), 0)
    return replace(empty, texts=source.texts(rows), source=source.name, rows=source.numbers(rows))


def test_a_cross_encoders_scores_are_its_logits_and_are_computed_once(cross_encoder, data, rows, tmp_path, monkeypatch):
    teacher, whole = CrossEncoderScores(cross_encoder, 3, tmp_path / "cache", 4096), read_source(data)
    teacher.read_all([whole])
    scores, counts = teacher.read(batch_of(whole, list(range(len(rows)))))
    assert counts.all()
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(cross_encoder).eval(),
        AutoTokenizer.from_pretrained(cross_encoder),
    )
    for row, own in zip(rows[:8], scores, strict=False):
        for name, score in zip(TEXTS[1:], own, strict=True):
            with torch.no_grad():
                logits = model(**tokenizer(row["anchor"], row[name], return_tensors="pt")).logits
            assert score.item() == pytest.approx(logits.item(), abs=1e-4)

    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(CrossEncoderScores, "scores_of", never)
    again = CrossEncoderScores(cross_encoder, 3, tmp_path / "cache", 4096)
    again.read_all([whole])
    assert torch.equal(again.read(batch_of(whole, list(range(len(rows)))))[0], scores)


def test_scores_by_other_libraries_are_computed_again(cross_encoder, data, tmp_path, monkeypatch):
    whole = read_source(data)
    CrossEncoderScores(cross_encoder, 3, tmp_path / "cache", 4096).read_all([whole])
    monkeypatch.setattr("common.provenance.version", lambda library: "0.0")
    asked: list[int] = []
    teacher = CrossEncoderScores(cross_encoder, 3, tmp_path / "cache", 4096)
    monkeypatch.setattr(teacher, "scores_of", lambda columns: asked.append(1) or np.zeros((len(columns[0]), 3)))
    teacher.read_all([whole])
    assert asked


@pytest.mark.parametrize("change", ["weights", "negatives"])
def test_another_model_or_candidate_has_scores_of_its_own(cross_encoder, rows, tmp_path, word_tokenizer, change):
    """A shared cache returns the same scores as a fresh one."""
    first = read_source(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    CrossEncoderScores(cross_encoder, 3, tmp_path / "cache", 4096).read_all([first])
    if change == "weights":
        model = BertForSequenceClassification.from_pretrained(cross_encoder)
        torch.nn.init.normal_(model.classifier.weight)
        cross_encoder = str(tmp_path / "other")
        model.save_pretrained(cross_encoder)
        word_tokenizer.save_pretrained(cross_encoder)
    else:
        rows = [row | {"negative_1": " ".join(reversed(row["anchor"].split()))} for row in rows]
    changed, found = read_source(str(write_jsonl(tmp_path / "changed.jsonl", rows))), []
    for cache in ("cache", "fresh"):
        teacher = CrossEncoderScores(cross_encoder, 3, tmp_path / cache, 4096)
        teacher.read_all([changed])
        found.append(teacher.read(batch_of(changed, list(range(len(rows)))))[0])
    torch.testing.assert_close(found[0], found[1])


def test_scores_of_a_column_belong_to_the_row_and_not_to_its_texts(rows, tmp_path):
    """The same texts three times, in two files, each time with other scores."""
    scaled = [[row | {"label": [n * score for score in row["label"]]} for row in rows] for n in (1, 2, 3)]
    files = {"first": scaled[0] + scaled[1], "second": scaled[2]}
    sources = [
        read_source(str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), numbers=("label",))
        for name, rows in files.items()
    ]
    teacher = ColumnScores("label", 3)
    teacher.read_all(sources)
    for of_file, given in zip(sources, files.values(), strict=True):
        numbers = list(range(len(given)))[::-1]
        found, counts = teacher.read(batch_of(of_file, numbers))
        np.testing.assert_array_equal(found, [row["label"] for row in given[::-1]])
        assert counts.all()


@pytest.mark.parametrize("labels", [[0.5] * 10, [["much", "little", "none"]] * 10, [[True, False, True]] * 10])
def test_a_parquet_column_of_something_else_is_a_sentence(rows, tmp_path, labels):
    texts = {name: [row[name] for row in rows[:10]] for name in TEXTS}
    Dataset.from_dict(texts | {"label": labels}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet, row 1: label must hold a list of numbers"):
        ColumnScores("label", 3).read_all([read_source(str(tmp_path / "rows.parquet"), numbers=("label",))])


@pytest.mark.promise("D1")
@pytest.mark.parametrize("loss", ["kl", "margin_mse"])
def test_the_loss_is_of_scaled_cosines(loss):
    """Test the wiring of scale and temperature, by the production losses."""
    arguments = TeachingArguments(score_column="label", score_loss=loss, score_scale=7.0, score_temperature=2.0)
    objective = Teaching(arguments, LongEmbedModel(tiny_config()), {"score": 3})
    student, target = torch.randn(5, 4, 32, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    value, _ = objective(student, {"score": (target, torch.ones(5, dtype=torch.bool))})
    cosines = F.cosine_similarity(student[:, :1], student[:, 1:], dim=-1)
    expected = (
        margin_mse(7 * cosines, target) if loss == "margin_mse" else soft_targets(7 * cosines, target, temperature=2)
    )
    torch.testing.assert_close(value, expected[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("options", ["--score_column label", "--score_loss margin_mse --score_teacher {cross_encoder}"])
def test_a_student_learns_to_score(model_folder, cross_encoder, data, tmp_path, options):
    given = (
        f"--model_name_or_path {model_folder} --train_data {data} --eval_data {data} --output_dir {tmp_path} {COLUMNS}"
    )
    given += (
        f"{options.format(cross_encoder=cross_encoder)} --per_device_train_batch_size 10 --max_steps 40 --dropout 0 "
    )
    given += "--learning_rate 3e-3 --dataloader_num_workers 0 --eval_steps 4"
    distillation.main(given.split())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < 0.7 * losses[0]


def test_mistakes_are_sentences(model_folder, cross_encoder, rows, tmp_path):
    def run(options: str, label: object = None, columns: str = COLUMNS) -> None:
        changed = [*rows[:2], rows[2] | {"label": rows[2]["label"] if label is None else label}, *rows[3:]]
        file = write_jsonl(tmp_path / "rows.jsonl", changed)
        given = f"--model_name_or_path {model_folder} --train_data {file} --output_dir {tmp_path}/out --max_steps 1 "
        distillation.main((given + columns + "--per_device_train_batch_size 8 " + options).split())

    for options, label, complaint in (
        ("--score_column label", [1.0, 2.0], "row 3: label must hold 3 numbers, one for each of positive, negative_0"),
        ("--score_column label", "much", "row 3: label must hold a list of numbers"),
        ("--score_column label", [1.0, 2.0, "much"], "row 3: label must hold a list of numbers"),
        ("--score_column points", None, "the column points is missing"),
        ("--score_teacher /nowhere/model", None, "--score_teacher /nowhere/model: unknown model"),
        (f"--score_teacher {cross_encoder} --score_column label", None, "give one kind, and of scores one source"),
        (f"--score_column label --structural_teacher {model_folder}", None, "give one kind"),
        ("--score_column label --score_scale 0", None, "--score_scale.*: 0: must be more than 0"),
    ):
        with pytest.raises(UserError, match=complaint) as caught:
            run(options, label)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="name three columns"):
        run("--score_column label", columns="--text_columns anchor positive ")
