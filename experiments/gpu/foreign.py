"""`attn_implementation="longembed_varlen"` on models of transformers, against their own eager attention."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from experiments.gpu.check import RULE, Check, ratio_of_errors

COMMON: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # so large that attention shapes the output
}
# What each asks of an attention function: causal masks, grouped key and value heads, windows on one side or on both,
# soft-capped scores, a factor of the scores of its own.
FOREIGN: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 9},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 9,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 50,
    },
    "bert": {},
    "modernbert": {"local_attention": 10, "global_attn_every_n_layers": 3, "pad_token_id": 0},
}
LENGTHS = (40, 70, 3)


def foreign_model(name: str, kernel: str, **fields: Any) -> Any:
    """Return a tiny model of transformers in evaluation mode, with the same random weights for every kernel.

    Args:
        name: key of `FOREIGN`.
        kernel: `attn_implementation`.
        fields: fields of its config that differ from those in `FOREIGN`.
    """
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name, **COMMON | ids | FOREIGN[name] | fields)
    return AutoModel.from_config(config, attn_implementation=kernel).eval()


def padded_batch(device: str, left: bool = False) -> dict[str, Tensor]:
    """Return random tokens `(B, S)` and their mask, padded on the right or on the left."""
    generator, longest = torch.Generator().manual_seed(1), max(LENGTHS)
    mask = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    mask = mask.flip(1) if left else mask
    input_ids = torch.randint(3, COMMON["vocab_size"], (len(LENGTHS), longest), generator=generator)
    return {"input_ids": input_ids.where(mask, 0).to(device), "attention_mask": mask.long().to(device)}


def states_and_gradient(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the states of the real tokens, and the gradient of the word embeddings under a fixed weighting."""
    states = model(**batch).last_hidden_state[batch["attention_mask"] > 0]
    weights = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)
    (gradient,) = torch.autograd.grad((states * weights.to(states.dtype)).sum(), [model.get_input_embeddings().weight])
    return [states.detach().double(), gradient.double()]


def check_foreign(device: str) -> Iterator[Check]:
    """Check every model of `FOREIGN` in bfloat16 and float16, padded on either side."""
    for dtype in (torch.bfloat16, torch.float16):
        for name in FOREIGN:
            for left in (False, True):
                batch = padded_batch(device, left)
                eager, ours = (foreign_model(name, kernel).to(device) for kernel in ("eager", "longembed_varlen"))
                exact = states_and_gradient(eager.float(), batch)  # in float64 its masked rows become NaN
                dense = states_and_gradient(eager.to(dtype), batch)
                ratio = ratio_of_errors(states_and_gradient(ours.to(dtype), batch), dense, exact)
                side = "left" if left else "right"
                detail = f"{ratio:.2f} times the error of eager attention"
                yield Check(f"foreign: {name} in {str(dtype)[6:]}, padded on the {side}", ratio <= RULE, detail)
