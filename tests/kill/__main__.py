"""Kill runs at random moments until that has happened a number of times; the same command goes on where it stopped.

python -m tests.kill --count 100 --folder runs/kill
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads cannot be forked
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import importlib
import itertools
import json
import platform
import random
import shutil
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import torch
import tqdm

from common.files import atomic_write
from tests.fuzz.__main__ import read_rows
from tests.kill.run import WORKLOADS, Reference, kill_and_go_on, left_alone
from tests.tiny_inputs import write_inputs


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="times that a run has to be killed")
    parser.add_argument("--seed", default="0", help="of the moments")
    parser.add_argument("--folder", type=Path, default=Path("runs/kill"), help="of results.jsonl and summary.json")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), help="what is killed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # its thread
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for workload in arguments.workloads:
        importlib.import_module(WORKLOADS[workload][0])
    work = folder / f"work-{os.getpid()}"
    inputs = work / "inputs"
    write_inputs(inputs)
    references: dict[str, Reference] = {}
    path = folder / "results.jsonl"
    done = {row["trial"]: row for row in read_rows(path) if not row["different"]}
    try:
        for number, workload in zip(itertools.count(), itertools.cycle(arguments.workloads)):
            if sum(row["killed"] for row in done.values()) >= arguments.count:
                break
            trial = f"{arguments.seed}-{number}-{workload}"
            if trial in done:
                continue
            if workload not in references:
                # Twice: what differs between two runs that were left alone says nothing about kills.
                references[workload], again = (
                    left_alone(workload, inputs, work / f"{workload}-{name}") for name in ("alone", "again")
                )
                if changing := sorted(set(references[workload].content.items()) ^ set(again.content.items())):
                    raise SystemExit(f"{workload}: two runs that were left alone differ in {dict(changing)}")
            kills = random.Random(trial).randint(1, 4)
            killed, different = kill_and_go_on(workload, references[workload], kills, trial, inputs, work / "killed")
            shutil.rmtree(work / "killed")
            done[trial] = {"trial": trial, "workload": workload, "killed": killed, "different": different}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(done[trial]) + "\n")
            print(f"{trial}: killed {killed} times, {different or 'the same end'}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    killed_by_workload: Counter[str] = Counter()
    for row in done.values():
        killed_by_workload[row["workload"]] += row["killed"]
    summary = {
        "killed": sum(killed_by_workload.values()),
        "by_workload": killed_by_workload,
        "runs": len(done),
        "runs_with_another_end": sum(bool(row["different"]) for row in done.values()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
    }
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    sys.exit(1 if summary["runs_with_another_end"] else 0)


if __name__ == "__main__":
    main()
