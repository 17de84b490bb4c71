"""Findings side by side: tiny trainings end to end, their course, one dropout mask for twins, what is refused."""

import json

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModel

from common.errors import UserError
from common.jsonl import read_text_columns
from eval.tasks import evaluation
from experiments import findings, one_mask
from experiments.studies import findings_data, training_runs
from tests.eval.task_files import words, write_rows
from training import contrastive
from training.data.packing import pack

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
FINDING = {
    "title": "One step and two",
    "data": "questions",
    "evaluations": {"questions": {"metrics": ["hit_rate_at_1"]}, "similarity": {}},
    "plot": ["Questions top 1", "Spearman"],
    "stages": 2,
    "training": {
        "objective": "info_nce",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "dropout": 0.0,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "report_to": "none",
    },
    "rows": {"one": {"max_steps": 1}, "two": {"max_steps": 2}},
}


@pytest.fixture
def findings_arguments(tiny_longembed, tmp_path, monkeypatch) -> findings.Arguments:
    """Twelve questions, of which the last four are judged; training runs in this process, which saves imports."""

    def run(command, **options):
        assert command[1] == str(findings.PROGRAMS["contrastive"])
        contrastive.main(command[2:])
        return type("Completed", (), {"returncode": 0})

    monkeypatch.setattr(training_runs.subprocess, "run", run)
    rows = [{"question": words(4, n), "long_answer": words(20, 50 + n), "title": f"page {n % 3}"} for n in range(12)]
    write_rows(tmp_path / "questions.jsonl", rows)
    pairs = [{"sentence1": words(8, n), "sentence2": words(8, 90 + n), "score": float(n % 6)} for n in range(30)]
    write_rows(tmp_path / "sts" / "STS16.jsonl", pairs)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "steps.yaml").write_text(yaml.safe_dump(FINDING, sort_keys=False))
    return findings.Arguments(
        model_name_or_path=str(tiny_longembed),
        output_dir=str(tmp_path / "out"),
        recipes=str(tmp_path / "recipes"),
        questions=str(tmp_path / "questions.jsonl"),
        judge_from=8,
        sts_dir=str(tmp_path / "sts"),
        precision="float32",
    )


def evaluated_by_hand(folder, tmp_path) -> tuple[float, float]:
    """Share of the judged questions that find their answer first among all, and Spearman's correlation, times 100."""
    model = AutoModel.from_pretrained(folder)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    queries = model.encode([row["question"] for row in rows[8:]], prompt_name="query", precision="float32")
    documents = model.encode([row["long_answer"] for row in rows], prompt_name="document", precision="float32")
    first = (queries @ documents.T).argmax(1) == np.arange(8, 12)
    pairs = [json.loads(line) for line in (tmp_path / "sts" / "STS16.jsonl").read_text().splitlines()]
    sides = [
        model.encode([pair[side] for pair in pairs], prompt_name="document", precision="float32")
        for side in ("sentence1", "sentence2")
    ]
    correlation, _ = spearmanr([pair["score"] for pair in pairs], (sides[0] * sides[1]).sum(1))
    return 100 * first.mean(), 100 * correlation


def test_two_trainings_are_judged_as_by_hand_and_made_once(findings_arguments, tmp_path, monkeypatch):
    results = findings.compare(findings_arguments)["steps"]
    assert [result["row"] for result in results] == ["start", "one", "two"]
    folder = tmp_path / "out" / "steps"
    models = [findings_arguments.model_name_or_path, folder / "one" / "final", folder / "two" / "final"]
    for result, model in zip(results, models, strict=True):
        found = [result["scores"][column] for column in ("Questions top 1", "Spearman")]
        assert found == pytest.approx(evaluated_by_hand(model, tmp_path), abs=0.01)
    assert len({result["scores"]["Spearman"] for result in results}) == 3
    assert [result["pairs"] for result in results[1:]] == [4, 8]
    # At a constant learning rate two steps begin with the one step, so that its end is a stage of it.
    ((step, scores),) = results[2]["stages"]
    assert step == 1
    assert scores["Spearman"] == pytest.approx(results[1]["scores"]["Spearman"], abs=1e-4)
    table = (folder / "table.md").read_text().splitlines()
    assert table[4].startswith(f"| two | {results[2]['scores']['Questions top 1']:.1f} |")
    for picture in (folder / "plot.png", tmp_path / "out" / "plane.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")

    def not_again(*settings):
        raise AssertionError("done before")

    monkeypatch.setattr(findings, "train", not_again)
    monkeypatch.setattr(evaluation.mteb, "evaluate", not_again)
    assert findings.compare(findings_arguments)["steps"] == results

    changed = FINDING | {"rows": {"one": {"max_steps": 1, "seed": 1}}}
    (tmp_path / "recipes" / "steps.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(UserError, match=r"steps/one was made from another model, recipe or data"):
        findings.compare(findings_arguments)


def test_missing_data_is_told_before_anything_is_trained(findings_arguments, tmp_path):
    findings_arguments.findings = ["hard_negatives"]
    findings_arguments.recipes = str(findings.FINDINGS)
    with pytest.raises(UserError, match="--teacher is needed"):
        findings.compare(findings_arguments)
    findings_arguments.findings = ["nothing"]
    with pytest.raises(UserError, match=r"nothing.yaml cannot be read"):
        findings.compare(findings_arguments)
    assert not (tmp_path / "out" / "hard_negatives").exists()


def test_a_model_that_is_not_there_is_told_before_anything_is_written(findings_arguments, tmp_path):
    findings_arguments.model_name_or_path = str(tmp_path / "none")
    with pytest.raises(UserError, match=r"unknown model .*/none"):
        findings.compare(findings_arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "option"), [("titles", "titles"), ("sentences", "titles"), ("documents", "documents")]
)
def test_a_file_of_which_nothing_is_left_to_train_on_is_told_before_training(
    findings_arguments, tmp_path, data, option
):
    """Three rows, of which all that are long enough are judged."""
    texts = [{"title": f"t{n}", "anchor": f"t{n}", "abstract": "a", "positive": words(20, n)} for n in range(3)]
    write_rows(tmp_path / "rows.jsonl", [row | {"body": words(20, n)} for n, row in enumerate(texts)])
    setattr(findings_arguments, option, str(tmp_path / "rows.jsonl"))
    findings_arguments.judged_titles, findings_arguments.judged_documents, findings_arguments.document_words = 3, 3, 15
    (tmp_path / "recipes" / "steps.yaml").write_text(yaml.safe_dump(FINDING | {"data": data}))
    with pytest.raises(UserError, match=rf"--{option} has no row to train on, .*\(--judged_{option}\)"):
        findings.compare(findings_arguments)
    assert not (findings_arguments.data / f"{data}.jsonl").exists()  # which would be taken for made, next time
    assert not (tmp_path / "out" / "steps").exists()


@pytest.mark.parametrize(("steps", "follow", "stages"), [(5, 2, [2, 4, 5]), (5, 3, [1, 2, 3, 4, 5])])
def test_every_stage_of_a_row_is_kept_until_it_is_judged(findings_arguments, tmp_path, steps, follow, stages):
    finding = FINDING | {"stages": follow, "rows": {"row": {"max_steps": steps}}}
    (tmp_path / "recipes" / "steps.yaml").write_text(yaml.safe_dump(finding))
    (row,) = findings.Finding.read(tmp_path / "recipes" / "steps.yaml").rows
    assert list(findings.make(row, tmp_path / "out" / "row", findings_arguments)) == stages


def test_a_row_interrupted_while_its_checkpoints_are_removed_goes_on(findings_arguments, tmp_path, monkeypatch):
    finding = FINDING | {"stages": 3, "rows": {"row": {"max_steps": 3}}}
    (tmp_path / "recipes" / "steps.yaml").write_text(yaml.safe_dump(finding))
    (row,) = findings.Finding.read(tmp_path / "recipes" / "steps.yaml").rows
    folder = tmp_path / "out" / "row"

    remove = findings.shutil.rmtree

    def stopping(path, **options):
        if path.name != "checkpoints":
            return remove(path, **options)
        (path / ".step-3.tmp-of-a-killed-process").mkdir()
        (path / "step-1" / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(findings.shutil, "rmtree", stopping)
        findings.make(row, folder, findings_arguments)
    assert list(findings.make(row, folder, findings_arguments)) == [1, 2, 3]
    assert not (folder / "checkpoints").exists()


def test_long_documents_are_judged_apart_from_those_that_train(findings_arguments, tmp_path):
    rows = [{"title": f"t{n}", "abstract": f"a{n}", "body": words(10 + n, n)} for n in range(20)]
    write_rows(tmp_path / "documents.jsonl", rows)
    findings_arguments.documents, findings_arguments.document_words, findings_arguments.judged_documents = (
        str(tmp_path / "documents.jsonl"),
        15,
        4,
    )
    path = findings_data.data_file("documents", findings_arguments)
    trained = [json.loads(line)["abstract"] for line in path.read_text().splitlines()]
    queries, corpus = (
        read_text_columns(findings_arguments.data / "Documents" / f"{name}.jsonl.gz", "text")
        for name in ("queries", "corpus")
    )
    judged = [text for _, (text,) in queries]
    bodies = {row["abstract"]: row["body"] for row in rows}
    assert [text for _, (text,) in corpus] == [bodies[abstract] for abstract in judged]
    assert len(judged) == 4
    assert findings_data.data_file("documents", findings_arguments) == path
    write_rows(tmp_path / "documents.jsonl", [row | {"title": f"u{n}"} for n, row in enumerate(rows)])
    with pytest.raises(UserError, match="was made from another model, recipe or data"):
        findings_data.data_file("documents", findings_arguments)
    assert {*trained, *judged} == {f"a{n}" for n in range(5, 20)}  # the others are too short
    assert not {*trained} & {*judged}


@pytest.mark.parametrize("path", sorted(findings.FINDINGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_row_is_one_that_the_training_understands(path, tmp_path):
    for row in findings.Finding.read(path).rows:
        config = tmp_path / f"{row.name}.yaml"
        config.write_text(yaml.safe_dump(row.recipe))
        argv = ["--config", str(config), "--model_name_or_path", str(tmp_path / "none")]
        argv += ["--train_data", "none.jsonl", "--output_dir", str(tmp_path / "out")]
        with pytest.raises(UserError, match="--model_name_or_path"):  # the first thing that is wrong
            contrastive.main(argv)


def test_twins_share_one_mask_under_the_patch_alone(tiny_longembed, monkeypatch):
    """The twins of a row are one vector although dropout is on: another one than without dropout, or drawn again."""
    model = AutoModel.from_pretrained(tiny_longembed, hidden_dropout_prob=0.3).train()
    texts = [list(range(100 + n, 110 + n)) for n in range(3)]
    (chunk,) = pack(texts * 2, 1000)

    def twins(pool):
        first, second = pool(model, chunk).detach().chunk(2)
        return first, second

    first, second = twins(one_mask.pool)
    assert (first - second).abs().max() > 0.01  # two masks
    monkeypatch.setattr(nn.Dropout, "forward", one_mask.drop_twins)
    first, second = twins(one_mask.pool_twins)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    again, _ = twins(one_mask.pool_twins)
    assert (first - again).abs().max() > 0.01
    model.eval()
    without, _ = twins(one_mask.pool_twins)
    assert (first - without).abs().max() > 0.01
    (others,) = pack([*texts, *texts[::-1]], 1000)
    with pytest.raises(UserError, match="needs --pairs twins"):
        one_mask.pool_twins(model, others)
