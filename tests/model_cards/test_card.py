"""The card of a release after an evaluation: metadata that huggingface_hub reads, a table, and files for benchmarks."""

import json

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, parse_eval_result_entries

from common.errors import UserError
from model_cards import card
from tests.eval.report.test_hub_results import write_result


def test_results_go_into_metadata_table_and_files(tiny, tmp_path):
    write_result(tmp_path / "eval", "local/tiny", "LEMBPasskeyRetrieval", {"test_256": 0.9, "test_512": 0.5})
    write_result(tmp_path / "eval", "local/tiny", "Garden", {"test": 0.25}, {"output": "tokens"}, "local-1")
    write_result(tmp_path / "eval", "baseline/bm25s", "Garden", {"test": 0.75}, None, "local-1")
    for _ in range(2):  # the second time it replaces what the first has written
        card.main(["tiny", "--results_dir", str(tmp_path / "eval")])
    written = ModelCard.load(tiny.folder / "README.md")
    assert written.data.license == "mit"
    assert written.data.model_name == "org/tiny"
    results = written.data.eval_results
    assert all(isinstance(result, EvalResult) for result in results)
    found = {(r.dataset_type, r.dataset_split, r.metric_name): r.metric_value for r in results}
    assert found["local/Garden", "test", "nDCG@10 x 100, a vector a token"] == 25.0
    assert len(found) == 3  # BM25 is in the table alone
    assert written.text.count("| BM25 |") == 1
    assert "| tiny: a vector a token |" in written.text
    assert written.text.endswith("end\n")
    (file,) = (tiny.folder / ".eval_results").iterdir()
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert {entry.task_id: entry.value for entry in entries}["LEMBPasskeyRetrieval_default_test_256"] == 90.0


def test_a_card_without_a_place_and_results_without_the_model_are_told(tiny, tmp_path):
    write_result(tmp_path / "eval", "local/other", "Garden", {"test": 0.25}, None, "local-1")
    with pytest.raises(UserError, match="it has those of other"):
        card.main(["tiny", "--results_dir", str(tmp_path / "eval")])
    (tiny.folder / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    with pytest.raises(UserError, match="add them"):
        card.main(["tiny", "--results_dir", str(tmp_path / "eval"), "--model", "other"])
    assert json.dumps("results") not in (tiny.folder / "README.md").read_text()
