"""A vector a token for late interaction: of the same pass as the vector, whatever the batch, saved with the model."""

import importlib.util
from itertools import chain

import numpy as np
import pytest
import torch
from sentence_transformers.util import quantize_embeddings
from torch.nn.functional import normalize
from transformers import AutoModel

from modeling_longembed import LongEmbedConfig, LongEmbedForMaskedLM, LongEmbedModel, output_token_codes_longembed
from modeling_longembed.output_token_codes_longembed import TokenCodec
from modeling_longembed.output_token_pooling_longembed import pool_tokens
from tests.modeling_longembed.tiny_checkpoints import (
    CONTEXT,
    VOCAB_SIZE,
    random_text,
    randomize,
    save_checkpoint,
    tiny_tokenizer,
)

TEXTS = [random_text(n, seed=n) for n in (5, 0, 30, 1, 38, 12)]
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {
    "states": {},
    "linear": {"token_dim": 8},
    "two layers, idf": {"token_dim": 16, "token_head": "mlp", "query_token_weights": "idf"},
    "gate, no frequent words": {"token_dim": 8, "query_token_weights": "state", "token_min_weight": 0.8},
}


def token_model(cls=LongEmbedModel, **fields):
    """Return a random model, all of whose parameters and tables of token vectors are random too."""
    config = LongEmbedConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT, **SIZES, **fields)
    model = randomize(cls(config))
    output = model.base_model.token_output
    if output.query_table is not None:
        with torch.no_grad():
            output.query_table.copy_(torch.rand(VOCAB_SIZE) + 0.5)
    model.base_model.tokenizer = model.tokenizer = tiny_tokenizer(0)
    return model


def tokens_of(model, texts=TEXTS, **choices):
    return model.encode(texts, precision="float32", output_value="tokens", **choices)


def packed(texts):
    ids = tiny_tokenizer(0)(texts)["input_ids"]
    lengths = torch.tensor([0, *map(len, ids)], dtype=torch.int32)
    return torch.tensor([*chain(*ids)])[None], lengths.cumsum(0, dtype=torch.int32)


@pytest.mark.promise("T10")
@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_token_vectors_do_not_depend_on_the_batch(fields):
    model = token_model(**fields)
    for is_query in (False, True):
        together = tokens_of(model, is_query=is_query)
        for batch_tokens in (1, 50):
            for ours, theirs in zip(
                tokens_of(model, batch_tokens=batch_tokens, is_query=is_query), together, strict=True
            ):
                np.testing.assert_allclose(ours, theirs, atol=1e-6)
        np.testing.assert_allclose(tokens_of(model, TEXTS[2], is_query=is_query), together[2], atol=1e-6)


@pytest.mark.promise("T10")
@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_padded_equals_packed_and_padding_is_zero(fields, side):
    model = token_model(**fields)
    tokenizer = tiny_tokenizer(0)
    input_ids, cu_seqlens = packed(TEXTS)
    flat = model(input_ids, cu_seq_lens_q=cu_seqlens, token_vectors=side)
    for padding_side in ("left", "right"):
        tokenizer.padding_side = padding_side
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        padded = model(batch["input_ids"], batch["attention_mask"], token_vectors=side)
        real = batch["attention_mask"] == 1
        assert padded.token_mask.dtype == torch.bool
        assert torch.equal(padded.token_mask[real], flat.token_mask[0])
        torch.testing.assert_close(padded.token_vectors[real], flat.token_vectors[0], atol=1e-5, rtol=0)
        assert not padded.token_mask[~real].any()
        assert not padded.token_vectors[~padded.token_mask].any()


@pytest.mark.promise("T10")
@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_texts_of_both_sides_in_one_batch_get_what_each_side_alone_gets(fields):
    model, is_query = token_model(**fields), torch.tensor([True, False, False, True, True, False])
    input_ids, cu_seqlens = packed(TEXTS)
    batch = tiny_tokenizer(0)(TEXTS, padding=True, return_tensors="pt")
    of_token = is_query.repeat_interleave(cu_seqlens.diff())[None, :, None]
    for rows, inputs in (
        (of_token, {"input_ids": input_ids, "cu_seq_lens_q": cu_seqlens}),
        (is_query[:, None, None], {name: batch[name] for name in ("input_ids", "attention_mask")}),
    ):
        mixed = model(**inputs, token_vectors=is_query)
        queries, documents = (model(**inputs, token_vectors=side) for side in ("query", "document"))
        expected = torch.where(rows, queries.token_vectors, documents.token_vectors)
        torch.testing.assert_close(mixed.token_vectors, expected)
        of_row = rows[..., 0]
        assert torch.equal(mixed.token_mask, torch.where(of_row, queries.token_mask, documents.token_mask))
        assert torch.equal(queries.token_vectors, documents.token_vectors) == (model.token_output.query_table is None)


@pytest.mark.promise("T11")
@pytest.mark.parametrize("weighting", ["none", "generalized_max"])
def test_one_pass_gives_both_and_asking_for_tokens_changes_no_bit_of_the_vector(weighting):
    model = token_model(token_dim=8, token_weighting=weighting, query_token_weights="state")
    vectors, tokens = model.encode(TEXTS, precision="float32", output_value="both")
    assert np.array_equal(vectors, model.encode(TEXTS, precision="float32"))
    for ours, theirs in zip(tokens, tokens_of(model), strict=True):
        assert np.array_equal(ours, theirs)
    input_ids, cu_seqlens = packed(TEXTS)
    plain = model(input_ids, cu_seq_lens_q=cu_seqlens)
    assert plain.token_vectors is plain.token_mask is None
    asked = model(input_ids, cu_seq_lens_q=cu_seqlens, token_vectors="query")
    assert torch.equal(plain.pooler_output, asked.pooler_output)
    assert torch.equal(plain.last_hidden_state, asked.last_hidden_state)


@pytest.mark.promise("T11")
@pytest.mark.parametrize("pattern", ["full", {"type": "landmark", "size": 4, "top_k": 2}])
def test_without_a_head_they_are_the_unit_states_of_the_tokens_before_weighting(pattern):
    model = token_model(attention_patterns=pattern)
    weighted = token_model(attention_patterns=pattern, token_weighting="generalized_max")
    weighted.load_state_dict(model.state_dict())
    input_ids, cu_seqlens = packed(TEXTS)
    special = torch.isin(input_ids[0], torch.tensor(model.tokenizer.all_special_ids))
    assert special.sum() == 2 * len(TEXTS)
    expected = normalize(model(input_ids, cu_seq_lens_q=cu_seqlens).last_hidden_state[0], dim=-1)
    for each in (model, weighted):
        output = each(input_ids, cu_seq_lens_q=cu_seqlens, token_vectors="document")
        torch.testing.assert_close(output.token_vectors[0][~special], expected[~special], atol=1e-6, rtol=0)
        assert torch.equal(output.token_mask[0], ~special)
    assert [len(tokens) for tokens in tokens_of(weighted)] == [5, 0, 30, 1, 38, 12]
    assert not weighted.token_output.state_dict()


def maxsim(query, document):
    """Sum over query tokens of the largest inner product with a document token, by a double loop."""
    return sum(max((float(q @ d) for d in document), default=0.0) for q in query)


@pytest.mark.promise("T12")
@pytest.mark.parametrize("token_dim", [None, 3])
@pytest.mark.parametrize("kind", ["idf", "table", "state"])
def test_maxsim_of_query_vectors_is_maxsim_in_which_each_token_counts_with_its_weight(kind, token_dim):
    model = token_model(token_dim=8, query_token_weights=kind)
    with torch.no_grad():
        model.token_output.query_table[9] *= -1
    documents = tokens_of(model, token_dim=token_dim)
    queries = tokens_of(model, token_dim=token_dim, is_query=True)
    unit = documents  # the same texts with weights of 1
    for text, query, plain in zip(TEXTS, queries, unit, strict=True):
        input_ids, cu_seqlens = packed([text])
        states = model(input_ids, cu_seq_lens_q=cu_seqlens).last_hidden_state[0, 1:-1]
        weights = model.token_output.query_table[input_ids[0, 1:-1]].abs()
        if kind == "state":
            gate = model.token_output.query_gate
            weights = weights * 2 / (1 + torch.exp(-(states @ gate.weight[0] + gate.bias)))
        for document in documents:
            expected = sum(
                w.item() * max((float(q @ d) for d in document), default=0.0)
                for w, q in zip(weights, plain, strict=True)
            )
            assert maxsim(query, document) == pytest.approx(expected, abs=1e-5)


def test_queries_are_known_by_their_prompt():
    model = token_model(query_token_weights="idf", prompts={"query": "w1 ", "document": "w2 ", "title": "w3 "})
    for name, is_query in (("query", True), ("document", False), ("title", False), (None, False)):
        for said in (None, True, False):
            weighted = is_query if said is None else said
            lengths = np.linalg.norm(tokens_of(model, TEXTS[0], prompt_name=name, is_query=said), axis=1)
            assert np.allclose(lengths, 1) == (not weighted)
    model.config.default_prompt_name = "query"
    assert not np.allclose(np.linalg.norm(tokens_of(model, TEXTS[0]), axis=1), 1)


def test_fewer_dimensions_are_the_first_ones_at_the_same_length():
    model = token_model(token_dim=8, query_token_weights="idf")
    for is_query in (False, True):
        for few, all_ in zip(
            tokens_of(model, token_dim=3, is_query=is_query), tokens_of(model, is_query=is_query), strict=True
        ):
            lengths = np.linalg.norm(all_, axis=1, keepdims=True)
            first = all_[:, :3] / np.linalg.norm(all_[:, :3], axis=1, keepdims=True)
            np.testing.assert_allclose(few, first * lengths, atol=1e-6)


@pytest.mark.promise("T13")
@pytest.mark.parametrize("cls", [LongEmbedModel, LongEmbedForMaskedLM])
@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_a_saved_model_gives_the_same_token_vectors(fields, cls, tmp_path):
    model = token_model(cls, **fields)
    model.save_pretrained(tmp_path)
    again, loading = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    again.base_model.tokenizer = model.tokenizer if cls is LongEmbedForMaskedLM else again.tokenizer
    for side in (False, True):
        before, after = (tokens_of(each.base_model, is_query=side) for each in (model, again))
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.promise("T13")
def test_a_folder_without_token_vectors_loads_as_before_and_a_head_can_be_added(tmp_path):
    model = token_model()
    model.save_pretrained(tmp_path)
    assert not any("token_output" in name for name in model.state_dict())
    loaded, loading = AutoModel.from_pretrained(
        tmp_path, token_dim=4, query_token_weights="idf", output_loading_info=True
    )
    assert loading["missing_keys"] == {"token_output.head.weight", "token_output.query_table"}
    assert np.array_equal(model.encode(TEXTS), loaded.encode(TEXTS))
    assert [part.shape for part in tokens_of(loaded, is_query=True)] == [(n, 4) for n in (5, 0, 30, 1, 38, 12)]
    assert (loaded.token_output.query_table == 1).all()


@pytest.mark.promise("T13")
def test_a_static_table_can_be_trained_when_it_is_loaded(tmp_path):
    model = token_model(token_dim=4, query_token_weights="idf")
    model.save_pretrained(tmp_path)
    loaded, loading = LongEmbedModel.from_pretrained(tmp_path, query_token_weights="table", output_loading_info=True)
    assert not any(loading.values())
    assert torch.equal(loaded.token_output.query_table, model.token_output.query_table)
    assert "token_output.query_table" in dict(loaded.named_parameters())
    assert "token_output.query_table" not in dict(model.named_parameters())
    for before, after in zip(tokens_of(model, is_query=True), tokens_of(loaded, is_query=True), strict=True):
        assert np.array_equal(before, after)


def test_a_converted_encoder_has_them(tmp_path):
    original = save_checkpoint(tmp_path, "bert")
    model = LongEmbedModel.from_encoder(tmp_path)
    batch = tiny_tokenizer(0)(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        states = original(**batch).last_hidden_state[0, 1:-1]
    np.testing.assert_allclose(tokens_of(model, TEXTS[0]), normalize(states, dim=-1), atol=1e-5)
    headed = LongEmbedModel.from_encoder(tmp_path, token_dim=4, query_token_weights="state")
    assert tokens_of(headed, TEXTS[0], is_query=True).shape == (5, 4)
    np.testing.assert_array_equal(headed.encode(TEXTS), model.encode(TEXTS))


def test_punctuation_is_left_out_on_request():
    tokenizer = tiny_tokenizer(0)
    tokenizer.add_tokens([",", "##-", "w1,", "\u2026", "$"])
    first = VOCAB_SIZE
    config = {"vocab_size": VOCAB_SIZE + 5, "max_position_embeddings": CONTEXT, **SIZES}
    ids = torch.tensor([[1, 5, *range(first, first + 5), 2]])
    for skip, kept in ((False, range(1, 7)), (True, (1, 4))):
        model = randomize(LongEmbedModel(LongEmbedConfig(**config, token_skip_punctuation=skip)))
        model.tokenizer = tokenizer
        for side in ("query", "document"):
            assert model(ids, token_vectors=side).token_mask[0].nonzero().flatten().tolist() == [*kept]


@pytest.mark.promise("T17")
def test_document_tokens_whose_weight_is_too_small_have_no_vector():
    model = token_model(token_dim=8, query_token_weights="state", token_min_weight=1.0)
    whole = token_model(token_dim=8, query_token_weights="state")
    whole.load_state_dict(model.state_dict())
    input_ids, cu_seqlens = packed(TEXTS)
    is_query = torch.tensor([True, False] * 3)
    kept = {}
    for side in ("query", "document", is_query):
        with torch.no_grad():
            ours, theirs = (m(input_ids, cu_seq_lens_q=cu_seqlens, token_vectors=side) for m in (model, whole))
        kept[str(side)] = ours.token_mask
        np.testing.assert_array_equal(ours.token_vectors, theirs.token_vectors * ours.token_mask[..., None])
    is_rare = model.token_output.query_table[input_ids] >= 1
    assert 0 < is_rare.sum() < is_rare.numel()
    every = whole(input_ids, cu_seq_lens_q=cu_seqlens, token_vectors="query").token_mask
    of_query = is_query.repeat_interleave(cu_seqlens.diff())
    assert kept["query"].equal(every)
    assert kept["document"].equal(every & is_rare)
    assert kept[str(is_query)].equal(every & (is_rare | of_query))
    whole.config.token_min_weight = 1.0  # at any time
    assert whole(input_ids, cu_seq_lens_q=cu_seqlens, token_vectors="document").token_mask.equal(kept["document"])


def test_another_tokenizer_or_more_special_tokens_are_noticed():
    model = token_model()
    ids = torch.tensor([[1, 5, 6, 2]])
    assert model(ids, token_vectors="query").token_mask.tolist() == [[False, True, True, False]]
    model.tokenizer = tiny_tokenizer(1)
    assert model(ids, token_vectors="query").token_mask.tolist() == [[False, True, True, False]]
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["w0"]})
    assert model(ids, token_vectors="query").token_mask.tolist() == [[False, False, True, False]]


def test_gradients_reach_head_table_and_gate_and_none_the_static_table():
    for kind in ("idf", "table", "state"):
        model = token_model(token_dim=4, token_head="mlp", query_token_weights=kind).train()
        input_ids, cu_seqlens = packed(TEXTS)
        model(input_ids, cu_seq_lens_q=cu_seqlens, token_vectors="query").token_vectors.sum().backward()
        named = dict(model.token_output.named_parameters())
        expected = {"head.dense.weight", "head.projection.weight"}
        expected |= {"query_table"} if kind != "idf" else set()
        expected |= {"query_gate.weight", "query_gate.bias"} if kind == "state" else set()
        assert set(named) == expected
        assert all(x.grad.abs().sum() > 0 for x in named.values())


def test_norms_are_those_of_float32_under_autocast_and_in_half_precision():
    model = token_model(token_dim=8)
    lengths = np.linalg.norm(np.concatenate(model.encode(TEXTS, output_value="tokens", precision="bfloat16")), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
    halved = tokens_of(model.to(torch.bfloat16))
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(halved), axis=1), 1, atol=1e-6)
    exact = tokens_of(token_model(token_dim=8), token_precision="float16")
    assert all(part.dtype == np.float16 for part in exact)


def test_chunks_of_a_stream_have_their_token_vectors():
    model = token_model(
        attention_patterns={"type": "memory", "size": 4, "memory": 4}, position_embedding_type="relative"
    )
    ids = torch.randint(5, VOCAB_SIZE, (2, 10))
    memory, parts = model.new_memory(2), []
    for chunk in ids.split(4, dim=1):
        output = model(chunk, memory=memory, token_vectors="document")
        memory = output.memory
        parts.append(output.token_vectors)
    whole = model(ids, token_vectors="document").token_vectors
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


def test_shapes_of_every_output():
    model = token_model(token_dim=8)
    assert tokens_of(model, "w1 w2").shape == (2, 8)
    assert tokens_of(model, "").shape == (0, 8)
    assert tokens_of(model, []) == []
    vectors, tokens = model.encode("w1 w2", output_value="both")
    assert (vectors.shape, tokens.shape) == ((32,), (2, 8))
    vectors, tokens = model.encode([], output_value="both")
    assert (vectors.shape, tokens) == ((0, 32), [])
    passages, tokens = model.encode([random_text(9)], output_value="both", late_chunk_tokens=4, output="torch")
    assert (passages[0].shape, tokens[0].shape) == ((3, 32), (9, 8))
    without_tokenizer = token_model(token_dim=8)
    without_tokenizer.tokenizer = None
    assert tokens_of(without_tokenizer, []) == []
    for value in ("tokens", "both"):
        once = model.encode(TEXTS, output_value=value, precision="float32")
        streamed = [*model.encode_stream(TEXTS, output_value=value, precision="float32")]
        for ours, theirs in zip(streamed, once if value == "tokens" else zip(*once, strict=True), strict=True):
            for a, b in zip(*((x,) if value == "tokens" else x for x in (ours, theirs)), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.promise("T4", "T16")
@pytest.mark.parametrize("token_dim", [None, 6])
def test_what_is_pooled_and_coded_in_encode_is_what_is_made_of_the_vectors_later(token_dim):
    model = token_model(token_dim=8)
    whole = tokens_of(model, token_dim=token_dim, output="torch")
    pooled = tokens_of(model, token_dim=token_dim, token_pooling=3, output="torch")
    assert [len(part) for part in pooled] == [max(len(part) // 3, min(len(part), 1)) for part in whole]
    for ours, vectors in zip(pooled, whole, strict=True):
        torch.testing.assert_close(ours, pool_tokens(vectors, 3)[0], atol=1e-6, rtol=0)
    assert all(
        a.equal(b)
        for a, b in zip(
            tokens_of(model, token_pooling=1, output="torch"), tokens_of(model, output="torch"), strict=True
        )
    )
    sample = torch.cat(whole)
    for kind in ("int8", "binary", "residual2"):
        codec = TokenCodec(kind).fit(sample)
        coded = tokens_of(model, token_dim=token_dim, token_precision=codec)
        for ours, vectors in zip(coded, whole, strict=True):
            assert np.array_equal(ours, codec.encode(vectors).numpy())
    for ours, vectors in zip(tokens_of(model, token_dim=token_dim, token_precision="binary"), whole, strict=True):
        assert np.array_equal(ours, quantize_embeddings(vectors.numpy(), "ubinary"))
    streamed = model.encode_stream(
        TEXTS, output_value="tokens", precision="float32", token_dim=token_dim, token_pooling=3
    )
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(streamed, pooled, strict=True))


def test_a_codec_of_the_package_serves_a_model_of_remote_code_and_the_other_way_round():
    """transformers loads the code of a folder as modules of its own."""
    spec = importlib.util.spec_from_file_location("elsewhere", output_token_codes_longembed.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    model = token_model(token_dim=8)
    sample = np.concatenate(tokens_of(model))
    ours, theirs = (kind("int8").fit(sample) for kind in (TokenCodec, elsewhere.TokenCodec))
    assert not isinstance(theirs, TokenCodec)
    for a, b in zip(tokens_of(model, token_precision=ours), tokens_of(model, token_precision=theirs), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("fields", "choices", "message"),
    [
        ({}, {"output_value": "words"}, "output_value='words'; choose from 'vector', 'tokens', 'both'"),
        ({}, {"output_value": "tokens", "token_dim": 8}, "token_dim=8, but this model has no token head"),
        ({"token_dim": 8}, {"output_value": "tokens", "token_dim": 9}, "token_dim=9 is more than the 8 dimensions"),
        ({"token_dim": 8}, {"output_value": "tokens", "token_dim": 0}, "token_dim=0; give a whole number"),
        ({"token_dim": 8}, {"token_dim": 4}, "token_dim=4 has no effect on output_value='vector'"),
        ({}, {"is_query": True}, "is_query=True has no effect"),
        ({}, {"output_value": "tokens", "normalize": False}, "normalize=False has no effect"),
        (
            {},
            {"output_value": "tokens", "token_precision": TokenCodec("int8")},
            "the int8 codec of token_precision has seen no sample, and the token vectors have 32 dimensions",
        ),
        (
            {"token_dim": 8},
            {"output_value": "tokens", "token_dim": 6, "token_precision": TokenCodec("int8").fit(torch.ones(1, 8))},
            "the int8 codec of token_precision takes 8 dimensions, and the token vectors have 6 dimensions",
        ),
        ({}, {"output_value": "tokens", "late_chunk_tokens": 4}, "late_chunk_tokens=4 has no effect"),
        ({}, {"output_value": "tokens", "token_precision": "int1"}, "token_precision='int1'; choose from"),
        ({}, {"output_value": "tokens", "token_precision": 8}, "token_precision=8; choose from"),
        ({}, {"output_value": "tokens", "token_precision": "int8"}, "token_precision='int8' needs a sample"),
        ({}, {"output_value": "tokens", "token_pooling": 0}, "token_pooling=0; give a whole number of at least 1"),
        ({}, {"output_value": "tokens", "token_pooling": 33}, "token_pooling=33; give a whole number of at most 32"),
        ({}, {"token_pooling": 2}, "token_pooling=2 has no effect on output_value='vector'"),
        (
            {},
            {"output_value": "tokens", "token_pooling": 2, "is_query": True},
            "token_pooling=2 is for documents",
        ),
        (
            {},
            {"output_value": "tokens", "token_precision": "binary", "prompt_name": "query"},
            "token_precision='binary' is for documents",
        ),
        ({}, {"output_value": "both", "output_file": "x.npy"}, "output_file takes one vector .* encode_stream"),
    ],
)
def test_mistakes_are_one_sentence(fields, choices, message):
    def read():
        raise AssertionError("a text was read")
        yield

    with pytest.raises(ValueError, match=f"^encode: {message}.*") as error:
        token_model(**fields).encode(read(), **choices)
    assert "\n" not in str(error.value)


def test_mistakes_in_the_config_and_in_a_forward_pass():
    for fields, message in (
        ({"token_dim": 0}, "token_dim=0"),
        ({"token_dim": 33}, "token_dim=33; .* hidden_size=32"),
        ({"token_head": "mlp"}, "token_head='mlp' but token_dim is not set"),
        ({"token_min_weight": 0.5}, "token_min_weight=0.5 but there are no query_token_weights"),
        ({"token_min_weight": -1, "query_token_weights": "idf"}, "token_min_weight=-1; give 0 or"),
        ({"token_weighting_power": 0.5}, "token_weighting_power=0.5 but there are no query_token_weights"),
        ({"token_weighting_power": -1, "query_token_weights": "idf"}, "token_weighting_power=-1; give 0 or"),
        (
            {"token_weighting_power": 1, "query_token_weights": "idf", "pooling": "cls"},
            "token_weighting_power=1 .*pooling='cls'",
        ),
        ({"token_head": "deep", "token_dim": 4}, "token_head"),
        ({"query_token_weights": "tf"}, "query_token_weights"),
    ):
        with pytest.raises(ValueError, match=message):
            token_model(**fields)
    model = token_model()
    with pytest.raises(ValueError, match=r"token_vectors='tokens'; choose from None"):
        model(torch.tensor([[1, 5, 2]]), token_vectors="tokens")
    with pytest.raises(ValueError, match="token_vectors needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32), token_vectors="query")
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"no tokenizer beside this model; set model\.tokenizer"):
        model.encode(TEXTS, output_value="tokens")


def test_native_architectures_have_no_token_head(tmp_path):
    with pytest.raises(ValueError, match="has no token_dim=8"):
        token_model(token_dim=8).to_native(tmp_path / "native")
