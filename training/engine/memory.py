"""What a step of training takes of memory, in closed form; a rule of thumb for choosing, not a measurement.

Per token, a width of d and m inner units, autograd keeps until the backward pass:

- of an attention sublayer its input, query, key, value, what is attended to twice (as the kernel gives it, and in the
  order of the next product), and the input of the norm: 7d. Kernels in linear memory are taken for granted; a pattern
  that gathers neighbouring blocks (`sliding`) keeps up to a half more than this.
- of a feed-forward sublayer its input, that of the norm, and the inner units before and after the activation: 2d + 2m,
  gated 2d + 4m. Where its weights are frozen (LoRA on the attention) the inputs of the products need not be kept.
- of each dropout its mask.

With gradient checkpointing only the input of each sublayer is kept, and all of one sublayer at a time. Gradients of a
feed-forward's inner units come on top when the backward pass begins. AdamW has two moments for every parameter that
trains.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig

GIB = 2**30
FLOAT = 4  # bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a step of training.

    Attributes:
        weights: of all parameters.
        gradients, moments: of those that train, and AdamW's of these.
        activations: of the tokens whose activations are held at once.
        logits: of a masked-language-model head on the tokens that are predicted.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations + self.logits


def estimate_memory(
    model: nn.Module,
    tokens: int,
    *,
    predicted: int = 0,
    gradient_checkpointing: bool = False,
    bf16: bool = False,
    lora: bool = False,
) -> MemoryEstimate:
    """The memory of a step.

    Args:
        model: of ours, with or without an adapter; what trains is what requires a gradient.
        tokens: whose activations are held at once.
        predicted: how many of them a masked-language-model head predicts.
        gradient_checkpointing, bf16: as in training.
        lora: as if it trained low-rank updates of the attention alone, whatever trains in fact.
    """
    parameters, config = list(model.named_parameters()), cast(PreTrainedConfig, model.config)
    weights = sum(parameter.nbytes for _, parameter in parameters)
    if bf16:  # autocast keeps a copy of each matrix in half the bytes until the step ends
        weights += sum(parameter.nbytes // 2 for _, parameter in parameters if parameter.ndim > 1)
    trained = 0 if lora else sum(parameter.nbytes for _, parameter in parameters if parameter.requires_grad)
    inner_trains = not lora and any(p.requires_grad for name, p in parameters if ".feed_forward." in name)
    per_token = _activations_of_a_token(
        config, gradient_checkpointing, FLOAT // 2 if bf16 else FLOAT, inner_trains, parameters[0][1].is_cuda
    )
    return MemoryEstimate(
        weights,
        trained,
        2 * trained,
        tokens * per_token,
        # Scores, their log-softmax, and their gradient in float32; under autocast the scores in bfloat16 too.
        predicted * config.vocab_size * (3 * FLOAT + (FLOAT // 2 if bf16 else 0)) if predicted else 0,
    )


def _activations_of_a_token(config: Any, checkpointing: bool, size: int, inner_trains: bool, cuda: bool) -> int:
    """Bytes; `size` are those of a number in matrix products. Norms compute in float32."""
    width, inner = config.hidden_size, config.intermediate_size * (2 if config.feed_forward_gated else 1)
    mask = width * (1 if cuda else size) if config.hidden_dropout_prob else 0
    bytes_of = {
        "s": 6 * width * size + width * FLOAT + mask,
        "f": (width + 2 * inner if inner_trains else 2 * inner - config.intermediate_size) * size
        + width * FLOAT
        + mask,
    }
    sublayers = [bytes_of[kind] for kind in config.sublayer_pattern]
    kept = len(sublayers) * width * FLOAT + max(sublayers) if checkpointing else sum(sublayers)
    embeddings, gradient = 3 * width * FLOAT + mask, 2 * config.intermediate_size * size
    return embeddings + kept + gradient
