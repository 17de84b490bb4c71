"""Paragraph Vectors against gensim's own, the same in every process, and able to tell documents apart."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.errors import UserError
from tests.training.tiny_training import write_jsonl
from training import paragraph_vector
from training.data.sources import Columns, read_sources
from training.teachers.paragraph_vector import SETTING_NAMES, WEIGHTS, ParagraphVector, _new_model, split_words

pytestmark = pytest.mark.xdist_group("paragraph_vector")  # what the module fixtures make is made once

doc2vec = pytest.importorskip("gensim.models.doc2vec", reason="gensim is not installed (extra paragraph-vector)")

TOPICS = [[f"{name}{number}" for number in range(12)] for name in ("sea", "law", "bread", "star", "tax", "horse")]
COMMON = "the of and a in to is it".split()  # noqa: SIM905


def documents(count: int, seed: int) -> list[dict[str, str]]:
    """Documents of words of two topics each."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        words = [word for topic in draw.sample(TOPICS, 2) for word in topic]
        text = " ".join(draw.choices(words, k=60) + draw.choices(COMMON, k=20))
        rows.append({"text": text, "id": f"document {number}"})
    return rows


@pytest.fixture(scope="module", params=["dm", "dbow", "both"])
def trained_model(request, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a model, and texts that it has not seen."""
    folder = tmp_path_factory.mktemp("paragraph-vectors")
    data = write_jsonl(folder / "train.jsonl", documents(80, 0))
    held_out = write_jsonl(folder / "held-out.jsonl", documents(20, 1))
    options = f"--train_data {data} --eval_data {held_out} --id_column id --output_dir {folder} --epochs 30 "
    paragraph_vector.main(f"{options} --architecture {request.param} --vector_size 24".split())
    return folder, [row["text"] for row in documents(20, 1)]


def test_held_out_documents_are_told_apart(trained_model):
    report = json.loads((trained_model[0] / "report.json").read_text())
    (held_out,) = report["held_out"].values()
    assert held_out["documents"] == 20
    assert held_out["accuracy"] > 4 * held_out["chance"]


def test_documents_keep_their_ids(trained_model):
    assert json.loads((trained_model[0] / "final" / "documents.json").read_text()) == [
        f"document {n}" for n in range(80)
    ]


@pytest.mark.parametrize("trained_model", ["both"], indirect=True)
def test_a_vector_is_the_same_in_every_process_and_order(trained_model):
    """Under another salt of Python's hashes, which gensim's own inference starts from."""
    folder, texts = trained_model
    code = (
        "import sys, json; from pathlib import Path; from training.teachers.paragraph_vector import ParagraphVector; "
        "rows = ParagraphVector.load(Path(sys.argv[1]))(json.loads(sys.argv[2])); "
        "print(json.dumps([row[0].tolist() for row in rows]))"
    )
    here = [row[0].tolist() for row in ParagraphVector.load(folder / "final")(texts[:4])]
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "final"), json.dumps(texts[3::-1])],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)[::-1] == here


def test_training_again_gives_the_same_bytes(trained_model, tmp_path):
    report = json.loads((trained_model[0] / "report.json").read_text())["arguments"]
    options = f"--train_data {trained_model[0]}/train.jsonl --output_dir {tmp_path} --epochs 30 --vector_size 24 "
    paragraph_vector.main(f"{options} --architecture {report['architecture']}".split())
    again, first = ((folder / "final" / WEIGHTS).read_bytes() for folder in (tmp_path, trained_model[0]))
    assert again == first


def test_inference_of_a_loaded_model_is_gensims(trained_model, monkeypatch):
    """gensim's `infer_vector`, its start and its draws set to ours, on a model that was never saved."""
    folder, texts = trained_model
    report = json.loads((folder / "report.json").read_text())["arguments"]
    architectures = ["dm", "dbow"] if report["architecture"] == "both" else [report["architecture"]]
    settings = {name: report[name] for name in SETTING_NAMES}
    sources = read_sources([f"{folder}/train.jsonl"], Columns(("text",), None, "texts"))
    fresh, loaded = ParagraphVector.train(sources, architectures, settings), ParagraphVector.load(folder / "final")
    for text in texts[:3]:
        words, expected = split_words(text, loaded.settings), []
        seeds = np.frombuffer(hashlib.sha256(" ".join(words).encode()).digest(), dtype=np.uint32)

        def start(size, seed_string, seeds=seeds):
            return (np.random.default_rng(seeds).random(size, dtype=np.float32) - 0.5) / size

        monkeypatch.setattr(doc2vec, "pseudorandom_weak_vector", start)
        for model in fresh.models:
            model.random.seed(seeds)
            expected.append(model.infer_vector(words))
        np.testing.assert_allclose(loaded([text])[0][0], np.concatenate(expected), atol=1e-5)


def long_documents(topics: list[list[str]]) -> list[str]:
    """Of the same 10,000 words, then 2,000 of a topic."""
    draw = random.Random(0)
    beginning = " ".join(draw.choices(COMMON, k=10_000))
    return [f"{beginning} {' '.join(draw.choices(topic, k=2000))}" for topic in topics]


def test_the_end_of_a_long_document_counts(tmp_path):
    """Long documents are nearest to short ones of the topic that they end with, by trained and by inferred vectors."""
    draw = random.Random(1)
    short = [" ".join(draw.choices(topic, k=300)) for topic in TOPICS[:4] for _ in range(20)]
    texts = [*long_documents(TOPICS[:4]), *short]
    data = write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    options = f"--train_data {data} --output_dir {tmp_path} --vector_size 24 --epochs 5 --architecture dm"
    paragraph_vector.main(options.split())
    own = load_file(tmp_path / "final" / WEIGHTS)["dm.documents"]
    for rows in (own, np.concatenate(ParagraphVector.load(tmp_path / "final")(texts))):
        of_long, of_topic = rows[:4], rows[4:].reshape(4, 20, -1).mean(1)
        of_long, of_topic = (part - part.mean(0) for part in (of_long, of_topic))  # what all have in common
        near = of_long @ (of_topic / np.linalg.norm(of_topic, axis=1, keepdims=True)).T
        assert near.argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("architecture", ["dm", "dbow"])
def test_spans_of_a_document_are_examples_of_one_tag(tmp_path, architecture, monkeypatch):
    """To the bit what gensim itself makes of two examples with one tag, and of one inference after the other."""
    texts = long_documents(TOPICS[:2])
    data = write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    arguments = paragraph_vector.ParagraphVectorArguments(
        [str(data)], str(tmp_path), architecture=architecture, vector_size=8, epochs=3
    )
    sources = read_sources([str(data)], Columns(("text",), None, "texts"))
    settings = {name: getattr(arguments, name) for name in SETTING_NAMES}
    vectors = ParagraphVector.train(sources, [architecture], settings)
    model, halves = vectors.models[0], [(text.split()[:10_000], text.split()[10_000:]) for text in texts]
    plain = _new_model(vectors.settings, architecture)
    examples = [doc2vec.TaggedDocument(half, [n]) for n, pair in enumerate(halves) for half in pair]
    plain.build_vocab(examples)
    plain.train(examples, total_examples=4, epochs=3)
    assert np.array_equal(model.dv.vectors, plain.dv.vectors)

    seeds = np.frombuffer(hashlib.sha256(texts[0].encode()).digest(), dtype=np.uint32)
    expected = (np.random.default_rng(seeds).random(8, dtype=np.float32) - 0.5) / 8
    monkeypatch.setattr(doc2vec, "pseudorandom_weak_vector", lambda *_, **__: expected)
    plain.random.seed(seeds)
    for rate in np.linspace(0.025, 0.0001, 3):
        for half in halves[0]:
            expected = plain.infer_vector(half, alpha=float(rate), epochs=1)
    np.testing.assert_allclose(vectors(texts[:1])[0][0], expected, atol=1e-6)


def test_names_are_checked_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(ParagraphVector, "train", lambda *_: pytest.fail("has trained"))
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"text": "one two one two", "id": "a"}] * 2)
    with pytest.raises(UserError, match="two documents are called a"):
        paragraph_vector.main(f"--train_data {twice} --id_column id --output_dir {tmp_path}".split())


def test_progress_is_shown(trained_model, tmp_path, capsys):
    options = f"--train_data {trained_model[0]}/train.jsonl --output_dir {tmp_path} --epochs 3 --vector_size 8"
    paragraph_vector.main(options.split())
    assert "training dbow: 100%" in (shown := capsys.readouterr().err)
    assert "3/3" in shown


def test_mistakes_are_sentences(trained_model, tmp_path):
    with pytest.raises(UserError, match=r"paragraph_vector.json is missing; give its final/"):
        ParagraphVector.load(trained_model[0])
    data = write_jsonl(tmp_path / "train.jsonl", [{"text": "one two one two"}])
    with pytest.raises(UserError, match="no word occurs so often"):
        paragraph_vector.main(f"--train_data {data} --min_count 50 --output_dir {tmp_path}".split())
    for option in (
        *("seed -1", f"seed {2**32}", "vector_size 0", "min_count 0", "negative 0", "epochs 0", "workers 0"),
        *("learning_rate 0", "architecture dm --window 0"),
    ):
        with pytest.raises(UserError, match=f"{option.split()[-1]}: must be "):
            paragraph_vector.main(f"--train_data {data} --{option} --output_dir {tmp_path}".split())
    damaged = shutil.copytree(trained_model[0] / "final", tmp_path / "damaged")
    for settings in ("[1, 2]", '{"architectures": ["dbow"]}', '"words"', "{"):
        (damaged / "paragraph_vector.json").write_text(settings)
        with pytest.raises(UserError, match=r"damaged: is damaged \(.*; train it again") as caught:
            ParagraphVector.load(damaged)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "final").exists()


def test_without_gensim_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    data = write_jsonl(tmp_path / "train.jsonl", documents(3, 0))
    with pytest.raises(UserError, match=r"needs gensim: pip install -e '.\[paragraph-vector\]'"):
        paragraph_vector.main(f"--train_data {data} --output_dir {tmp_path}".split())
