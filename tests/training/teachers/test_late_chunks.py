"""Late chunks of a student: their texts are those of its tokens, and their loss that of a loop over `encode`."""

import json

import pytest
import torch
import torch.nn.functional as F

from common.arguments import parse
from common.errors import UserError
from modeling_longembed import LongEmbedModel
from modeling_longembed.encoding_tokens_longembed import special_tokens_around
from tests.training.tiny_training import random_documents, tiny_config, write_jsonl
from training import distillation
from training.data.pairs.batches import PairTokenizer
from training.data.sources import TEXTS, read_sources
from training.teachers.arguments import TeachingArguments
from training.teachers.embedding_teachers import Teacher
from training.teachers.late_chunks import ChunkTeacher, LateChunks
from training.teachers.step import TaughtBatches

pytestmark = pytest.mark.promise("D8")
DOCUMENTS = [row["text"] for row in random_documents(9)]


@pytest.mark.parametrize("size", [1, 7, 16, 200])
@pytest.mark.parametrize(("prompt", "limit"), [("", 128), ("river night ", 128), ("river ", 20)])
def test_a_chunk_has_the_text_of_its_tokens(word_tokenizer, size, prompt, limit):
    """A token is a word here, so that the tokens of a chunk's text are those of the chunk without what is special."""
    tokenize = PairTokenizer(word_tokenizer, limit, limit, {"document": prompt})
    found = LateChunks(tokenize, size)(DOCUMENTS)
    no_text = {*special_tokens_around(word_tokenizer)[0], *special_tokens_around(word_tokenizer)[1]}
    lead = 1 + len(word_tokenizer(prompt, add_special_tokens=False)["input_ids"])
    for text, chunks, row in zip(DOCUMENTS, found, tokenize(DOCUMENTS, "document"), strict=True):
        parts = [range(start, min(start + size, len(row))) for start in range(0, len(row), size)]
        expected = [[row[n] for n in part if n >= lead and row[n] not in no_text] for part in parts]
        assert [word_tokenizer(chunk, add_special_tokens=False)["input_ids"] for chunk in chunks] == expected
        assert all(chunk in text for chunk in chunks)
    assert size > 1 or all({chunks[0], chunks[-1]} == {""} for chunks in found)  # special tokens


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_the_loss_of_a_run_is_the_loop_over_chunks(word_tokenizer, model_folder, tmp_path, loss):
    """Vectors of the student's `encode` of whole texts, in chunks, against the teacher's `encode` of each chunk's text.

    The teacher cuts chunks off, in training and on held-out texts.
    """
    torch.manual_seed(3)
    LongEmbedModel(tiny_config(initializer_range=0.3)).save_pretrained(tmp_path / "teacher")
    word_tokenizer.save_pretrained(tmp_path / "teacher")
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in DOCUMENTS])
    options = f"--model_name_or_path {model_folder} --train_data {data} --eval_data {data} --eval_steps 1 --dropout 0 "
    options += f"--structural_teacher truncate:{tmp_path}/teacher:10 --structural_loss {loss} --structural_weight 0 "
    options += f"--late_chunk_tokens 9 --late_chunk_weight 0.5 --output_dir {tmp_path}/out --max_steps 1 "
    options += "--per_device_train_batch_size 9 --batch_tokens 60 --dataloader_num_workers 0 --learning_rate 1e-30 "
    options += "--weight_decay 0 --logging_steps 1"
    distillation.main(options.split())
    student, teacher = (
        LongEmbedModel.from_pretrained(folder).eval() for folder in (model_folder, tmp_path / "teacher")
    )
    chunks, targets = [], []
    for vectors, text in zip(student.encode(DOCUMENTS, late_chunk_tokens=9, output="torch"), DOCUMENTS, strict=True):
        words = ["[CLS]", *text.split()][:127]
        for place, vector in enumerate(vectors):
            if own := [word for word in words[9 * place : 9 * place + 9] if word != "[CLS]"]:
                chunks.append(vector)
                targets.append(" ".join(own[:8]))
    targets = teacher.encode(targets, output="torch")
    expected = {
        "cosine": 1 - F.cosine_similarity(torch.stack(chunks), targets),
        "mse": F.mse_loss(torch.stack(chunks), targets),
    }
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for name in ("chunk_loss", "eval_chunk_loss"):
        (value,) = [line[name] for line in lines if name in line]
        assert value == pytest.approx(expected[loss].mean().item(), rel=1e-4)
    (value,) = [line["loss"] for line in lines if "loss" in line]
    assert value == pytest.approx(expected[loss].mean().item() / 2, rel=1e-4)


def test_one_chunk_is_the_text_itself(train_script, model_folder, tmp_path):
    """A student that is its teacher has no loss in it."""
    options = f"--model_name_or_path {model_folder} --dropout 0 --structural_teacher {model_folder} --max_length 128 "
    train_script(
        "distillation", options + "--contextual_weight 0 --late_chunk_tokens 128 --max_steps 1 --logging_steps 1"
    )
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["chunk_loss"] < 1e-6 < line["contextual_loss"]


def test_chunks_are_embedded_once(model_folder, word_tokenizer, tmp_path):
    """The heaviest batch, whose texts are cut off, takes vectors that are there."""
    tokenize = PairTokenizer(word_tokenizer, 30, 30, {})
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in DOCUMENTS])
    sources, late_chunks = read_sources([str(file)], TEXTS), LateChunks(tokenize, 8)
    reading = Teacher("structural_teacher", f"truncate:{model_folder}:24", tmp_path / "cache", batch_tokens=100)
    chunks = ChunkTeacher(reading, late_chunks)
    chunks.read_all(sources)
    reading.read_all(sources)  # frees the model
    chunks.teacher.fill(late_chunks.column(sources[0], range(9)))  # all there: the model is not asked again
    batches = TaughtBatches(sources, tokenize, batch_size=4, batch_tokens=40, seed=0, late_chunks=late_chunks)
    for batch in (batches[0], batches.heaviest()):
        lengths = torch.cat([chunk.cu_seq_lens_q.diff() for chunk in batch.chunks]).tolist()
        assert [len(texts) for texts in batch.chunk_texts] == [-(-length // 8) for length in lengths]
        vectors, inside = chunks.read(batch)
        assert len(vectors) == len(inside) == sum(bool(text) for texts in batch.chunk_texts for text in texts)


def test_a_text_without_words_has_no_chunk(model_folder, word_tokenizer, tmp_path):
    tokenize = PairTokenizer(word_tokenizer, 30, 30, {})
    assert LateChunks(tokenize, 8)([" "]) == [[""]]
    reading = Teacher("structural_teacher", str(model_folder), tmp_path / "cache", batch_tokens=100)
    vectors, inside = reading.vectors([])
    assert vectors.shape == (0, 32)
    assert inside.shape == (0,)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            "--structural_loss max_margin_mse --late_chunk_tokens 8",
            "--late_chunk_tokens: applies only with --structural_loss mse or cosine",
        ),
        ("--late_chunk_weight 2", "--late_chunk_weight: applies only with --late_chunk_tokens"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, complaint):
    with pytest.raises(UserError, match=complaint):
        parse(TeachingArguments, argv=f"--structural_teacher t {options}".split())
