"""What MTEB's leaderboard gets: descriptions that MTEB reads and loads, and results in the layout of its repository."""

import json
import subprocess

import mteb
import pytest
from mteb import ResultCache
from mteb.models import sentence_transformer_wrapper as wrappers

from common.errors import UserError
from eval import submission
from eval.report.hub_results import read_task_scores
from eval.report.submission import accepted, commit_results, module_source, read_module
from modeling_longembed import LongEmbedModel
from tests.eval.report.test_hub_results import PASSKEY, write_result

if not hasattr(wrappers, "MultiVectorWrapper"):
    pytest.skip("needs a release of mteb that loads token vectors", allow_module_level=True)
BASE = "sentence-transformers/all-MiniLM-L6-v2"
COMMIT = "0123456789abcdef" * 2 + "01234567"
CONFIG = {
    "vocab_size": 100,
    "hidden_size": 32,
    "max_position_embeddings": 4096,
    "token_dim": 8,
    "license": "apache-2.0",
    "original_model": BASE,
    "prompts": {"query": "", "document": ""},
}


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "longembed_minilm_models.py"
    path.write_text(module_source(CONFIG, 1234, "org/longembed-minilm", COMMIT, "2026-11-28", ["NQ"]))
    return read_module(path)


def write_all(folder, settings=None, revision=None, model="local/tiny"):
    splits = dict.fromkeys(mteb.get_task(PASSKEY).eval_splits, 0.5)
    return write_result(folder, model, PASSKEY, splits, settings, revision)


def test_mteb_reads_a_description_with_a_loader_of_each_output(module):
    _, (one, tokens) = module
    assert one.loader is wrappers.SentenceTransformerEncoderWrapper
    assert tokens.loader.__name__ == "load_token_vectors"
    assert (one.name, tokens.name) == ("org/longembed-minilm", "org/longembed-minilm-tokens")
    assert (one.model_type, tokens.model_type) == (["dense"], ["late-interaction"])
    assert (one.embed_dim, tokens.embed_dim) == (32, 8)
    for meta in (one, tokens):
        assert meta.loader_kwargs == {"trust_remote_code": True}
        assert meta.revision == COMMIT
        assert meta.adapted_from == BASE
        assert meta.training_datasets == mteb.get_model_meta(BASE).training_datasets | {"NQ"}
        assert not meta.use_instructions


def test_a_base_that_mteb_does_not_know_is_refused():
    with pytest.raises(UserError, match="not what it was trained on"):
        module_source(CONFIG | {"original_model": "org/unknown"}, 1, "org/x", COMMIT, "2026-11-28", [])


def test_what_the_leaderboard_does_not_take_is_left_out_with_its_reason(module, tmp_path):
    write_all(tmp_path / "a")
    write_all(tmp_path / "b", {"output": "tokens"})
    write_all(tmp_path / "c", {"output": "tokens", "token_precision": "binary"})
    write_result(tmp_path / "d", "local/tiny", "LEMBQMSumRetrieval", {"test": 0.5}, None, "local-1")
    write_result(tmp_path / "e", "local/tiny", "LEMBNeedleRetrieval", {"test_256": 0.5})
    write_result(tmp_path / "f", "local/tiny", "LEMBSummScreenFDRetrieval", {"validation": 0.5}, None, "another")
    kept, left = accepted(read_task_scores(tmp_path), module[1])
    assert [(meta.name, result.task_name) for meta, result in kept] == [
        ("org/longembed-minilm-tokens", PASSKEY),
        ("org/longembed-minilm", PASSKEY),
    ]
    text = "\n".join(left)
    assert len(left) == 4
    for reason in ("local files", "one vector and a vector a token", "test_512", "another revision"):
        assert reason in text


def test_mteb_commits_the_results_and_finds_them_in_its_repository(module, tmp_path):
    """Oracle: MTEB's own reader of a clone of its repository, and git."""
    write_all(tmp_path / "a")
    kept, _ = accepted(read_task_scores(tmp_path / "a"), module[1])
    difference = commit_results(kept, tmp_path / "out")
    folder = f"results/org__longembed-minilm/{COMMIT}"
    for file in (f"{PASSKEY}.json", "model_meta.json"):
        assert f"+++ b/{folder}/{file}" in difference
    clone = tmp_path / "out" / "remote"
    log = subprocess.run(["git", "log", "--oneline"], cwd=clone, capture_output=True, text=True, check=True).stdout
    assert len(log.splitlines()) == 2
    meta = json.loads((clone / folder / "model_meta.json").read_text())
    assert meta["loader"]
    found = ResultCache(tmp_path / "out").load_task_result(PASSKEY, module[1][0])
    assert found.get_score() == pytest.approx(0.5)
    assert commit_results(kept, tmp_path / "out") == ""  # it has them


def test_both_pull_requests_are_shown_and_can_be_applied(tiny_folder, tmp_path, capsys):
    write_all(tmp_path / "eval", model=f"local/{tiny_folder.name}")
    words = ["--model", str(tiny_folder), "--hub_model_id", "org/longembed-minilm", "--hub_revision", COMMIT]
    words += ["--release_date", "2026-11-28", "--results_dir", str(tmp_path / "eval")]
    submission.main([*words, "--output_dir", str(tmp_path / "out"), "--mock_run", "False"])
    assert "adds 1 results" in capsys.readouterr().out
    assert PASSKEY in (tmp_path / "out" / "results.diff").read_text()
    subprocess.run(["git", "init", "-q", tmp_path / "mteb"], check=True)
    subprocess.run(["git", "apply", tmp_path / "out" / "model.diff"], cwd=tmp_path / "mteb", check=True)
    (applied,) = (tmp_path / "mteb").rglob("*_models.py")
    assert read_module(applied)[1][1].name == "org/longembed-minilm-tokens"
    with pytest.raises(UserError, match="40 hexadecimal digits"):
        submission.main([*words, "--hub_revision", "main", "--output_dir", str(tmp_path / "out")])


@pytest.fixture(scope="module")
def tiny_folder(minilm, tmp_path_factory):
    from transformers import AutoTokenizer

    from tests.training.tiny_training import tiny_config

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = LongEmbedModel(tiny_config(vocab_size=len(tokenizer), token_dim=8, original_model=BASE))
    model.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_both_outputs_load_by_their_description_and_pass_mtebs_mock_tasks(module, tiny_folder, place, capsys):
    meta = module[1][place]
    submission.check_loading(meta, tiny_folder)
    assert "loads, and passes" in capsys.readouterr().out
