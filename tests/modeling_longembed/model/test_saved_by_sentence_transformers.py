"""A fine-tune with sentence-transformers keeps what it was told: prompts, default prompt, similarity and modules."""

import json

import numpy as np
import pytest
import torch

from modeling_longembed import LongEmbedModel
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, random_text, save_checkpoint

st = pytest.importorskip("sentence_transformers")

TEXTS = [random_text(n, seed=n) for n in (20, 3, 9, 31)]
OURS = {"query": "w1 w2 ", "document": "w3 "}
THEIRS = {"query": "w7 ", "document": "", "title": "w9 w9 "}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of ours, which sentence-transformers loads."""
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(folder / "bert", "bert")
    LongEmbedModel.from_encoder(folder / "bert", prompts=OURS).save_pretrained(folder / "ours")
    return folder / "ours"


def load(folder, **settings) -> "st.SentenceTransformer":
    return st.SentenceTransformer(str(folder), device="cpu", trust_remote_code=True, **settings)


def change_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(1.5)


def train_with_its_trainer(model, output_dir) -> None:
    """Two steps of sentence-transformers' own trainer, with a checkpoint after each."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    arguments = st.SentenceTransformerTrainingArguments(
        str(output_dir), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    loss = st.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    st.SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss).train()


def build(published) -> "st.SentenceTransformer":
    """Return a model of which nothing is as in our folder."""
    settings = {"prompts": THEIRS, "default_prompt_name": "title", "similarity_fn_name": "dot", "truncate_dim": 24}
    model = load(published, **settings)
    model.max_seq_length = 16
    model.append(st.sentence_transformer.modules.Dense(32, 28, activation_function=torch.nn.Tanh()))
    return model


def assert_same(folder, model) -> None:
    again = load(folder)
    assert again.prompts == THEIRS
    assert (again.default_prompt_name, again.similarity_fn_name, again.truncate_dim) == ("title", "dot", 24)
    assert again.max_seq_length == 16
    assert [type(module).__name__ for module in again] == [type(module).__name__ for module in model]
    for way in ("encode", "encode_query", "encode_document"):
        np.testing.assert_allclose(getattr(again, way)(TEXTS), getattr(model, way)(TEXTS), atol=1e-6)
    # The encoder alone puts the same prompts before texts.
    assert LongEmbedModel.from_pretrained(folder).config.prompts == THEIRS
    assert (folder / "modeling_longembed.py").exists()


def test_what_it_saves_loads_as_what_it_was(published, tmp_path):
    """Saved by `save`, and by `save_pretrained` over a folder of ours."""
    model = build(published)
    model.save(str(tmp_path / "saved"))
    assert_same(tmp_path / "saved", model)
    LongEmbedModel.from_pretrained(published).save_pretrained(tmp_path / "over")
    model.save_pretrained(str(tmp_path / "over"), create_model_card=False)
    assert_same(tmp_path / "over", model)


@pytest.mark.slow
def test_checkpoints_of_its_trainer_load_as_what_they_were(published, tmp_path):
    model = build(published)
    train_with_its_trainer(model, tmp_path)
    assert_same(tmp_path / "checkpoint-2", model)


def test_the_encoder_alone_adopts_what_its_config_can_name_and_says_what_it_cannot(published, tmp_path, caplog):
    pooling = st.sentence_transformer.modules.Pooling(32, "lasttoken")
    settings = {"prompts": THEIRS, "default_prompt_name": "title", "similarity_fn_name": "dot"}
    model = st.SentenceTransformer(modules=[load(published)[0], pooling], device="cpu", **settings)
    model.save(str(tmp_path / "named"))
    assert not [record for record in caplog.records if not record.name.startswith("sentence_transformers")]
    encoder = LongEmbedModel.from_pretrained(tmp_path / "named")
    assert encoder.config.similarity_fn_name == "dot"
    for prompt_name in (None, "query", "title"):
        theirs = model.encode(TEXTS, prompt_name=prompt_name)
        np.testing.assert_allclose(
            encoder.encode(TEXTS, prompt_name=prompt_name, precision="float32"), theirs, atol=1e-5
        )
    build(published).save(str(tmp_path / "not named"))
    assert "does not know of Dense, truncate_dim=24; load this folder with SentenceTransformer" in caplog.text


def test_saving_leaves_the_model_what_it_was(published, tmp_path):
    """What is read of the encoder afterwards, and a save of its own, are of its own settings."""
    model = build(published)
    encoder = model[0].auto_model
    before, vectors = encoder.config.to_dict(), encoder.encode(TEXTS, prompt_name="query", precision="float32")
    for folder in ("one", "two"):
        model.save(str(tmp_path / folder))
        assert encoder.config.to_dict() == before
    np.testing.assert_array_equal(encoder.encode(TEXTS, prompt_name="query", precision="float32"), vectors)
    assert LongEmbedModel.from_pretrained(tmp_path / "one").config.prompts == THEIRS
    encoder.save_pretrained(tmp_path / "own")
    assert LongEmbedModel.from_pretrained(tmp_path / "own").config.prompts == OURS


def test_another_encoder_that_is_saved_meanwhile_keeps_its_settings(published, tmp_path):
    """Such as one that a later module has beside the first: it is saved as by any other caller."""
    model, other = load(published, prompts=THEIRS), LongEmbedModel.from_pretrained(published)

    class WithAnother(st.sentence_transformer.modules.Normalize):
        def save(self, folder, *arguments, **options):
            other.save_pretrained(tmp_path / "other")
            super().save(folder, *arguments, **options)

    model.append(WithAnother())
    model.save(str(tmp_path / "saved"))
    assert LongEmbedModel.from_pretrained(tmp_path / "saved").config.prompts == THEIRS
    assert LongEmbedModel.from_pretrained(tmp_path / "other").config.prompts == OURS
    assert (tmp_path / "other" / "modules.json").exists()


def test_a_fine_tune_without_new_settings_equals_the_encoder_alone(published, tmp_path):
    model = load(published)
    change_weights(model[0].auto_model)
    model.save(str(tmp_path / "tuned"))
    encoder = LongEmbedModel.from_pretrained(tmp_path / "tuned")
    for name in OURS:
        theirs = getattr(load(tmp_path / "tuned"), f"encode_{name}")(TEXTS)
        np.testing.assert_allclose(theirs, encoder.encode(TEXTS, prompt_name=name, precision="float32"), atol=1e-6)
        assert np.abs(theirs - getattr(load(published), f"encode_{name}")(TEXTS)).max() > 1e-3


def test_our_own_save_writes_all_files_again_also_over_theirs(published, tmp_path):
    load(published, prompts=THEIRS, similarity_fn_name="dot").save(str(tmp_path))
    encoder = LongEmbedModel.from_pretrained(tmp_path)
    encoder.config.prompts, encoder.config.similarity_fn_name = OURS, "cosine"
    encoder.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert (settings["prompts"], settings["similarity_fn_name"]) == (OURS, "cosine")
    assert load(tmp_path).max_seq_length == CONTEXT
