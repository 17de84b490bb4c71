"""A tiny base in a folder, a model that was trained from it, and an empty release of it."""

import pytest
import torch
import yaml

from model_cards import release
from modeling_longembed import LongEmbedModel
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, save_checkpoint

RECIPE = {
    "repository": "org/tiny",
    "base": "org/base",
    "base_package": "no-such-package",
    "conversion": {"max_position_embeddings": 4 * CONTEXT, "attention_patterns": {"type": "block", "size": 16}},
    "steps": [],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_checkpoint(folder, "bert")
    return folder


@pytest.fixture
def trained(base):
    """A model with a new context, a new token head, and matrices, norms and biases that have moved."""
    model = LongEmbedModel.from_encoder(base, token_dim=8, **RECIPE["conversion"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "norm" in name or "word_embeddings" in name:
                parameter += 0.01 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """`model_cards/tiny` with a recipe and a card, and nothing else."""
    monkeypatch.setattr(release, "CARDS", tmp_path)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "README.md").write_text(
        "---\nlicense: mit\n---\n\n# tiny\n\n<!-- results -->\n<!-- /results -->\n\nend\n"
    )
    return release.Release(folder)
