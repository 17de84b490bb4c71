"""Vectors: those of sentence-transformers, of the model itself, of chunks; each computed once, and whole on disk."""

import os
import signal
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, BertConfig, BertModel, RobertaConfig, RobertaModel

from common.encoders import ChunkEncoder, Encoder, ModelFolder, stream, token_batches
from common.errors import UserError
from common.vector_cache import VectorCache

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly brew tea in large kettles".split()  # noqa: SIM905
texts_of_words = st.lists(st.lists(st.sampled_from(WORDS), max_size=150).map(" ".join), min_size=1, max_size=6)


def random_texts(count: int, longest: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, longest))) for _ in range(count)]


@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("prompt_type", [PromptType.query, PromptType.document])
def test_one_vector_a_text_equals_sentence_transformers(tiny_model, max_length, prompt_type):
    encoder = Encoder(ModelFolder.find(str(tiny_model)), max_length, batch_tokens=200)
    reference = SentenceTransformer(str(tiny_model), device="cpu")
    reference.max_seq_length = max_length or 64
    texts = random_texts(12, 100)
    encode = reference.encode_query if prompt_type == PromptType.query else reference.encode_document
    vectors = np.concatenate(encoder(texts, prompt_type))
    np.testing.assert_allclose(vectors, encode(texts), atol=1e-6)


@hypothesis.settings(max_examples=15, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(texts=texts_of_words, size=st.sampled_from([8, 31, 64]))
def test_the_sum_of_chunks_is_the_sum_of_all_token_vectors(tiny_model, tokenizer, texts, size):
    """By hand: cut the ids, put [CLS] and [SEP] around each piece, add up BERT's last hidden states."""
    bert = BertModel.from_pretrained(tiny_model).eval()
    rows = ChunkEncoder(ModelFolder.find(str(tiny_model)), size, batch_tokens=300)(texts, PromptType.document)
    for text, matrix in zip(texts, rows, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [ids[i : i + size - 2] for i in range(0, max(1, len(ids)), size - 2)]
        assert len(matrix) == len(pieces)
        for piece, row in zip(pieces, matrix, strict=True):
            with torch.no_grad():
                states = bert(
                    torch.tensor([[tokenizer.cls_token_id, *piece, tokenizer.sep_token_id]])
                ).last_hidden_state
            np.testing.assert_allclose(row, states[0].sum(0), rtol=1e-4, atol=1e-3)


def test_a_prompt_is_in_front_of_every_chunk_and_within_its_size(tiny_model, tokenizer):
    encoder = ChunkEncoder(ModelFolder.find(str(tiny_model)), 16)
    prompt, text = "ask: ", " ".join(WORDS * 3)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = 16 - 2 - len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    by_hand = [prompt + tokenizer.decode(ids[i : i + room]) for i in range(0, len(ids), room)]
    unprompted = Encoder(ModelFolder.find(str(tiny_model)), 64)(by_hand, PromptType.document)
    (rows,) = encoder([text], PromptType.query)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, np.concatenate(unprompted), atol=1e-5)


def test_a_model_with_its_own_encode_does_it_itself(tiny_longembed):
    reference = AutoModel.from_pretrained(tiny_longembed).eval()
    texts = random_texts(8, 120)
    encoder = Encoder(ModelFolder.find(str(tiny_longembed)), batch_tokens=300)
    assert encoder.own is not None
    for prompt_type in (PromptType.query, PromptType.document):
        expected = reference.encode(texts, prompt_name=prompt_type.value, precision="float32")
        np.testing.assert_allclose(np.concatenate(encoder(texts, prompt_type)), expected, atol=1e-5)


def test_max_length_cuts_what_a_model_with_its_own_encode_reads(tiny_longembed, tokenizer):
    encoder = Encoder(ModelFolder.find(str(tiny_longembed)), 20)
    texts = random_texts(6, 120)
    ids = [tokenizer(text, truncation=True, max_length=20, add_special_tokens=True)["input_ids"] for text in texts]
    cut = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    assert any(len(row) == 20 for row in ids)
    expected = AutoModel.from_pretrained(tiny_longembed).eval().encode(cut, prompt_name="document", precision="float32")
    np.testing.assert_allclose(np.concatenate(encoder(texts, PromptType.document)), expected, atol=1e-5)


def test_a_length_beyond_the_context_is_refused(tiny_model, tiny_longembed, tokenizer, tmp_path):
    # RoBERTa has two rows more than positions: its table of 66 reads 64 tokens.
    RobertaModel(
        RobertaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=66,
        )
    ).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    for folder, context in ((tiny_model, 64), (tiny_longembed, 256), (tmp_path / "roberta", 64)):
        found = ModelFolder.find(str(folder))
        assert Encoder(found, context).max_length == context
        with pytest.raises(UserError, match=f"{context + 1} tokens are more than the context .* at most {context}"):
            Encoder(found, context + 1)


@hypothesis.given(lengths=st.lists(st.integers(1, 50), max_size=60), budget=st.integers(1, 120))
def test_batches_hold_every_text_once_and_keep_the_budget(lengths, budget):
    batches = list(token_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


class Counting:
    """An encoder that counts what it is asked; a text's matrix is its length and its number of spaces."""

    def __init__(self, identity: str = "a"):
        self.identity, self.batch_tokens, self.asked = identity, 8, []
        self.prompts: dict[str, str | None] = {}

    def __call__(self, texts, prompt_type):
        self.asked += texts
        return [np.array([[len(text), text.count(" ")]], dtype=np.float32) for text in texts]


def test_each_text_is_encoded_once_for_all_runs(tmp_path):
    texts = [*random_texts(40, 30), "twice", "twice"]
    for run, encoder in enumerate((Counting(), Counting(), Counting("another"))):
        found = {}
        for indices, matrices in stream(texts, encoder, None, VectorCache(tmp_path / "v.sqlite"), "texts"):
            found.update(zip(indices, matrices, strict=True))
        assert [tuple(found[i][0]) for i in range(len(texts))] == [(len(t), t.count(" ")) for t in texts]
        assert sorted(encoder.asked) == ([] if run == 1 else sorted(set(texts)))


def test_the_kind_of_text_is_part_of_the_key(tmp_path):
    cache, encoder = VectorCache(tmp_path / "v.sqlite"), Counting()
    for prompt_type in (PromptType.query, PromptType.document, PromptType.query):
        list(stream(["text"], encoder, prompt_type, cache, "texts"))
    assert encoder.asked == ["text", "text"]


def test_only_a_window_of_texts_is_in_memory():
    """Texts come from a sequence that makes them when asked and tells how many live at a time."""
    import gc
    import weakref

    living: weakref.WeakSet = weakref.WeakSet()

    class Text(str):
        __slots__ = ("__weakref__",)

    class Lazy:
        most = 0

        def __len__(self):
            return 200

        def __getitem__(self, i):
            if i >= len(self):
                raise IndexError(i)
            text = Text(f"{i} " * 20)
            living.add(text)
            gc.collect(0)
            Lazy.most = max(Lazy.most, len(living))
            return text

    encoder = Counting()
    encoder.__class__ = type(
        "Forgetting", (Counting,), {"__call__": lambda self, texts, kind: [np.zeros((1, 2))] * len(texts)}
    )
    for _ in stream(Lazy(), encoder, None, VectorCache(":memory:"), "texts"):
        pass
    assert Lazy.most < 20  # a window of 8 * 16 characters holds one or two


def test_the_cache_returns_what_was_put_and_only_that(tmp_path):
    cache = VectorCache(tmp_path / "v.sqlite")
    matrices = {i.to_bytes(2, "big"): np.random.default_rng(i).standard_normal((1 + i % 3, 4)) for i in range(1200)}
    cache.put(matrices)
    found = VectorCache(tmp_path / "v.sqlite").get([*matrices, b"absent"])
    assert found.keys() == matrices.keys()
    for key, matrix in matrices.items():
        np.testing.assert_array_equal(found[key], matrix.astype(np.float32))


def test_a_put_that_is_killed_leaves_nothing_or_all(tmp_path):
    path = tmp_path / "v.sqlite"
    script = (
        "import sys, numpy as np\n"
        "from common.vector_cache import VectorCache\n"
        "cache = VectorCache(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "for n in range(10**9):\n"
        "    cache.put({b'%d-%d' % (n, i): np.full((2, 64), n, np.float32) for i in range(200)})\n"
    )
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            while not VectorCache(path).get([b"2-0"]):
                pass
            os.kill(process.pid, signal.SIGKILL)
    cache = VectorCache(path)
    put = 0
    for n in range(10_000):
        found = cache.get([b"%d-%d" % (n, i) for i in range(200)])
        assert len(found) in (0, 200)
        assert all((matrix == n).all() for matrix in found.values())
        put += bool(found)
        if not found:
            break
    assert put >= 3


def test_a_file_that_is_no_cache_is_told(tmp_path):
    (tmp_path / "v.sqlite").write_text("not a database" * 100)
    with pytest.raises(UserError, match=r"cannot use .*v.sqlite as the cache"):
        VectorCache(tmp_path / "v.sqlite")


def test_a_cache_that_cannot_be_made_or_read_is_told(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot make .*file, the folder of the cache of vectors .*; name another"):
        VectorCache(tmp_path / "file" / "v.sqlite")
    keys = [bytes([n]) for n in range(100)]
    VectorCache(tmp_path / "v.sqlite").put({key: np.ones((1, 200)) for key in keys})
    with open(tmp_path / "v.sqlite", "r+b") as file:
        file.seek(4096)  # behind the first page, which says what the file holds
        file.write(b"\xff" * 8192)
    for read in ("get", "rows"):
        with pytest.raises(UserError, match=r"cannot read .*v.sqlite, the cache .*malformed.*; delete it"):
            getattr(VectorCache(tmp_path / "v.sqlite"), read)(keys)


def test_a_folder_that_is_no_model_is_told(tmp_path, tiny_model):
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


def test_the_revision_of_a_folder_changes_with_what_shapes_a_vector(tiny_model, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    original = ModelFolder.find(str(tiny_model)).revision
    assert ModelFolder.find(str(copy)).revision == original
    (copy / "README.md").write_text("another card")
    assert ModelFolder.find(str(copy)).revision == original
    settings = copy / "config.json"
    settings.write_text(settings.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-5'))
    assert ModelFolder.find(str(copy)).revision != original
