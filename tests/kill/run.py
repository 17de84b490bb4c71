"""Run scripts that are killed at random moments, and compare how they end with a run that was left alone."""

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from common.errors import run as run_script
from tests.forked import Ended, run_forked
from tests.tiny_inputs import COMMANDS

LIMIT = 600.0  # seconds; a run that takes longer hangs
RESUMED = (
    "--max_steps 12 --save_steps 3 --logging_steps 2 --eval_steps 6 --learning_rate 1e-3 --resume_from_checkpoint last "
    "--dropout 0.1"
)
# Training with a process that tokenises ahead, and with caches of tokens and of teachers' vectors; building a cache of
# vectors; judging; a task.
WORKLOADS = {
    "contrastive": (
        "training.contrastive",
        f"{RESUMED} --eval_data in/pairs.jsonl --dataloader_num_workers 1 --save_total_limit 9",
    ),
    "distillation": ("training.distillation", f"{RESUMED} --eval_data in/documents.jsonl"),
    "pretraining": ("training.pretraining", f"{RESUMED} --save_total_limit 1"),
    "mine_negatives": ("training.mine_negatives", "--batch_tokens 100"),
    "pruning": ("training.pruning", ""),
    "mteb_long": ("eval.mteb_long", "--batch_tokens 100"),
    "questions": ("eval.questions", ""),
}
CLOCK = {
    "evaluation_time",
    "evaluation_phases",
    "date",
    "tokens_per_second",
    "pairs_per_second",
    "peak_memory_gib",
    "texts_per_second",
    "seconds_per_query",
}
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "sqlite3.connect"}


@dataclass(frozen=True)
class Reference:
    """A run that was left alone.

    Attributes:
        content: what it wrote, as `content` returns it.
        seconds: how long it took.
        writes: number of its operations on files that change something.
    """

    content: dict[str, str]
    seconds: float
    writes: int


def command(workload: str) -> tuple[str, list[str]]:
    """Return the module and the command line of a workload; options that are given twice have their last value."""
    script, more = WORKLOADS[workload]
    return script, [*COMMANDS[script].split(), *more.split()]


def start(workload: str, folder: Path, seconds: float, before_write: int | None = None) -> Ended:
    """Start a workload in a folder, which may hold what an earlier start has left.

    Args:
        workload: name of one.
        folder: has the inputs in `in`.
        seconds: kill it after this time.
        before_write: kill it before its n-th operation that changes a file; None: never.
    """
    script, words = command(workload)
    main: Callable[[], None] = importlib.import_module(script).main

    def work() -> None:
        os.chdir(folder)
        sys.argv = [f"{script.replace('.', '/')}.py", *words]
        datasets.config.HF_DATASETS_CACHE = str(folder / "datasets")
        tempfile.tempdir = str(folder)
        count_writes(folder, before_write)
        run_script(main)

    return run_forked(work, seconds, folder / "log")


def count_writes(folder: Path, last: int | None) -> None:
    """Count the operations that change files into a file of one byte each; kill the processes before the last."""
    counter = os.open(folder / "writes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count, owner = 0, os.getpid()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        written = event in WRITES or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if written and os.getpid() == owner:
            count += 1
            os.write(counter, b".")
            if count == last:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)


def left_alone(workload: str, inputs: Path, folder: Path) -> Reference:
    """Run a workload from its start to its end in a new folder.

    Raises:
        RuntimeError: it does not end well.
    """
    shutil.copytree(inputs, folder / "in")
    ended = start(workload, folder, LIMIT)
    if ended.code:
        raise RuntimeError(f"{workload} ends with {ended.code}: {ended.stderr[-3000:]}")
    return Reference(content(folder / "out"), ended.seconds, (folder / "writes").stat().st_size)


def kill_and_go_on(
    workload: str, reference: Reference, kills: int, seed: str, inputs: Path, folder: Path
) -> tuple[int, list[str]]:
    """Kill a workload at random moments, start it again each time, and let it end at last.

    Half of the moments are random times, the other half random operations on files.

    Args:
        workload: name of one.
        reference: how it ends when it is left alone.
        kills: how often it is started to be killed.
        seed: of the moments.
        inputs: folder of the inputs.
        folder: new, for the runs.

    Returns:
        How often it was killed before it had ended, and the files that differ from the reference at the end.
    """
    shutil.copytree(inputs, folder / "in")
    draw, killed = random.Random(seed), 0
    for _ in range(kills):
        by_time = draw.random() < 0.5
        seconds = draw.uniform(0.0, reference.seconds) if by_time else LIMIT
        ended = start(workload, folder, seconds, None if by_time else draw.randint(1, reference.writes))
        if ended.killed and not by_time:
            return killed, [f"after {killed} kills it hangs"]
        if ended.code == -signal.SIGKILL:
            killed += 1
        elif ended.code:
            return killed, [f"after {killed} kills it ends with {ended.code}: {ended.stderr[-2000:]}"]
    ended = start(workload, folder, LIMIT)
    if ended.code:
        return killed, [f"after {killed} kills it ends with {ended.code}: {ended.stderr[-2000:]}"]
    now = content(folder / "out")
    names = sorted(reference.content.keys() | now.keys())
    different = [name for name in names if reference.content.get(name) != now.get(name)]
    return killed, different + [f"{path.name} is left" for path in folder.rglob("*.tmp-*")]


def content(folder: Path) -> dict[str, str]:
    """Return a hash of each file below a folder, of all that does not depend on the clock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if (
            path.is_file()
            and not name.startswith("tensorboard/")
            and not name.endswith(("-journal", "run_settings.jsonl"))
        ):
            found[name] = hashlib.sha256(without_clock(path)).hexdigest()
    return found


def without_clock(path: Path) -> bytes:
    """Return the bytes of a file; of JSON and of SQLite what they hold, without times."""
    if path.suffix == ".sqlite":
        connection = sqlite3.connect(path)
        rows = sorted(connection.execute("SELECT * FROM vectors"))
        connection.close()
        return repr(rows).encode()
    if path.suffix in (".json", ".jsonl") and path.name != "mined.jsonl":
        text = path.read_text(encoding="utf-8")
        values = [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
        return json.dumps([timeless(value) for value in values], sort_keys=True).encode()
    if path.name == "table.md":  # the column of times is the last one
        rows = [line.split("|") for line in path.read_text(encoding="utf-8").splitlines()]
        return repr([row[:-2] if "ms a query" in rows[0][-2] else row for row in rows]).encode()
    return path.read_bytes()


def timeless(value: Any) -> Any:
    """Return JSON without the values that a clock or the machine gives."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in CLOCK}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value
