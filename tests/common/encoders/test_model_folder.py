"""The files of a model: which folders are accepted, and what the revision depends on."""

import shutil

import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import filter_repo_objects
from transformers import BertConfig

from common.encoders.encoder import Encoder
from common.encoders.model_folder import FILES, ModelFolder
from common.errors import UserError
from tests.fake_hub import COMMIT, fake_hub


def test_a_folder_that_is_no_model_is_reported(tmp_path, tiny_sentence_transformer):
    with pytest.raises(UserError, match=r"it needs config.json and"):
        ModelFolder.find(str(tmp_path))
    for name in (str(tmp_path / "nowhere"), "nobody/nothing", "no such model"):
        with pytest.raises(UserError, match="unknown model"):
            ModelFolder.find(name)
    BertConfig(hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 16)
    with pytest.raises(UserError, match="does not load"):
        Encoder(ModelFolder.find(str(tmp_path)))
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        _ = ModelFolder.find(str(tmp_path)).parameters


def test_the_revision_of_a_folder_changes_with_what_shapes_a_vector(tiny_sentence_transformer, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sentence_transformer, copy)
    original = ModelFolder.find(str(tiny_sentence_transformer)).revision
    assert ModelFolder.find(str(copy)).revision == original
    (copy / "README.md").write_text("another card")
    assert ModelFolder.find(str(copy)).revision == original
    (copy / "2_Dense").mkdir()
    (copy / "2_Dense" / "pytorch_model.bin").write_bytes(b"the weights of a dense layer")
    with_dense = ModelFolder.find(str(copy)).revision
    assert with_dense != original
    (copy / "2_Dense" / "pytorch_model.bin").write_bytes(b"other weights of that layer!")
    assert ModelFolder.find(str(copy)).revision not in (original, with_dense)
    shutil.rmtree(copy / "2_Dense")
    settings = copy / "config.json"
    settings.write_text(settings.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-5'))
    assert ModelFolder.find(str(copy)).revision != original


def test_all_that_a_model_is_loaded_from_is_downloaded_and_no_more():
    needed = {"config.json", "model.safetensors", "vocab.txt", "spiece.model", "qwen.tiktoken", "modeling.py"}
    needed |= {"1_Pooling/config.json", "2_Dense/pytorch_model.bin", "2_Dense/model.safetensors"}
    other = {"pytorch_model.bin", "tf_model.h5", "README.md", "onnx/model.onnx", "flax_model.msgpack"}
    assert set(filter_repo_objects(needed | other, allow_patterns=FILES)) == needed


def test_a_part_of_a_snapshot_is_not_taken_for_the_model(tiny_longembed, tmp_path, monkeypatch):
    """Without modules.json it would be another model: mean pooling, and no prompts."""

    def answer(method, path):
        name = path.partition(f"/resolve/{'main' if '/main/' in path else COMMIT}/")[2]
        if name not in ("config.json", "model.safetensors"):
            return 503, {}, b""
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}, (tiny_longembed / name).read_bytes()

    with fake_hub(monkeypatch, tmp_path, answer):
        for name in ("config.json", "model.safetensors"):
            hf_hub_download("org/name", name)
        with pytest.raises(UserError, match=r"org/name has a file modules\.json could not be found out") as error:
            ModelFolder.find("org/name")
    assert "\n" not in str(error.value)
