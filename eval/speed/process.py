"""Measurements in fresh processes, so that neither memory nor compiled kernels of one reach the next."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.provenance import computed_by
from eval.speed.measurement import Case

ROOT = Path(__file__).resolve().parents[2]
CODE = ("modeling_longembed", "eval.speed.measurement", "common.step_measurement", "common.encoders.quantization")


def case_label(case: Case) -> str:
    """Return the name of a case in tables: its pattern as given, and its kernel unless that is the default."""
    if case.attention_pattern is None:
        name = "own patterns"
    else:
        parameters = [f"{key}={value}" for key, value in case.attention_pattern.items() if key != "type"]
        name = ":".join([case.attention_pattern["type"], *([",".join(parameters)] if parameters else [])])
    return name if case.attn_implementation == "longembed_varlen" else f"{name} ({case.attn_implementation})"


def describe_environment(device: str) -> str:
    """Return the processor, the versions of the libraries that compute, and a hash of the code that runs.

    Only measurements of the same environment are comparable.
    """
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1] if found else name
    versions = computed_by(*CODE, libraries=("torch", "transformers", "flash-attn"))
    code = versions.pop("code")
    return ", ".join([name, *(f"{library} {version}" for library, version in versions.items()), f"code {code[:12]}"])


def run_case(case: Case, limit: float) -> dict[str, Any]:
    """Measure a case in a fresh process.

    Args:
        case: what to measure.
        limit: seconds after which the process is stopped.

    Returns:
        The fields of a `Measurement`.

    Raises:
        UserError: the process failed for another reason than time or memory.
    """
    name = f"{case_label(case)} at {case.length} tokens"
    return run_module("eval.speed.measurement", asdict(case), case.workload.threads, name, limit)


def run_module(module: str, job: dict[str, Any], threads: int, name: str, limit: float | None = None) -> dict[str, Any]:
    """Run `python -m module '<job as JSON>'` and read the JSON of the last line that it prints.

    Args:
        module: the module that measures.
        job: its argument.
        threads: CPU threads of the process.
        name: what error messages call the measurement.
        limit: seconds after which the process is stopped; None: it may take any time.

    Returns:
        What the process printed; or `{"outcome": "over limit"}`, `{"outcome": "out of memory"}` if it was stopped.

    Raises:
        UserError: the process failed for another reason than time or memory.
    """
    environment = os.environ | {variable: str(threads) for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", module, json.dumps(job)]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "over limit"}
    if process.returncode == -signal.SIGKILL:  # what Linux does when memory is full
        return {"outcome": "out of memory"}
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise UserError(f"{name} could not be measured: {last}")
    return json.loads(process.stdout.splitlines()[-1])
