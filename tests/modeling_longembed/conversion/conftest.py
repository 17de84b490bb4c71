"""Checkpoints of other architectures, which the tests of conversion read."""

import pytest

from tests.modeling_longembed.tiny_checkpoints import save_checkpoint


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """`checkpoint(family, **changes)` gives folder and original model, each made once."""
    made = {}

    def get(family, **changes):
        key = (family, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = folder, save_checkpoint(folder, family, **changes)
        return made[key]

    return get
