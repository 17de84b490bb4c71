"""Which parameters train: all, LoRA, LoRA with embeddings and norms (LongLoRA), or the position table alone."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import UserError
from modeling_longembed.position_base_longembed import extension_factor


@dataclass
class TuningArguments:
    """Which parameters train."""

    tuning: Literal["full", "lora", "longlora", "positions"] = field(
        default="full",
        metadata={
            "help": "parameters that train. full: all; lora: low-rank updates of the attention; longlora: these and, "
            "whole, embeddings and norms; positions: only the position table, and of an extended one only the new rows"
        },
    )
    lora_r: int = field(
        default=8,
        metadata={
            "help": "rank of the LoRA updates",
            "within": "[1, inf)",
            "applies": {"tuning": ("lora", "longlora")},
        },
    )
    lora_alpha: int = field(
        default=16,
        metadata={
            "help": "the LoRA updates are scaled by lora_alpha / lora_r",
            "within": "[1, inf)",
            "applies": {"tuning": ("lora", "longlora")},
        },
    )
    lora_dropout: float = field(
        default=0.0,
        metadata={
            "help": "dropout of the input of the LoRA updates",
            "within": "[0, 1)",
            "applies": {"tuning": ("lora", "longlora")},
        },
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        metadata={"help": "names of the linear layers that LoRA updates", "applies": {"tuning": ("lora", "longlora")}},
    )


def select_parameters(
    model: PreTrainedModel, arguments: TuningArguments, *, token_output: bool = False
) -> PreTrainedModel | PeftModel:
    """Choose the parameters that train, in place.

    - `lora`: Hu et al. 2021 (arXiv:2106.09685), through peft.
    - `longlora`: Chen et al. 2023 (arXiv:2309.12307), section 3.3: LoRA, and every parameter whose name contains
      `embed` or `norm` trains whole. (It is not peft's "LoRA+", which is about learning rates.)
    - `positions`: only the rows of the position table that the extension has added (E5-Base-4k, Zhu et al. 2024,
      arXiv:2404.12096). The rows of the original model do not change by a bit. A table without added rows trains whole.

    The token head and the weights of query tokens train only if a loss reads token vectors: DDP waits for the gradient
    of every parameter that requires one.

    Args:
        model: the model before any wrapper.
        arguments: parsed command-line options.
        token_output: whether a loss reads token vectors, and trains what makes them.

    Returns:
        `model`, wrapped by peft for `lora` and `longlora`.

    Raises:
        UserError: the model has no position table, or no module that LoRA can update.
    """
    selected: PreTrainedModel | PeftModel = model
    output: nn.Module | None = getattr(model.base_model, "token_output", None)  # code of earlier versions has none
    if arguments.tuning == "positions":
        _train_positions(model)
    elif arguments.tuning in ("lora", "longlora"):
        selected = _add_lora(model, arguments)
    if output is not None and not token_output:
        output.requires_grad_(False)
    return selected


def _add_lora(model: PreTrainedModel, arguments: TuningArguments) -> PeftModel:
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"--lora_target_modules {' '.join(arguments.lora_target_modules)}: {' '.join(str(error).split())}"
        ) from None
    if arguments.tuning == "longlora":
        for _, parameter in _embeddings_and_norms(adapted.get_base_model()):
            parameter.requires_grad_(True)
    return adapted


def _embeddings_and_norms(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return embeddings and norms, found by name regardless of case (BERT writes `LayerNorm`), without LoRA weights."""
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if ("embed" in name.lower() or "norm" in name.lower()) and "lora_" not in name
    ]


def _train_positions(model: PreTrainedModel) -> None:
    table = getattr(model.base_model.embeddings, "position_embeddings", None)
    if table is None:
        raise UserError(
            f"--tuning positions: this model has no position table "
            f"(position_embedding_type={model.config.position_embedding_type!r}); use lora or full"
        )
    model.requires_grad_(False)
    table.weight.requires_grad_(True)
    frozen = original_rows(model)
    if frozen.any():
        # The mask is applied to the incoming gradient, which commutes with DDP's mean; clipping sees only what trains.
        # A row whose gradient is always zero has zero moments, so AdamW without decay does not change it.
        table.weight.register_hook(lambda gradient: gradient.masked_fill(frozen.to(gradient.device)[:, None], 0.0))


def original_rows(model: PreTrainedModel) -> Tensor:
    """Return which rows of a position table are the original model's: `(rows,)` bool, all False without an extension.

    The method `repeat` puts the P old rows first, `interpolate` puts them at the multiples of its factor.
    """
    rows = len(model.base_model.get_parameter("embeddings.position_embeddings.weight"))
    extension = model.config.position_extension or {}
    old = extension.get("original_max_position_embeddings", rows)
    place = torch.arange(rows)
    if old >= rows:
        return torch.zeros(rows, dtype=torch.bool)
    if extension["method"] == "interpolate":
        factor = math.ceil(extension_factor(extension, model.config.max_position_embeddings))
        return (place % factor == 0) & (place < factor * old)
    return place < old
