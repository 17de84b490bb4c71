"""Embedding teachers: the vectors of the encoders themselves, computed once, also after an interruption."""

import json
import shutil
import sqlite3

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from common.encoders.encoder import Encoder
from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import random_documents, tiny_config, write_jsonl
from training import distillation
from training.data.pairs.batches import PairBatch
from training.data.sources import TEXTS, Source, read_sources
from training.teachers.embedding_teachers import Teacher

pytestmark = pytest.mark.promise("D3")


@pytest.fixture(scope="module")
def documents_source(documents_file) -> Source:
    return read_sources([str(documents_file)], TEXTS)[0]


@pytest.fixture(scope="module")
def texts(documents_source) -> list[str]:
    return documents_source.texts(list(range(len(documents_source.rows))))[0]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The texts that encoders have embedded during the test."""
    asked: list[str] = []
    encode = Encoder.__call__

    def counting(self, texts, prompt_type):
        asked.extend(texts)
        return encode(self, texts, prompt_type)

    monkeypatch.setattr(Encoder, "__call__", counting)
    return asked


def teacher(name: str, cache, **options) -> Teacher:
    return Teacher("structural_teacher", name, cache, batch_tokens=100, **options)


def read(reading: Teacher, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    return reading.read(PairBatch([], torch.empty(0), len(texts), 0, (), 0, texts=[texts]))


@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_and_windows_are_the_models(model_folder, documents_source, texts, tmp_path, normalize):
    """Also if the cache already holds vectors of the other setting."""
    teacher(f"truncate:{model_folder}:24", tmp_path / "cache", normalize=not normalize).read_all([documents_source])
    truncating = teacher(f"truncate:{model_folder}:24", tmp_path / "cache", normalize=normalize)
    truncating.read_all([documents_source])
    vectors, inside = read(truncating, texts)
    model, tokenizer = AutoModel.from_pretrained(model_folder).eval(), AutoTokenizer.from_pretrained(model_folder)
    lengths = []
    for text, vector in zip(texts, vectors, strict=True):
        ids = tokenizer(text)["input_ids"]
        lengths.append(len(ids))
        cut = torch.tensor([ids if len(ids) <= 24 else [*ids[:23], ids[-1]]])
        with torch.no_grad():
            pooled = model(cut, attention_mask=torch.ones_like(cut)).pooler_output[0]
        pooled = F.normalize(pooled, dim=0) if normalize else pooled
        torch.testing.assert_close(vector, pooled, atol=1e-5, rtol=0)
    assert inside.tolist() == [length <= 24 for length in lengths]
    assert 0 < inside.sum() < len(texts)


@pytest.mark.parametrize(("words", "inside"), [(21, True), (22, True), (23, False)])
def test_a_text_as_long_as_the_window_is_read_to_its_end(model_folder, tmp_path, words, inside):
    """Two of its 24 tokens are special."""
    file = write_jsonl(tmp_path / "one.jsonl", [{"text": " ".join(["river"] * words)}])
    truncating = teacher(f"truncate:{model_folder}:24", tmp_path / "cache")
    truncating.read_all(read_sources([str(file)], TEXTS))
    assert read(truncating, [" ".join(["river"] * words)])[1].tolist() == [inside]


@pytest.mark.parametrize(("words", "inside"), [(125, True), (126, False)])
def test_the_prompt_takes_room_in_the_window(word_tokenizer, tmp_path, words, inside):
    """Of 128 tokens, 2 are special and 1 is the prompt. A text was read to its end if its last word has an effect."""
    LongEmbedModel(tiny_config(prompts={"document": "river "})).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    texts = [" ".join(["stone"] * (words - 1) + [last]) for last in ("stone", "cloud")]
    file = write_jsonl(tmp_path / "two.jsonl", [{"text": text} for text in texts])
    reading = teacher(str(tmp_path), tmp_path / "cache")
    reading.read_all(read_sources([str(file)], TEXTS))
    vectors, found = read(reading, texts)
    assert found.tolist() == [inside, inside]
    assert torch.equal(vectors[0], vectors[1]) != inside


@pytest.mark.parametrize("prompt", ["river ", "river " * 60])
def test_a_text_beyond_the_window_is_not_tokenised_to_its_end_to_say_so(word_tokenizer, tmp_path, tokenized, prompt):
    """Only the encoder itself does that; also where the prompt leaves no room for any text."""
    LongEmbedModel(tiny_config(prompts={"document": prompt})).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    texts = ["stone", " ".join(["stone"] * 5000)]
    file = write_jsonl(tmp_path / "two.jsonl", [{"text": text} for text in texts])
    reading = teacher(f"truncate:{tmp_path}:40", tmp_path / "cache")
    reading.read_all(read_sources([str(file)], TEXTS))
    whole = [text for call in tokenized for text in call if text.endswith(texts[1])]
    assert whole == [prompt + texts[1]]
    assert read(reading, texts)[1].tolist() == [len(prompt) < 40, False]


def test_a_teacher_computes_in_the_precision_asked_for(documents_source, texts, word_tokenizer, tmp_path):
    """Large weights make the rounding visible."""
    torch.manual_seed(0)
    LongEmbedModel(tiny_config(initializer_range=0.3)).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    model, found = AutoModel.from_pretrained(tmp_path).eval(), {}
    for precision in ("float32", "bfloat16"):
        reading = teacher(str(tmp_path), tmp_path / "cache", precision=precision)
        reading.read_all([documents_source])
        found[precision] = read(reading, texts)[0]
        expected = model.encode(texts, prompt_name="document", precision=precision, output="torch")
        torch.testing.assert_close(found[precision], expected, atol=1e-4, rtol=0)
    assert (found["float32"] - found["bfloat16"]).abs().max() > 1e-3


def test_chunks_have_no_window(model_folder, documents_source, texts, tmp_path):
    chunking = teacher(f"chunk-mean:{model_folder}:16", tmp_path / "cache")
    chunking.read_all([documents_source])
    vectors, inside = read(chunking, texts)
    assert inside.all()
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(texts)))
    with pytest.raises(UserError, match="a direction without a length; leave out --no_normalize_teacher"):
        teacher(f"chunk-mean:{model_folder}:16", tmp_path / "cache", normalize=False)


def test_a_mask_that_leaves_nothing_is_refused_and_another_says_what_it_leaves(
    train_script, texts, word_tokenizer, model_folder, tmp_path, capsys
):
    lengths = sorted(len(word_tokenizer(text)["input_ids"]) for text in texts)
    assert lengths[0] > 8
    assert lengths[3] < lengths[4]
    teachers = "--structural_mask --structural_teacher truncate:{}:{} "
    with pytest.raises(UserError, match=r"reads none of the texts to its end \(its window is 8 tokens\)"):
        train_script("distillation", teachers.format(model_folder, 8))
    train_script("distillation", teachers.format(model_folder, lengths[3]))
    assert f"documents.jsonl: --structural_mask leaves {4 / len(texts):.1%} of the texts" in capsys.readouterr().out


def test_a_text_is_read_once_and_only_by_the_teacher_that_has_not(
    model_folder, documents_source, texts, calls, tmp_path
):
    for name in (f"truncate:{model_folder}:24", f"truncate:{model_folder}:40"):
        expected = None
        for _ in range(2):
            reading = teacher(name, tmp_path / "cache")
            reading.read_all([documents_source])
            found = read(reading, texts)[0]
            assert expected is None or torch.equal(found, expected)
            expected = found
        assert sorted(calls) == sorted(set(texts))
        calls.clear()


def test_other_weights_or_prompts_are_another_teacher(documents_source, texts, word_tokenizer, calls, tmp_path):
    for number, changes in enumerate(({}, {"prompts": {"document": "river "}}, {"initializer_range": 0.1})):
        folder = tmp_path / str(number)
        torch.manual_seed(0)
        LongEmbedModel(tiny_config(**changes)).save_pretrained(folder)
        word_tokenizer.save_pretrained(folder)
        teacher(str(folder), tmp_path / "cache").read_all([documents_source])
        assert len(calls) == len(set(texts))
        calls.clear()


def test_an_interrupted_cache_goes_on(model_folder, documents_source, texts, calls, tmp_path, monkeypatch):
    name, put, puts = f"truncate:{model_folder}:24", VectorCache.put, []

    def interrupted(self, matrices):
        if puts:
            raise KeyboardInterrupt
        puts.append(len(matrices))
        put(self, matrices)

    with monkeypatch.context() as patch:
        patch.setattr(VectorCache, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            teacher(name, tmp_path / "cache").read_all([documents_source])
    calls.clear()
    teacher(name, tmp_path / "cache").read_all([documents_source])
    assert len(calls) == len(set(texts)) - puts[0] > 0


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path):
    cache = VectorCache(tmp_path / "cache")
    rows = {bytes([n]): np.ones((1, 1000), np.float32) for n in range(20)}
    cache.put({b"first": rows[b"\0"]})
    cache._connection.execute("PRAGMA max_page_count = 4")
    with pytest.raises(UserError, match=r"database or disk is full.*what it holds is kept"):
        cache.put(rows)
    assert list(cache.get([b"first", *rows])) == [b"first"]


def test_mistakes_are_sentences(model_folder, documents_source, tmp_path):
    (tmp_path / "no cache").write_text("something else, longer than the head of a database " * 9)
    for name, cache, complaint in (
        ("/nowhere/model", "cache", "--structural_teacher /nowhere/model: unknown model /nowhere/model"),
        ("bm25", "cache", "--structural_teacher bm25: .* does not give one vector a text"),
        (f"chunk-mean:{model_folder}:x", "cache", "write chunk-mean:PATH:N"),
        ("paragraph-vector:/nowhere", "cache", "/nowhere: is no folder of training/paragraph_vector.py|needs gensim"),
        (str(model_folder), "no cache", "as the cache of vectors .*; delete it"),
    ):
        with pytest.raises(UserError, match=complaint) as caught:
            teacher(name, tmp_path / cache).read_all([documents_source])
        assert "\n" not in str(caught.value)
    reading = teacher(str(model_folder), tmp_path / "cache")
    reading.read_all([documents_source])
    (tmp_path / "cache").unlink()
    with pytest.raises(UserError, match="1 vectors or scores are gone; start the same command again"):
        read(reading, ["never read"])


def test_a_run_reads_what_another_has_left(train_script, model_folder, calls, tmp_path):
    shared = f"--teacher_cache {tmp_path}/shared"
    train_script("distillation", shared)
    first = len(calls)
    assert first
    train_script("distillation", f"{shared} --seed 7 --output_dir {tmp_path}/again")
    assert len(calls) == first
    with sqlite3.connect(tmp_path / "shared") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_student_may_begin_with_some_layers(train_script, model_folder, tmp_path):
    train_script("distillation", "--keep_layers 1 --learning_rate 1e-30 --weight_decay 0 --max_steps 1")
    given = AutoModel.from_pretrained(model_folder).keep_layers([1]).state_dict()
    final = AutoModel.from_pretrained(tmp_path / "out" / "final").state_dict()
    torch.testing.assert_close(final, given, atol=1e-29, rtol=0)  # AdamW moves by its learning rate
    with pytest.raises(UserError, match=r"^--keep_layers 7: write every_other"):
        train_script("distillation", f"--keep_layers 7 --output_dir {tmp_path}/another")


def test_a_resumed_run_keeps_its_teachers_and_what_they_ask_for(train_script, model_folder, tmp_path):
    """The teacher may have moved; another model under the old name is refused."""
    teachers = [tmp_path / name for name in ("teacher", "moved")]
    for folder in teachers:
        shutil.copytree(model_folder, folder)
    options = "--save_steps 1 --resume_from_checkpoint last --change_settings max_steps "
    options += "--structural_teacher {} --contextual_teacher truncate:{}:24 "
    train_script("distillation", options.format(teachers[0], model_folder) + "--max_steps 1")
    torch.manual_seed(5)
    LongEmbedModel(tiny_config()).save_pretrained(teachers[0])
    given = options.format(teachers[1], model_folder) + "--max_steps 2 "
    for changed, name in (
        (f"--structural_teacher {teachers[0]}", "structural_teacher"),
        ("--structural_loss cosine", "structural_loss"),
        ("--contextual_loss mse", "contextual_loss"),
        ("--structural_weight 0.5", "structural_weight"),
        ("--no_normalize_teacher", "normalize_teacher"),
        ("--text_columns text text", "text_columns"),
    ):
        with pytest.raises(
            UserError, match=f"step-1: was made with .*--{name} .*, now it is .*; use the same"
        ) as caught:
            train_script("distillation", given + changed)
        assert "\n" not in str(caught.value)
    train_script("distillation", given)
    assert (tmp_path / "out" / "checkpoints" / "step-2").is_dir()


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("lengths", ["", "--no_normalize_teacher --no_normalize_student"])
def test_a_student_that_is_its_teacher_has_no_loss(train_script, model_folder, tmp_path, loss, lengths):
    """Teacher and student compute the same vectors, normalised or not."""
    options = f"--model_name_or_path {model_folder} --dropout 0 "
    options += f"--structural_teacher {model_folder} --structural_loss {loss} --contextual_weight 0 --max_length 128 "
    train_script("distillation", f"{options} --max_steps 1 --logging_steps 1 {lengths}")
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["structural_loss"] < 1e-6


def test_the_student_comes_to_its_teacher(word_tokenizer, tmp_path):
    """A student of another width learns, behind its projection, the directions of a chunking teacher."""
    torch.manual_seed(3)
    folders = {"teacher": tiny_config(initializer_range=0.3), "student": tiny_config(hidden_size=24)}
    for name, config in folders.items():
        LongEmbedModel(config).save_pretrained(tmp_path / name)
        word_tokenizer.save_pretrained(tmp_path / name)
    data = write_jsonl(tmp_path / "texts.jsonl", random_documents(60))
    held_out = write_jsonl(tmp_path / "held-out.jsonl", random_documents(20, seed=1))
    options = f"--model_name_or_path {tmp_path}/student --train_data {data} --eval_data {held_out} "
    options += f"--structural_teacher chunk-mean:{tmp_path}/teacher:16 --output_dir {tmp_path}/out --max_steps 60 "
    options += "--per_device_train_batch_size 20 --learning_rate 5e-3 --dataloader_num_workers 0 --eval_steps 3 "
    distillation.main(options.split())
    lines = [line for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines() if "eval_loss" in line]
    losses = [float(line.split('"eval_loss": ')[1].split(",")[0].rstrip("}")) for line in lines]
    assert losses[-1] < 0.6 * losses[0]
    names = AutoModel.from_pretrained(tmp_path / "out" / "final").state_dict()
    assert not [name for name in names if "head" in name]  # the projection stays behind
