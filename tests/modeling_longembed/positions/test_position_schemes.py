"""Position schemes and their extensions against transformers' own code, closed forms and brute force."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from modeling_longembed import LongEmbedConfig
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.position_alibi_longembed import AlibiBias, alibi_slopes
from modeling_longembed.position_base_longembed import extension_factor
from modeling_longembed.position_buckets_longembed import BucketBias, relative_position_bucket
from modeling_longembed.position_rope_longembed import (
    extended_rope_parameters,
    grouped_positions,
    rope_frequencies,
    rope_plan,
    rotary_at,
)
from modeling_longembed.position_schemes_longembed import POSITION_SCHEMES
from modeling_longembed.position_table_longembed import extend_position_table, position_ids, sinusoidal_embeddings

ORIGINAL = 16  # context in tokens of the "trained" models below
BASE = {"rope_type": "default", "rope_theta": 10_000.0}


def pack(*lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedDocuments(cu_seqlens, max(lengths))


def rope_config(method, factor=8, **extension):
    """A rope model with head size 8, stretched by `factor`."""
    if method is not None:
        extension = {"method": method, "original_max_position_embeddings": ORIGINAL} | extension
    return LongEmbedConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        position_embedding_type="rope",
        max_position_embeddings=factor * ORIGINAL,
        position_extension=extension or None,
    )


def plan_of(config, documents):
    return rope_plan(config, config.rope_parameters, documents, documents.token_index)


def as_complex(states):
    """Half-split channels `(..., D)` as the planes that they are."""
    half = states.shape[-1] // 2
    return torch.complex(states[..., :half].double(), states[..., half:].double())


def relative_scores(query, key, relative_position, inv_freq):
    """Scores by the definition, `Re(sum_t q_t conj(k_t) exp(i r f_t))`, with any `(Q, K)` table r of distances."""
    product = torch.einsum("qht,kht->hqkt", as_complex(query), as_complex(key).conj())
    turn = torch.polar(torch.ones(1, dtype=torch.float64), relative_position.double()[..., None] * inv_freq.double())
    return (product * turn).sum(-1).real


# Rotary ---------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("P1")
@given(shift=st.integers(0, 100_000))
def test_rotary_scores_depend_on_distances_alone(shift):
    query, key = torch.randn(2, 12, 2, 8, dtype=torch.float64)
    inv_freq = rope_frequencies(BASE, 8, ORIGINAL)[0].double()
    here, there = (rotary_at(torch.arange(12) + offset, inv_freq) for offset in (0, shift))
    scores, shifted = (torch.einsum("qhd,khd->hqk", at(query), at(key)) for at in (here, there))
    # The angle itself is rounded: an ulp of `shift` radians is what fp64 can give.
    assert (scores - shifted).abs().max() < 1e-12 * max(1, shift / 1000)


def test_rotary_is_the_definition_in_complex_numbers():
    query, key = torch.randn(2, 12, 2, 8, dtype=torch.float64)
    inv_freq = rope_frequencies(BASE, 8, ORIGINAL)[0].double()
    place = torch.arange(12)
    at = rotary_at(place, inv_freq)
    expected = relative_scores(query, key, place[:, None] - place, inv_freq)
    torch.testing.assert_close(torch.einsum("qhd,khd->hqk", at(query), at(key)), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(at(query).norm(dim=-1), query.norm(dim=-1), atol=1e-12, rtol=0)


@pytest.mark.promise("P2")
def test_half_split_is_interleaved_with_permuted_channels():
    dim, states = 8, torch.randn(12, 3, 8)
    at = rotary_at(torch.arange(12), rope_frequencies(BASE, dim, ORIGINAL)[0])
    interleave = torch.arange(dim).view(2, dim // 2).T.flatten()  # 0, D/2, 1, D/2 + 1, ...
    sin, cos = at.sin[None, :, : dim // 2], at.cos[None, :, : dim // 2]
    theirs = rotate_interleaved(states[None][..., interleave], sin, cos)[0]
    assert torch.equal(at(states)[..., interleave], theirs)


def test_rotary_tables_are_those_of_llama():
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=BASE)
    place = torch.arange(500)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), place[None])
    at = rotary_at(place, rope_frequencies(BASE, 8, ORIGINAL)[0])
    torch.testing.assert_close(at.cos, cos[0], atol=1e-4, rtol=0)  # angles of 500 in fp32
    torch.testing.assert_close(at.sin, sin[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(at.cos[:20], cos[0, :20], atol=1e-6, rtol=0)


def test_rotation_of_bfloat16_is_computed_in_float32():
    states = torch.randn(4, 2, 8, dtype=torch.bfloat16)
    at = rotary_at(torch.arange(30_000, 30_004), rope_frequencies(BASE, 8, ORIGINAL)[0])
    assert torch.equal(at(states), at(states.float()).bfloat16())


# Scaling of rotary frequencies ----------------------------------------------------------------------------------------


@pytest.mark.promise("P3")
@pytest.mark.parametrize("method", ["linear", "dynamic", "ntk", "yarn"])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_a_factor_of_1_leaves_the_frequencies(method, head_dim):
    extension = {"method": method, "original_max_position_embeddings": 512, "factor": 1.0}
    parameters = extended_rope_parameters(extension, BASE, 4096)
    stretched, attention_factor = rope_frequencies(parameters, head_dim, 512, 512)
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](
        LlamaConfig(head_dim=head_dim, rope_parameters=BASE | {"rope_type": "linear", "factor": 1.0})
    )
    torch.testing.assert_close(stretched, expected, atol=1e-7, rtol=0)
    assert attention_factor == 1.0


@pytest.mark.promise("P4")
@pytest.mark.parametrize("factor", [2.0, 8.0, 16.0])
def test_yarn(factor):
    extension = {"method": "yarn", "original_max_position_embeddings": 512}
    parameters = extended_rope_parameters(extension, BASE, int(512 * factor))
    stretched, attention_factor = rope_frequencies(parameters, 64, 512)
    base, _ = rope_frequencies(BASE, 64, 512)
    assert attention_factor == pytest.approx(0.1 * math.log(factor) + 1, abs=1e-7)
    assert (stretched.diff() < 0).all()
    assert (stretched <= base * (1 + 1e-6)).all()
    assert (stretched >= base / factor * (1 - 1e-6)).all()
    # Planes that turn often inside the trained window stay, those that turn less than once are interpolated.
    turns = 512 * base / (2 * math.pi)
    torch.testing.assert_close(stretched[turns > 40], base[turns > 40])
    torch.testing.assert_close(stretched[turns < 0.7], base[turns < 0.7] / factor)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("linear", {}),
        ("yarn", {}),
        ("yarn", {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False}),
        ("dynamic", {"factor": 1.0}),
    ],
)
def test_scaled_frequencies_are_those_that_transformers_computes_for_llama(method, more):
    extension = {"method": method, "original_max_position_embeddings": 512, "keep_short": True} | more
    ours, our_factor = rope_frequencies(extended_rope_parameters(extension, BASE, 4096), 64, 512, 3000)
    theirs = {"rope_type": method, "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 512}
    # transformers' dynamic NTK reads the trained length from the config, YaRN from its parameters.
    context = 512 if method == "dynamic" else 4096
    llama = LlamaConfig(head_dim=64, max_position_embeddings=context, rope_parameters=theirs | more)
    expected, factor = ROPE_INIT_FUNCTIONS[method](llama, torch.device("cpu"), seq_len=3000)
    assert torch.equal(ours, expected)
    assert our_factor == factor


@pytest.mark.promise("P5")
@pytest.mark.parametrize("factor", [2.0, 8.0, 32.0])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_static_ntk_divides_the_lowest_frequency_and_keeps_the_highest(factor, head_dim):
    stretched, _ = rope_frequencies(BASE | {"rope_type": "ntk", "factor": factor}, head_dim, 512)
    base, _ = rope_frequencies(BASE, head_dim, 512)
    assert stretched[0] == base[0] == 1.0
    assert (stretched[-1] - base[-1] / factor).abs() < 1e-10
    assert stretched[-1] / base[-1] * factor == pytest.approx(1.0, rel=1e-5)
    assert (stretched[1:-1] < base[1:-1]).all()
    assert (stretched[1:-1] > base[1:-1] / factor).all()


def test_theta_replaces_the_base():
    extension = {"method": "theta", "original_max_position_embeddings": 512, "rope_theta": 100_000.0}
    stretched, _ = rope_frequencies(extended_rope_parameters(extension, BASE, 4096), 64, 512)
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](
        LlamaConfig(head_dim=64, rope_parameters={"rope_type": "linear", "rope_theta": 100_000.0, "factor": 1.0})
    )
    torch.testing.assert_close(stretched, expected, atol=1e-7, rtol=0)


def test_dynamic_scaling_goes_by_the_length_of_each_document():
    lengths = [ORIGINAL - 3, 3 * ORIGINAL, 1, ORIGINAL, 5 * ORIGINAL + 1]
    documents = pack(*lengths)
    plan = plan_of(rope_config("dynamic"), documents)
    for (start, end), length in zip(documents.bounds, lengths, strict=True):
        theta = 10_000.0 * max(1.0, length / ORIGINAL) ** (8 / 6)
        angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        torch.testing.assert_close(plan.near.cos[start:end, :4].double(), angles.cos(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", POSITION_SCHEMES["rope"].extensions)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_documents_within_the_original_context_are_rotated_as_before(method, lengths):
    documents = pack(*lengths)
    query, key = torch.randn(2, sum(lengths), 4, 8)
    extended_query, extended_key, grouped = plan_of(rope_config(method, factor=4), documents)(query, key)
    base_query, base_key, _ = plan_of(rope_config(None, factor=4), documents)(query, key)
    for start, end in documents.bounds:
        if end - start <= ORIGINAL:
            assert torch.equal(extended_query[start:end], base_query[start:end])
            assert torch.equal(extended_key[start:end], base_key[start:end])
            if grouped is not None:
                assert (grouped.neighbours[start:end] == end - start).all()
        elif method == "group":
            assert (grouped.neighbours[start:end] == 64).all()
        else:
            assert not torch.equal(extended_query[start:end], base_query[start:end])


def test_keep_short_can_be_turned_off():
    documents = pack(5)
    near = [plan_of(rope_config("linear", keep_short=keep), documents).near.cos[:, 0] for keep in (True, False)]
    torch.testing.assert_close(near[0], torch.arange(5.0).cos())
    torch.testing.assert_close(near[1], (torch.arange(5.0) / 8).cos())


# Self-Extend ----------------------------------------------------------------------------------------------------------


def self_extend_map(length, group, neighbours):
    """Relative position of every query and key, by the formula of the paper and its mirror image."""
    table = torch.empty(length, length, dtype=torch.long)
    for i in range(length):
        for j in range(length):
            if abs(i - j) < neighbours:
                table[i, j] = i - j
            else:
                left, right = max(i, j), min(i, j)
                far = left // group - right // group + neighbours - neighbours // group
                table[i, j] = far if i > j else -far
    return table


def merged_scores(config, length, query, key):
    documents = pack(length)
    near_query, near_key, grouped = plan_of(config, documents)(query, key)
    index = documents.token_index
    return grouped.merge(torch.einsum("qhd,khd->hqk", near_query, near_key), index, index)


@pytest.mark.promise("P6")
@given(length=st.integers(ORIGINAL + 1, 48), neighbours=st.integers(1, 20), factor=st.integers(2, 6))
def test_self_extend_is_its_map_of_relative_positions(length, neighbours, factor):
    query, key = torch.randn(2, length, 2, 8, dtype=torch.float64)
    config = rope_config("group", factor=factor, neighbours=neighbours)
    inv_freq = rope_frequencies(BASE, 8, ORIGINAL)[0]
    expected = relative_scores(query, key, self_extend_map(length, factor, neighbours), inv_freq)
    # fp32 angles of up to 60 radians
    torch.testing.assert_close(merged_scores(config, length, query, key), expected, atol=1e-4, rtol=0)


@pytest.mark.promise("P6")
@pytest.mark.parametrize(("factor", "neighbours"), [(1, 5), (4, 40), (4, 64)], ids=["groups of 1", "w = S", "w > S"])
def test_self_extend_equals_rope(factor, neighbours):
    length = 40
    query, key = torch.randn(2, length, 2, 8, dtype=torch.float64)
    config = rope_config("group", factor=4, neighbours=neighbours)
    config.position_extension["factor"] = factor
    near_query, near_key, _ = plan_of(rope_config(None), pack(length))(query, key)
    expected = torch.einsum("qhd,khd->hqk", near_query, near_key)
    torch.testing.assert_close(merged_scores(config, length, query, key), expected, atol=1e-12, rtol=0)


@pytest.mark.promise("P6")
@given(length=st.integers(2, 64), group=st.integers(1, 9), neighbours=st.integers(1, 20))
def test_the_map_of_self_extend_is_antisymmetric_monotone_and_bounded(length, group, neighbours):
    index = torch.arange(length)
    left, right, floored = grouped_positions(index, group, neighbours)
    distance = index[:, None] - index
    far = torch.where(distance > 0, left[:, None] - floored, right[:, None] - floored)
    table = torch.where(distance.abs() < neighbours, distance, far)
    assert torch.equal(table, self_extend_map(length, group, neighbours))
    assert torch.equal(table, -table.T)
    assert (table.diff(dim=0) >= 0).all()  # a later query is never nearer to a key before it
    if neighbours % group == 0:
        assert table.max() <= max(neighbours, (length - neighbours) / group + neighbours)


# Biases ---------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("P7")
def test_alibi_slopes_are_the_published_ones():
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(12) == [2.0**-n for n in range(1, 9)] + [2.0**-n for n in (0.5, 1.5, 2.5, 3.5)]


@pytest.mark.promise("P7")
@pytest.mark.parametrize("heads", [1, 2, 4, 8, 12, 16, 20])
def test_alibi_slopes_are_those_of_bloom_and_mpt(heads):
    slopes = torch.tensor(alibi_slopes(heads))
    torch.testing.assert_close(slopes, build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1])
    mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
    torch.testing.assert_close(slopes.sort().values, mpt.sort().values)


@pytest.mark.promise("P7")
@pytest.mark.parametrize("heads", [8, 12])
def test_alibi_is_symmetric(heads):
    index = torch.arange(9)
    bias = AlibiBias(torch.tensor(alibi_slopes(heads))).dense(None, index, index)
    assert torch.equal(bias, bias.transpose(1, 2))
    assert torch.equal(bias[:, 1:, 1:], bias[:, :-1, :-1])
    assert torch.equal(bias[:, 0], -torch.tensor(alibi_slopes(heads))[:, None] * index)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 64), (8, 20), (4, 2)])
def test_buckets_are_those_of_mpnet_and_t5(buckets, distance):
    relative = torch.arange(-3000, 3001)
    ours = relative_position_bucket(relative, buckets, distance)
    assert torch.equal(ours, MPNetEncoder.relative_position_bucket(relative, buckets, distance))
    assert torch.equal(ours, T5Attention._relative_position_bucket(relative, True, buckets, distance))


def test_bucket_bias_is_a_lookup_by_key_minus_query():
    table = torch.randn(8, 3)
    index = torch.arange(40)
    bias = BucketBias(table, 20).dense(None, index, index)
    expected = table[MPNetEncoder.relative_position_bucket(index[None] - index[:, None], 8, 20)].permute(2, 0, 1)
    assert torch.equal(bias, expected)


# Sinusoids and learned tables -----------------------------------------------------------------------------------------


def test_sinusoids_are_those_of_distilbert():
    expected = torch.empty(300, 32)
    create_sinusoidal_embeddings(300, 32, expected)
    torch.testing.assert_close(sinusoidal_embeddings(torch.arange(300), 32), expected, atol=5e-5, rtol=0)


def test_sinusoids_know_distances():
    table = sinusoidal_embeddings(torch.arange(60), 32).double()
    products = table @ table.T
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(table.norm(dim=1), torch.full((60,), 4.0, dtype=torch.float64), atol=1e-5, rtol=0)
    # A step of k is one rotation, the same from every place.
    angle = 7 * 10_000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    planes = torch.complex(table[:, 1::2], table[:, 0::2])
    expected = planes[:-7] * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(planes[7:], expected, atol=1e-4, rtol=0)


@pytest.mark.promise("P9")
@given(rows=st.integers(1, 20), length=st.integers(1, 70))
def test_a_repeated_table_is_periodic(rows, length):
    length = max(rows, length)
    table = torch.randn(rows, 3)
    longer = extend_position_table(table, length, "repeat")
    assert longer.shape == (length, 3)
    assert all(torch.equal(longer[place], table[place % rows]) for place in range(length))


@pytest.mark.promise("P9")
@given(rows=st.integers(1, 20), length=st.integers(1, 70))
def test_an_interpolated_table_hits_the_original_rows(rows, length):
    length = max(rows, length)
    factor = math.ceil(length / rows)
    table = torch.randn(rows, 3)
    longer = extend_position_table(table, length, "interpolate")
    kept = longer[::factor]
    assert longer.shape == (length, 3)
    assert torch.equal(kept, table[: len(kept)])
    # What numpy's linear interpolation gives between them; the last row is repeated.
    place = torch.arange(length).clamp(max=factor * (rows - 1)).double() / factor
    low = place.floor().long()
    high = (low + 1).clamp(max=rows - 1)
    expected = torch.lerp(table[low].double(), table[high].double(), (place - low)[:, None])
    torch.testing.assert_close(longer.double(), expected, atol=1e-6, rtol=0)


def table_config(scheme, method, factor=4, **extension):
    return LongEmbedConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        position_embedding_type=scheme,
        max_position_embeddings=factor * ORIGINAL,
        position_extension={"method": method, "original_max_position_embeddings": ORIGINAL} | extension,
    )


def test_position_ids_of_each_method_on_a_long_document():
    documents = pack(4 * ORIGINAL)
    index = documents.token_index
    for scheme, method, expected in (
        ("absolute", "repeat", index),
        ("absolute", "interpolate", index),
        ("absolute", "group", index // 4),
        ("absolute", "restart", index % 5),
        ("sinusoidal", "repeat", index % ORIGINAL),
        ("sinusoidal", "interpolate", index / 4),
        ("sinusoidal", "group", index // 4),
        ("sinusoidal", "restart", index % 5),
    ):
        config = table_config(scheme, method, **({"period": 5} if method == "restart" else {}))
        assert torch.equal(position_ids(config, documents, index), expected), (scheme, method)


@pytest.mark.promise("P9")
@pytest.mark.parametrize("scheme", ["absolute", "sinusoidal"])
@pytest.mark.parametrize("method", POSITION_SCHEMES["absolute"].extensions)
@given(lengths=st.lists(st.integers(1, 3 * ORIGINAL), min_size=1, max_size=4))
def test_documents_within_the_original_context_read_the_original_rows(scheme, method, lengths):
    table = torch.randn(ORIGINAL, 3)
    config = table_config(scheme, method, **({"period": ORIGINAL} if method == "restart" else {}))
    documents = pack(*lengths)
    ids = position_ids(config, documents, documents.token_index)
    if scheme == "absolute":
        longer = method in ("repeat", "interpolate")
        rows = (extend_position_table(table, 4 * ORIGINAL, method) if longer else table)[ids]
        original = table
    else:
        rows, original = sinusoidal_embeddings(ids, 32), sinusoidal_embeddings(torch.arange(ORIGINAL), 32)
    for start, end in documents.bounds:
        if end - start <= ORIGINAL:
            assert torch.equal(rows[start:end], original[: end - start])


def test_the_factor_is_new_over_original_length_unless_given():
    extension = {"original_max_position_embeddings": 512}
    assert extension_factor(extension, 4096) == 8
    assert extension_factor(extension | {"factor": 3.0}, 4096) == 3.0
    assert extension_factor(extension, 512) == 1.0
