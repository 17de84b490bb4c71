"""The choice of parameters that `make test` runs out of a larger product."""

from itertools import combinations, product

import pytest

from tests.covering import covering_first


def pairs(cases: list) -> set:
    return {pair for case in cases for pair in combinations(enumerate(case.values), 2)}


def test_what_is_not_slow_has_every_pair_of_values_and_far_fewer_cases():
    allowed = [values for values in product(range(9), "abcdef", "uvwxyz") if values[1:] != ("a", "z")]
    cases = [pytest.param(*values, id=str(values)) for values in allowed]
    thinned = covering_first(cases)
    assert [case.values for case in thinned] == allowed
    kept = [case for case in thinned if not case.marks]
    assert pairs(kept) == pairs(cases)
    assert len(kept) < 75 < len(cases) == 315
    fives = covering_first(cases, keep=lambda number, *letters: number == 5)
    assert not any(case.marks for case in fives if case.values[0] == 5)
    assert pairs([case for case in fives if not case.marks]) == pairs(cases)
    assert all(case.marks == [pytest.mark.slow] for case in thinned if case.marks)
    few = covering_first(cases, factors=lambda number, *letters: (number, *(letters if number == 0 else (None, None))))
    kept = [case.values for case in few if not case.marks]
    assert len(kept) == 8 + len([values for values in kept if values[0] == 0])
    zeros = [pytest.param(*values) for values in allowed if values[0] == 0]
    assert pairs([pytest.param(*values) for values in kept if values[0] == 0]) == pairs(zeros)
