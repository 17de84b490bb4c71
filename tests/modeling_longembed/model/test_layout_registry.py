"""The published layouts, as strings and as models."""

import re
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.layout_registry_longembed import expand_layout, interleaved, layers_of, par, sandwich

PAIRS = 4


def kinds(model) -> str:
    """What the sublayers of a model are, by their modules."""
    return "".join("f" if layer.attention is None else "s" for layer in model.layers)


# Sandwich (Press et al. 2020) -----------------------------------------------------------------------------------------


@pytest.mark.promise("L1")
@given(n=st.integers(1, 40), data=st.data())
def test_a_sandwich_has_as_many_of_each_kind_and_one_interleaved_region(n, data):
    k = data.draw(st.integers(0, n - 1))
    layout = sandwich(n, k)
    assert layout.count("s") == layout.count("f") == n
    bottom, middle, top = re.fullmatch("(s*?)((?:sf)+)(f*)", layout).groups()
    assert (len(bottom), len(middle), len(top)) == (k, 2 * (n - k), k)


@pytest.mark.promise("L1")
@given(n=st.integers(1, 40))
def test_the_ends_of_the_sandwich(n):
    assert sandwich(n, 0) == interleaved(n) == LongEmbedConfig(num_hidden_layers=n).sublayer_pattern
    assert sandwich(n, n - 1).count("sf") == 1


def test_the_sandwich_of_the_paper():
    assert sandwich(16, 6) == "ssssss" + "sfsfsfsfsfsfsfsfsfsf" + "ffffff"


@pytest.mark.promise("L1")
@pytest.mark.parametrize("k", range(PAIRS))
def test_a_sandwich_is_a_model_of_as_many_parameters(build_tiny_model, k):
    fields = {"num_hidden_layers": None, "intermediate_size": 4 * 32}
    plain = build_tiny_model(**fields, sublayer_pattern=interleaved(PAIRS))
    model = build_tiny_model(**fields, sublayer_pattern=sandwich(PAIRS, k))
    assert kinds(model) == sandwich(PAIRS, k)
    assert model.num_parameters() == plain.num_parameters()
    input_ids = torch.arange(60).view(2, 30)
    ours, baseline = (one(input_ids).pooler_output for one in (model, plain))
    assert ours.isfinite().all()
    assert torch.equal(ours, baseline) == (k == 0)


# PAR (Mandava et al. 2020) --------------------------------------------------------------------------------------------


@pytest.mark.promise("L2")
@given(blocks=st.integers(2, 200), ratio=st.floats(2, 20, exclude_min=True))
def test_par_places_few_attention_sublayers_in_the_first_two_thirds(blocks, ratio):
    attention = round(blocks / ratio)
    if not attention:
        with pytest.raises(ValueError, match="has no attention sublayer"):
            par(blocks, ratio)
        return
    layout = par(blocks, ratio)
    places = [index for index, kind in enumerate(layout) if kind == "s"]
    assert len(layout) == blocks
    assert set(layout) <= {"s", "f"}
    assert len(places) == attention
    assert places[0] == 0
    assert 3 * places[-1] < 2 * blocks
    gaps = {after - before for before, after in pairwise(places)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1  # evenly


@pytest.mark.promise("L2")
def test_the_par_of_the_paper():
    """The 16 + 16 sublayers of Transformer-XL base become 6 + 26: the 63 % less attention of its abstract."""
    assert par(32, 5) == "sffsfffsfffsffsfffsfffffffffffff"
    assert 1 - par(32, 5).count("s") / 16 == 0.625
    assert par(24, 5).count("s") == 5  # PAR BERT base


@pytest.mark.promise("L2")
def test_a_larger_ratio_costs_less_at_4096_tokens():
    """Counted by torch, in the matrix products of a forward pass. The number of parameters rises meanwhile."""
    flops, parameters = [], []
    for ratio in (2.1, 4, 12):
        config = LongEmbedConfig(
            vocab_size=8,
            hidden_size=16,
            num_attention_heads=1,
            intermediate_size=64,
            sublayer_pattern=par(12, ratio),
            max_position_embeddings=4096,
        )
        model = LongEmbedModel._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 4096, dtype=torch.long))
        flops.append(counter.get_total_flops())
        parameters.append(model.num_parameters())
    assert flops == sorted(flops, reverse=True)
    assert len(set(flops)) == len(flops)
    assert parameters == sorted(parameters)


# By name --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "letters"),
    [
        ("interleaved", "sfsfsfsf"),
        ("sandwich(0)", "sfsfsfsf"),
        ("sandwich(3)", "ssssffff"),
        ("par(4)", "sffsffff"),
        ("par(2.5)", "sfsfsfff"),
        ("fsff", "fsff"),
    ],
)
def test_a_layout_by_name(name, letters):
    assert expand_layout(name, num_layers=4) == letters


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("sandwich(4)", r"sandwich\(4\) of num_hidden_layers=4 pairs .* from 0 to 3$"),
        ("par(2)", r"par\(2\) does not exist.* more than 2"),
        ("par(100)", r"par\(100\) of 8 sublayers has no attention"),
        ("sandwich", r"sublayer_pattern='sandwich'; give letters"),
        ("sandwich(-1)", r"sublayer_pattern='sandwich\(-1\)'; give letters"),
        ("sfx", r"sublayer_pattern='sfx'; give letters"),
        ("", r"sublayer_pattern=''; give letters"),
    ],
)
def test_a_layout_that_does_not_exist_is_refused_in_one_sentence(name, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        expand_layout(name, num_layers=4)
    assert "\n" not in str(caught.value)


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="num_hidden_layers=0 pairs is empty; give at least 1"):
        expand_layout("interleaved", num_layers=0)


@given(pattern=st.text("sf", min_size=1))
def test_layers_begin_at_attention_and_take_the_feed_forward_after_it(pattern):
    layers = layers_of(pattern)
    assert list(chain.from_iterable(layers)) == list(range(len(pattern)))
    written = ["".join(pattern[index] for index in layer) for layer in layers]
    assert all(re.fullmatch("sf*", layer) for layer in written[1:])
    assert re.fullmatch("sf*|f+", written[0])
    assert len(layers) == pattern.count("s") + (pattern[0] == "f")


def test_the_layers_of_the_interleaved_layout_are_its_pairs():
    assert layers_of("sfsf") == [[0, 1], [2, 3]]
    assert layers_of("fsssff") == [[0], [1], [2], [3, 4, 5]]
