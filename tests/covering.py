"""Thin a product of parameters to a covering one; the whole product stays, marked slow."""

from collections.abc import Callable
from itertools import combinations

import pytest


def covering_first(
    cases: list,
    keep: Callable[..., bool] = lambda *values: False,
    factors: Callable[..., tuple] = lambda *values: values,
) -> list:
    """Mark the cases slow that are not needed for every pair of parameter values to be tested together.

    Most mistakes show in one value or in two together (Kuhn, Wallace and Gallo 2004, "Software fault interactions");
    of three factors of 9, 6 and 6 values a few more than 54 cases have all pairs, of 324. The choice is greedy and
    depends on the cases alone.

    Args:
        cases: `pytest.param`s with as many values each, those that are allowed. Values are told apart by their `repr`.
        keep: called with the values of a case; those that it says True of are not slow, whatever they add.
        factors: called with the values of a case; what it returns, in their place, is what is tested in pairs: None in
            the place of a value where any will do.

    Returns:
        The cases in their order, each of them once, those beyond the covering ones with the mark `slow`.
    """
    pairs = [set(combinations([(n, repr(v)) for n, v in enumerate(factors(*case.values))], 2)) for case in cases]
    chosen = {number for number, case in enumerate(cases) if keep(*case.values)}
    left = set().union(*pairs).difference(*(pairs[number] for number in chosen))
    while left:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & left))
        chosen.add(best)
        left -= pairs[best]
    return [
        case if number in chosen else pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
        for number, case in enumerate(cases)
    ]
