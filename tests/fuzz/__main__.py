"""Run a number of bad inputs; the same command goes on where it was stopped, and runs again what was a fault.

python -m tests.fuzz --count 1000 --folder runs/fuzz
python -m tests.fuzz --folder runs/fuzz --only KEY    # one of them, with all that it writes
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads cannot be forked
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import importlib
import json
import platform
import shutil
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from itertools import chain, count
from pathlib import Path

import torch
import tqdm

from common.files import atomic_write
from tests.fuzz.cases import Case, collect
from tests.fuzz.run import options_of, run_case
from tests.tiny_inputs import COMMANDS, write_inputs

PER_DRAW = 300
# What a script writes is an input of others.
READ_AS = {"eval.mteb_long": "results", "retrieval.build": "index"}


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="inputs that have to be refused")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this time, to go on later")
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"), help="of results.jsonl and summary.json")
    parser.add_argument("--scripts", nargs="+", default=list(COMMANDS), help="modules to try")
    parser.add_argument("--only", nargs="+", help="keys of inputs to run again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # its thread
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for script in arguments.scripts:
        importlib.import_module(script)
    inputs = folder / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    write_inputs(inputs)
    check_good_commands(arguments.scripts, inputs, folder)
    options = {script: options_of(script) for script in arguments.scripts}

    path, start = folder / "results.jsonl", time.monotonic()
    rows = {row["key"]: row for row in read_rows(path)}
    done = {key: row for key, row in rows.items() if row["kind"] != "fault" and key not in (arguments.only or ())}
    again = [Case.from_text(row["case"]) for key, row in rows.items() if key not in done]  # what was a fault
    drawn = (case for number in count() for case in collect(inputs, options, number, PER_DRAW))
    for case in [case for case in again if case.key in arguments.only] if arguments.only else chain(again, drawn):
        refused = sum(row["kind"] == "refused" for row in done.values())  # what is accepted was legal after all
        if (refused >= arguments.count and not arguments.only) or time.monotonic() - start > 60 * arguments.minutes:
            break
        if case.key in done:
            continue
        outcome = run_case(case, inputs, folder / f"case-{os.getpid()}")
        if outcome.kind == "void":
            continue
        row = {"key": case.key, "kind": outcome.kind, "detail": outcome.detail, "seconds": round(outcome.seconds, 2)}
        done[case.key] = row | {"script": case.script, "case": case.as_text()}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(done[case.key]) + "\n")
        if outcome.kind in ("fault", "unfinished") or arguments.only:
            print(f"{outcome.kind} {case.key}: {case.script}: {shown(case)}\n    {outcome.detail}", flush=True)
    summary = {
        **Counter(row["kind"] for row in done.values()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "minutes": round((time.monotonic() - start) / 60, 1),
    }
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    sys.exit(1 if summary.get("fault") or summary.get("unfinished") else 0)


def check_good_commands(scripts: list[str], inputs: Path, folder: Path) -> None:
    """Run every command line as it is: what is refused later is refused for what was changed.

    The results that eval.mteb_long writes become an input of eval.plot, and the index of retrieval.build one of others.
    """
    import datasets

    from common.errors import run as run_script
    from tests.forked import run_forked
    from tests.fuzz.run import main_of

    for script in scripts:
        work = folder / f"good-{os.getpid()}"
        shutil.copytree(inputs, work / "in")

        def good(script: str = script, work: Path = work) -> None:
            os.chdir(work)
            datasets.config.HF_DATASETS_CACHE = str(work / "datasets")
            sys.argv = [script, *COMMANDS[script].split()]
            run_script(main_of(script))

        ended = run_forked(good, 300, folder / "log")
        if ended.code:
            raise SystemExit(f"{script} does not end well with good inputs: {ended.stderr[-3000:]}")
        print(f"{script}: {ended.seconds:.1f} s", flush=True)
        if script in READ_AS:
            shutil.copytree(work / "out", inputs / READ_AS[script], ignore=shutil.ignore_patterns("*.sqlite"))
        shutil.rmtree(work)


def read_rows(path: Path) -> list[dict]:
    """Read the results of an earlier run, and cut off the half of a line that a kill has left."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))  # the next line would be appended to it
    return [json.loads(line) for line in whole.splitlines()]


def shown(case: Case) -> str:
    """Return what is special about a case, for a person."""
    good = COMMANDS[case.script].split()
    extra = [word for word in case.words if word not in good] or [f"{len(case.words)} of {len(good)} words"]
    return f"{' '.join(extra)!r:.200} {str(case.edits)[:300]}"


if __name__ == "__main__":
    main()
