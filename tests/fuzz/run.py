"""Run bad inputs, each in a forked process, and judge how it ends."""

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import yaml
from safetensors import SafetensorError, safe_open

from common.errors import run as run_script
from docs.make_reference import parser_of
from tests.forked import run_forked
from tests.fuzz.cases import Case, prepare
from tests.tiny_inputs import CHANGED, COMMANDS

MEMORY = 6 << 30
# Python's own words about our code: a message with one of them was not written for a reader.
OURS = re.compile(
    r"NoneType|has no attribute|unexpected keyword|list index|not subscriptable|KeyError|TypeError|IndexError|"
    r"Traceback|object is not|unhashable type|positional argument|maximum recursion|stack smashing|core dumped"
)


@dataclass(frozen=True)
class Outcome:
    """How a bad input ended.

    Attributes:
        kind: `refused` with one sentence, `accepted`, `unfinished` when the time was up, `fault`, or `void` if there
            was nothing to try.
        detail: the sentence, or what is wrong.
        seconds: how long the script ran.
    """

    kind: str
    detail: str
    seconds: float


def main_of(script: str) -> Callable[[], None]:
    """Return the entry point of a script, which is imported."""
    return importlib.import_module(script).main


def options_of(script: str) -> dict[str, argparse.Action]:
    """Return the options of a script by name."""
    actions = parser_of(Path(script.replace(".", "/") + ".py"))._actions
    return {action.dest: action for action in actions if action.dest not in ("help", "config")}


def run_case(case: Case, inputs: Path, folder: Path, seconds: float = 30.0) -> Outcome:
    """Run a case in a new folder, as a shell would run it, and judge how it ends.

    Args:
        case: the bad input.
        inputs: folder of the good inputs.
        folder: made, and removed afterwards.
        seconds: the time that it may take.
    """
    main, work = main_of(case.script), folder / "work"
    work.mkdir(parents=True)
    (folder / "tmp").mkdir()

    def script() -> None:
        os.chdir(work)
        sys.argv = [f"{case.script.replace('.', '/')}.py", *case.words]
        datasets.config.HF_DATASETS_CACHE = str(folder / "datasets")
        tempfile.tempdir = str(folder / "tmp")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        run_script(main)

    try:
        if not prepare(case, inputs, work):
            return Outcome("void", "an edit was not possible", 0.0)
        before = hashes(work / "in")
        ended = run_forked(script, seconds, folder / "log", MEMORY)
        kind, detail = judge(ended.code, ended.killed, ended.stderr)
        after = hashes(work / "in")
        changed = [f"in/{name}" for name in sorted(before | after) if before.get(name) != after.get(name)]
        if changed := [name for name in changed if not is_asked_for(name, case)]:
            kind, detail = "fault", f"inputs changed: {', '.join(changed)}"
        # A process that was stopped may leave temporary files, which the next one removes.
        if kind != "unfinished" and (wrong := half_written(work)):
            kind, detail = "fault", f"half-written: {', '.join(wrong)}"
        return Outcome(kind, detail, ended.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_asked_for(name: str, case: Case) -> bool:
    """Return whether a case may write to a file: the script is there to do so, or a word beside the good ones names it.

    The word may also name a place around it.
    """
    if name.startswith(CHANGED.get(case.script, "\0")):
        return True
    added = Counter(case.words) - Counter(COMMANDS[case.script].split())
    places = [word.partition("=")[2] if word.startswith("--") else word for word in added]
    return any(name in place or (place and name.startswith(place)) for place in places)


def hashes(folder: Path) -> dict[str, str]:
    """Return a hash of each file below a folder, by its name there; special files are left out."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def judge(code: int, killed: bool, stderr: str) -> tuple[str, str]:
    """Return the kind of an outcome and its detail, from the exit code and what is on stderr."""
    lines = stderr.splitlines() or [""]
    if killed:
        return "unfinished", lines[-1][-200:]
    if "Traceback (most recent call last)" in stderr:
        return "fault", f"a traceback: {last_frames(stderr)}"
    if code == 0:
        return "accepted", ""
    told = [line for line in lines if line.startswith("error: ")]
    if code != 2:
        return "fault", f"exit code {code}: {last_frames(stderr)}"
    if len(told) != 1 or lines[-1] != told[0]:
        return "fault", f"exit code 2 without one sentence: {stderr[-1000:]}"
    if found := OURS.search(told[0]):
        return "fault", f"{found[0]!r} is not for a reader: {told[0][:1000]}"
    if len(told[0]) > 2000:
        return "fault", f"a sentence of {len(told[0])} characters: {told[0][:300]}"
    return "refused", told[0][:400]


def last_frames(stderr: str, count: int = 4) -> str:
    """Return the last frames of a traceback in our code, and the exception; the end of stderr without a traceback."""
    frames = re.findall(
        r'File "([^"]*/(?:training|eval|retrieval|common|modeling_longembed)/[^"]+)", line (\d+), in (\w+)', stderr
    )
    where = " < ".join(
        f"{'/'.join(file.split('/')[-2:])}:{line} {name}" for file, line, name in frames[: -count - 1 : -1]
    )
    return f"{where}: {stderr[-600:]}" if where else stderr[-2000:]


def half_written(work: Path) -> list[str]:
    """List what a script has left below a folder, beside the inputs, that is not whole."""
    wrong = []
    for path in sorted(work.rglob("*")):
        name = str(path.relative_to(work))
        if name.startswith("in/") and ".tmp-" not in name:
            continue
        if ".tmp-" in path.name:
            wrong.append(f"{name} is a temporary name")
        elif path.is_dir():
            if path.name == "final" and not any(path.iterdir()):
                wrong.append(f"{name} is empty")
        elif path.is_file() and (complaint := unreadable(path)):
            wrong.append(f"{name}: {complaint}")
    return wrong


def unreadable(path: Path) -> str | None:
    """Return why a file is not whole, by the format that its name says; None if it is."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            for line in path.read_text(encoding="utf-8").splitlines():
                json.loads(line)
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                list(weights.keys())
        elif path.suffix == ".sqlite":
            connection = sqlite3.connect(path)
            (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
            connection.close()
            return None if verdict == "ok" else verdict
        elif path.suffix == ".png" and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
            return "ends early"
        elif path.stat().st_size == 0 and not path.name.endswith(("lock", "-journal")):
            return "is empty"
    except (ValueError, OSError, SafetensorError, sqlite3.Error, yaml.YAMLError) as error:
        return str(error)[:200]
    return None
