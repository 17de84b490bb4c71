"""A mean of weights: numpy's, with what is kept of the first model, and no mean of what does not fit."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import tiny_config, word_tokenizer
from training import averaging


@pytest.fixture
def models(tmp_path):
    folders = []
    for number in range(3):
        model = LongEmbedModel(tiny_config(token_dim=8, query_token_weights="table"))
        with torch.no_grad():
            model.token_output.query_table.normal_()
        model.tokenizer = word_tokenizer()
        model.save_pretrained(tmp_path / str(number))
        folders.append(str(tmp_path / str(number)))
    return folders


def weights(folder):
    state = LongEmbedModel.from_pretrained(folder).state_dict()
    return {name: tensor.double().numpy() for name, tensor in state.items()}


@pytest.mark.parametrize(("given", "shares"), [([], [1 / 3] * 3), ([0.5, 0.75, -0.25], [0.5, 0.75, -0.25])])
def test_the_mean_is_that_of_numpy_and_what_is_kept_is_the_first_models(models, tmp_path, given, shares):
    words = ["--models", *models, "--output_dir", str(tmp_path / "out"), "--keep", "token_output.query_"]
    averaging.main([*words, *(["--shares", *map(str, given)] if given else [])])
    mean, parts = weights(tmp_path / "out" / "final"), [weights(folder) for folder in models]
    for name, value in mean.items():
        expected = np.average([part[name] for part in parts], axis=0, weights=shares)
        if name.startswith("token_output.query_"):
            expected = parts[0][name]
        np.testing.assert_allclose(value, expected, atol=1e-6)


def test_models_that_do_not_fit_are_told_in_a_sentence(models, tmp_path):
    LongEmbedModel(tiny_config(token_dim=4)).save_pretrained(tmp_path / "narrow")
    (tmp_path / "narrow" / "tokenizer.json").write_bytes((tmp_path / "0" / "tokenizer.json").read_bytes())
    out = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"narrow: has another token_output\."):
        averaging.main(["--models", models[0], str(tmp_path / "narrow"), *out])
    with pytest.raises(UserError, match="1 in all"):
        averaging.main(["--models", *models[:2], "--shares", "0.6", "0.6", *out])
    with pytest.raises(UserError, match="at least two"):
        averaging.main(["--models", models[0], *out])
    assert not (tmp_path / "out" / "final").exists()
