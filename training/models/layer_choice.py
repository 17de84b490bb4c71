"""Which layers of a model a student begins with."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.errors import UserError
from modeling_longembed.layout_layerdrop_longembed import every_other
from modeling_longembed.layout_registry_longembed import layers_of


@dataclass
class LayerArguments:
    """The layers to train."""

    keep_layers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "the model begins with these of its layers: every_other, ends:3 (so many, evenly spaced from the "
            "first to the last), or their numbers from 0; all if not given"
        },
    )

    def apply(self, model: Any) -> None:
        """Leave a LongEmbed model the layers that it is to begin with.

        Raises:
            UserError: layers that it does not have, or a layout without layers.
        """
        if self.keep_layers:
            keep_layers(model, self.keep_layers, "keep_layers")


def keep_layers(model: Any, words: list[str], option: str) -> None:
    """Leave a model the layers that `words` choose; `option` is where they come from.

    Raises:
        UserError: layers that it does not have, or a layout without layers.
    """
    try:
        model.keep_layers(chosen_layers(words, len(layers_of(model.config.sublayer_pattern)), option))
    except ValueError as error:
        raise UserError(f"--{option} {' '.join(words)}: {error}") from None


def chosen_layers(words: list[str], num_layers: int, option: str) -> list[int]:
    """The layers to keep, from `every_other`, `ends:3` or numbers.

    Evenly spaced from the first to the last are DistilBERT's 0, 2, 4, 7, 9 and 11 of 12.

    Raises:
        UserError: words of no such form, or more layers than there are.
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
