"""Layouts: the order of the sublayers, one letter each, `s` self-attention and `f` feed-forward.

A layout is a string, `config.sublayer_pattern`; here are the published ways to write one.
"""

import math
import re


def interleaved(num_layers: int) -> str:
    """The Transformer's own layout (Vaswani et al. 2017, section 3.1): `(sf)^n`, n = `num_layers` pairs.

    Raises:
        ValueError: `num_layers` is less than 1.
    """
    return sandwich(num_layers, 0)


def sandwich(num_layers: int, coefficient: int) -> str:
    """`s^k (sf)^(n-k) f^k`: attention towards the bottom, feed-forward towards the top, as many of each as before.

    Press et al. 2020, "Improving Transformer Models by Reordering their Sublayers" (arXiv:1911.03864), section 5. Their
    best for a language model of n = 16 pairs is k = 6. The number of parameters does not depend on k.

    Args:
        num_layers: n pairs of sublayers.
        coefficient: k, from 0 (the interleaved layout) to n - 1.

    Returns:
        2n letters.

    Raises:
        ValueError: no such k.
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
    """Few attention sublayers, evenly spaced in the first two thirds, and feed-forward everywhere else.

    Mandava et al. 2020, "Pay Attention when Required" (arXiv:2009.04534). Of N = `blocks` sublayers, round(N / p) are
    attention, p = `ratio` (5 in the paper's models). The paper leaves open which blocks of the first two thirds these
    are; here number i of n_s stands at index floor(i * ceil(2N / 3) / n_s), so the first block is attention. Where an
    attention sublayer (4 d^2 parameters) gives way to a feed-forward one (8 d^2 at the usual width), the model has MORE
    parameters than the interleaved one of as many blocks; what falls is the time for long documents.

    Args:
        blocks: N, sublayers of both kinds together.
        ratio: p, all sublayers to attention sublayers; more than 2, which would be the interleaved layout's.

    Returns:
        N letters.

    Raises:
        ValueError: a ratio that the rule is not defined for, or that leaves no attention.
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
    """The letters of a layout that is written by name.

    Args:
        layout: `interleaved`, `sandwich(k)`, `par(p)`, or letters `s` and `f`, which are returned as they are.
        num_layers: n pairs of sublayers of a named layout, which has 2n sublayers; letters have their own number.

    Returns:
        Letters `s` and `f`.

    Raises:
        ValueError: a name that does not exist, or an argument that its layout is not defined for.
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
    """The layers of a layout: each begins at an `s` and takes the `f`s after it; leading `f`s are one of their own.

    Args:
        pattern: letters `s` and `f`.

    Returns:
        The indices of the sublayers of each layer; together all indices, in order. `sfssff` has three layers,
        `[[0, 1], [2], [3, 4, 5]]`.
    """
    return [list(range(*match.span())) for match in re.finditer("sf*|f+", pattern)]
