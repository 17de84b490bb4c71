"""A supernet: an encoder in which every position of the layout is a mixture of the possible sublayers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from modeling_longembed import LongEmbedConfig, LongEmbedModel

KINDS = "sf-"  # self-attention, feed-forward, identity; the order of the logits


class MixedSublayer(nn.Module):
    """Self-attention, feed-forward and identity, weighted by a Gumbel-softmax over trainable logits.

    `y = w_s attention(x) + w_f feed_forward(x) + w_- x` with `w = softmax((logits + g) / temperature)`, g Gumbel noise
    (Jang et al. 2017, arXiv:1611.01144, equation 2). Both candidates are complete residual sublayers, norm included, so
    that a one-hot w gives exactly that sublayer. In evaluation only the likeliest candidate is computed.

    Args:
        attention, feed_forward: the candidates, two `LongEmbedSublayer`s.
        temperature: temperature of the softmax; towards 0 the weights become one-hot samples.
    """

    def __init__(self, attention: nn.Module, feed_forward: nn.Module, temperature: float) -> None:
        super().__init__()
        self.candidates = nn.ModuleList([attention, feed_forward])
        self.logits = nn.Parameter(torch.zeros(len(KINDS)))
        self.temperature = temperature
        self.noise: Tensor | None = None

    def draw(self) -> None:
        """Draw the noise of the next batch.

        It is drawn once per batch, not once per forward pass: under gradient caching a batch takes several passes, and
        embeddings of queries and documents from different mixtures could not be compared.
        """
        self.noise = -torch.empty_like(self.logits).exponential_().log()

    def weights(self) -> Tensor:
        """Return the weights `(3,)` in the order of `KINDS`, whose sum is 1; without noise before the first `draw`."""
        noise = 0.0 if self.noise is None else self.noise
        return torch.softmax((self.logits + noise) / self.temperature, dim=0)

    def forward(self, hidden_states: Tensor, context: Any) -> tuple[Tensor, None]:
        """Map `(T, d)` to `(T, d)`, as a `LongEmbedSublayer` does."""
        if not self.training:
            kind = int(self.logits.argmax())
            if KINDS[kind] != "-":
                hidden_states, _ = self.candidates[kind](hidden_states, context=context)
            return hidden_states, None
        *weights, identity = self.weights()
        mixed = identity * hidden_states
        for weight, candidate in zip(weights, self.candidates, strict=True):
            mixed = mixed + weight * candidate(hidden_states, context=context)[0]
        return mixed, None


class Supernet(LongEmbedModel):
    """A LongEmbed encoder with a `MixedSublayer` at each of the N positions of a layout.

    Its config is that of the layout `(sf)^N`: position i mixes the i-th pair.

    The sublayers of the model that it starts from are the candidates of their kind at their position; the other
    candidate of a position is new. A new attention sublayer has the attention pattern of the attention before it (of
    the first one if there is none before it). LayerDrop is off, because a mixture drops sublayers by itself.

    Args:
        model: the encoder to start from; its modules become those of the supernet.
        temperature: temperature of the Gumbel-softmax.

    Attributes:
        step: a buffer: the number of optimiser steps done.
        choice: a buffer `(N,)`: the likeliest kind of each position (index in `KINDS`) at the end of the last cycle, -1
            before the end of the first.
    """

    config: LongEmbedConfig
    step: Tensor
    choice: Tensor

    def __init__(self, model: LongEmbedModel, temperature: float) -> None:
        kinds = model.config.sublayer_pattern
        nearest = [max(0, kinds[: index + 1].count("s") - 1) for index in range(len(kinds))]
        super().__init__(_with_layout(model.config, "sf" * len(kinds), nearest, layerdrop=0.0))
        self.layerdrop = model.config.layerdrop  # for the model that `derive` returns
        self.set_attn_implementation(model.config._attn_implementation)
        fresh = self.layers
        for name, module in model.named_children():
            self.add_module(name, module)
        self.layers = nn.ModuleList(
            MixedSublayer(
                own if kind == "s" else fresh[2 * index], own if kind == "f" else fresh[2 * index + 1], temperature
            )
            for index, (kind, own) in enumerate(zip(kinds, model.layers, strict=True))
        )
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("choice", torch.full((len(kinds),), -1))

    def logits(self) -> list[Tensor]:
        """Return the architecture parameters, `(3,)` for each position."""
        return [layer.logits for layer in self.layers]

    def draw(self) -> None:
        """Draw the Gumbel noise of the next batch at all positions."""
        for layer in self.layers:
            layer.draw()

    def probabilities(self) -> Tensor:
        """Return the softmax of the logits, `(N, 3)`."""
        return torch.stack(self.logits()).detach().softmax(dim=1)

    def kinds(self) -> str:
        """Return the likeliest kind of each position as N letters of `KINDS`, at least one of them attention.

        An encoder without attention embeds bags of words. If attention is the likeliest kind nowhere, the position
        where it is most likely becomes attention.
        """
        probabilities = self.probabilities()
        letters = [KINDS[kind] for kind in probabilities.argmax(dim=1).tolist()]
        if "s" not in letters:
            letters[int(probabilities[:, KINDS.index("s")].argmax())] = "s"
        return "".join(letters)

    def derive(self) -> LongEmbedModel:
        """Return the model of the layout `kinds()` without its identities, with a copy of the supernet's weights."""
        kinds = self.kinds()
        chosen = [(i, self.layers[i].candidates[KINDS.index(kind)]) for i, kind in enumerate(kinds) if kind != "-"]
        config = _with_layout(
            self.config,
            kinds.replace("-", ""),
            [index for index, sublayer in chosen if sublayer.attention is not None],
            first_attention_norm=not isinstance(chosen[0][1].norm, nn.Identity),
            layerdrop=self.layerdrop,
        )
        model = LongEmbedModel._from_config(config, attn_implementation=self.config._attn_implementation)
        weights = self.state_dict()
        for place, (_, sublayer) in enumerate(chosen):
            weights |= {f"layers.{place}.{name}": tensor for name, tensor in sublayer.state_dict().items()}
        model.to(device=self.device, dtype=self.dtype)
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        return model.train(self.training)


def _with_layout(config: PreTrainedConfig, pattern: str, attention: list[int], **changes: Any) -> LongEmbedConfig:
    """Return a config with another layout.

    Args:
        config: the config to change.
        pattern: the new `sublayer_pattern`.
        attention: for each attention sublayer of the new layout, the index of its pattern in the old config.
        **changes: other fields.
    """
    changes |= {"sublayer_pattern": pattern, "num_hidden_layers": None, "layer_types": None}
    for name in ("attention_patterns", "training_attention_patterns"):
        if entries := getattr(config, name):
            changes[name] = [entries[number] for number in attention]
    return LongEmbedConfig.from_dict(config.to_dict() | changes)
