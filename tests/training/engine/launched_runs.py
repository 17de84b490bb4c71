"""Train several times, one run after another, in the processes of one launch: a launch costs more than a tiny training.

accelerate launch --config_file CONFIG --module tests.training.engine.launched_runs RUNS.json

RUNS.json is a list of `{"script": name, "options": [...]}`. All models are float64, so that one process and two
processes agree up to a rounding error that several steps of an optimiser cannot make visible, on any processor.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState

from tests.training.double_precision import double_precision
from tests.training.tiny_training import SCRIPTS


def keep_process_group() -> None:
    """Leave the process group open at the end of a training: a launch can make it only once."""
    PartialState.destroy_process_group = lambda self, group=None: None


def main() -> None:
    keep_process_group()
    environment = dict(os.environ)  # the loop takes the settings of FSDP out of it
    with double_precision():
        for run in json.loads(Path(sys.argv[1]).read_text()):
            os.environ.update(environment)
            SCRIPTS[run["script"]].main(run["options"])
            AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
