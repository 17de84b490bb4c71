"""A file that nobody could ask for is not a file that is not there (a fake Hub, its cache, local folders)."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from modeling_longembed import LongEmbedModel
from modeling_longembed.conversion_settings_longembed import TRANSFORMER_FILES
from modeling_longembed.hub_files_longembed import SAVED_TOKENIZER_FILES, TOKENIZER_FILES, find_file
from tests.fake_hub import COMMIT, fake_hub
from tests.modeling_longembed.tiny_checkpoints import save_checkpoint

# Every file that is optional in a checkpoint which is converted.
OPTIONAL = [
    "modules.json",
    "config_sentence_transformers.json",
    *TRANSFORMER_FILES,
    "1_Pooling/config.json",
    "2_Normalize/config.json",
    "3_Dropout/config.json",
    "README.md",
    *TOKENIZER_FILES,
]
# The files without which there is no checkpoint, and what transformers asks for by itself: a listing, a template that
# no encoder reads, and the config of an adapter, which a repository with a config.json is not.
OTHERS = {"config.json", "model.safetensors", "", "chat_template.jinja", "adapter_config.json"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, "bert")
    rows = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"), ("3_Dropout", "Dropout")]
    modules = [{"name": path, "path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in rows]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    return folder


def serving(folder, failing=(), status=503):
    """A Hub with the files of a folder, which fails for some of them."""

    def answer(method, path):
        name = path.partition(f"/resolve/{COMMIT}/")[2] or path.partition("/resolve/main/")[2]
        headers = {"X-Repo-Commit": COMMIT}
        if name in failing:
            return status, {}, b""
        if not name or not (folder / name).is_file():
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b""
        body = (folder / name).read_bytes()
        return 200, headers | {"ETag": f'"{name.replace("/", "-")}"'}, body

    return answer


def test_a_conversion_from_the_hub_is_that_of_the_folder(checkpoint, tmp_path, monkeypatch):
    with fake_hub(monkeypatch, tmp_path, serving(checkpoint)) as hub:
        model = LongEmbedModel.from_encoder("org/name")
        asked = {path.partition("/resolve/main/")[2] for _, path in hub.requests}
    assert model.config.pooling == "cls"
    assert asked - OTHERS == set(OPTIONAL)  # what is tested below is what a conversion asks for


@pytest.mark.parametrize("file", OPTIONAL)
def test_a_conversion_refuses_where_the_hub_fails_for_any_one_file(file, checkpoint, tmp_path, monkeypatch):
    with (
        fake_hub(monkeypatch, tmp_path, serving(checkpoint, [file])),
        pytest.raises(
            OSError, match=r"org/name has a file .* could not be found out \(the Hub answered 503\)"
        ) as error,
    ):
        LongEmbedModel.from_encoder("org/name")
    assert f" {file} " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [403, 503, 0])
@pytest.mark.parametrize("suffix", ["", ".index.json"], ids=["whole", "sharded"])
def test_older_weights_are_not_read_in_place_of_those_that_the_hub_does_not_give(
    suffix, status, checkpoint, tmp_path, monkeypatch
):
    folder = shutil.copytree(checkpoint, tmp_path / "both")
    weights = load_file(folder / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, folder / "pytorch_model.bin")
    if suffix:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-1-of-1.safetensors")}
        (folder / "model.safetensors").rename(folder / "model-1-of-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    answer = serving(folder, [f"model.safetensors{suffix}"], status)
    with (
        fake_hub(monkeypatch, tmp_path, answer) as hub,
        pytest.raises(OSError, match=rf"a file model\.safetensors{re.escape(suffix)} could not be found out"),
    ):
        LongEmbedModel.from_encoder("org/name")
    assert not any("pytorch_model" in path for _, path in hub.requests)


def test_an_encoder_in_a_subfolder_of_the_hub_is_that_of_the_folder(checkpoint, tmp_path, monkeypatch):
    outer = tmp_path / "outer"
    shutil.copytree(checkpoint, outer / "0_Transformer", ignore=shutil.ignore_patterns("modules.json", "1_Pooling"))
    shutil.copytree(checkpoint / "1_Pooling", outer / "1_Pooling")
    modules = (checkpoint / "modules.json").read_text().replace('"path": ""', '"path": "0_Transformer"')
    (outer / "modules.json").write_text(modules)
    with fake_hub(monkeypatch, tmp_path, serving(outer)):
        model = LongEmbedModel.from_encoder("org/name")
    expected = LongEmbedModel.from_encoder(checkpoint)
    assert model.config.pooling == expected.config.pooling == "cls"
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert model.tokenizer("w1 w2 w3")["input_ids"] == expected.tokenizer("w1 w2 w3")["input_ids"]
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        with (
            fake_hub(monkeypatch, tmp_path / file, serving(outer, [f"0_Transformer/{file}"])),
            pytest.raises(OSError, match=rf"org/name has a file 0_Transformer/{file} could not be found out"),
        ):
            LongEmbedModel.from_encoder("org/name")


def test_a_checkpoint_of_older_weights_alone_is_read(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")  # for which transformers asks the Hub in a thread
    folder = shutil.copytree(checkpoint, tmp_path / "older")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with fake_hub(monkeypatch, tmp_path, serving(folder)):
        found = LongEmbedModel.from_encoder("org/name").state_dict()
    expected = LongEmbedModel.from_encoder(checkpoint).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503, 504, 0])
def test_no_failure_of_a_server_is_an_answer(status, checkpoint, tmp_path, monkeypatch):
    with (
        fake_hub(monkeypatch, tmp_path, serving(checkpoint, ["modules.json"], status)),
        pytest.raises(OSError, match="could not be found out") as error,
    ):
        find_file("org/name", "modules.json")
    assert (str(status) in str(error.value)) == (status != 0)
    assert "\n" not in str(error.value)


def test_a_lost_connection_is_no_answer(checkpoint, tmp_path, monkeypatch):
    with fake_hub(monkeypatch, tmp_path, serving(checkpoint)) as hub:
        hub.close()
        with pytest.raises(OSError, match=r"could not be found out \(ConnectError\)|\(ConnectionError\)"):
            find_file("org/name", "modules.json")


def test_offline_the_cache_answers_by_a_file_or_by_a_mark_and_not_by_a_gap(checkpoint, tmp_path, monkeypatch):
    with fake_hub(monkeypatch, tmp_path, serving(checkpoint)) as hub:
        found = find_file("org/name", "modules.json")
        assert find_file("org/name", "vocab.txt") is None  # which leaves a mark
        for failed in (lambda method, path: (503, {}, b""), None):
            hub.answer = failed or hub.answer
            options = {} if failed else {"local_files_only": True}
            assert find_file("org/name", "modules.json", **options) == found
            assert find_file("org/name", "vocab.txt", **options) is None
            with pytest.raises(OSError, match="could not be found out"):
                find_file("org/name", "README.md", **options)


def test_a_local_folder_answers_by_its_listing(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    assert find_file(folder, "modules.json") == str(folder / "modules.json")
    assert find_file(folder, "config.json", subfolder="1_Pooling") == str(folder / "1_Pooling" / "config.json")
    assert find_file(folder, "nothing.json") is None
    assert find_file(folder, "modules.json/config.json") is None
    (folder / "modules.json").unlink()
    (folder / "modules.json").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match=r"modules\.json is a link to a file that is not there"):
        LongEmbedModel.from_encoder(folder)


@pytest.fixture(scope="module")
def ours(checkpoint, tmp_path_factory):
    """A folder of ours."""
    folder = tmp_path_factory.mktemp("ours")
    LongEmbedModel.from_encoder(checkpoint).save_pretrained(folder)
    return folder


def test_a_tokenizer_without_its_config_is_one(ours, tmp_path):
    folder = shutil.copytree(ours, tmp_path / "copy")
    (folder / "tokenizer_config.json").unlink()
    model = LongEmbedModel.from_pretrained(folder)
    assert model.has_tokenizer()
    model.save_pretrained(tmp_path / "again")
    tokenizer = LongEmbedModel.from_pretrained(tmp_path / "again").tokenizer
    assert tokenizer("w1 w2 w3")["input_ids"] == model.tokenizer("w1 w2 w3")["input_ids"]
    (folder / "tokenizer.json").unlink()
    assert not LongEmbedModel.from_pretrained(folder).has_tokenizer()


@pytest.mark.parametrize("file", SAVED_TOKENIZER_FILES)
def test_nothing_is_saved_where_the_hub_does_not_give_the_tokenizer(file, ours, tmp_path, monkeypatch):
    with fake_hub(monkeypatch, tmp_path, serving(ours, [file])):
        model = LongEmbedModel.from_pretrained("org/name")
        with pytest.raises(OSError, match=rf"org/name has a file {file} could not be found out"):
            model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
