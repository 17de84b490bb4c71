"""`attn_implementation="longembed_varlen"` on models of transformers, against their eager attention and their masks."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from experiments.gpu.foreign import COMMON, FOREIGN, check_foreign, foreign_model, padded_batch, states_and_gradient
from modeling_longembed import attention_interface_longembed as attention_interface
from modeling_longembed.attention_interface_longembed import (
    REFUSED,
    PackedMask,
    longembed_varlen,
    packed_mask,
    read_mask_function,
)

BATCH, LENGTH = 3, 23
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # the models' eager softmax is in float32


def masks():
    """Padding on the right, inside a sequence, and on the left."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0, 17:] = False
    mask[1, [4, 5, 11]] = False
    mask[2, :9] = False
    return mask


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_of_transformers_computes_what_its_eager_attention_does(name, left):
    batch = padded_batch("cpu", left)
    expected, found = (states_and_gradient(foreign_model(name, k), batch) for k in ("eager", "longembed_varlen"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("name", FOREIGN)
def test_padding_inside_a_sequence_counts_in_windows_as_it_does_there(name):
    batch = {"input_ids": torch.randint(3, COMMON["vocab_size"], (BATCH, LENGTH)), "attention_mask": masks().long()}
    batch["position_ids"] = torch.arange(LENGTH)[None].expand(BATCH, -1)
    expected, found = (
        foreign_model(name, kernel)(**batch).last_hidden_state[masks()] for kernel in ("eager", "longembed_varlen")
    )
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_no_token_of_a_causal_model_sees_a_later_one(name):
    model, input_ids = foreign_model(name, "longembed_varlen"), torch.randint(3, 200, (1, LENGTH))
    changed = input_ids.clone()
    changed[0, -1] += 1
    states, others = (model(ids).last_hidden_state[0] for ids in (input_ids, changed))
    assert torch.equal(states[:-1], others[:-1])
    assert not torch.equal(states[-1], others[-1])


def test_a_decoder_that_its_config_makes_bidirectional_is_bidirectional():
    batch = padded_batch("cpu")
    expected, found = (
        states_and_gradient(foreign_model("llama", kernel, is_causal=False), batch)
        for kernel in ("eager", "longembed_varlen")
    )
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    causal, _ = states_and_gradient(foreign_model("llama", "longembed_varlen"), batch)
    assert (causal - found[0]).abs().max() > 0.1


@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_sequences_are_computed_as_each_alone(name, given):
    model, lengths = foreign_model(name, "longembed_varlen"), (9, 1, 30)
    input_ids = torch.randint(3, 200, (1, sum(lengths)))
    arguments = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "use_cache": False}
    if given == "cu_seq_lens":
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        arguments |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 30, "max_length_k": 30}
    packed = model(input_ids, **arguments).last_hidden_state[0].split(lengths)
    eager = foreign_model(name, "eager")
    for states, ids in zip(packed, input_ids.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(states, eager(ids).last_hidden_state[0], **CLOSE)


def test_the_lengths_of_packed_sequences_are_read_once_for_all_layers(monkeypatch):
    model, made = foreign_model("llama", "longembed_varlen"), []
    original = attention_interface.PackedDocuments

    class Counted(original):
        def __init__(self, *arguments, **options):
            made.append(arguments)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(attention_interface, "PackedDocuments", Counted)
    cu_seqlens = torch.tensor([0, 9, 10, 40], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    model(torch.randint(3, 200, (1, 40)), use_cache=False, **lengths)
    assert COMMON["num_hidden_layers"] == 3
    assert len([arguments for arguments in made if arguments and arguments[0] is cu_seqlens]) == 1


def test_another_packing_under_the_same_mask_is_not_taken_for_the_first():
    mask, states = packed_mask(mask_function=causal_mask_function), [x[:1] for x in random_states()]
    for first in range(1, LENGTH):
        lengths = torch.tensor([0, first, LENGTH], dtype=torch.int32)  # the allocator may give it the place of the last
        found, _ = longembed_varlen(None, *states, mask, cu_seq_lens_q=lengths)
        numbers = (torch.arange(LENGTH) >= first).long()
        pairs = (numbers[:, None] == numbers) & (torch.arange(LENGTH)[:, None] >= torch.arange(LENGTH))
        torch.testing.assert_close(found, dense(*states, pairs.expand(1, 4, -1, -1)))


def cross_attending_model(name, kernel):
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name == "bart":
        layers = {f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
        fields = {"d_model": 32, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, **layers}
    else:
        fields = {key: COMMON[key] for key in COMMON if key != "vocab_size"} | {"is_decoder": True}
        fields |= {"add_cross_attention": True}
    config = AutoConfig.for_model(name, vocab_size=200, **ids, **fields)
    return AutoModel.from_config(config, attn_implementation=kernel).eval()


@pytest.mark.parametrize("name", ["bart", "bert", "gpt2"])
def test_cross_attention_is_refused_also_with_as_many_keys_as_queries(name):
    """Its mask pads keys, which are no queries: the same place of the other side would be left out."""
    model, tokens = cross_attending_model(name, "longembed_varlen"), torch.randint(3, 200, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0
    if name == "bart":
        inputs = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens}
    else:
        width = model.config.hidden_size
        inputs = {
            "input_ids": tokens,
            "encoder_hidden_states": torch.randn(2, 7, width),
            "encoder_attention_mask": mask,
        }
    with pytest.raises(ValueError, match=r"^longembed_varlen does not compute cross-attention \(\w+\); load the model"):
        model(**inputs, use_cache=False)


def test_attention_dropout_is_applied_in_training_alone():
    model, batch = foreign_model("bert", "longembed_varlen", hidden_dropout_prob=0.0), padded_batch("cpu")
    model.config.attention_probs_dropout_prob = 0.5
    assert torch.equal(model(**batch).last_hidden_state, model(**batch).last_hidden_state)
    model.train()
    assert not torch.equal(model(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_a_cache_of_keys_is_refused_by_name():
    model = foreign_model("llama", "longembed_varlen")
    first = model(torch.tensor([[5, 6, 7]]), use_cache=True)
    with pytest.raises(ValueError, match=r"^longembed_varlen: 1 queries and 4 keys; it computes neither a cache of"):
        model(torch.tensor([[8]]), past_key_values=first.past_key_values, use_cache=True)


def test_the_check_of_the_gpu_passes_here_and_finds_a_model_that_became_bidirectional(monkeypatch):
    monkeypatch.setattr("experiments.gpu.foreign.FOREIGN", {"llama": FOREIGN["llama"]})
    assert all(check.passed for check in check_foreign("cpu"))
    monkeypatch.setattr("modeling_longembed.attention_interface_longembed.segment_attention", bidirectional)
    assert not any(check.passed for check in check_foreign("cpu"))


def bidirectional(query, key, value, cu_seqlens, longest, scaling, dropout, causal):
    ends = cu_seqlens.tolist()
    rows = [slice(start, end) for start, end in pairwise(ends)]
    parts = [[x[at].transpose(0, 1) for x in (query, key, value)] for at in rows]
    return torch.cat([scaled_dot_product_attention(*part, scale=scaling).transpose(0, 1) for part in parts])


# Mask functions -------------------------------------------------------------------------------------------------------


def blocks_of_three(batch, head, query, key):
    return query // 3 == key // 3


def odd_heads_see_themselves(batch, head, query, key):
    return (head % 2 == 0) | (query == key)


SEQUENCES = torch.tensor([[0] * 10 + [1] * 4 + [2] * 9, [0] * LENGTH, [0] + [1] * 22])
PLACES = torch.cat([torch.arange(10), torch.arange(4), torch.arange(9)]).expand(BATCH, -1)
FUNCTIONS = {
    "bidirectional": (bidirectional_mask_function, True),
    "causal": (causal_mask_function, True),
    "window": (sliding_window_bidirectional_mask_function(4), True),
    "causal window": (sliding_window_causal_mask_function(4), True),
    "window of itself": (sliding_window_causal_mask_function(1), True),
    "causal within a window": (and_masks(causal_mask_function, sliding_window_bidirectional_mask_function(4)), True),
    "earlier within a window": (and_masks(masking_utils.sliding_window_overlay(4), bidirectional_mask_function), True),
    "packed": (and_masks(causal_mask_function, masking_utils.packed_sequence_mask_function(SEQUENCES)), True),
    "chunks": (chunked_causal_mask_function(5, torch.tensor([0, 0, 9])), False),
    "blocks": (or_masks(causal_mask_function, blocks_of_three), False),
    "blocks within": (and_masks(causal_mask_function, blocks_of_three), False),
    "heads": (odd_heads_see_themselves, False),
    "partial": (partial(causal_mask_function), False),
}


def random_states(heads=4, key_heads=2, value_width=8):
    shapes = ((heads, 8), (key_heads, 8), (key_heads, value_width))
    return [torch.randn(BATCH, n, LENGTH, width, dtype=torch.float64, requires_grad=True) for n, width in shapes]


def dense(query, key, value, visible, scale=None):
    """The definition on visible pairs `(B, 1 or H, S, S)`; zeros where nothing is seen."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    blind = ~visible.any(-1, keepdim=True)
    context = scaled_dot_product_attention(query, key, value, attn_mask=visible | blind, scale=scale)
    return context.masked_fill(blind, 0.0).transpose(1, 2)


def visible_pairs(function, padding):
    """The mask function on all pairs, for each head."""
    heads = torch.arange(4)[None, :, None, None]
    index = torch.arange(LENGTH)
    batch = torch.arange(BATCH)[:, None, None, None]
    found = function(batch, heads, index[None, None, :, None], index[None, None, None, :])
    return found.expand(BATCH, 4, LENGTH, LENGTH) & padding[:, None, None, :]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_mask_function_is_honoured(name):
    function, is_read = FUNCTIONS[name]
    assert (read_mask_function(function) is not None) == is_read
    for padding in (torch.ones(BATCH, LENGTH, dtype=torch.bool), masks()):
        expected_pairs = visible_pairs(function, padding)
        if name not in ("heads", "partial"):  # transformers' own expansion, which has one head
            theirs = sdpa_mask(
                batch_size=BATCH,
                q_length=LENGTH,
                kv_length=LENGTH,
                mask_function=function,
                attention_mask=padding,
                allow_is_causal_skip=False,
                allow_is_bidirectional_skip=False,
            )
            assert torch.equal(theirs.expand(-1, 4, -1, -1), expected_pairs)
        states = random_states()
        expected = dense(*states, expected_pairs)
        mask = packed_mask(mask_function=function, attention_mask=padding, batch_size=BATCH, q_length=LENGTH)
        found, weights = longembed_varlen(None, *states, mask)
        assert weights is None
        assert (found[~padding] == 0).all()
        torch.testing.assert_close(found[padding], expected[padding], atol=1e-12, rtol=1e-12)
        weighting = torch.linspace(-1, 1, int(padding.sum()) * 32, dtype=torch.float64).view(-1, 4, 8)
        gradients = [torch.autograd.grad((x[padding] * weighting).sum(), states) for x in (found, expected)]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_packed_places_are_those_in_the_sequence():
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    if remap is None:
        pytest.skip("this transformers counts places in the whole row, which gives the same masks")
    function = masking_utils.packed_sequence_compatibility_function(
        sliding_window_causal_mask_function(4), PLACES, SEQUENCES[:1].expand(BATCH, -1)
    )
    states, everything = random_states(), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    found, _ = longembed_varlen(None, *states, packed_mask(mask_function=function))
    torch.testing.assert_close(found, dense(*states, visible_pairs(function, everything)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["chunks", "blocks"])
def test_a_mask_of_places_in_the_row_is_refused_for_packed_sequences(name):
    """In transformers each sequence has chunks of its own; its predicate would count them from the row's beginning."""
    function, lengths = FUNCTIONS[name][0], (10, 4, 9)
    states = [x[:1] for x in random_states()]
    mask, cu_seqlens = packed_mask(mask_function=function), torch.tensor([0, 10, 14, LENGTH], dtype=torch.int32)
    alone = [x.split(lengths, dim=2) for x in states]
    expected = []
    for query, key, value in zip(*alone, strict=True):
        index = torch.arange(query.shape[2])
        pairs = function(torch.tensor(0), torch.tensor(0), index[:, None], index).expand(1, 4, -1, -1)
        expected.append(dense(query, key, value, pairs))
    for _ in range(2):  # no layer finds in the cache what was refused
        with pytest.raises(ValueError, match=r"counts places in the whole row .* leave that out and give position_ids"):
            longembed_varlen(None, *states, mask, cu_seq_lens_q=cu_seqlens)
    if not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        return  # what the error advises gives other chunks in this transformers, in its eager attention too
    advised = masking_utils.packed_sequence_compatibility_function(function, PLACES[:1], SEQUENCES[:1])
    found, _ = longembed_varlen(None, *states, packed_mask(mask_function=advised))
    torch.testing.assert_close(found, torch.cat(expected, dim=1))


def test_the_packed_rows_are_found_once_for_all_layers():
    mask = packed_mask(mask_function=causal_mask_function, attention_mask=masks())
    assert mask.rows(BATCH, LENGTH, torch.device("cpu")) is mask.rows(BATCH, LENGTH, torch.device("cpu"))


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_the_entry_in_transformers_table_serves_other_models(side):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=64, **sizes, initializer_range=0.3)
    model = BertModel(config, add_pooling_layer=False).eval()
    input_ids = torch.randint(1, 64, (3, 20))
    attention_mask = torch.ones_like(input_ids)
    if side == "holes":
        attention_mask = torch.bernoulli(torch.full((3, 20), 0.6)).long()
    else:
        attention_mask[1, slice(12, None) if side == "right" else slice(0, 8)] = 0
    outputs = {}
    for name in ("sdpa", "longembed_varlen"):
        model.set_attn_implementation(name)
        outputs[name] = model(input_ids, attention_mask=attention_mask).last_hidden_state[attention_mask == 1]
    torch.testing.assert_close(outputs["longembed_varlen"], outputs["sdpa"], atol=1e-5, rtol=0)
    # Without the registered mask function the padding would have been seen: it makes a difference here.
    assert (model(input_ids).last_hidden_state[attention_mask == 1] - outputs["sdpa"]).abs().max() > 1e-2


def test_the_entry_takes_packed_input_too():
    query, key, value = torch.randn(3, 1, 4, 12, 8)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    output, _ = longembed_varlen(None, query, key, value, None, cu_seq_lens_q=cu_seqlens, is_causal=False)
    for start, end in ((0, 5), (5, 12)):
        part = (x[:, :, start:end] for x in (query, key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(*part).transpose(1, 2)
        torch.testing.assert_close(output[:, start:end], expected, atol=1e-6, rtol=0)


# What the caller asks for ---------------------------------------------------------------------------------------------


def test_scaling_and_a_soft_cap_are_those_of_the_caller():
    query, key, value = random_states(key_heads=4)
    mask = packed_mask(mask_function=sliding_window_causal_mask_function(6), attention_mask=masks())
    pairs = visible_pairs(sliding_window_causal_mask_function(6), masks())
    found, _ = longembed_varlen(None, query, key, value, mask, scaling=0.7)
    torch.testing.assert_close(found[masks()], dense(query, key, value, pairs, scale=0.7)[masks()])
    found, _ = longembed_varlen(None, query, key, value, mask, scaling=0.7, softcap=1.5)
    scores = 1.5 * torch.tanh(0.7 * query @ key.transpose(2, 3) / 1.5)
    expected = torch.softmax(scores.masked_fill(~pairs, -1e30), dim=-1) @ value
    torch.testing.assert_close(found[masks()], expected.transpose(1, 2)[masks()])


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_keys_and_values_are_copied_for_grouped_heads_alone_and_without_the_padding(key_heads, monkeypatch):
    states, mask = random_states(key_heads=key_heads), packed_mask(attention_mask=masks())
    expected = dense(*states, visible_pairs(causal_mask_function, masks()))
    copied, repeat = [], torch.Tensor.repeat_interleave
    monkeypatch.setattr(
        torch.Tensor, "repeat_interleave", lambda x, *a, **k: copied.append(x.shape) or repeat(x, *a, **k)
    )
    found, _ = longembed_varlen(None, *states, mask)
    assert copied == ([] if key_heads == 4 else [(int(masks().sum()), key_heads, 8)] * 2)
    monkeypatch.undo()
    torch.testing.assert_close(found[masks()], expected[masks()])


def test_values_may_have_another_width():
    states = random_states(value_width=5)
    found, _ = longembed_varlen(None, *states, packed_mask(mask_function=causal_mask_function))
    everything = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(found, dense(*states, visible_pairs(causal_mask_function, everything)))


@pytest.mark.parametrize("function", [causal_mask_function, sliding_window_causal_mask_function(4), blocks_of_three])
def test_dropout_keeps_the_mean(function):
    states = [x.detach() for x in random_states()]
    mask = packed_mask(mask_function=function)
    expected, _ = longembed_varlen(None, *states, mask)
    draws = torch.stack([longembed_varlen(None, *states, mask, dropout=0.3)[0] for _ in range(60)])
    assert draws.std(dim=0).max() > 0.1
    error = (draws.mean(dim=0) - expected).abs() / (draws.std(dim=0) / 60**0.5 + 1e-9)
    assert error.mean() < 1.0  # of a standard normal: 0.8


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_without_a_mask_the_arguments_count_as_in_flash_attention(causal, window):
    # `sliding_window` counts the token itself, on both sides of a bidirectional model.
    if window is None:
        function = causal_mask_function if causal else bidirectional_mask_function
    elif causal:
        function = sliding_window_causal_mask_function(window)
    else:
        function = sliding_window_bidirectional_mask_function(window - 1)
    states, module = random_states(), torch.nn.Identity()
    module.is_causal = causal
    found, _ = longembed_varlen(module, *states, masks().long(), sliding_window=window)
    expected = dense(*states, visible_pairs(function, masks()))
    torch.testing.assert_close(found[masks()], expected[masks()])
    module.is_causal = not causal
    again, _ = longembed_varlen(module, *states, masks().long(), sliding_window=window, is_causal=causal)
    assert torch.equal(found, again)


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_compute_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^longembed_varlen does not compute '{name}'; load the model with attn_"):
        longembed_varlen(None, *random_states(), PackedMask(), **{name: True})
    longembed_varlen(None, *random_states(), PackedMask(), **{name: None})


def test_masks_that_contradict_the_inputs_are_refused():
    states, cu_seqlens = [x[:1] for x in random_states()], torch.tensor([0, 9, LENGTH], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^longembed_varlen: attention_mask has shape \(1, 1, 23, 23\), and only a p"):
        longembed_varlen(None, *states, torch.ones(1, 1, LENGTH, LENGTH), is_causal=True)
    with pytest.raises(ValueError, match=r"^longembed_varlen: Identity does not say whether it is causal; pass is_cau"):
        longembed_varlen(torch.nn.Identity(), *states, None)
    with pytest.raises(ValueError, match=r"^longembed_varlen: attention_mask has shape \(1, 30\) and the batch \(1, 2"):
        longembed_varlen(None, *states, packed_mask(attention_mask=torch.ones(1, 30)))
    with pytest.raises(ValueError, match=r"^longembed_varlen: give either cu_seq_lens_q or a mask with padding, not"):
        longembed_varlen(None, *states, packed_mask(attention_mask=masks()[:1]), cu_seq_lens_q=cu_seqlens)
    with pytest.raises(ValueError, match=r"^longembed_varlen: cu_seq_lens_q and cu_seq_lens_k differ; load the model"):
        longembed_varlen(None, *states, PackedMask(), cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens - 1)
