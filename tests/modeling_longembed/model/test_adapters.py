"""An adapter is saved as an adapter, and gives the same vectors on a base of ours, whoever loads it."""

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from modeling_longembed import LongEmbedModel
from tests.modeling_longembed.tiny_checkpoints import random_text, save_checkpoint

peft = pytest.importorskip("peft")

TEXTS = [random_text(n, seed=n) for n in (20, 3, 0, 31)]
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
TARGETS = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_checkpoint(folder / "bert", "bert")
    LongEmbedModel.from_encoder(folder / "bert").save_pretrained(folder / "ours")
    return folder / "ours"


def lora(**settings) -> "peft.LoraConfig":
    # Weights that are not zero at the start, as after a training.
    return peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **settings)


def encode(model) -> np.ndarray:
    return model.encode(TEXTS, precision="float32")


def saved_by_transformers(base_folder, folder) -> np.ndarray:
    model = LongEmbedModel.from_pretrained(base_folder)
    model.add_adapter(lora())
    model.save_pretrained(folder, title="org/tiny-adapter")
    return encode(model)


def saved_by_peft(base_folder, folder) -> np.ndarray:
    model = peft.get_peft_model(LongEmbedModel.from_pretrained(base_folder), lora())
    model.save_pretrained(folder)
    return encode(model)


def loaded_by_transformers(base_folder, folder):
    model = LongEmbedModel.from_pretrained(base_folder)
    model.load_adapter(str(folder))
    return model


def loaded_by_peft(base_folder, folder):
    return peft.PeftModel.from_pretrained(LongEmbedModel.from_pretrained(base_folder), folder)


@pytest.mark.parametrize("save", [saved_by_transformers, saved_by_peft])
def test_the_folder_is_an_adapter_and_loads_onto_a_base_of_ours(base_folder, tmp_path, save):
    vectors = save(base_folder, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == FILES
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert "one vector for a document" not in card.text
    for load in (loaded_by_transformers, loaded_by_peft):
        np.testing.assert_allclose(encode(load(base_folder, tmp_path / "adapter")), vectors, atol=1e-6)
    assert np.abs(vectors - encode(LongEmbedModel.from_pretrained(base_folder))).max() > 1e-2


def test_the_card_says_how_to_load_it(base_folder, tmp_path):
    saved_by_transformers(base_folder, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert f'AutoModel.from_pretrained("{base_folder}", trust_remote_code=True)' in text
    assert 'model.load_adapter("org/tiny-adapter")' in text


def test_a_merged_model_is_a_whole_model_again(base_folder, tmp_path):
    merged = peft.get_peft_model(LongEmbedModel.from_pretrained(base_folder), lora()).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert {"modules.json", "modeling_longembed.py", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob("adapter*"))
    np.testing.assert_allclose(encode(LongEmbedModel.from_pretrained(tmp_path)), encode(merged), atol=1e-6)


def test_a_model_with_layers_of_peft_is_not_saved_as_a_model(base_folder, tmp_path):
    """Its weights would have names that no model of ours reads."""
    model = peft.get_peft_model(LongEmbedModel.from_pretrained(base_folder), lora())
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
        model.get_base_model().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_adapter_that_sentence_transformers_saves_loads_with_it(base_folder, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    options = {"device": "cpu", "trust_remote_code": True}
    model = st.SentenceTransformer(str(base_folder), prompts={"query": "w7 ", "document": ""}, **options)
    model.add_adapter(lora())
    model.save(str(tmp_path / "adapter"))
    (code,) = (tmp_path / "adapter").glob("*.py")  # of the module among those of sentence-transformers
    assert code.name == "hub_sentence_transformers_longembed.py"
    again = st.SentenceTransformer(str(tmp_path / "adapter"), **options)
    np.testing.assert_allclose(again.encode_query(TEXTS), model.encode_query(TEXTS), atol=1e-6)
