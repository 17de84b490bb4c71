"""The curve of quality against bytes: every combination once, and a front that nothing surpasses."""

import json
import random

import pytest
import torch

from common.arguments import parse
from common.errors import UserError
from experiments import token_storage
from experiments.token_storage import Arguments, Row, combinations, measure, pareto
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import random_documents, tiny_config, word_tokenizer


def test_the_front_is_what_no_other_row_surpasses():
    draw = random.Random(0)
    rows = [Row(str(n), "", draw.randint(1, 20), {"task": float(draw.randint(1, 20))}) for n in range(40)]

    def surpassed(row):
        return any(
            (other.size <= row.size and other.score > row.score) or (other.size < row.size and other.score == row.score)
            for other in rows
        )

    front = pareto(rows)
    assert {(row.size, row.score) for row in front} == {(row.size, row.score) for row in rows if not surpassed(row)}
    assert [row.size for row in front] == sorted({row.size for row in front})


def test_all_tokens_come_first_and_every_combination_once():
    values = combinations(
        Arguments(model="m", output_dir="o", dims=[64], pools=[2, 4], precisions=["binary", "float16"], weights="none")
    )
    assert list(values)[:2] == ["bm25", "m@tokens:precision=float16,weights=none"]
    assert "m@tokens:dim=64,pool=4,precision=binary,weights=none" in values
    assert len({label for label, _ in values.values()}) == len(values) == 2 * 3 * 2 + 3


def test_all_tokens_come_first_also_where_nobody_asks_for_them():
    """What is kept in other precisions is made of them, so that no document is read twice."""
    values = list(combinations(Arguments(model="m", output_dir="o", pools=[2], precisions=["int8", "float32"])))
    assert values[1:4] == [f"m@tokens:precision={name}" for name in ("float16", "int8", "float32")]
    assert "m@tokens:pool=2,precision=float16" not in values


def test_rows_beside_the_combinations_are_chosen_one_by_one():
    given = ["precision=residual2", "dim=64,pool=8,precision=int8", "pool=2,precision=binary"]
    found = combinations(Arguments(model="m", output_dir="o", pools=[2], precisions=["binary"], settings=given))
    assert list(found)[1:] == [
        "m@tokens:precision=float16",
        "m@tokens:precision=binary",
        "m@tokens:pool=2,precision=binary",
        "m@tokens:precision=residual2",
        "m@tokens:dim=64,pool=8,precision=int8",
        "m@chunks:254",
        "m@vector",
    ]
    assert found["m@tokens:dim=64,pool=8,precision=int8"][0] == "64 dimensions, pooled by 8, int8"
    refused = {"dim=0": "dim=0 is no setting of token vectors", "weights=none": "give --weights none"}
    for settings, complaint in refused.items():
        with pytest.raises(UserError, match=f"--settings {settings}.*{complaint}"):
            combinations(Arguments(model="m", output_dir="o", settings=[settings]))


@pytest.mark.parametrize("option", ["dims", "pools", "chunks"])
def test_numbers_below_1_are_refused(option):
    with pytest.raises(UserError, match=f"--{option}.*0: must be at least 1"):
        parse(Arguments, argv=["--model=m", "--output_dir=o", f"--{option}", "0"])


def test_a_run_writes_table_and_plot_and_repeats_nothing(make_task, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = LongEmbedModel(tiny_config(initializer_range=0.5, token_dim=16)).eval()
    model.tokenizer = word_tokenizer()
    model.save_pretrained(tmp_path / "model")
    documents = [row["text"] for row in random_documents(8)]
    make_task("Words", documents, [" ".join(text.split()[:5]) for text in documents])
    arguments = Arguments(
        model=str(tmp_path / "model"), data_dir=str(tmp_path / "data"), output_dir=str(tmp_path / "out"), dims=[8],
        precisions=["float16", "binary"], chunks=[16],
    )  # fmt: skip
    rows = measure(arguments)
    sizes = {row.label: row.size for row in rows}
    assert sizes["all tokens, float16"] == 2 * sizes["8 dimensions, float16"] == 16 * sizes["all tokens, binary"]
    assert sizes["one vector"] == 32 * 4
    assert json.loads((tmp_path / "out" / "results.json").read_text())[1]["label"] == "all tokens, float16"
    assert "| all tokens, float16 |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("eval.tasks.evaluation.mteb.evaluate", None)
    assert token_storage.measure(arguments) == rows


def test_bm25_is_a_level_and_takes_no_mark_from_the_vectors():
    rows = [Row("BM25", "", 10, {"Words": 90.0}), Row("one vector", "", 100, {"Words": 50.0})]
    table = token_storage.as_markdown(rows).splitlines()
    assert [line.split("|")[-2].strip() for line in table if "BM25" in line or "one vector" in line] == ["", "x"]
