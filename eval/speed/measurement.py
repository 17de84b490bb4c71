"""Measure speed and memory once, in a process that does nothing else; eval/throughput.py starts such processes.

    python -m eval.speed.measurement '<a case as JSON>'      prints one line of JSON

common/step_measurement.py says what is measured. A call reads one document of random tokens. A short document warms up
first: in training that is an optimiser step, so that both moments of AdamW exist before memory is measured. On CUDA a
document of the full length follows, so that kernels are chosen and compiled before time is measured.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.conditions import NOT_GIVEN
from common.encoders.quantization import int8_weights
from common.errors import UserError
from common.memory import is_out_of_memory
from common.step_measurement import measure_calls
from modeling_longembed import LongEmbedConfig, LongEmbedModel

SHORT = 128  # tokens of the warm-up document
# Fields of a workload that are fields of the config of a random model.
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "position_embedding_type")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """The model, and what is done with it; the default is a random model of MiniLM's size.

    Raises:
        UserError: 8-bit weights are requested for something else than encoding on the CPU.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "a LongEmbed model; default: random weights of the sizes below"}
    )
    num_hidden_layers: int = field(
        default=6, metadata={"help": "layers of a random model", "applies": {"model_name_or_path": NOT_GIVEN}}
    )
    hidden_size: int = field(
        default=384, metadata={"help": "width of a random model", "applies": {"model_name_or_path": NOT_GIVEN}}
    )
    num_attention_heads: int = field(
        default=12, metadata={"help": "attention heads of a random model", "applies": {"model_name_or_path": NOT_GIVEN}}
    )
    intermediate_size: int = field(
        default=1536,
        metadata={"help": "width of its feed-forward layers", "applies": {"model_name_or_path": NOT_GIVEN}},
    )
    position_embedding_type: str = field(
        default="rope",
        metadata={
            "help": "position scheme of a random model; 'absolute' has one parameter row per position",
            "applies": {"model_name_or_path": NOT_GIVEN},
        },
    )
    mode: str = field(
        default="forward",
        metadata={
            "help": "forward; encoding: forward as `encode` does it, with float32 weights; training: forward, backward "
            "and a step of AdamW",
            "choices": ["forward", "encoding", "training"],
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "in training, keep only the input of each sublayer and recompute the rest",
            "applies": {"mode": "training"},
        },
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "data type: of weights and activations (forward) or of the autocast (encoding, training); int8: of "
            "the weights of linear layers, for encoding on the CPU",
            "choices": [*DTYPES, "int8"],
        },
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto: cuda if available"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})

    def __post_init__(self) -> None:
        if self.dtype == "int8" and (self.mode != "encoding" or resolve_device(self.device) != "cpu"):
            raise UserError(
                "8 bits are for encoding on the CPU: give --mode encoding, --device cpu, or another precision"
            )


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        workload: the model, and what is done with it.
        attention_pattern: an entry of `config.attention_patterns`, used in all layers; None: the model's own patterns.
        attn_implementation: the kernel.
        length: tokens of the document.
        context: `max_position_embeddings` of a random model, the same for all lengths that are compared.
    """

    workload: Workload
    attention_pattern: dict | None
    attn_implementation: str
    length: int
    context: int

    @classmethod
    def from_dict(cls, fields: dict) -> "Case":
        """Build a case from what `dataclasses.asdict` returned."""
        return cls(**fields | {"workload": Workload(**fields["workload"])})

    def config(self) -> LongEmbedConfig:
        """Build the configuration of the model.

        Raises:
            ValueError: the fields contradict each other, or the context is shorter than the document.
            OSError: there is no such model.
        """
        name = self.workload.model_name_or_path
        fields: dict[str, Any] = (
            {} if self.attention_pattern is None else {"attention_patterns": self.attention_pattern}
        )
        if name is None:
            fields |= {name: getattr(self.workload, name) for name in SIZES} | {"max_position_embeddings": self.context}
            config = LongEmbedConfig(**fields)
        else:
            config = LongEmbedConfig.from_pretrained(name, **fields)
        if config.max_position_embeddings < self.length:
            raise ValueError(
                f"{self.length} tokens are more than the model's context of {config.max_position_embeddings}; "
                "leave this length out"
            )
        return config

    def model(self) -> LongEmbedModel:
        """Load the model, or draw its random weights with a fixed seed, on its device."""
        torch.manual_seed(0)
        name, config = self.workload.model_name_or_path, self.config()
        if name is None:
            model = LongEmbedModel._from_config(config, attn_implementation=self.attn_implementation)
        else:
            model = LongEmbedModel.from_pretrained(name, config=config, attn_implementation=self.attn_implementation)
        return model.to(resolve_device(self.workload.device))


@dataclass(frozen=True)
class Measurement:
    """What one process found.

    Attributes:
        outcome: `measured`, or why there are no numbers: `over limit`, `out of memory`.
        seconds: median time of a call.
        peak: most memory during the calls, in bytes.
        base: memory before the first call, in bytes.
        pid: of the process.
    """

    outcome: str
    seconds: float = 0.0
    peak: int = 0
    base: int = 0
    pid: int = 0


def resolve_device(device: str) -> str:
    """Return `cpu` or `cuda`; `auto` is CUDA if available."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def forward_step(model: LongEmbedModel, workload: Workload) -> Callable[[Tensor], None]:
    """Return a call that reads `(1, S)` token ids without gradients, in the workload's data type."""
    model.eval().to(DTYPES[workload.dtype])

    @torch.inference_mode()
    def step(input_ids: Tensor) -> None:
        model(input_ids)

    return step


def encoding_step(model: LongEmbedModel, workload: Workload) -> Callable[[Tensor], None]:
    """Return a call that reads `(1, S)` token ids without gradients, in the precision that `Encoder` uses."""
    model.eval()
    if workload.dtype == "int8":
        int8_weights(model)
    dtype = DTYPES.get(workload.dtype, torch.float32)

    @torch.inference_mode()
    def step(input_ids: Tensor) -> None:
        with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
            model(input_ids)

    return step


def training_step(model: LongEmbedModel, workload: Workload) -> Callable[[Tensor], None]:
    """Return a call that trains on `(1, S)` token ids: forward, backward and a step of AdamW on float32 weights."""
    dtype = DTYPES[workload.dtype]
    model.train()
    if workload.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())

    def step(input_ids: Tensor) -> None:
        with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids).pooler_output.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS = {"forward": forward_step, "encoding": encoding_step, "training": training_step}


def measure(case: Case) -> dict:
    """Load the model and measure it in this process; returns the fields of a `Measurement`."""
    torch.set_num_threads(case.workload.threads)
    model = case.model()
    step, cuda = STEPS[case.workload.mode](model, case.workload), model.device.type == "cuda"
    input_ids = torch.randint(1, model.config.vocab_size, (1, case.length), device=model.device)
    step(input_ids[:, :SHORT])
    if cuda:
        step(input_ids)
    return {"outcome": "measured"} | measure_calls(lambda: step(input_ids), cuda)


def main() -> None:
    """Run the process. A lack of memory is a result; any other error ends the process with a traceback."""
    try:
        result = measure(Case.from_dict(json.loads(sys.argv[1])))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        result = {"outcome": "out of memory"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
