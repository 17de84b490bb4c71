"""Training as a job of the Hub: a header that uv and `hf jobs` read, and what the job would run."""

import subprocess
import sys
from pathlib import Path

import pytest

from training import hf_job

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "hf_job.py"
JOB = ["--repository", "https://example.org/longembed", "--revision", "v0.1.0"]
TRAIN = ["training/contrastive.py", "--config", "training/recipes/contrastive/default.yaml", "--output_dir", "run"]


def test_the_header_is_what_hf_jobs_reads_and_needs_what_training_needs():
    """Oracle: huggingface_hub's reader of the header, and the packages that pyproject.toml asks for."""
    header = pytest.importorskip("huggingface_hub.cli._uv_script_header", reason="an older release reads no header")
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    text = SCRIPT.read_text()
    read = header.parse_uv_script_header(text)
    assert (read.flavor, read.timeout, read.secrets) == ("a10g-small", "4h", ["HF_TOKEN"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["train"]
    assert tomllib.loads(header._extract_pep_723_block(text))["dependencies"] == needed


def test_the_dry_run_shows_the_commands_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_job.main([*JOB, "--dry_run", *TRAIN])
    clone, folder, train = capsys.readouterr().out.splitlines()
    assert clone == "git clone --quiet --depth 1 --branch v0.1.0 https://example.org/longembed longembed"
    assert folder == "cd longembed"
    assert train.endswith(f"accelerate.commands.launch {' '.join(TRAIN)}")
    assert not list(tmp_path.iterdir())


def test_a_job_runs_the_script_of_the_checkout_and_ends_as_it_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    (source / "training").mkdir(parents=True)
    (source / "common.py").write_text("CODE = 7\n")
    (source / "training" / "mine.py").write_text("import sys, common\nprint(sys.argv[1:])\nsys.exit(common.CODE)\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@localhost"]
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], cwd=source, check=True)
    monkeypatch.setattr(hf_job, "commands", lambda *a: [REAL(*a)[0], [sys.executable, *a[2]]])  # no launcher, for time
    with pytest.raises(SystemExit) as ended:
        hf_job.main(["--repository", f"file://{source}", "training/mine.py", "--max_steps", "3"])
    assert ended.value.code == 7


REAL = hf_job.commands


def test_a_job_without_a_training_script_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        hf_job.main([*JOB, "--max_steps", "3"])
    assert "error:" in capsys.readouterr().err
