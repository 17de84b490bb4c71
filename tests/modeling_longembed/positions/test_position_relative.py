"""Transformer-XL's relative positions against the formula and against XLNet's attention; and no positions at all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import XLNetConfig, XLNetModel
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.attention_longembed import LayerContext
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.position_relative_longembed import DistanceBias, DistanceEmbeddings
from modeling_longembed.position_table_longembed import sinusoidal_embeddings

HEADS, DIM, WIDTH = 4, 8, 32


def xlnet_shifted(scores, length):
    """`(H, L, 2L)` products with the keys of the distances L, L - 1, ..., 1 - L, shifted as XLNet does it."""
    return XLNetRelativeAttention.rel_shift_bnij(scores[None], klen=length)[0]


@pytest.mark.promise("P8")
@given(length=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_bias_is_the_shift_of_transformer_xl(length, seed):
    torch.manual_seed(seed)
    query, u, v = torch.randn(HEADS, length, DIM).double(), *torch.randn(2, HEADS, DIM).double()
    keys = torch.randn(HEADS, 2 * length + 1, DIM).double()  # of the distances -length to length
    index = torch.arange(length)
    ours = DistanceBias(keys, v - u, 0.3).dense(query + u[:, None], index, index)
    products = (query + v[:, None]) @ keys.flip(1)[:, :-1].transpose(1, 2)  # descending: L, ..., 1 - L
    torch.testing.assert_close(ours, 0.3 * xlnet_shifted(products, length), atol=1e-12, rtol=0)

    naive = torch.stack(
        [torch.stack([(query[:, i] + v) * keys[:, i - j + length] for j in range(length)], 1) for i in range(length)], 1
    ).sum(-1)
    torch.testing.assert_close(ours, 0.3 * naive, atol=1e-12, rtol=0)


@pytest.mark.promise("P8")
@given(length=st.integers(2, 30), start=st.integers(0, 50), data=st.data())
def test_any_queries_and_keys_of_a_document_have_their_part_of_the_bias(length, start, data):
    torch.manual_seed(0)
    query, shift = torch.randn(HEADS, length, DIM).double(), torch.randn(HEADS, DIM).double()
    bias = DistanceBias(torch.randn(HEADS, 2 * length + 1, DIM).double(), shift, 1.0)
    index = torch.arange(length)
    whole = bias.dense(query, index, index)
    some = st.lists(st.integers(0, length - 1), min_size=1, max_size=9)
    rows, columns = (torch.tensor(data.draw(some)) for _ in range(2))
    part = bias.dense(query[:, rows], rows + start, columns + start)  # wherever the document stands
    torch.testing.assert_close(part, whole[:, rows][:, :, columns], atol=1e-12, rtol=0)
    half = bias.heads(slice(1, 3)).dense(query[1:3], index, index)
    torch.testing.assert_close(half, whole[1:3], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", ["eager", "longembed_varlen"])
def test_the_attention_is_that_of_xlnet(kernel):
    torch.manual_seed(0)
    length = 23
    config = XLNetConfig(d_model=WIDTH, n_head=HEADS, n_layer=1, vocab_size=8, attn_type="bi", dropout=0.0)
    xlnet = XLNetModel(config).double()
    theirs = xlnet.layer[0].rel_attn
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours_config = LongEmbedConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        position_embedding_type="relative",
        attention_bias=False,
    )
    model = LongEmbedModel._from_config(ours_config, attn_implementation=kernel).double().eval()
    attention = model.layers[0].attention
    # XLNet keeps all sines before all cosines: the same sinusoids in another order of channels.
    order = torch.arange(WIDTH).view(2, -1).T.flatten()
    with torch.no_grad():
        for mine, name in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")):
            getattr(attention, mine).weight.copy_(getattr(theirs, name).flatten(1).T)
        attention.o_proj.weight.copy_(theirs.o.flatten(1))
        attention.distance.r_proj.weight.copy_(theirs.r.flatten(1).T[:, order])
        attention.distance.content_bias.copy_(theirs.r_w_bias)
        attention.distance.distance_bias.copy_(theirs.r_r_bias)

        states = torch.randn(length, WIDTH).double()
        heads = [torch.einsum("ih,hnd->ind", states, x)[:, None] for x in (theirs.q, theirs.k, theirs.v)]
        table = xlnet.relative_positional_encoding(length, length).double()
        keys = torch.einsum("ibh,hnd->ibnd", table, theirs.r)
        expected = torch.einsum("ibnd,hnd->ibh", theirs.rel_attn_core(*heads, keys), theirs.o)[:, 0]

        documents = PackedDocuments(torch.tensor([0, length], dtype=torch.int32), length)
        positions = ours_config.position_scheme.prepare(ours_config, documents, documents.token_index, states)
        output, _ = attention(states, LayerContext(documents, positions))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)  # the sinusoids are of single precision


def test_the_table_holds_the_sinusoids_of_all_distances():
    distances = DistanceEmbeddings.up_to(5, WIDTH, torch.zeros(1, dtype=torch.float64))
    for distance in range(-5, 6):
        expected = sinusoidal_embeddings(torch.tensor([distance]), WIDTH)[0].double()
        assert torch.equal(distances.table[distances.reach + distance], expected)


@pytest.mark.parametrize("kernel", ["eager", "longembed_varlen", "longembed_chunked"])
def test_relative_positions_do_not_depend_on_where_counting_begins(build_tiny_model, kernel):
    model = build_tiny_model(position_embedding_type="relative", attn_implementation=kernel).double()
    input_ids = torch.randint(1, 64, (2, 15))
    ids = torch.arange(15).expand(2, 15)
    outputs = [model(input_ids, position_ids=ids + start).last_hidden_state for start in (0, 1000)]
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)


@pytest.mark.promise("P11")
def test_without_positions_a_causal_model_tells_orders_apart_and_a_bidirectional_one_does_not(build_tiny_model):
    torch.manual_seed(0)
    model = build_tiny_model(position_embedding_type="none", is_causal=True).double()
    input_ids = torch.randint(1, 64, (1, 12))
    shuffled = input_ids[:, torch.randperm(12)]
    causal = [model(ids).pooler_output for ids in (input_ids, shuffled)]
    assert (causal[0] - causal[1]).abs().max() > 1e-3
    model.config.is_causal = False  # which the config refuses, because of what is shown here
    both_ways = [model(ids).pooler_output for ids in (input_ids, shuffled)]
    torch.testing.assert_close(*both_ways, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scheme", ["absolute", "rope", "alibi", "relative", "none"])
def test_a_causal_token_does_not_move_when_a_later_one_changes(build_tiny_model, scheme):
    model = build_tiny_model(position_embedding_type=scheme, is_causal=True).double()
    input_ids = torch.randint(1, 64, (1, 30))
    edited = input_ids.clone()
    edited[0, 17] = (edited[0, 17] + 1) % 64
    before, after = (model(ids).last_hidden_state[0] for ids in (input_ids, edited))
    assert torch.equal(before[:17], after[:17])
    assert (before[17:] - after[17:]).abs().amax(-1).min() > 1e-6
