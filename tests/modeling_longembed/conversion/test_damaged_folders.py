"""Folders that cannot be converted as they are: refused with a sentence that says what to do, or read anyway."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from modeling_longembed import LongEmbedModel
from tests.modeling_longembed.tiny_checkpoints import VOCAB_SIZE, random_text, save_checkpoint


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "bert", "bert")
    return tmp_path / "bert"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_weights_that_are_a_pointer_or_cut_short(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"):
        weights.write_bytes(damaged)
        with pytest.raises((ValueError, OSError), match=r"are damaged .*git lfs pull") as refused:
            LongEmbedModel.from_encoder(folder)
        assert "\n" not in str(refused.value)


def test_a_tokenizer_with_more_tokens_than_the_table_has_rows(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["brandnew"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"'brandnew' with the number {VOCAB_SIZE}.* only {VOCAB_SIZE} rows"):
        LongEmbedModel.from_encoder(folder)


def test_an_adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ValueError, match=r"is an adapter of org/base, .*merge_and_unload"):
        LongEmbedModel.from_encoder(folder)


@pytest.fixture
def old_layout(folder, tmp_path):
    """A folder as old releases of sentence-transformers saved it."""
    outer = tmp_path / "outer"
    (outer / "1_Pooling").mkdir(parents=True)
    folder.rename(outer / "0_Transformer")
    (outer / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (outer / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(("Transformer", "Pooling"))
    ]
    (outer / "modules.json").write_text(json.dumps(modules))
    (outer / "README.md").write_text("---\nlicense: mit\n---\n")
    return outer


def test_an_encoder_in_a_subfolder_gives_the_vectors_of_sentence_transformers(old_layout, capsys):
    model = LongEmbedModel.from_encoder(old_layout)
    assert (model.config.pooling, model.config.license) == ("cls", "mit")
    assert "cuts texts off after 12 tokens" in capsys.readouterr().out
    texts = [random_text(count, seed=count) for count in range(1, 10)]
    reference = SentenceTransformer(str(old_layout), device="cpu")
    np.testing.assert_allclose(model.encode(texts), reference.encode(texts), atol=1e-5)


def test_an_encoder_in_a_subfolder_with_code_of_its_own_is_refused(old_layout):
    change(old_layout / "0_Transformer" / "config.json", model_type="theirs", auto_map={"AutoConfig": "a.B"})
    with pytest.raises(ValueError, match="runs code of its own"):
        LongEmbedModel.from_encoder(old_layout)


def test_a_subfolder_without_an_encoder(old_layout):
    (old_layout / "0_Transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"Unrecognized model .* config\.json"):
        LongEmbedModel.from_encoder(old_layout)


def test_a_model_with_code_of_its_own_is_refused_without_a_question(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("it asks"))
    change(folder / "config.json", model_type="theirs", auto_map={"AutoConfig": "a.B", "AutoModel": "a.C"})
    with pytest.raises(ValueError, match="runs code of its own") as refused:
        LongEmbedModel.from_encoder(folder)
    assert "trust_remote_code" not in str(refused.value)


def test_roberta_without_a_padding_token(tmp_path):
    save_checkpoint(tmp_path / "roberta", "roberta")
    change(tmp_path / "roberta" / "config.json", pad_token_id=None)
    with pytest.raises(ValueError, match="without pad_token_id"):
        LongEmbedModel.from_encoder(tmp_path / "roberta")


def test_a_card_in_latin_1_and_settings_with_a_byte_order_mark(folder):
    card = "---\nlicense: other # see the file\n---\n# Modèle\n"
    (folder / "README.md").write_bytes(card.encode("latin-1"))
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
    ]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "modules.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(modules).encode())
    model = LongEmbedModel.from_encoder(folder)
    assert model.config.license == "other"
    # Without modules.json it would be the mean, at unit length.
    assert (model.config.pooling, model.config.normalize) == ("cls", False)


def test_the_card_of_the_current_folder_has_its_name(folder, tmp_path, monkeypatch):
    model = LongEmbedModel.from_encoder(folder)
    (tmp_path / "named").mkdir()
    monkeypatch.chdir(tmp_path / "named")
    model.save_pretrained(".")
    assert "\n# named\n" in (tmp_path / "named" / "README.md").read_text()


def test_half_a_character_is_named_by_the_number_of_its_text(folder):
    model = LongEmbedModel.from_encoder(folder)
    with pytest.raises(ValueError, match="text 1 holds half a character"):
        model.encode(["w1 w2", "w1 \ud83d"])
