"""Textual similarity: correlations as scipy and sentence-transformers have them, subsets, geometry, what is refused."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from common.errors import UserError, run
from eval import sts
from eval.models.mteb_models import OneVector
from eval.sts import Arguments, evaluate_similarity
from eval.tasks.similarity import get_tasks, local_task
from tests.eval.task_files import write_rows

DEVELOPMENT = Path(os.environ.get("LONGEMBED_DEV_DATA", Path(__file__).parents[3] / "shared" / "data" / "dev"))
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly brew tea in large kettles".split()  # noqa: SIM905


def random_pairs(count: int, seed: int = 0) -> list[dict]:
    """Pairs that share words as their score says, more or less, in two subsets; scores have ties.

    No two sentences are one: the cosine of equal vectors is 1 up to rounding, which orders such pairs at random.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        first = generator.choice(WORDS, generator.integers(2, 12))
        score = generator.integers(0, 11) / 2
        second = np.where(generator.random(len(first)) < score / 5, first, generator.choice(WORDS, len(first)))
        sentences = {"sentence1": " ".join(first), "sentence2": " ".join([*second, "indeed"])}
        rows.append(sentences | {"score": score, "subset": "ab"[i % 2]})
    return rows


def cells(table: str) -> list[dict[str, str]]:
    """The rows of a Markdown table."""
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


@pytest.fixture
def encode_pairs(tiny_sentence_transformer):
    """The unit vectors of both sides of pairs, by sentence-transformers."""
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu")

    def encode(rows):
        return [
            model.encode_document([row[side] for row in rows], normalize_embeddings=True)
            for side in ("sentence1", "sentence2")
        ]

    return encode


@pytest.mark.promise("E1")
def test_the_table_is_that_of_sentence_transformers_and_scipy(tiny_sentence_transformer, encode_pairs, tmp_path):
    rows = {"sts12": random_pairs(60, 1), "mine": random_pairs(40, 2)}
    for row in rows["mine"]:
        del row["subset"]
    rows["mine"].append(rows["mine"][0])  # a sentence that is there twice counts once in the uniformity
    for name, pairs in rows.items():
        write_rows(tmp_path / "data" / f"{name}.jsonl{'.gz' * (name == 'mine')}", pairs)
    arguments = Arguments([str(tiny_sentence_transformer)], str(tmp_path / "r"), data_dir=str(tmp_path / "data"))
    (found,) = cells(evaluate_similarity(arguments))
    (found_mean,) = cells(evaluate_similarity(replace(arguments, aggregation="mean")))
    expected, aligned, uniform = {}, [], []
    for name, title in (("mine", "mine"), ("sts12", "STS12")):
        first, second = encode_pairs(rows[name])
        gold = np.array([row["score"] for row in rows[name]])
        cosines = (first * second).sum(1)
        evaluator = EmbeddingSimilarityEvaluator(
            [row["sentence1"] for row in rows[name]], [row["sentence2"] for row in rows[name]], gold.tolist(),
            main_similarity="cosine",
        )  # fmt: skip
        expected[title] = evaluator(SentenceTransformer(str(tiny_sentence_transformer), device="cpu"))[
            "spearman_cosine"
        ]
        # Spearman with ties is Pearson's correlation of average ranks.
        assert expected[title] == pytest.approx(np.corrcoef(rankdata(gold), rankdata(cosines))[0, 1], abs=1e-6)
        parts = 2 if "subset" in rows[name][0] else 1
        correlations = [spearmanr(gold[i::parts], cosines[i::parts])[0] for i in range(parts)]
        assert float(found_mean[title]) == pytest.approx(100 * np.mean(correlations), abs=0.006)
        aligned.append(np.square(first - second).sum(1)[gold > 4].mean())
        unique = np.unique(np.concatenate([first, second]), axis=0)
        squares = np.square(unique[:, None] - unique[None]).sum(2)[np.triu_indices(len(unique), 1)]
        uniform.append(np.log(np.exp(-2 * squares).mean()))
    assert list(found) == ["model", "mine", "STS12", "mean", "alignment", "uniformity"]
    for title, value in expected.items():
        assert float(found[title]) == pytest.approx(100 * value, abs=0.006)
    assert float(found["mean"]) == pytest.approx(100 * np.mean([*expected.values()]), abs=0.006)
    assert float(found["alignment"]) == pytest.approx(np.mean(aligned), abs=6e-4)
    assert float(found["uniformity"]) == pytest.approx(np.mean(uniform), abs=6e-4)


def test_whatever_has_one_vector_is_judged_and_the_rest_is_refused(
    tiny_sentence_transformer, tiny_longembed, tmp_path, monkeypatch, capsys
):
    write_rows(tmp_path / "data" / "sickr.jsonl", random_pairs(30))
    models = [
        tiny_longembed,
        tiny_sentence_transformer,
        f"truncate:{tiny_sentence_transformer}:8",
        f"chunk-mean:{tiny_sentence_transformer}:8",
    ]
    argv = ["sts", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "r", "--model"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (*argv, *models)])
    with pytest.raises(SystemExit) as left:
        run(sts.main)
    assert left.value.code == 0
    rows = cells((tmp_path / "r" / "table.md").read_text())
    names = ["tiny-longembed", "tiny", "tiny-truncate-8", "tiny-chunk-mean-8"]
    assert [row["model"] for row in rows] == [f"local/{name}" for name in names]
    assert len({row["SICK-R"] for row in rows}) == 4
    for name in ("bm25", f"chunk-max:{tiny_sentence_transformer}:8"):
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*argv, name)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(sts.main)
        assert left.value.code == 2
        assert "has no single vector of a text" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "words"), [(1.0, "it has collapsed"), (np.nan, "zero, NaN or infinite")])
def test_vectors_that_cannot_order_pairs_are_told(tiny_sentence_transformer, tmp_path, monkeypatch, value, words):
    write_rows(tmp_path / "data" / "mine.jsonl", random_pairs(10))
    monkeypatch.setattr(
        OneVector, "encode", lambda self, inputs, **_: np.full((len(inputs.dataset), 4), value, np.float32)
    )
    with pytest.raises(UserError, match=rf"local/tiny gives .* mine.*{words}"):
        evaluate_similarity(
            Arguments([str(tiny_sentence_transformer)], str(tmp_path / "r"), data_dir=str(tmp_path / "data"))
        )
    assert not list((tmp_path / "r").rglob("mine.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": "4.4"}, 'row 2: score is "4.4", not a number'),
        ({"score": True}, "row 2: score is true, not a number"),
        ({"score": float("nan")}, "row 2: score is NaN, not a number"),
        ({"sentence2": None}, "row 2: sentence2 is null, not a string"),
        ({"subset": [1]}, r"row 2: subset is \[1\], not a string"),
        ({"subset": "a"}, "row 2: either every row has a subset, or none; the first row differs"),
        ({"score": 2.5}, "its 2 pairs have no two different scores"),
    ],
)
def test_a_malformed_row_is_told_with_file_line_and_field(tmp_path, change, words):
    rows = [{"sentence1": "a", "sentence2": "b", "score": 2.5}] * 2
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row | (change if i else {})) + "\n" for i, row in enumerate(rows)))
    with pytest.raises(UserError, match=rf"mine.jsonl.*{words}"):
        local_task("mine", path)


def test_tasks_are_found_however_their_names_are_spelled(tmp_path):
    for name in ("sickr", "STS-12", "mine"):
        write_rows(tmp_path / f"{name}.jsonl", random_pairs(4))
    assert [task.metadata.name for task in get_tasks([], str(tmp_path))] == ["STS12", "mine", "SICK-R"]
    (task,) = get_tasks(["sick-r"], str(tmp_path))
    assert task.metadata.dataset["path"] == "local/sickr.jsonl"
    assert task.metadata.revision.startswith("local-")
    with pytest.raises(UserError, match="has no task STS13; it has STS12, mine, SICK-R"):
        get_tasks(["sts13"], str(tmp_path))
    with pytest.raises(UserError, match=r"holds no .jsonl"):
        get_tasks([], str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"STS22 is none of STS12, .*; for your own pairs give --data_dir"):
        get_tasks(["STS22"], None)
    (official,) = get_tasks(["stsbenchmark"], None)
    assert official.metadata.dataset["path"] == "mteb/stsbenchmark-sts"


@pytest.mark.slow  # 2,372 sentences; the fast tests compare a tiny model's table with sentence-transformers and scipy
@pytest.mark.promise("E1")
def test_minilm_has_its_published_correlations(minilm, tmp_path):
    """MTEB's published results: STS16 78.99, STS13 80.60."""
    data = DEVELOPMENT / "sts"
    if not data.is_dir():
        pytest.skip(f"{DEVELOPMENT} has no sts; LONGEMBED_DEV_DATA names another folder")
    (row,) = cells(evaluate_similarity(Arguments([str(minilm)], str(tmp_path), tasks=["STS16"], data_dir=str(data))))
    assert float(row["STS16"]) == pytest.approx(78.99, abs=0.05)
