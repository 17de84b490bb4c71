"""An index that is damaged or foreign, and another model, are refused in one sentence, and stay as they are."""

import json
import shutil

import pytest
import torch

from common.errors import UserError
from retrieval.documents.document import Document
from retrieval.index import identity
from retrieval.index.index import Index
from tests.retrieval.conftest import make_documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_longembed):
    path = tmp_path_factory.mktemp("index") / "index"
    Index.build(path, make_documents(5), str(tiny_longembed), segments="late:16")
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_of(folder):
    (path,) = (folder / "shards").iterdir()
    return path


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "no index": (lambda f: (f / "manifest.json").unlink(), "holds no index: it has no manifest.json"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), "the manifest is damaged"),
    "no fields": (lambda f: edit_manifest(f, shards=[{"name": "x"}]), "the manifest is damaged"),
    "foreign": (lambda f: (f / "manifest.json").write_text("[1]"), "is no manifest of an index of ours"),
    "newer": (lambda f: edit_manifest(f, version=3), "has version 3, and this program reads versions to 2"),
    "cut off": (lambda f: shard_of(f).write_bytes(shard_of(f).read_bytes()[:-9]), "bytes instead of"),
    "no shard": (lambda f: shard_of(f).unlink(), "is missing; copy the index again"),
    "bad shard": (
        lambda f: shard_of(f).write_bytes(b"\xff" * 8 + shard_of(f).read_bytes()[8:]),
        r"\.safetensors: .*header",
    ),
    "bad codec": (lambda f: next((f / "codecs").iterdir()).write_bytes(b"codec"), "codecs.*header"),
}


@pytest.mark.promise("I8")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_index_is_refused(copied, tiny_model, damage):
    spoil, message = DAMAGES[damage]
    spoil(copied)
    before = content(copied)
    with pytest.raises(UserError, match=message) as error:
        Index.open(copied, tiny_model)
    assert "\n" not in str(error.value)
    assert content(copied) == before


@pytest.mark.promise("I8")
def test_another_model_is_refused(copied, tiny_model, tiny_longembed, tiny_sentence_transformer, monkeypatch):
    from modeling_longembed import LongEmbedModel

    index = Index.open(copied)
    assert index.search("river")  # with the model that the manifest names
    before = content(copied)
    other = LongEmbedModel.from_pretrained(tiny_longembed)
    with torch.no_grad():
        other.embeddings.word_embeddings.weight[500] += 1
    for change, what in (
        (lambda: None, "weights"),
        (lambda: other.load_state_dict(tiny_model.state_dict()), None),
        (lambda: other.config.prompts.update(query="find: "), "settings in its config.json"),
    ):
        change()
        if what is None:
            assert Index.open(copied, other).search("river")
            continue
        with pytest.raises(UserError, match=f"was built with the model .* has other {what}; open the index with that"):
            Index.open(copied, other)
    with pytest.raises(UserError, match="is no LongEmbed model"):
        Index.open(copied, str(tiny_sentence_transformer))
    # Code or libraries of other versions are no reason to refuse, unless they give other vectors.
    path = copied / "manifest.json"
    saved = json.loads(path.read_text())
    saved["model"]["computed_by"] = {"code": "of last year"}
    path.write_text(json.dumps(saved))
    assert Index.open(copied, tiny_model)
    monkeypatch.setattr(identity, "PROBE", "some other text")
    with pytest.raises(
        UserError, match=r"by other code or libraries, with which the model gave other vectors \(cosine"
    ):
        Index.open(copied, tiny_model)
    path.write_text(json.dumps(saved | {"model": saved["model"] | {"name": "/nowhere"}}))
    with pytest.raises(UserError, match=r"was built with /nowhere: .*; name the model where it is$"):
        Index.open(copied).search("river")
    assert content(copied).keys() == before.keys()


@pytest.mark.promise("I8")
def test_nothing_to_index_and_documents_of_one_id_are_refused(tmp_path, tiny_model):
    with pytest.raises(UserError, match="there is no document to index"):
        Index.build(tmp_path / "empty", [], tiny_model, token_precision="float32")
    twice = [Document("a", "river"), Document("b", "stone"), Document("a", "night")]
    with pytest.raises(UserError, match="two documents have the id 'a'; give each an id of its own"):
        Index.build(tmp_path / "twice", twice, tiny_model)
    for options, message in (
        ({"segments": "lines"}, "segments 'lines': choose from"),
        ({"parts": []}, r"parts \(none\): choose from vector, tokens, words"),
        ({"token_precision": "int3"}, "token_precision 'int3': choose from float32"),
        ({"token_dim": 8}, "token_dim=8, but this model has no token head"),
    ):
        with pytest.raises(UserError, match=message):
            Index.build(tmp_path / "wrong", [Document("a", "river")], tiny_model, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("I8")
def test_a_folder_with_something_else_is_no_place_for_an_index(tmp_path, tiny_model):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds shards and is no index; name an empty folder or a new one"):
        Index.build(tmp_path, [Document("a", "river")], tiny_model)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "shards" / "mine.txt"]
