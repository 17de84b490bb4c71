"""`encode`: the original model's vector of each text, whatever the batch, the order and the neighbours."""

import itertools
import logging
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import normalize

from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.encoding_longembed import budget_batches
from tests.modeling_longembed.tiny_checkpoints import (
    CONTEXT,
    VOCAB_SIZE,
    random_text,
    randomize,
    save_checkpoint,
    tiny_tokenizer,
)

LIMIT = 3 * CONTEXT
SHORT = [random_text(n, seed=n) for n in (5, 0, 30, 1, 38, 12)]
LONG = [random_text(n, seed=n) for n in (70, 3, LIMIT - 2, 0, 45, 38, 39, 100)]


@pytest.fixture(scope="module")
def bert_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return folder, save_checkpoint(folder, "bert")


@pytest.fixture(scope="module")
def prompted_model(bert_checkpoint):
    return LongEmbedModel.from_encoder(bert_checkpoint[0], LIMIT, prompts={"query": "w1 w2 ", "document": "w3 "})


def random_model(**fields) -> LongEmbedModel:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LongEmbedConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=LIMIT, **sizes, **fields)
    model = randomize(LongEmbedModel(config))
    model.tokenizer = tiny_tokenizer(0)
    return model


def vectors_of(model, texts, **choices) -> torch.Tensor:
    return model.encode(texts, precision="float32", output="torch", **choices)


def one_sentence(error):
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("encode: ")


def test_vectors_are_the_originals_masked_means_in_the_order_of_the_texts(prompted_model, bert_checkpoint):
    _, original = bert_checkpoint
    batch = tiny_tokenizer(0)(SHORT, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = original(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = (states * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(vectors_of(prompted_model, SHORT, normalize=False), means, atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors_of(prompted_model, SHORT), normalize(means), atol=1e-5, rtol=0)


def test_shapes_and_types(prompted_model):
    for output, kind, dtype in (("numpy", np.ndarray, np.float32), ("torch", torch.Tensor, torch.float32)):
        for texts, shape in ((SHORT, (6, 32)), (SHORT[:1], (1, 32)), ("w1", (32,)), ("", (32,)), ([], (0, 32))):
            for precision in ("float32", "bfloat16", "auto"):
                vectors = prompted_model.encode(texts, output=output, precision=precision)
                assert isinstance(vectors, kind)
                assert vectors.dtype == dtype
                assert vectors.shape == shape
    assert prompted_model.encode([], truncate_dim=8).shape == (0, 8)
    assert prompted_model.encode([], late_chunk_tokens=8) == []
    assert not vectors_of(prompted_model, SHORT).requires_grad


def test_every_kind_of_sequence_of_strings(prompted_model):
    expected = vectors_of(prompted_model, SHORT)
    for texts in (tuple(SHORT), np.array(SHORT), iter(SHORT), dict.fromkeys(SHORT), (text for text in SHORT)):
        assert torch.equal(vectors_of(prompted_model, texts), expected)
    assert torch.equal(vectors_of(prompted_model, SHORT[0]), vectors_of(prompted_model, SHORT[:1])[0])


def test_prompts_go_before_the_texts(prompted_model):
    for name, prompt in (("query", "w1 w2 "), ("document", "w3 ")):
        expected = vectors_of(prompted_model, [prompt + text for text in SHORT])
        assert torch.equal(vectors_of(prompted_model, SHORT, prompt_name=name), expected)
    assert not torch.allclose(vectors_of(prompted_model, SHORT, prompt_name="query"), vectors_of(prompted_model, SHORT))


def test_fewer_dimensions_are_the_first_ones_at_unit_length(prompted_model):
    expected = normalize(vectors_of(prompted_model, SHORT, normalize=False)[:, :8])
    torch.testing.assert_close(vectors_of(prompted_model, SHORT, truncate_dim=8), expected)
    raw = vectors_of(prompted_model, SHORT, truncate_dim=8, normalize=False)
    assert torch.equal(raw, vectors_of(prompted_model, SHORT, normalize=False)[:, :8])


# --- neighbours -----------------------------------------------------------------------------------------------------

MODELS = {
    "absolute, repeated": {"position_extension": {"method": "repeat", "original_max_position_embeddings": CONTEXT}},
    "absolute, interpolated": {
        "position_extension": {"method": "interpolate", "original_max_position_embeddings": CONTEXT}
    },
    "rope, dynamic": {
        "position_embedding_type": "rope",
        "position_extension": {"method": "dynamic", "original_max_position_embeddings": CONTEXT},
    },
    "alibi, windows": {
        "position_embedding_type": "alibi",
        "attention_patterns": {"type": "sliding", "window": 5, "global_tokens": 1},
    },
    "blocks, restarting": {
        "attention_patterns": {"type": "block", "size": 16},
        "position_extension": {"method": "restart", "original_max_position_embeddings": CONTEXT},
    },
}


@pytest.mark.promise("P10")
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_a_vector_depends_on_its_own_text_alone(fields):
    model = random_model(**fields)
    together = vectors_of(model, LONG)
    alone = torch.stack([vectors_of(model, text) for text in LONG])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(vectors_of(model, LONG[::-1]).flip(0), together, atol=1e-6, rtol=0)
    for batch_tokens in (1, 41, LIMIT, 200):
        torch.testing.assert_close(vectors_of(model, LONG, batch_tokens=batch_tokens), together, atol=1e-6, rtol=0)


@given(
    lengths=st.lists(st.integers(0, 50), max_size=40),
    budget=st.integers(1, 120),
    longest_first=st.booleans(),
    padded=st.booleans(),
)
def test_batches_hold_every_document_once_and_keep_to_the_budget(lengths, budget, longest_first, padded):
    def cost(batch: list[int]) -> int:
        sizes = [lengths[index] for index in batch]
        return max(sizes) * len(sizes) if padded else sum(sizes)

    batches = budget_batches(lengths, budget, longest_first=longest_first, padded=padded)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    expected = sorted(lengths, reverse=True) if longest_first else lengths
    assert [lengths[index] for index in order] == expected
    assert all(len(batch) == 1 or cost(batch) <= budget for batch in batches)
    # Greedy: no batch could take the first document of the next one.
    for batch, following in itertools.pairwise(batches):
        assert cost([*batch, following[0]]) > budget


@pytest.mark.parametrize("batch_tokens", [1, 60, 130, 10_000])
def test_forward_passes_hold_real_tokens_only_and_keep_to_the_budget(prompted_model, batch_tokens):
    passes = []

    def note(module, arguments, keywords):
        assert keywords.get("attention_mask") is None
        passes.append((arguments[0].shape, len(keywords["cu_seq_lens_q"]) - 1))

    handle = prompted_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        prompted_model.encode(LONG, batch_tokens=batch_tokens)
    finally:
        handle.remove()
    real = sum(len(ids) for ids in tiny_tokenizer(0)(LONG)["input_ids"])
    assert sum(shape[0] * shape[1] for shape, _ in passes) == real
    assert sum(documents for _, documents in passes) == len(LONG)
    assert all(shape[1] <= batch_tokens or documents == 1 for shape, documents in passes)
    assert (len(passes) == 1) == (batch_tokens > real)


# --- too long -------------------------------------------------------------------------------------------------------


def test_what_is_cut_off_is_counted_and_said_once(prompted_model, caplog):
    texts = [random_text(n, seed=n) for n in (LIMIT + 5, 3, 2 * LIMIT, LIMIT - 2)]
    with caplog.at_level(logging.WARNING):
        vectors = vectors_of(prompted_model, texts, batch_tokens=50)
    (record,) = caplog.records
    assert f"2 of 4 texts are longer than the context of {LIMIT} tokens" in record.message
    assert f"the longest has {len(texts[2])} characters" in record.message
    # what remains is what the tokenizer itself would leave, its closing token included
    kept = tiny_tokenizer(0)(texts, truncation=True, max_length=LIMIT)["input_ids"]
    assert prompted_model.tokenize(texts) == kept
    words = [tiny_tokenizer(0).decode(ids, skip_special_tokens=True) for ids in kept]
    caplog.clear()
    assert torch.equal(vectors_of(prompted_model, words), vectors)
    assert not caplog.records


def test_the_prompt_counts_and_a_document_that_fits_is_whole(prompted_model, caplog):
    exact = random_text(LIMIT - 2)
    prompted_model.encode([exact], overflow="error")
    assert not caplog.records
    with pytest.raises(ValueError, match="text 0 is longer than the context"):
        prompted_model.encode([exact], prompt_name="document", overflow="error")


def test_too_long_is_refused_where_it_must_not_be_cut(prompted_model):
    with pytest.raises(ValueError, match=r"text 1 is longer than the .* would be cut off; split") as error:
        prompted_model.encode(["w1", random_text(10 * LIMIT)], overflow="error")
    assert "\n" not in str(error.value)


def test_a_users_calls_of_the_tokenizer_change_nothing_here_and_encoding_nothing_there():
    """A fast tokenizer keeps the truncation and padding of its last call, also that of another thread."""
    model, texts = random_model(), [*LONG, random_text(LIMIT + 9)]
    tokenizer, expected = model.tokenizer, model.tokenize(texts)
    tokenizer.truncation_side = "left"
    tokenizer(texts, truncation=True, max_length=9, padding="max_length")
    kept = tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
    assert None not in kept
    assert model.tokenize(texts) == expected
    vectors_of(model, SHORT)
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == kept
    stop = threading.Event()

    def use() -> None:
        while not stop.is_set():
            for length in (5, 9):
                tokenizer(SHORT, truncation=True, max_length=length)

    user = threading.Thread(target=use)
    user.start()
    try:
        assert all(model.tokenize(texts) == expected for _ in range(100))
    finally:
        stop.set()
        user.join()


def test_tokens_that_are_added_to_the_tokenizer_are_read():
    model = random_model()
    before = model.tokenize(["w1 zebra w2"])
    model.tokenizer.add_tokens(["zebra"])
    added = model.tokenizer("w1 zebra w2")["input_ids"]
    assert model.tokenize(["w1 zebra w2"]) == [added] != before
    model.tokenizer = tiny_tokenizer(0)
    assert model.tokenize(["w1 zebra w2"]) == before


def test_saving_and_extending_leave_a_users_tokenizer_alone(tmp_path):
    """What is saved does not depend on earlier calls, and a longer context is that of the model's own tokenizer."""
    model = random_model(position_embedding_type="absolute")
    tokenizer = model.tokenizer
    model.save_pretrained(tmp_path / "first", title="same")
    tokenizer(SHORT, truncation=True, max_length=9, padding="max_length")
    model.save_pretrained(tmp_path / "second", title="same")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    model.extend_context(2 * LIMIT, "repeat")
    assert (tokenizer.model_max_length, model.tokenizer.model_max_length) == (CONTEXT, 2 * LIMIT)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 9


def test_a_tokenizer_without_special_tokens():
    model = random_model()
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    text = random_text(LIMIT + 9)
    assert model.tokenize([text]) == [model.tokenizer(text)["input_ids"][:LIMIT]]
    # a text without tokens has nothing to say: zeros, not NaN
    vectors = vectors_of(model, ["", "w1", ""])
    assert torch.equal(vectors.norm(dim=1).round(decimals=5), torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(vectors_of(model, ["", ""]), torch.zeros(2, 32))
    assert [part.shape for part in vectors_of(model, ["", "w1"], late_chunk_tokens=4)] == [(0, 32), (1, 32)]


# --- late chunks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 40, 500])
def test_late_chunks_are_pooled_from_states_that_read_the_whole_document(prompted_model, size):
    parts = vectors_of(prompted_model, LONG, late_chunk_tokens=size, normalize=False, batch_tokens=150)
    documents = vectors_of(prompted_model, LONG, normalize=False)
    for text, passages, document in zip(LONG, parts, documents, strict=True):
        with torch.no_grad():
            states = prompted_model(**tiny_tokenizer(0)(text, return_tensors="pt")).last_hidden_state[0]
        pieces = states.split(size)
        torch.testing.assert_close(passages, torch.stack([x.mean(0) for x in pieces]), atol=1e-5, rtol=0)
        lengths = torch.tensor([float(len(x)) for x in pieces])
        torch.testing.assert_close(lengths @ passages / lengths.sum(), document, atol=1e-5, rtol=0)
    single = vectors_of(prompted_model, LONG[0], late_chunk_tokens=size)
    torch.testing.assert_close(single, normalize(parts[0]), atol=1e-5, rtol=0)


def test_late_chunks_take_the_models_pooling():
    model = random_model(pooling="cls")
    with torch.no_grad():
        states = model(**tiny_tokenizer(0)(LONG[0], return_tensors="pt")).last_hidden_state[0]
    passages = vectors_of(model, LONG[0], late_chunk_tokens=7, normalize=False)
    torch.testing.assert_close(passages, states[::7], atol=1e-5, rtol=0)


# --- how ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("X3")
def test_bfloat16_points_where_float32_points(prompted_model):
    exact, fast = vectors_of(prompted_model, LONG), prompted_model.encode(LONG, precision="bfloat16", output="torch")
    assert torch.nn.functional.cosine_similarity(exact, fast).min() > 0.98
    assert not torch.equal(exact, fast)  # it was used


def test_training_mode_is_put_aside_and_taken_up_again(prompted_model):
    expected = vectors_of(prompted_model, SHORT)
    try:
        prompted_model.train()
        assert torch.equal(vectors_of(prompted_model, SHORT), expected)  # no dropout
        assert prompted_model.training
        with pytest.raises(ValueError, match="cut off"):
            prompted_model.encode(random_text(LIMIT), overflow="error")
        assert prompted_model.training
        assert all(module.training for module in prompted_model.modules())
    finally:
        prompted_model.eval()


def test_a_progress_bar_only_where_it_is_wanted(prompted_model, capfd):
    for choice, batch_tokens, shown in (
        (None, 10_000, False),
        (None, 50, True),
        (False, 50, False),
        (True, 10_000, True),
    ):
        prompted_model.encode(LONG, batch_tokens=batch_tokens, show_progress_bar=choice)
        captured = capfd.readouterr()
        assert captured.out == ""
        assert ("100%" in captured.err) == shown


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"prompt_name": "passage"}, "prompt_name='passage'.*'query', 'document'"),
        ({"overflow": "ignore"}, "overflow='ignore'.*'warn', 'error'"),
        ({"output": "list"}, "output='list'.*'numpy', 'torch'"),
        ({"precision": "float16"}, "precision='float16'.*'float32', 'bfloat16'"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"batch_tokens": None}, "batch_tokens=None"),
        ({"batch_tokens": "many"}, "batch_tokens='many'"),
        ({"truncate_dim": 0}, "truncate_dim=0"),
        ({"truncate_dim": 33}, "truncate_dim=33 .* 32"),
        ({"truncate_dim": 8.0}, r"truncate_dim=8\.0"),
        ({"late_chunk_tokens": 0}, "late_chunk_tokens=0"),
        ({"late_chunk_tokens": -4}, "late_chunk_tokens=-4"),
    ],
    ids=str,
)
def test_choices_that_cannot_be_are_refused_in_one_sentence(prompted_model, choices, named):
    with pytest.raises(ValueError, match=named) as error:
        prompted_model.encode(["w1"], **choices)
    one_sentence(error)


@pytest.mark.parametrize(("texts", "named"), [(["w1", None], "text 1 is a NoneType"), ([b"w1"], "text 0 is a bytes")])
def test_what_is_no_string_is_refused_by_its_number(prompted_model, texts, named):
    with pytest.raises(ValueError, match=named) as error:
        prompted_model.encode(texts)
    one_sentence(error)
