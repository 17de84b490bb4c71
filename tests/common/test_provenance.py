"""What computed a result: an edit of the code that runs, another library or another device shows."""

import json
import sys
from functools import partial

import pytest

from common import provenance
from common.encoders.encoder import ChunkEncoder, Encoder
from common.encoders.model_folder import ModelFolder
from common.encoders.model_spec import ModelSpec
from common.encoders.text_vectors import cache_keys
from common.provenance import code_hash, computed_by, content_hashes
from modeling_longembed import attention_longembed


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of three files that can be imported."""
    folder = tmp_path / "attention_of_a_test"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__", "kernel", "inner/mask"):
        (folder / f"{name}.py").write_text(f"name = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]
    provenance._module_hash.cache_clear()


@pytest.mark.parametrize("file", ["__init__.py", "kernel.py", "inner/mask.py"])
def test_an_edit_of_any_file_of_a_package_shows_and_is_the_only_thing_that_does(package, file):
    before = code_hash(package.name)
    provenance._module_hash.cache_clear()  # as a new process does
    assert code_hash(package.name) == before
    (package / "notes.txt").write_text("nothing that runs")
    other = code_hash("common.files")
    content = (package / file).read_text()
    (package / file).write_text(content.replace("name", "game", 1))  # of the same size
    assert code_hash(package.name) == before  # this process goes on with what it has imported
    provenance._module_hash.cache_clear()
    assert code_hash(package.name) != before
    assert code_hash("common.files") == other
    (package / file).write_text(content)
    provenance._module_hash.cache_clear()
    assert code_hash(package.name) == before


def test_a_module_is_a_part_of_its_package_and_not_of_its_siblings(package):
    before = code_hash(f"{package.name}.kernel")
    (package / "inner" / "mask.py").write_text("name = 1\n")
    provenance._module_hash.cache_clear()
    assert code_hash(f"{package.name}.kernel") == before
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        code_hash("no_such_module_anywhere")


def test_another_version_or_device_is_told_apart_and_a_missing_library_says_nothing(monkeypatch):
    found = computed_by("common.files", device="cpu")
    assert found["torch"].split("+")[0] == sys.modules["torch"].__version__.split("+")[0]
    assert "flash-attn" in found or provenance._version("flash-attn") is None
    assert computed_by("common.files", device="cuda") != found
    monkeypatch.setattr(provenance, "version", lambda library: "0.0")
    assert computed_by("common.files", device="cpu") != found


def test_the_content_of_a_file_counts_and_not_its_name(tmp_path):
    for name, content in (("a", "text"), ("b", "text"), ("c", "tent")):
        (tmp_path / name).write_text(content)
    first, second, third = content_hashes(tmp_path / name for name in "abc")
    assert first == second != third


def keys_of(folder, kind=Encoder, **options) -> list[bytes]:
    encoder = kind(ModelFolder.find(str(folder)), 16 if kind is ChunkEncoder else None, **options)
    assert encoder.computed_by == ModelSpec("model", encoder.folder, precision=encoder.precision).computed_by(False)
    return cache_keys(["a text"], encoder, "document")


def test_vectors_of_a_model_of_ours_are_those_of_the_installed_code(
    tiny_longembed, tiny_sentence_transformer, edit_code
):
    before = {folder: keys_of(folder) for folder in (tiny_longembed, tiny_sentence_transformer)}
    assert keys_of(tiny_longembed) == before[tiny_longembed]
    edit_code("modeling_longembed")
    assert keys_of(tiny_longembed) != before[tiny_longembed]
    assert keys_of(tiny_sentence_transformer) == before[tiny_sentence_transformer]  # BERT's code is transformers'


@pytest.mark.parametrize("change", ["encoder", "library", "device", "precision"])
def test_whatever_computes_a_vector_is_in_its_key(tiny_sentence_transformer, edit_code, monkeypatch, change):
    before, options = keys_of(tiny_sentence_transformer, ChunkEncoder), {}
    if change == "encoder":
        edit_code("common.encoders.encoder")
    elif change == "library":
        monkeypatch.setattr(provenance, "version", lambda library: "0.0")
    elif change == "device":
        monkeypatch.setattr("common.encoders.model_folder.device_kind", lambda: "another")
    else:
        options["precision"] = "bfloat16"
    assert keys_of(tiny_sentence_transformer, ChunkEncoder, **options) != before


ENCODER = ("encoder", "precision", "quantization")
KEPT = ("kept_tokens", "token_settings", "token_store")
TOKEN_CODE = ("encoding", "output_maxsim", "output_token_pooling", "output_token_codes", "output_tokens")


@pytest.mark.parametrize(
    ("kind", "ours", "code", "of_the_model"),
    [
        ("model", False, ENCODER, ("encoding", "encoding_tokens")),
        ("chunk-max", False, ENCODER, ("encoding", "encoding_tokens")),
        ("tokens", False, ("multi_vector_encoder", "precision", "quantization", *KEPT), TOKEN_CODE),
        ("model", True, ENCODER, ()),
        ("chunks", True, ("longembed_encoder", "quantization"), ()),
        ("tokens", True, ("longembed_encoder", "quantization", *KEPT), ()),
    ],
)
def test_results_are_of_the_code_that_decides_them(
    tiny_longembed, tiny_sentence_transformer, monkeypatch, kind, ours, code, of_the_model
):
    """Each module that takes part, changed by itself, makes results that are computed again."""
    folder = ModelFolder.find(str(tiny_longembed if ours else tiny_sentence_transformer))
    monkeypatch.setattr(ModelFolder, "is_late_interaction", not ours)
    spec, original = ModelSpec(kind, folder, 16), provenance._module_hash
    modules = [f"common.encoders.{name}" for name in code]
    modules += [f"modeling_longembed.{name}_longembed" for name in of_the_model]
    modules += ["modeling_longembed"] if ours else []
    seen = {str(spec.computed_by(False))}
    for module in modules:
        edited = partial(lambda name, edited: "edited" if name == edited else original(name), edited=module)
        monkeypatch.setattr(provenance, "_module_hash", edited)
        seen.add(str(spec.computed_by(False)))
    assert len(seen) == 1 + len(modules)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_the_code_that_is_hashed_is_the_code_that_is_imported(tiny_longembed, trust_remote_code):
    """transformers prefers a class that is registered, as ours are, to the code in the folder."""
    folder = ModelFolder.find(str(tiny_longembed))
    encoder = Encoder(folder, trust_remote_code=trust_remote_code)
    imported = type(encoder.model[0].auto_model).__module__
    assert folder._code(trust_remote_code) == [imported.split(".")[0]] == [attention_longembed.__package__]


def test_code_in_another_repository_is_read_where_it_lies(tiny_sentence_transformer, tmp_path, monkeypatch):
    """A model whose `auto_map` names another repository runs that one's code, which no commit of the model names."""
    folder, upstream = tmp_path / "model", tmp_path / "upstream"
    folder.mkdir()
    upstream.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    auto_map = {"AutoModel": "some/code--modeling_other.OtherModel", "AutoConfig": "configuration.OtherConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": auto_map}))
    (upstream / "modeling_other.py").write_text("scale = 1\n")
    asked = []
    monkeypatch.setattr(
        "common.encoders.model_folder.snapshot_download", lambda name, **_: asked.append(name) or str(upstream)
    )
    found = ModelFolder.find(str(folder))
    before = found.computed_by(trust_remote_code=True)
    assert set(asked) == {"some/code"}
    (upstream / "modeling_other.py").write_text("scale = 2\n")
    assert found.computed_by(trust_remote_code=True) != before
    assert found.computed_by() == found.computed_by(trust_remote_code=False) != before  # nothing of it runs
