"""The layout axis: the order of the sublayers, one letter each, `s` for self-attention and `f` for feed-forward.

A layout is a string, `config.sublayer_pattern`. This file has the published layouts and their names.
"""

import math
import re


def interleaved(num_layers: int) -> str:
    """Return the layout of the Transformer (Vaswani et al. 2017, section 3.1): `(sf)^n` for n = `num_layers` pairs.

    Raises:
        ValueError: `num_layers` is less than 1.
    """
    return sandwich(num_layers, 0)


def sandwich(num_layers: int, coefficient: int) -> str:
    """Return the sandwich layout `s^k (sf)^(n-k) f^k`: more attention at the bottom, more feed-forward at the top.

    Press et al. 2020, "Improving Transformer Models by Reordering their Sublayers" (arXiv:1911.03864), section 5. Their
    best coefficient for a language model of n = 16 pairs is k = 6. The number of parameters does not depend on k.

    Args:
        num_layers: n pairs of sublayers.
        coefficient: k, from 0 (the interleaved layout) to n - 1.

    Returns:
        2n letters.

    Raises:
        ValueError: `num_layers` is less than 1, or k is out of its range.
    """
    if num_layers < 1:
        raise ValueError(f"a layout of num_hidden_layers={num_layers} pairs is empty; give at least 1")
    if not 0 <= coefficient < num_layers:
        raise ValueError(
            f"sandwich({coefficient}) of num_hidden_layers={num_layers} pairs does not exist; give a coefficient from "
            f"0 to {num_layers - 1}"
        )
    return "s" * coefficient + "sf" * (num_layers - coefficient) + "f" * coefficient


def par(blocks: int, ratio: float) -> str:
    """Return the PAR layout: a few attention sublayers, evenly spaced in the first two thirds, else feed-forward.

    Mandava et al. 2020, "Pay Attention when Required" (arXiv:2009.04534). Of N = `blocks` sublayers, n_s = round(N / p)
    are attention, with p = `ratio` (5 in the paper's models). The paper does not say which blocks of the first two
    thirds these are; here attention sublayer i is at index floor(i * ceil(2N / 3) / n_s), so the first block is
    attention. A feed-forward sublayer (8 d^2 parameters at the usual width) that replaces an attention sublayer (4 d^2)
    makes the model LARGER than the interleaved model with as many blocks, but faster on long documents.

    Args:
        blocks: N, number of sublayers of both kinds.
        ratio: p, ratio of all sublayers to attention sublayers; more than 2, the ratio of the interleaved layout.

    Returns:
        N letters.

    Raises:
        ValueError: the rule is not defined for this ratio, or it leaves no attention sublayer.
    """
    if not 2 < ratio < math.inf:
        raise ValueError(
            f"par({ratio:g}) does not exist: the ratio is that of all sublayers to attention sublayers; give more "
            "than 2, or use 'interleaved'"
        )
    attention = round(blocks / ratio)
    if attention < 1:
        raise ValueError(f"par({ratio:g}) of {blocks} sublayers has no attention sublayer; give a smaller ratio")
    region = -(-2 * blocks // 3)  # ceil
    places = {number * region // attention for number in range(attention)}
    return "".join("s" if index in places else "f" for index in range(blocks))


def expand_layout(layout: str, num_layers: int) -> str:
    """Return the letters of a layout given by name.

    Args:
        layout: `interleaved`, `sandwich(k)`, `par(p)`, or letters `s` and `f`, which are returned as they are.
        num_layers: number n of pairs of sublayers; a named layout has 2n sublayers. Letters have their own number.

    Returns:
        Letters `s` and `f`.

    Raises:
        ValueError: there is no layout of this name, or it is not defined for its argument.
    """
    if re.fullmatch("[sf]+", layout):
        return layout
    if layout == "interleaved":
        return interleaved(num_layers)
    if match := re.fullmatch(r"sandwich\((\d+)\)", layout):
        return sandwich(num_layers, int(match[1]))
    if match := re.fullmatch(r"par\((\d+(?:\.\d+)?)\)", layout):
        return par(2 * num_layers, float(match[1]))
    raise ValueError(
        f"sublayer_pattern={layout!r}; give letters 's' (self-attention) and 'f' (feed-forward), such as 'sfsf', or "
        "'interleaved', 'sandwich(k)', 'par(p)'"
    )


def layers_of(pattern: str) -> list[list[int]]:
    """Group sublayers into layers: an `s` with the `f`s after it; `f`s before the first `s` are a layer of their own.

    Args:
        pattern: letters `s` and `f`.

    Returns:
        The indices of the sublayers of each layer, in order. For `sfssff`: `[[0, 1], [2], [3, 4, 5]]`.
    """
    return [list(range(*match.span())) for match in re.finditer("sf*|f+", pattern)]
