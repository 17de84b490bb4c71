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
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from tests.training.tiny_training import SCRIPTS


def load_in_double_precision() -> None:
    """Make float64 the type of every weight, whether it is read from a file or new."""
    torch.set_default_dtype(torch.float64)
    load = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *arguments, **options):
        return load(cls, *arguments, **options | {"dtype": torch.float64})

    def match_weights(module, inputs):
        if isinstance(module, nn.Linear):
            return tuple(tensor.to(module.weight.dtype) for tensor in inputs)
        return None

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    # A teacher's vectors stay float32, as they are stored; a projection of them is a new module, of float64.
    register_module_forward_pre_hook(match_weights)


def keep_process_group() -> None:
    """Leave the process group open at the end of a training: a launch can make it only once."""
    PartialState.destroy_process_group = lambda self, group=None: None


def main() -> None:
    load_in_double_precision()
    keep_process_group()
    environment = dict(os.environ)  # the loop takes the settings of FSDP out of it
    for run in json.loads(Path(sys.argv[1]).read_text()):
        os.environ.update(environment)
        SCRIPTS[run["script"]].main(run["options"])
        AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
