"""What the tests of evaluation share: tiny tasks, and an end to the settings of a training."""

from pathlib import Path

import pytest

from tests.eval.task_files import write_rows


@pytest.fixture
def make_task(tmp_path):
    """Writes a task folder below `tmp_path / "data"`; document i is relevant for query i."""

    def make(name: str, documents, queries, split: str = "", suffix: str = ".jsonl", qrels=None) -> Path:
        folder = tmp_path / "data" / name
        where = folder / split if split else folder
        write_rows(where / f"corpus{suffix}", [{"doc_id": f"d{i}", "text": t} for i, t in enumerate(documents)])
        write_rows(where / f"queries{suffix}", [{"qid": f"q{i}", "text": t} for i, t in enumerate(queries)])
        pairs = [(i, i) for i in range(len(queries))] if qrels is None else qrels
        write_rows(where / f"qrels{suffix}", [{"qid": f"q{q}", "doc_id": f"d{d}"} for q, d in pairs])
        return folder

    return make


@pytest.fixture
def fresh_accelerator():
    """For tests that train: accelerate keeps its first settings, such as the precision, as long as a process lives."""
    from accelerate.state import AcceleratorState  # most tests here do not train

    yield
    AcceleratorState._reset_state(True)
