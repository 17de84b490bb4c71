"""The growth exponent: power laws are recovered, and it is the slope of least squares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.speed.growth import growth_exponent


@given(
    exponent=st.floats(-1, 3),
    factor=st.floats(1e-6, 1e6),
    lengths=st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True),
)
def test_the_exponent_of_a_power_law_is_recovered(exponent, factor, lengths):
    values = [factor * length**exponent for length in lengths]
    assert growth_exponent(lengths, values) == pytest.approx(exponent, abs=1e-6)


def test_the_exponent_is_the_slope_of_least_squares():
    lengths, values = [1, 2, 4, 8], [1.0, 5.0, 3.0, 20.0]
    x, y = np.log(lengths), np.log(values)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert growth_exponent(lengths, values) == pytest.approx(slope)
    assert np.isnan(growth_exponent([4096], [1.0]))
    assert np.isnan(growth_exponent([4096, 8192], [0.0, 1.0]))
