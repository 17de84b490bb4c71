"""Ways to a longer context side by side: tiny models end to end, going on after an interruption, what is refused."""

import json

import pytest
import yaml

from common.errors import UserError
from eval import perplexity
from eval.tasks import evaluation
from experiments import extension
from experiments.studies import training_runs
from tests.eval.task_files import words
from training import pretraining

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
TRAINING = {
    "per_device_train_tokens": 256,
    "batch_tokens": 128,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "eval_steps": 2,
    "eval_sequence_length": 64,
    "dropout": 0.0,
    "dataloader_num_workers": 0,
    "report_to": "none",
}
RECIPES = {
    "base": {"sequence_length": 64},
    "rope": {
        "position_embedding_type": "rope",
        "rope_theta": 1000,
        "max_position_embeddings": 128,
        "sequence_length": 128,
        "training_attention_patterns": "shifted:size=32",
    },
}
ROWS = ["repeat", "interpolate", "group", "block", "rope_start", "rope"]


@pytest.fixture
def extension_arguments(tiny_sentence_transformer, make_task, tmp_path, monkeypatch) -> extension.Arguments:
    """An encoder of 64 positions, extended to 128; training runs in this process, which saves imports."""

    def run(command, **options):
        assert command[1] == str(extension.SCRIPT)
        pretraining.main(command[2:])
        return type("Completed", (), {"returncode": 0})

    monkeypatch.setattr(training_runs.subprocess, "run", run)
    (tmp_path / "recipes").mkdir()
    for name, recipe in RECIPES.items():
        (tmp_path / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(TRAINING | recipe))
    for name, column, first in (("train", "body", 0), ("held-out", "text", 100)):
        rows = [{column: words(150 + seed, first + seed)} for seed in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_task("Toy", [words(100, seed) for seed in range(5)], [words(5, seed) for seed in range(5)])
    return extension.Arguments(
        model_name_or_path=str(tiny_sentence_transformer),
        train_data=[str(tmp_path / "train.jsonl")],
        text_column="body",
        eval_data=str(tmp_path / "held-out.jsonl"),
        task_data_dir=str(tmp_path / "data"),
        output_dir=str(tmp_path / "out"),
        rows=ROWS,
        retrieval_rows=[name for name in extension.ROWS if name != "group"],
        recipes=str(tmp_path / "recipes"),
        lengths=["32,64,128"],
        documents=3,
        precision="float32",
        batch_tokens=512,
    )


@pytest.mark.slow
def test_the_comparison_end_to_end_goes_on_and_repeats_nothing(extension_arguments, tmp_path, monkeypatch):
    measure, stop_at = perplexity.measure, "rope"

    def stopping(model, label, *rest):
        if label == stop_at:
            raise KeyboardInterrupt
        return measure(model, label, *rest)

    monkeypatch.setattr(perplexity, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        extension.compare(extension_arguments)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["row"] for result in written] == ["base", *ROWS[:-1]]

    stop_at = ""
    results = {result["row"]: result for result in extension.compare(extension_arguments)}
    assert list(results) == ["base", *ROWS]
    values = {
        name: {length: point["value"] for length, point in result["perplexity"]["masked"].items()}
        for name, result in results.items()
    }
    assert set(values["base"]) == {"32", "64"}  # it reads no more
    for name in ROWS:
        assert set(values[name]) == {"32", "64", "128"}
        assert list(results[name]["retrieval"]) == ([] if name == "group" else ["Toy"])
    for length in ("32", "64"):  # within the original context an extended model is the one it is made from
        for name in ("repeat", "interpolate", "group"):
            assert values[name][length] == pytest.approx(values["base"][length], rel=1e-5)
        assert values["rope_start"][length] != pytest.approx(values["base"][length], rel=1e-3)
    # A text of 32 tokens lies within one block, one of 64 does not: the closing token is read alone.
    assert values["block"]["32"] == pytest.approx(values["base"]["32"], rel=1e-5)
    assert values["rope"] != pytest.approx(values["rope_start"], rel=1e-6)
    cost = results["rope"]["training"]
    assert cost["tokens"] == pytest.approx(3 * 256, rel=0.5)  # whole pieces of documents
    assert [tokens for tokens, _ in cost["curve"]][-1] == cost["tokens"]
    assert len(cost["curve"]) == 2
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert table[2] == "|  | 32 | 64 | 128 | Toy | training tokens | minutes | peak GiB |"
    assert len(table) == 4 + 1 + len(ROWS)
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")

    def not_again(*settings):
        raise AssertionError("done before")

    monkeypatch.setattr(extension, "train", not_again)
    monkeypatch.setattr(perplexity, "score", not_again)
    monkeypatch.setattr(evaluation.mteb, "evaluate", not_again)
    assert {result["row"]: result for result in extension.compare(extension_arguments)} == results

    path = tmp_path / "recipes" / "rope.yaml"
    path.write_text(path.read_text() + "seed: 1\n")
    with pytest.raises(UserError, match=r"rows/rope.* was made from another model, recipe or data; remove it"):
        extension.compare(extension_arguments)


def test_what_a_run_cost_is_read_from_its_lines(tmp_path):
    """Two steps of 100 tokens at 50 a second, one of 70 at 10; evaluated after each step, and not each is logged."""
    lines = [
        {"step": 1, "eval_loss": 4.0},
        {"step": 2, "token_count": 100, "tokens_per_second": 50, "peak_memory_gib": 1.5},
        {"step": 2, "eval_loss": 3.0},
        {"step": 3, "token_count": 70, "tokens_per_second": 10, "peak_memory_gib": 1.25},
        {"step": 3, "eval_loss": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cost = training_runs.training_cost(tmp_path / "metrics.jsonl")
    assert cost == {
        "tokens": 270,
        "minutes": pytest.approx((200 / 50 + 70 / 10) / 60),
        "peak_memory_gib": 1.5,
        "curve": [[100, 4.0], [200, 3.0], [270, 2.5]],
    }


def test_only_who_started_a_script_answers_ctrl_c(tmp_path):
    """As a terminal does it, which interrupts all processes; a script that failed of it would be a UserError here."""
    (tmp_path / "script.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    training_runs.run_script(tmp_path / "script.py", [])


def test_unknown_rows_and_missing_recipes_are_refused_before_training(extension_arguments, tmp_path):
    extension_arguments.rows = ["ropes"]
    with pytest.raises(UserError, match="--rows: there is no ropes; choose of base repeat"):
        extension.compare(extension_arguments)
    extension_arguments.rows = ["alibi"]
    with pytest.raises(UserError, match=r"alibi.yaml cannot be read"):
        extension.compare(extension_arguments)
    assert not (tmp_path / "out" / "rows").exists()


@pytest.mark.parametrize("name", sorted({row.recipe for row in extension.ROWS.values() if row.recipe}))
def test_every_recipe_is_one_that_the_training_understands(name, tmp_path):
    argv = ["--config", str(extension.RECIPES / f"{name}.yaml"), "--model_name_or_path", str(tmp_path / "none")]
    argv += ["--train_data", "none.jsonl", "--eval_data", "none.jsonl", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--model_name_or_path"):  # the first thing that is wrong
        pretraining.main(argv)
