"""LSH attention against the definition of Reformer written out token by token, and against transformers' Reformer."""

import json
from collections import Counter
from itertools import pairwise, product
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from modeling_longembed import LongEmbedConfig, LongEmbedForMaskedLM, LongEmbedModel, pattern_lsh_longembed
from modeling_longembed.attention_longembed import KERNELS, LayerContext, LongEmbedAttention
from modeling_longembed.packing_longembed import PackedDocuments
from modeling_longembed.pattern_base_longembed import AttentionInputs
from modeling_longembed.pattern_lsh_longembed import LshAttention
from modeling_longembed.position_alibi_longembed import AlibiBias, alibi_slopes
from modeling_longembed.position_base_longembed import Positions
from modeling_longembed.position_buckets_longembed import BucketBias
from tests.covering import covering_first
from tests.modeling_longembed.memory_use import Allocated, KeptForBackward
from tests.modeling_longembed.tiny_checkpoints import save_checkpoint

HEADS, DIM = 3, 8
SCALING = DIM**-0.5
PATHS = ("eager", "longembed_varlen")


def make_inputs(lengths, pattern, dtype=torch.float64, **more):
    """Random inputs; the key is a tensor of its own, so that the gradients of query and key are seen apart."""
    trainable = torch.is_grad_enabled()
    query, value = (torch.randn(sum(lengths), HEADS, DIM, dtype=dtype, requires_grad=trainable) for _ in range(2))
    key = query.detach().clone().requires_grad_(trainable)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    documents = PackedDocuments(cu_seqlens, max(lengths))
    return AttentionInputs(query, key, value, pattern, documents, scaling=SCALING, dropout=0.0, **more)


def run(inputs, path):
    return KERNELS[path].function(inputs)[0]


def hashes_of(query, pattern, head):
    """Buckets `(R, L)` of one head's vectors: Kitaev et al. 2020, section 2, `argmax([xR; -xR])`."""
    length = len(query)
    count = pattern.buckets or 2 * -(-length // pattern.chunk)
    if length <= pattern.chunk or count == 1:
        return torch.zeros(1, length, dtype=torch.long)
    sizes = [count]
    if count > 2 * pattern.chunk:
        first = next(n for n in range(2, count + 2, 2) if n * n >= count)
        sizes = [first, next(n for n in range(2, count + 2, 2) if n * first >= count)]
    generator = torch.Generator().manual_seed(pattern.seed)
    shape = (1 if pattern.shared_rotations else HEADS, DIM, pattern.hashes, sum(sizes) // 2)
    rotations = torch.randn(shape, generator=generator).to(query.dtype)[0 if pattern.shared_rotations else head]
    buckets, start, scale = 0, 0, 1
    for size in sizes:
        rotated = torch.einsum("ld,drb->rlb", query, rotations[..., start : start + size // 2])
        buckets = buckets + scale * torch.cat([rotated, -rotated], -1).argmax(-1)
        start, scale = start + size // 2, scale * size
    return buckets


def reformer(inputs):
    """Section 2 and appendix A of the paper, a query at a time: `(T, H, D)`.

    o_i = sum_r exp(z_r - z) sum_{j in P_r} exp(q_i k_j - log N_ij - z_r) v_j, where N_ij is the number of rounds r in
    which j is in P_r, z_r the logarithm of the sum of the exponentials of round r, and z that of all rounds.
    `allow_duplicates` is this without N_ij. One round after the other is sorted and cut into chunks.
    """
    pattern, contexts = inputs.pattern, []
    for start, end in pairwise(inputs.documents.cu_seqlens.tolist()):
        query, key, value = (x[start:end].double() for x in inputs[:3])
        length = end - start
        of_heads = []
        for head in range(HEADS):
            if not length:
                continue
            buckets = hashes_of(query[:, head].detach(), pattern, head).tolist()
            unit = key[:, head] / (key[:, head].square().mean(-1, keepdim=True) + 1e-6).sqrt()
            scores = query[:, head] @ unit.T * inputs.scaling
            if inputs.bias is not None:
                index = torch.arange(length)
                scores = scores + inputs.bias.dense(query.transpose(0, 1), index, index)[head]
            orders = [sorted(range(length), key=lambda token, of=of: (of[token], token)) for of in buckets]
            chunks = [
                [(r, o[n : n + pattern.chunk]) for n in range(0, length, pattern.chunk)] for r, o in enumerate(orders)
            ]
            chain = [chunk for of_round in chunks for chunk in of_round]
            rows = []
            for i in range(length):
                seen = []  # the keys of each round
                for number, (r, chunk) in enumerate(chain):
                    if i not in chunk:
                        continue
                    before_r, before = chain[number - 1] if len(chain) > 1 else (r, [])
                    keys = [(r, j) for j in chunk] + [(before_r, j) for j in before]
                    if not pattern.across_buckets:
                        keys = [(s, j) for s, j in keys if s == r and buckets[s][j] == buckets[r][i]]
                    seen.append([j for _, j in keys if j != i and (j <= i or not inputs.causal)])
                times = Counter(j for keys in seen for j in keys)
                outputs, totals = [], []
                for keys in seen:
                    chosen = torch.tensor(keys or [i])
                    of_round = torch.full((1,), -1e5, dtype=torch.float64)
                    if keys:
                        of_round = scores[i, chosen]
                        if not pattern.allow_duplicates:
                            of_round = of_round - torch.tensor([times[j] for j in keys]).double().log()
                    outputs.append(of_round.softmax(0) @ value[chosen, head])
                    totals.append(of_round.logsumexp(0))
                shares = (torch.stack(totals) - torch.stack(totals).logsumexp(0)).exp()
                rows.append((shares[:, None] * torch.stack(outputs)).sum(0))
            of_heads.append(torch.stack(rows))
        contexts.append(torch.stack(of_heads, 1) if of_heads else query)
    return torch.cat(contexts)


def assert_equal_with_gradients(output, expected, leaves):
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    ours, theirs = (
        torch.autograd.grad((x * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
        for x in (output, expected)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.promise("A11")
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=settings.default.max_examples // 3)
@given(data=st.data())
def test_equals_the_definition(path, causal, data):
    pattern = LshAttention(
        chunk=data.draw(st.integers(1, 7)),
        hashes=data.draw(st.integers(1, 3)),
        buckets=data.draw(st.sampled_from([0, 0, 1, 2, 6])),
        seed=data.draw(st.integers(0, 5)),
        across_buckets=data.draw(st.booleans()),
        allow_duplicates=data.draw(st.booleans()),
        shared_rotations=data.draw(st.booleans()),
    )
    around = [0, 1, 2, pattern.chunk, pattern.chunk + 1, 2 * pattern.chunk, 11, 13, 23]
    lengths = data.draw(st.lists(st.sampled_from(around), min_size=1, max_size=3).filter(any))
    bias, leaves = data.draw(st.sampled_from([None, "alibi", "buckets"])), []
    if bias == "buckets":
        leaves = [torch.randn(8, HEADS, dtype=torch.float64, requires_grad=True)]
    bias = {
        "alibi": AlibiBias(torch.tensor(alibi_slopes(HEADS))),
        "buckets": BucketBias(*leaves, 20) if leaves else None,
    }.get(bias)
    inputs = make_inputs(lengths, pattern, causal=causal, bias=bias)
    with patch.object(pattern_lsh_longembed, "MAX_UNFUSED_SCORES", data.draw(st.sampled_from([1, 500, 2**24]))):
        assert_equal_with_gradients(run(inputs, path), reformer(inputs), [*inputs[:3], *leaves])


# The Reformer of transformers -----------------------------------------------------------------------------------------


REFORMER_OF_TRANSFORMERS = {"across_buckets": True, "allow_duplicates": True}


def transformers_lsh(pattern, length, causal):
    """transformers' layer. It counts buckets its own way, so it is told how many."""
    config = ReformerConfig(
        attn_layers=["lsh"],
        attention_head_size=DIM,
        num_attention_heads=HEADS,
        hidden_size=HEADS * DIM,
        lsh_attn_chunk_length=pattern.chunk,
        num_hashes=pattern.hashes,
        num_buckets=pattern.hash_sizes(length) or 2,  # 2: asked for and not used, a single chunk is not hashed
        is_decoder=causal,
    )
    return LSHSelfAttention(config).double()


def run_transformers(layer, pattern, states):
    """Context `(L, H * D)` of one document `(L, H * D)`, padded to whole chunks, with our rotations."""

    def rotations(shape, dtype, device):
        """Draw as transformers does with `hash_seed`, and in float32 whatever the precision of the layer."""
        return draw(shape, generator=torch.Generator().manual_seed(pattern.seed)).to(dtype)

    length, draw = len(states), torch.randn
    filling = -length % pattern.chunk if length > pattern.chunk else 0
    padded = torch.nn.functional.pad(states, (0, 0, 0, filling))[None]
    mask = torch.tensor([[1] * length + [0] * filling])
    with patch.object(torch, "randn", rotations):
        return layer(padded, attention_mask=mask).hidden_states[0, :length]


@pytest.mark.promise("A11")
@pytest.mark.parametrize(
    ("buckets", "hashes", "path", "causal"),
    covering_first(
        [
            pytest.param(
                *values, id=f"buckets{values[0]}-{values[1]}-{values[2]}-{'causal' if values[3] else 'both-ways'}"
            )
            for values in product([0, 2, 6, 22], [1, 2, 5], PATHS, [False, True])
        ]
    ),
)
def test_equals_the_reformer_of_transformers(buckets, hashes, path, causal):
    """The named choice; transformers neither hides the other buckets of a chunk nor divides by N_ij."""
    lengths = [64, 1, 7, 8, 9, 16, 61]
    entry = {"type": "lsh", "chunk": 8, "hashes": hashes, "buckets": buckets, "seed": 3} | REFORMER_OF_TRANSFORMERS
    width = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "num_hidden_layers": 1}
    config = LongEmbedConfig(attention_patterns=entry, attention_bias=False, is_causal=causal, **width)
    config._attn_implementation = path
    ours = LongEmbedAttention(config, config.get_patterns()[0]).double()
    torch.nn.init.normal_(ours.q_proj.weight, std=0.5)
    torch.nn.init.eye_(ours.o_proj.weight)
    states = torch.randn(sum(lengths), HEADS * DIM, dtype=torch.float64, requires_grad=True)
    documents = PackedDocuments(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths))
    output = ours(states, LayerContext(documents, Positions()))[0]

    expected = []
    for document in states.split(lengths):
        layer = transformers_lsh(ours.pattern, len(document), causal)
        layer.query_key.weight, layer.value.weight = ours.q_proj.weight, ours.v_proj.weight
        expected.append(run_transformers(layer, ours.pattern, document))
    assert_equal_with_gradients(output, torch.cat(expected), [states, ours.q_proj.weight, ours.v_proj.weight])


def test_equals_the_reformer_of_transformers_with_the_same_seed():
    """Nothing is patched: in float32 the rotations of a seed are those of transformers' `hash_seed`, head by head."""
    pattern = LshAttention(chunk=8, hashes=3, seed=5, **REFORMER_OF_TRANSFORMERS)
    layer = transformers_lsh(pattern, 64, causal=False).float().eval()
    layer.hash_seed = pattern.seed
    states = torch.randn(64, HEADS * DIM)
    query, value = (x(states).unflatten(-1, (HEADS, DIM)) for x in (layer.query_key, layer.value))
    documents = PackedDocuments(torch.tensor([0, 64], dtype=torch.int32), 64)
    inputs = AttentionInputs(query, query, value, pattern, documents, scaling=SCALING, dropout=0.0)
    expected = layer(states[None]).hidden_states[0]
    torch.testing.assert_close(run(inputs, "longembed_varlen").flatten(1), expected, atol=1e-5, rtol=1e-5)


# Each pair once -------------------------------------------------------------------------------------------------------


@pytest.mark.promise("A11")
@pytest.mark.parametrize("path", PATHS)
def test_rounds_that_find_the_same_keys_change_nothing(path):
    """Four rounds in which all tokens are in one bucket see the same keys, and give what one round does."""
    inputs = make_inputs([16], LshAttention(chunk=8, hashes=1, buckets=1))
    once = run(inputs, path)
    same = torch.ones(HEADS, 4, 16, dtype=torch.long)
    with patch.object(LshAttention, "hash", lambda self, inputs, query: same):
        four_times = run(inputs._replace(pattern=LshAttention(chunk=8, hashes=4)), path)
    # The second chunk sees the first. The first sees the last chunk of the same round only where there is one round.
    torch.testing.assert_close(four_times[8:], once[8:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_a_pair_that_meets_more_often_does_not_weigh_more(path):
    """The weights of two equal keys are equal though one meets the query in both rounds and the other in one."""
    rounds = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).expand(HEADS, 2, 6)
    inputs = make_inputs([6], LshAttention(chunk=3, hashes=2))
    with torch.no_grad():
        inputs.key[2] = inputs.key[1]
        inputs = inputs._replace(value=torch.eye(6, dtype=torch.float64)[:, None].expand(-1, HEADS, -1))
        with patch.object(LshAttention, "hash", lambda self, inputs, query: rounds):
            weights = run(inputs, path)[0]  # of the first query: (H, 6)
            twice = run(inputs._replace(pattern=LshAttention(chunk=3, hashes=2, allow_duplicates=True)), path)[0]
    torch.testing.assert_close(weights[:, 1], weights[:, 2], atol=1e-12, rtol=0)
    torch.testing.assert_close(twice[:, 1], 2 * twice[:, 2], atol=1e-12, rtol=0)


# Dense attention ------------------------------------------------------------------------------------------------------


@pytest.mark.promise("A11")
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", [LshAttention(chunk=40), LshAttention(chunk=17, hashes=1, buckets=1)], ids=str)
def test_one_chunk_is_dense_attention_with_shared_queries_and_keys(pattern, path, causal):
    lengths = [17, 1, 2, 9]
    inputs = make_inputs(lengths, pattern, causal=causal)
    expected = []
    for query, key, value in zip(*(x.split(lengths) for x in inputs[:3]), strict=True):
        mask = ~torch.eye(len(query), dtype=torch.bool)
        mask = mask.tril() if causal else mask
        mask = mask | (torch.eye(len(query), dtype=torch.bool) & ~mask.any(dim=1))  # itself, if there is no other
        states = (x.transpose(0, 1) for x in (query, rms_norm(key, (DIM,), eps=1e-6), value))
        expected.append(scaled_dot_product_attention(*states, attn_mask=mask, scale=SCALING).transpose(0, 1))
    assert_equal_with_gradients(run(inputs, path), torch.cat(expected), inputs[:3])


def inputs_with_neighbours(length, pattern, seed):
    """Every vector has three others that point almost the same way, anywhere. The context is the weights."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(length // 4, 2, 16, generator=generator).repeat(4, 1, 1)
    noise = torch.randn(length, 2, 16, generator=generator)
    query = 4 * (centres[torch.randperm(length, generator=generator)] + 0.3 * noise)
    value = torch.eye(length)[:, None].expand(-1, 2, -1)
    documents = PackedDocuments(torch.tensor([0, length], dtype=torch.int32), length)
    return AttentionInputs(query, query, value, pattern, documents, scaling=16**-0.5, dropout=0.0)


def test_more_hashes_reach_more_of_the_largest_weights():
    reached = []
    for hashes in (1, 2, 4, 8):
        shares = []
        for seed in range(3):
            inputs = inputs_with_neighbours(512, LshAttention(chunk=16, hashes=hashes, seed=seed), seed)
            weights = run(inputs, "longembed_varlen").transpose(0, 1)
            query = inputs.query.transpose(0, 1)
            scores = query @ rms_norm(query, (16,)).transpose(1, 2) * inputs.scaling
            true = scores.masked_fill(torch.eye(512, dtype=torch.bool), -1e5).softmax(-1).topk(3)
            found = weights.gather(-1, true.indices) > 0
            shares.append(((true.values * found).sum() / true.values.sum()).item())
        reached.append(sum(shares) / len(shares))
    # What R rounds miss that are independent of each other is missed^R.
    for before, after in pairwise(reached):
        assert 1 - after < 0.8 * (1 - before)
    assert reached[0] > 0.25  # 32 keys of 512 at random: 0.06
    assert reached[-1] > 0.9


# The seed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_document_is_hashed_alike_at_any_time_and_in_any_batch(path):
    lengths = [9, 61, 40]
    inputs = make_inputs(lengths, LshAttention(chunk=4, hashes=2))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    output = run(inputs, path)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it move the draws of others
    torch.manual_seed(2)
    for training in (True, True, False):
        again = inputs._replace(documents=PackedDocuments(inputs.documents.cu_seqlens, 61), training=training)
        assert torch.equal(run(again, path), output)

    alone = PackedDocuments(torch.tensor([0, 61], dtype=torch.int32), 61)
    query, key, value = (x[9:70] for x in inputs[:3])
    single = inputs._replace(query=query, key=key, value=value, documents=alone)
    torch.testing.assert_close(run(single, path), output[9:70], atol=1e-12, rtol=0)

    other = inputs._replace(pattern=LshAttention(chunk=4, hashes=2, seed=1))
    assert (run(other, path) - output).abs().max() > 0.01


def buckets_of(model, states):
    """The buckets that each attention sublayer would give the same vectors, `(layers, H, R, L)`."""
    found = []
    for layer in model.layers:
        if layer.attention is not None:
            width = (layer.attention.config.num_attention_heads, layer.attention.head_dim)
            query = states.unflatten(-1, width)
            documents = PackedDocuments(torch.tensor([0, len(states)], dtype=torch.int32), len(states))
            inputs = AttentionInputs(query, query, query, layer.attention.pattern, documents, scaling=1.0, dropout=0.0)
            found.append(layer.attention.pattern.hash(inputs, query.transpose(0, 1)))
    return torch.stack(found)


def test_every_head_layer_and_round_has_its_own_rotations():
    width = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 32}
    states = torch.randn(64, 16).repeat(1, 2)  # both heads have the same vectors
    buckets = buckets_of(
        LongEmbedModel(LongEmbedConfig(attention_patterns={"type": "lsh", "chunk": 8}, **width)), states
    )
    ways = buckets.flatten(0, 2)
    assert len(ways) == 3 * 2 * 4
    assert len(ways.unique(dim=0)) == len(ways)
    shared = [{"type": "lsh", "chunk": 8, "seed": 0, "shared_rotations": True}] * 3
    ways = buckets_of(LongEmbedModel(LongEmbedConfig(attention_patterns=shared, **width)), states).flatten(0, 2)
    assert len(ways.unique(dim=0)) == 4  # the rounds alone differ


@pytest.mark.parametrize("path", PATHS)
def test_some_of_the_heads_compute_what_they_do_among_all(path):
    """Under tensor parallelism a process has some heads, which keep their own rotations."""
    inputs = make_inputs([40], LshAttention(chunk=4, hashes=2))
    torch.testing.assert_close(run(inputs.heads(slice(1, 3)), path), run(inputs, path)[:, 1:3], atol=1e-12, rtol=0)


def test_the_seeds_of_the_sublayers_are_in_the_config_and_stay_with_them():
    width = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 32}

    def seeds(entries):
        return [entry["seed"] for entry in LongEmbedConfig(attention_patterns=entries, **width).attention_patterns]

    assert seeds("lsh") == [0, 1, 2]
    assert seeds(["lsh", "lsh", "lsh"]) == [0, 1, 2]
    assert seeds({"type": "lsh", "seed": 7}) == [7, 8, 9]
    assert seeds([{"type": "lsh", "seed": 7}, "lsh", {"type": "lsh", "seed": 7}]) == [7, 1, 7]
    model = LongEmbedModel(LongEmbedConfig(attention_patterns="lsh", **width)).keep_layers([2])
    assert [entry["seed"] for entry in model.config.attention_patterns] == [2]
    assert model.layers[0].attention.pattern.seed == 2


@pytest.mark.parametrize("across_buckets", [False, True])
def test_a_config_of_an_earlier_version_computes_what_that_version_did(tmp_path, across_buckets):
    """Such a config has the five parameters of that time: pairs count once a round, all heads and layers hash alike."""
    earlier = {"type": "lsh", "chunk": 8, "hashes": 3, "buckets": 0, "seed": 1, "across_buckets": across_buckets}
    width = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "num_hidden_layers": 2, "vocab_size": 32}
    LongEmbedConfig(attention_patterns=earlier, **width).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"attention_patterns": [earlier] * 2}))
    loaded = LongEmbedConfig.from_pretrained(tmp_path)
    patterns = loaded.get_patterns()
    assert patterns == [LshAttention(8, 3, 0, 1, across_buckets, allow_duplicates=True, shared_rotations=True)] * 2
    loaded.save_pretrained(tmp_path)
    assert LongEmbedConfig.from_pretrained(tmp_path).get_patterns() == patterns
    # An entry that somebody writes today is today's, in a new config or at load.
    assert not LongEmbedConfig(attention_patterns=earlier, **width).get_patterns()[0].allow_duplicates
    changed = LongEmbedConfig.from_pretrained(tmp_path, attention_patterns=[{"type": "lsh", "seed": 3}, "lsh"])
    assert changed.get_patterns() == [LshAttention(seed=3), LshAttention(seed=1)]


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [LongEmbedModel, LongEmbedForMaskedLM])
def test_another_encoder_cannot_be_converted_to_it(cls, tmp_path):
    save_checkpoint(tmp_path, "bert", with_head=True)
    for patterns in ("lsh", ["full", {"type": "lsh", "chunk": 8}]):
        with pytest.raises(ValueError, match=r"^attention_patterns: 'lsh' has one projection .*; choose") as refusal:
            cls.from_encoder(tmp_path, attention_patterns=patterns)
        assert "\n" not in str(refusal.value)


# What it costs --------------------------------------------------------------------------------------------------------


def test_a_document_is_sorted_once_and_its_order_inverted_once(monkeypatch):
    """Sorting is what hashing costs beside the scores."""
    inputs, calls, argsort = make_inputs((60,), LshAttention(chunk=8, hashes=3)), [], torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda x, *a, **k: calls.append(x.shape) or argsort(x, *a, **k))
    run(inputs, "longembed_varlen")
    assert calls == [(HEADS, 3, 64)] * 2


@pytest.mark.parametrize("buckets", [0, 1])
def test_memory_grows_with_the_length_and_not_its_square(buckets):
    """Forward and backward at 8,192 tokens: what is allocated on the way, and what is kept for the backward pass."""
    largest, kept = [], []
    for length in (4096, 8192):
        inputs = make_inputs([length], LshAttention(chunk=32, hashes=2, buckets=buckets), torch.float32, training=True)
        with (
            patch.object(pattern_lsh_longembed, "MAX_UNFUSED_SCORES", 2**17),
            Allocated() as allocated,
            KeptForBackward() as held,
        ):
            run(inputs, "longembed_varlen").sum().backward()
        largest.append(allocated.largest)
        kept.append(held.total)
    assert largest[1] <= 2.1 * largest[0]
    assert kept[1] <= 2.1 * kept[0]
    assert largest[1] < 8192**2 / 100
    assert kept[1] < 8 * 3 * 8192 * HEADS * DIM  # a few times query, key and value
