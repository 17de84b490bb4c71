"""Length and masking rate as functions of the step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from training.data.documents.curriculum import Curriculum, LengthSchedule, RateSchedule


@pytest.mark.promise("M3")
def test_bert_trained_ninety_per_cent_of_its_steps_on_128_tokens():
    schedule = LengthSchedule.parse(["128:0.9", "512:0.1"])
    assert [schedule.at(step, 1_000_000) for step in (0, 899_999, 900_000, 999_999)] == [128, 128, 512, 512]
    assert [schedule.at(step, 10) for step in range(12)] == [128] * 9 + [512] * 3


@pytest.mark.promise("M3")
@given(first=st.integers(100, 500), factor=st.integers(2, 30), stages=st.integers(2, 9), total=st.integers(20, 500))
def test_a_ramp_grows_by_a_constant_factor_in_equal_stages(first, factor, stages, total):
    schedule = LengthSchedule.parse([f"ramp:{first}-{first * factor}:{stages}"])
    lengths = np.array([schedule.at(step, total) for step in range(total)])
    assert (lengths[0], lengths[-1]) == (first, first * factor)
    assert (np.diff(lengths) >= 0).all()
    found, counts = np.unique(lengths, return_counts=True)
    assert found[1:] / found[:-1] == pytest.approx(factor ** (1 / (stages - 1)), rel=0.1)
    assert counts == pytest.approx(total / stages, abs=1.01)


def test_a_constant_needs_no_end():
    curriculum = Curriculum(LengthSchedule.parse(["512"]), RateSchedule.parse(["0.15"]), 7)
    assert {curriculum.length(step) for step in range(20)} == {512}
    assert {curriculum.mask_rate(step) for step in range(20)} == {0.15}


@given(first=st.floats(0.01, 1), last=st.floats(0.01, 1), total=st.integers(2, 1000))
def test_the_rate_is_linear(first, last, total):
    schedule = RateSchedule.parse([f"{first:.3f}-{last:.3f}"])
    rates = [schedule.at(step, total) for step in range(total)]
    assert rates == pytest.approx(np.linspace(float(f"{first:.3f}"), float(f"{last:.3f}"), total), abs=1e-12)
    assert schedule.at(total + 5, total) == schedule.last


@pytest.mark.parametrize(
    "text", ["", "0", "long", "128:0.9", "128:0.9 512:0.2", "128 512", "ramp:128-512", "ramp:128-512:1", "128:-1 512:2"]
)
def test_lengths_in_no_known_form(text):
    with pytest.raises(UserError, match=r"^--sequence_length ") as caught:
        LengthSchedule.parse(text.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "0", "1.5", "0.2-0", "much", "0.1-0.2-0.3", "-0.1"])
def test_rates_in_no_known_form(text):
    with pytest.raises(UserError, match=r"^--mask_rate "):
        RateSchedule.parse([text])
