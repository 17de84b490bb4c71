"""S2-Attn: against the roll of the paper written out here, and what the shift does for far tokens and for causality."""

import copy

import pytest
import torch

from modeling_longembed import LongEmbedModel
from modeling_longembed.packing_longembed import PackedDocuments, split_documents
from modeling_longembed.pattern_base_longembed import AttentionInputs, Places
from modeling_longembed.pattern_registry_longembed import build_pattern

HEADS, DIM = 4, 8


def one_document(length):
    return PackedDocuments(torch.tensor([0, length], dtype=torch.int32), length)


def attend(pattern, query, key, value, causal=False):
    inputs = AttentionInputs(
        query, key, value, pattern, one_document(len(query)), scaling=0.3, dropout=0.0, causal=causal
    )
    return pattern.attend(inputs)


def roll_attention(query, key, value, size, causal=False):
    """Algorithm 1 of the LongLoRA paper on one document of whole groups: roll half the heads, attend in groups, roll
    back. `(L, H, D)`."""
    half = HEADS // 2

    def shift(x, by):
        return torch.cat([x[:, :half], x[:, half:].roll(by, dims=0)], dim=1)

    groups = [shift(x, -(size // 2)).view(-1, size, HEADS, DIM).transpose(1, 2) for x in (query, key, value)]
    scores = groups[0] @ groups[1].transpose(2, 3) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(size, size).triu(1).bool(), float("-inf"))
    context = (scores.softmax(-1) @ groups[2]).transpose(1, 2).reshape(-1, HEADS, DIM)
    return shift(context, size // 2)


@pytest.mark.promise("A5")
@pytest.mark.parametrize("groups", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [2, 5, 8])
def test_with_wrap_it_is_the_roll_of_the_paper(size, groups):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, size * groups, HEADS, DIM).double()
    pattern = build_pattern({"type": "shifted", "size": size, "wrap": True})
    expected = roll_attention(query, key, value, size)
    torch.testing.assert_close(attend(pattern, query, key, value), expected, atol=1e-12, rtol=0)


@pytest.mark.promise("A5")
@pytest.mark.parametrize("wrap", [True, False])
def test_one_group_is_full_attention(wrap):
    query, key, value = torch.randn(3, 16, HEADS, DIM).double()
    pattern = build_pattern({"type": "shifted", "size": 16, "wrap": wrap})
    expected = attend(build_pattern("full"), query, key, value)
    torch.testing.assert_close(attend(pattern, query, key, value), expected, atol=1e-12, rtol=0)


@pytest.mark.promise("A5")
def test_the_shifted_heads_are_the_plain_ones_of_the_rolled_document():
    torch.manual_seed(0)
    size = 8
    inputs = torch.randn(3, 5 * size, HEADS, DIM).double()
    pattern = build_pattern({"type": "shifted", "size": size, "wrap": True})
    swapped = inputs.roll(HEADS // 2, dims=2).roll(-(size // 2), dims=1)  # now the plain half computes them
    plain = attend(pattern, *swapped).roll(size // 2, dims=0)[:, : HEADS // 2]
    torch.testing.assert_close(attend(pattern, *inputs)[:, HEADS // 2 :], plain, atol=1e-12, rtol=0)


@pytest.mark.promise("A5")
def test_rolling_back_is_the_exact_inverse():
    documents = PackedDocuments(torch.tensor([0, 40, 45, 45, 128], dtype=torch.int32), 83)
    pattern = build_pattern({"type": "shifted", "size": 8, "wrap": True})
    order = pattern.rolled(documents)
    assert torch.equal(order[order.argsort()], torch.arange(128))
    for start, end in documents.bounds:  # every document by itself; one of a single group stays as it is
        shift = 4 if end - start > 8 else 0
        assert torch.equal(order[start:end], torch.arange(start, end).roll(-shift))


def test_groups_are_counted_in_each_document_in_tokens():
    cuts = split_documents(torch.tensor([0, 20, 23, 23, 40], dtype=torch.int32), 8, 4)
    assert cuts.tolist() == [0, 4, 12, 20, 23, 27, 35, 40]


@pytest.mark.promise("A5")
def test_the_roll_lets_a_causal_model_see_the_future_and_segments_do_not():
    torch.manual_seed(0)
    size = 8
    query, key, value = torch.randn(3, 4 * size, HEADS, DIM).double()
    edited = [x.clone() for x in (key, value)]
    for x in edited:
        x[-1] += 1
    rolled = (roll_attention(query, *kv, size, causal=True) for kv in ((key, value), edited))
    first, second = rolled
    assert (first[: size // 2] - second[: size // 2]).abs().max() > 1e-3  # the end leaks into the beginning
    pattern = build_pattern({"type": "shifted", "size": size})
    first, second = (attend(pattern, query, *kv, causal=True) for kv in ((key, value), edited))
    assert torch.equal(first[:-1], second[:-1])


@pytest.mark.promise("A6")
@pytest.mark.parametrize("groups", [2, 3, 4, 8])
def test_layers_until_every_token_has_heard_of_every_other(groups):
    size, layers = 4, {}
    for wrap in (True, False):
        length = size * groups
        fields = (torch.arange(length), torch.full((length,), length), torch.zeros(length, dtype=torch.bool))
        query, key = (Places(*(x.view(shape) for x in fields)) for shape in ((-1, 1), (1, -1)))
        pattern = build_pattern({"type": "shifted", "size": size, "wrap": wrap})
        seen = pattern.visible(query, key, torch.arange(2)[:, None, None], 2).any(0).double()
        reached, layers[wrap] = torch.eye(length).double(), 0
        while not reached.all():
            reached, layers[wrap] = seen @ reached, layers[wrap] + 1
    assert layers == {True: groups, False: 2 * groups - 1}


@pytest.mark.promise("X5")
def test_a_model_trains_shifted_and_serves_full_with_the_same_weights(build_tiny_model, tmp_path):
    shifted = {"type": "shifted", "size": 8}
    fields = {"hidden_dropout_prob": 0.0, "position_embedding_type": "rope"}
    model = build_tiny_model(attention_patterns="full", training_attention_patterns=shifted, **fields).double()
    full, trains = (build_tiny_model(attention_patterns=p, **fields).double() for p in ("full", shifted))
    input_ids = torch.randint(1, 64, (2, 37))

    def output(model):
        return model(input_ids).last_hidden_state

    for other in (full, trains):
        other.load_state_dict(model.state_dict())
    assert torch.equal(output(model.eval()), output(full.eval()))
    assert torch.equal(output(model.train()), output(trains.train()))
    assert (output(full) - output(trains)).abs().max() > 1e-3

    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output(model).square().sum().backward()
    optimizer.step()
    assert any((before[name] != tensor).any() for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = LongEmbedModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.training_attention_patterns == model.config.training_attention_patterns
    torch.testing.assert_close(output(loaded.eval()), output(model.eval()), atol=1e-12, rtol=0)
    torch.testing.assert_close(output(loaded.train()), output(model.train()), atol=1e-12, rtol=0)
