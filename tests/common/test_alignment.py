"""Alignment and uniformity against their definitions and their limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from common.alignment import alignment, uniformity

pytestmark = pytest.mark.promise("C12")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@given(rows=st.integers(2, 9), dim=st.integers(1, 8), power=st.floats(0.5, 3.0), seed=st.integers(0, 99))
def test_equal_their_definitions(rows, dim, power, seed):
    first, second = unit(rows, dim, seed=seed), unit(rows, dim, seed=seed + 100)
    pairs = [math.dist(x, y) ** power for x, y in zip(first.tolist(), second.tolist(), strict=True)]
    assert alignment(first, second, alpha=power).item() == pytest.approx(sum(pairs) / rows, abs=1e-9)
    points = first.tolist()
    others = [math.exp(-power * math.dist(x, y) ** 2) for i, x in enumerate(points) for y in points[:i]]
    assert uniformity(first, t=power).item() == pytest.approx(math.log(sum(others) / len(others)), abs=1e-9)


def test_limits():
    points = unit(500, 768)
    assert alignment(points, points) == 0
    assert uniformity(points[:1].expand(9, -1)).item() == pytest.approx(0, abs=1e-9)
    assert uniformity(points).item() == pytest.approx(-4, abs=0.02)  # -2t
    assert uniformity(points[:1]) == 0


def test_do_not_change_under_rotation():
    first, second = unit(20, 8), unit(20, 8, seed=1)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    torch.testing.assert_close(
        alignment(first @ rotation, second @ rotation), alignment(first, second), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(uniformity(first @ rotation), uniformity(first), atol=1e-9, rtol=0)


def test_of_many_rows_the_same_are_taken_from_everywhere():
    points = unit(50, 8)
    assert uniformity(points, max_rows=10) == uniformity(points, max_rows=10) == uniformity(points[::5])
    assert uniformity(points, max_rows=50) == uniformity(points)
