"""A stream of texts gives the vectors of `encode`, in order, and holds two windows of it at a time."""

import itertools
import threading

import numpy as np
import pytest
import torch
from transformers.utils import logging

from modeling_longembed import LongEmbedModel
from modeling_longembed import encoding_longembed as encoding
from modeling_longembed.encoding_file_longembed import VectorFile
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, random_text, save_checkpoint

LIMIT = 3 * CONTEXT
TEXTS = [random_text(n % 50, seed=n) for n in range(60)]
SMALL = {"batch_tokens": 60, "precision": "float32"}  # windows of 3840 characters


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    save_checkpoint(folder, "bert")
    return LongEmbedModel.from_encoder(folder, LIMIT, prompts={"query": "w1 w2 ", "document": "w3 "})


@pytest.fixture(scope="module")
def expected(model):
    return np.stack([model.encode(text, precision="float32") for text in TEXTS])


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of at most 7 texts."""
    monkeypatch.setattr(encoding, "TEXTS_PER_WINDOW", 7)


def counted(texts, read: list):
    for text in texts:
        read.append(text)
        yield text


def test_a_stream_gives_the_vectors_of_encode_in_order(model, expected, small_windows):
    np.testing.assert_allclose(np.stack([*model.encode_stream(TEXTS, **SMALL)]), expected, atol=1e-6)
    np.testing.assert_allclose(model.encode(iter(TEXTS), **SMALL), expected, atol=1e-6)
    choices = {"prompt_name": "query", "truncate_dim": 8, "normalize": False, **SMALL}
    np.testing.assert_allclose(
        torch.stack([*model.encode_stream(iter(TEXTS), output="torch", **choices)]), model.encode(TEXTS, **choices)
    )
    passages = [*model.encode_stream(TEXTS, late_chunk_tokens=9, **SMALL)]
    for ours, alone in zip(passages, model.encode(TEXTS, late_chunk_tokens=9, precision="float32"), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-6)
    assert [*model.encode_stream([])] == []


def test_vectors_come_while_texts_are_read(model, small_windows):
    """Also of an endless iterable; two windows are read ahead, and closing ends the thread."""
    read: list[str] = []
    stream = model.encode_stream(counted(itertools.cycle(TEXTS), read), **SMALL)
    assert not read
    for number in range(30):
        next(stream)
        assert len(read) <= (number // 7 + 2) * 7
    stream.close()
    before = len(read)
    assert next(stream, None) is None
    assert len(read) == before


def test_a_window_is_bounded_in_characters_and_in_texts(small_windows):
    texts = [*(["x" * 10] * 20), "y" * 1000, "z" * 95, "z" * 5, "z"]
    windows = [*encoding.divide_into_windows(iter(texts), 100)]
    assert [*itertools.chain(*windows)] == texts
    assert [len(window) for window in windows] == [7, 7, 7, 2, 1]


def test_errors_reach_the_caller_after_what_came_before(model, expected, small_windows):
    def failing():
        yield from TEXTS[:20]
        raise OSError("the disk is gone")

    class Broken(Exception):
        pass

    def broken(*args, **kwargs):
        raise Broken

    for texts, error, message in (
        (failing(), OSError, "the disk is gone"),
        ([*TEXTS[:16], None, "w1"], ValueError, "encode: text 16 is a NoneType, not a string"),
    ):
        seen = []
        with pytest.raises(error, match=message):
            seen.extend(model.encode_stream(texts, **SMALL))
        with pytest.raises(error, match=message):
            for vector in model.encode_stream(failing() if error is OSError else texts, **SMALL):
                seen.append(vector)
        assert len(seen) in (14, 28)
        np.testing.assert_allclose(np.stack(seen[-14:]), expected[:14], atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "tokenize_beginnings", broken)  # in the thread
        with pytest.raises(Broken):
            next(model.encode_stream(TEXTS))
    with pytest.raises(ValueError, match="text 40 is longer than the context"):
        model.encode([*TEXTS[:40], random_text(2 * LIMIT)], overflow="error", **SMALL)
    with pytest.raises(ValueError, match="prompt_name='title'"):
        model.encode_stream(TEXTS, prompt_name="title")  # before anything is read
    with pytest.raises(ValueError, match="a stream takes several texts, and this is one string"):
        model.encode_stream("w1")
    for encode in (model.encode_stream, model.encode):
        with pytest.raises(ValueError, match=r"^encode: output='list'; choose from 'numpy', 'torch'$"):
            encode(TEXTS, output="list")


def test_the_model_may_train_between_two_vectors(model, expected, small_windows):
    found = []
    for vector in model.encode_stream(TEXTS[:20], **SMALL):
        model.train()
        found.append(vector)
    assert model.training
    model.eval()
    np.testing.assert_allclose(np.stack(found), expected[:20], atol=1e-6)


def test_what_is_cut_off_is_said_once(model, small_windows, caplog):
    model.encode([random_text(2 * LIMIT), *TEXTS[:20], random_text(3 * LIMIT)], **SMALL)
    (record,) = caplog.records
    assert f"2 of 22 texts are longer than the context of {LIMIT} tokens" in record.message


@pytest.mark.parametrize("show", [None, True, False])
@pytest.mark.parametrize("bars", [True, False])
def test_progress_counts_the_texts_that_are_done(show, bars, model, expected, small_windows, capsys):
    logging.enable_progress_bar() if bars else logging.disable_progress_bar()
    try:
        found = model.encode(TEXTS[:40], show_progress_bar=show, **SMALL)
    finally:
        logging.enable_progress_bar()
    np.testing.assert_allclose(found, expected[:40], atol=1e-6)
    assert ("40/40" in capsys.readouterr().err) == (bars and show is not False)


# --- into a file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 60])
def test_the_file_is_numpys_and_is_read_from_the_disk(model, expected, small_windows, tmp_path, count):
    path = tmp_path / "vectors.npy"
    path.write_text("old")
    vectors = model.encode(iter(TEXTS[:count]), output_file=path, **SMALL)
    loaded = np.load(path, mmap_mode="r")
    assert loaded.shape == (count, 32)
    np.testing.assert_array_equal(loaded, vectors)
    np.testing.assert_allclose(loaded, expected[:count], atol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["vectors.npy"]
    narrow = model.encode(TEXTS[:count], output_file=str(path), output="torch", truncate_dim=5, **SMALL)
    assert torch.equal(narrow, torch.from_numpy(np.load(path)))
    assert narrow.shape == (count, 5)


def test_texts_for_a_file_are_read_as_for_a_stream(model, small_windows, tmp_path, monkeypatch):
    """At most two windows ahead of what is in the file."""
    read, written, write = [], [], VectorFile.write

    def checked(file, vectors):
        assert len(read) <= file.count + 2 * 7
        written.append(len(vectors))
        write(file, vectors)

    monkeypatch.setattr(VectorFile, "write", checked)
    model.encode(counted(TEXTS, read), output_file=tmp_path / "vectors.npy", **SMALL)
    assert read == TEXTS
    assert sum(written) == len(TEXTS)
    assert max(written) <= 7


@pytest.mark.parametrize("count", [2, 4000])  # buffered to the end, and written before
def test_a_full_disk_leaves_the_old_file_and_nothing_else(count, tmp_path):
    resource, path = pytest.importorskip("resource"), tmp_path / "vectors.npy"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match="File too large"):  # the error of a limit, which comes where that of a disk does
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
            with VectorFile(path, 32) as file:
                file.write(torch.ones(count, 32))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_place_that_is_taken_meanwhile_leaves_nothing_else(tmp_path):
    path = tmp_path / "vectors.npy"
    with pytest.raises(IsADirectoryError), VectorFile(path, 2):
        path.mkdir()
    assert [*tmp_path.iterdir()] == [path]


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "vectors.npy"
    with VectorFile(path, 2) as one:
        with VectorFile(path, 2) as other:
            one.write(torch.ones(3, 2))
            other.write(torch.zeros(1, 2))
        np.testing.assert_array_equal(np.load(path), np.zeros((1, 2)))
    np.testing.assert_array_equal(np.load(path), np.ones((3, 2)))


def test_a_failure_leaves_the_old_file_and_nothing_else(model, small_windows, tmp_path):
    path = tmp_path / "vectors.npy"
    path.write_text("old")
    with pytest.raises(ValueError, match="text 30 is a int"):
        model.encode([*TEXTS[:30], 7], output_file=path, **SMALL)
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(FileNotFoundError):
        model.encode(TEXTS, output_file=tmp_path / "missing" / "vectors.npy")


@pytest.mark.parametrize(("texts", "choices"), [("w1", {}), (["w1"], {"late_chunk_tokens": 4})])
def test_a_file_takes_one_vector_for_each_of_several_texts(model, tmp_path, texts, choices):
    with pytest.raises(ValueError, match="output_file takes one vector for each of several texts"):
        model.encode(texts, output_file=tmp_path / "vectors.npy", **choices)
    assert not [*tmp_path.iterdir()]
