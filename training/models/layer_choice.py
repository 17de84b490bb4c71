"""The choice of the layers that a student keeps of a model."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.errors import UserError
from modeling_longembed.layout_layerdrop_longembed import every_other
from modeling_longembed.layout_registry_longembed import layers_of


@dataclass
class LayerArguments:
    """The layers to keep."""

    keep_layers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "layers of the model to keep and train: every_other, ends:3 (three, evenly spaced from the first "
            "to the last), or their numbers counted from 0; all if not given"
        },
    )

    def apply(self, model: Any) -> None:
        """Remove the other layers from a LongEmbed model, in place.

        Raises:
            UserError: the model does not have these layers, or its layout has none.
        """
        if self.keep_layers:
            keep_layers(model, self.keep_layers, "keep_layers")


def keep_layers(model: Any, words: list[str], option: str) -> None:
    """Remove all layers of a model but the chosen ones, in place.

    Args:
        model: a LongEmbed model.
        words: the choice; see `chosen_layers`.
        option: name of the option, for the error message.

    Raises:
        UserError: the model does not have these layers, or its layout has none.
    """
    try:
        model.keep_layers(chosen_layers(words, len(layers_of(model.config.sublayer_pattern)), option))
    except ValueError as error:
        raise UserError(f"--{option} {' '.join(words)}: {error}") from None


def chosen_layers(words: list[str], num_layers: int, option: str) -> list[int]:
    """Return the numbers of the layers to keep, ascending.

    `ends:6` of 12 layers are DistilBERT's 0, 2, 4, 7, 9 and 11.

    Args:
        words: `every_other`, `ends:N`, or numbers.
        num_layers: number of layers of the model.
        option: name of the option, for the error message.

    Raises:
        UserError: the words have another form, or name layers that the model does not have.
    """
    text = " ".join(words) or "every_other"
    if text == "every_other":
        return every_other(num_layers, 0.5)
    kind, _, count = text.partition(":")
    if kind == "ends" and count.isdecimal() and 0 < int(count) <= num_layers:
        return np.linspace(0, num_layers - 1, int(count)).round().astype(int).tolist()
    if all(word.isdecimal() and int(word) < num_layers for word in words):
        return sorted({int(word) for word in words})
    raise UserError(
        f"--{option} {text}: write every_other, ends:N with N up to {num_layers}, or numbers from 0 to {num_layers - 1}"
    )
