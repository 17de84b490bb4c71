"""One measurement of speed and memory, in a process that does nothing else. eval/throughput.py starts these.

    python -m eval.speed.measurement '<a case as JSON>'      prints one line of JSON

What is measured stands in common/step_measurement.py. A call reads one document of random tokens. On CUDA a call of the
same length comes first, so that kernels are chosen and compiled outside the clock; on the CPU nothing depends on the
length, and a short document warms up. In training that is an optimiser step, so that both moments of AdamW are there.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.memory import is_out_of_memory
from common.quantization import int8_weights
from common.step_measurement import measure_calls
from modeling_longembed import LongEmbedConfig, LongEmbedModel

SHORT = 128  # tokens of the document that warms up
# Fields of a workload that are fields of the config of a random model.
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "position_embedding_type")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """The model, and what is done with it. The default is the size of MiniLM."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "a model of ours; default: random weights of the sizes below"}
    )
    num_hidden_layers: int = 6
    hidden_size: int = 384
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    position_embedding_type: str = field(
        default="rope",
        metadata={"help": "positions of a random model; 'absolute' has a row for every token of the context"},
    )
    mode: str = field(
        default="forward",
        metadata={
            "help": "forward; encoding: forward as `encode` does it, weights in float32; training: forward, backward "
            "and a step of AdamW",
            "choices": ["forward", "encoding", "training"],
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "in training keep the input of each sublayer and compute the rest again"}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "forward: of weights and states; encoding and training: of the autocast; int8: of the weights of "
            "linear layers, when encoding on the CPU",
            "choices": [*DTYPES, "int8"],
        },
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda; auto: cuda where there is one"})
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
        attention_pattern: an entry of `config.attention_patterns`, for all layers; None: the model's own.
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
        """The case of which `dataclasses.asdict` made `fields`."""
        return cls(**fields | {"workload": Workload(**fields["workload"])})

    def config(self) -> LongEmbedConfig:
        """The configuration of the model.

        Raises:
            ValueError: it cannot be built, or its context is shorter than the document.
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
        """The model on its device."""
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
        case: what it measured.
        repeat: 0, 1, ... of the same case.
        where: machine and code; numbers of others are not comparable.
        limit: seconds after which the process was to be stopped.
        outcome: `measured`, or why there are no numbers: `over limit`, `out of memory`.
        seconds: of one call.
        peak, base: memory in bytes.
        pid: of the process.
    """

    case: Case
    repeat: int
    where: str
    limit: float
    outcome: str
    seconds: float = 0.0
    peak: int = 0
    base: int = 0
    pid: int = 0


def resolve_device(device: str) -> str:
    """`cpu` or `cuda`: `auto` is CUDA where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def forward_step(model: LongEmbedModel, workload: Workload) -> Callable[[Tensor], None]:
    """Reads `(1, S)` token ids without gradients."""
    model.eval().to(DTYPES[workload.dtype])

    @torch.inference_mode()
    def step(input_ids: Tensor) -> None:
        model(input_ids)

    return step


def encoding_step(model: LongEmbedModel, workload: Workload) -> Callable[[Tensor], None]:
    """Reads `(1, S)` token ids without gradients, in the precision of `common.encoders.Encoder`."""
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
    """Forward, backward and a step of AdamW on `(1, S)` token ids, the weights in float32."""
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
    """Loads the model and measures it in this process; the fields of a `Measurement` from `outcome` on."""
    torch.set_num_threads(case.workload.threads)
    model = case.model()
    step, cuda = STEPS[case.workload.mode](model, case.workload), model.device.type == "cuda"
    input_ids = torch.randint(1, model.config.vocab_size, (1, case.length), device=model.device)
    step(input_ids[:, :SHORT])
    if cuda:
        step(input_ids)
    return {"outcome": "measured"} | measure_calls(lambda: step(input_ids), cuda)


def main() -> None:
    """The process. That memory did not suffice is a result; everything else that goes wrong is not."""
    try:
        result = measure(Case.from_dict(json.loads(sys.argv[1])))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        result = {"outcome": "out of memory"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
