"""`make model`: each step of a recipe runs once, also after a failure, and the end is a difference and its model."""

import importlib
import json
from types import SimpleNamespace

import pytest
import yaml

from common.errors import UserError
from model_cards import rebuild
from model_cards.rebuild import command_of, run_step
from modeling_longembed import LongEmbedModel
from tests.model_cards.conftest import RECIPE
from tests.modeling_longembed.tiny_checkpoints import random_text


@pytest.fixture
def places(tmp_path):
    return {"data": str(tmp_path / "data"), "runs": str(tmp_path / "runs")}


def script(tmp_path, code="print(1)"):
    (tmp_path / "counting.py").write_text(f"import sys, pathlib\n{code}\n")
    return {"name": "count", "module": "counting", "options": {"words": ["{data}/a", 3]}}


def test_options_become_words_with_their_places(places):
    step = {"name": "head", "module": "a.b", "options": {"data": ["{data}/x", "{runs}/y"], "dim": 8, "fast": True}}
    words = command_of(step, places)[1:]
    assert words[:2] == ["-m", "a.b"]
    assert words[2:] == [
        *("--data", f"{places['data']}/x", f"{places['runs']}/y", "--dim", "8", "--fast", "True"),
        *("--output_dir", f"{places['runs']}/head"),
    ]


def test_a_step_runs_once_and_again_after_it_failed(tmp_path, places, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"
    failing = script(tmp_path, f"open({str(log)!r}, 'a').write('x'); sys.exit(3)")
    with pytest.raises(UserError, match="exit code 3"):
        run_step(failing, places)
    step = script(tmp_path, f"open({str(log)!r}, 'a').write('x')")
    for _ in range(2):
        run_step(step, places)
    assert log.read_text() == "xx"
    with pytest.raises(UserError, match="other options"):
        run_step(step | {"options": {"words": ["b"]}}, places)


def run_here(command, check):
    """`subprocess.run` of `python -m module ...`, without a process, which would import torch again."""
    importlib.import_module(command[2]).main(command[3:])
    return SimpleNamespace(returncode=0)


def test_a_recipe_is_rebuilt_from_documents_alone(tiny, base, tmp_path, capsys, monkeypatch):
    """Oracle: the calls that the recipe stands for."""
    monkeypatch.setattr(rebuild.subprocess, "run", run_here)
    data = tmp_path / "data"
    data.mkdir()
    texts = [random_text(30, seed=n) for n in range(12)]
    (data / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    step = {
        "name": "weights",
        "module": "training.token_output",
        "options": {
            "model_name_or_path": "{runs}/start",
            "train_data": ["{data}/documents.jsonl"],
            "query_token_weights": "idf",
        },
    }
    (tiny.folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"steps": [step]}))
    options = ["tiny", "--data_dir", str(data), "--base", str(base), "--output_dir", str(tmp_path / "runs")]
    rebuild.main(options)
    made = LongEmbedModel.from_pretrained(tmp_path / "runs" / "final")
    expected = LongEmbedModel.from_encoder(base, **RECIPE["conversion"])
    expected.fit_query_token_weights(texts, kind="idf")
    assert made.state_dict().keys() == expected.state_dict().keys()
    assert all(made.state_dict()[name].equal(tensor) for name, tensor in expected.state_dict().items())
    rebuild.main(options)
    assert "weights: done before" in capsys.readouterr().out


def test_missing_documents_are_told_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="the card of tiny"):
        rebuild.main(["tiny", "--data_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path / "runs")])
