"""A difference is small, near, and gives the same bits wherever it is applied."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from model_cards import difference as module
from model_cards.difference import applied, difference, read_difference, write_difference


@pytest.fixture
def weights():
    base = {"matrix": torch.randn(6, 40), "same": torch.randn(3, 4), "vector": torch.randn(5), "gone": torch.randn(2)}
    trained = {
        "matrix": base["matrix"] + torch.randn(6, 40) * torch.tensor([1e-6, 0, 1e-3, 1, 10, 1e3])[:, None],
        "same": base["same"].clone(),
        "vector": base["vector"] + 0.1,
        "longer": torch.randn(7, 4),
    }
    return trained, base


def test_a_row_is_off_by_at_most_half_a_step(weights):
    """Oracle: the bound of rounding, which is a 254th of the row's largest change, in float64."""
    trained, base = weights
    kept = difference(trained, base)
    assert set(kept) == {"matrix", "matrix:step", "vector", "longer"}
    assert kept["matrix"].dtype == torch.int8
    got = applied(kept, base)
    change = (trained["matrix"] - base["matrix"]).double().numpy()
    largest = np.abs(change).max(1, keepdims=True)
    rounding = 1e-6 * (1 + largest)  # of sums in float32
    assert (np.abs(got["matrix"].numpy() - trained["matrix"].numpy()) <= largest / 254 + rounding).all()
    for name in ("same", "vector", "longer"):
        assert got[name].equal(trained[name])


def test_sums_are_rounded_twice_on_every_machine(weights):
    """Oracle: numpy's product and sum in float32, which no instruction fuses."""
    trained, base = weights
    kept = difference(trained, base)
    product = kept["matrix"].numpy().astype(np.float32) * kept["matrix:step"].numpy()[:, None]
    expected = base["matrix"].numpy() + product
    np.testing.assert_array_equal(applied(kept, base)["matrix"].numpy(), expected)


def test_what_was_applied_is_kept_without_loss(weights):
    """A second difference of what a difference gave changes nothing any more but the last bits of sums."""
    trained, base = weights
    once = applied(difference(trained, base), base)
    twice = applied(difference(once, base), base)
    torch.testing.assert_close(twice["matrix"], once["matrix"], rtol=1e-6, atol=1e-6)


def test_the_file_says_to_which_base_it_belongs(weights, tmp_path):
    kept = difference(*weights)
    write_difference(tmp_path / "d.safetensors", kept, "abc")
    read, base = read_difference(tmp_path / "d.safetensors")
    assert base == "abc"
    assert read.keys() == kept.keys()
    assert all(read[name].equal(kept[name]) for name in kept)


def test_too_much_and_damage_are_refused_in_a_sentence(weights, tmp_path, monkeypatch):
    path = tmp_path / "d.safetensors"
    write_difference(path, difference(*weights), "abc")
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="more than"):
        write_difference(tmp_path / "other", difference(*weights), "abc")
    assert not (tmp_path / "other").exists()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="no difference of weights"):
        read_difference(path)
