"""The ruler itself: known models on known documents give the figures that others have published or measured."""

import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval
from eval.tasks.retrieval import get_tasks, load

DEVELOPMENT = Path(os.environ.get("LONGEMBED_DEV_DATA", Path(__file__).parents[3] / "shared" / "data" / "dev"))


@pytest.mark.promise("E1")
def test_minilm_on_the_public_qmsum_meetings(minilm, tmp_path):
    """all-MiniLM-L6-v2, which reads 256 tokens, has nDCG@10 = 16.32 in MTEB's published results."""
    (task,) = get_tasks(["LEMBQMSumRetrieval"], None)
    try:
        load(task)
    except UserError as error:
        pytest.skip(str(error))
    (score,) = evaluate_retrieval(
        RetrievalArguments(model=[str(minilm)], output_dir=str(tmp_path), tasks=["LEMBQMSumRetrieval"])
    )
    assert score.value == pytest.approx(16.32, abs=0.05)


def meeting_retrieval(model: str, output_dir: Path) -> float:
    """MeetingRetrieval (QMSum's test meetings), whose figures another program has measured."""
    if not (DEVELOPMENT / "MeetingRetrieval").is_dir():
        pytest.skip(f"{DEVELOPMENT} has no MeetingRetrieval; LONGEMBED_DEV_DATA names another folder")
    (score,) = evaluate_retrieval(
        RetrievalArguments([model], str(output_dir), tasks=["MeetingRetrieval"], data_dir=str(DEVELOPMENT))
    )
    return score.value


def test_bm25_on_the_development_meetings(tmp_path):
    assert meeting_retrieval("bm25", tmp_path) == pytest.approx(94.9, abs=0.05)


@pytest.mark.slow  # whole meetings through the real MiniLM; the fast tests judge tiny models
def test_truncation_on_the_development_meetings(minilm, tmp_path):
    """The figure was taken in bfloat16, which moves it by a tenth."""
    assert meeting_retrieval(f"truncate:{minilm}:512", tmp_path) == pytest.approx(45.1, abs=0.2)


def test_the_figures_of_the_gpu_are_those_of_its_run():
    """Each row of docs/reports/attention-cost.md: tokens per second of both lengths, and peak and memory at 65,536."""
    reports = Path(__file__).parents[2] / "docs" / "reports"
    checks = json.loads((reports / "gpu_check.json").read_text())["checks"]
    details = {check["name"]: check["detail"] for check in checks if check["name"].startswith("speed: ")}
    page = (reports / "attention-cost.md").read_text().partition("## On a GPU")[2]
    rows = [line.strip("| \n").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == 3
    for name, *cells in rows:
        for mode, (short, long, peak, memory) in (("training", cells[:4]), ("forward", cells[4:])):
            pattern = name.strip("`")
            assert details[f"speed: {mode}, {pattern}, 16384 tokens"].startswith(f"{short} tokens a second, ")
            expected = f"{long} tokens a second, {peak} of the peak, {memory} GB"
            assert details[f"speed: {mode}, {pattern}, 65536 tokens"] == expected
    assert f"All {len(checks)} checks" in " ".join(page.split())
    assert all(check["passed"] for check in checks)
