"""A position scheme is one class in one file: one that is written here works everywhere without another line."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import modeling_longembed
from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.pattern_registry_longembed import PATTERNS
from modeling_longembed.position_base_longembed import (
    POSITION_SCHEMES,
    DistanceOnlyBias,
    Positions,
    PositionScheme,
    register_scheme,
)

FOLDER = Path(modeling_longembed.__file__).parent


class LearnedSlope(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(config.num_attention_heads))


class SlopeBias(DistanceOnlyBias):
    """`-slope_h |i - j|`."""

    def __init__(self, slopes):
        self.slopes, self.num_heads = slopes, len(slopes)

    def heads(self, heads):
        return SlopeBias(self.slopes[heads])

    def values(self, relative_position, head):
        return -relative_position.abs() * self.slopes[head]


class SlopePositions(Positions):
    def apply(self, attention, query, key, pattern, documents):
        return query, key, SlopeBias(attention.distance.slope), None


class LearnedSlopes(PositionScheme):
    """ALiBi with slopes that every sublayer learns, and a mark on even tokens."""

    type = "learned_slopes"
    adds_bias = True

    def check(self, config):
        if config.is_causal:
            raise ValueError("position_embedding_type='learned_slopes' looks both ways; set is_causal=false")

    def embed(self, hidden_states, places, table):
        return hidden_states + (places % 2 == 0)[:, None]

    def build(self, config):
        return LearnedSlope(config)

    def prepare(self, config, documents, token_index, hidden_states):
        return SlopePositions()

    def tensor_parallel_plan(self):
        return {"distance.slope": "colwise"}


@pytest.fixture
def learned_slopes():
    register_scheme(LearnedSlopes)
    yield
    del POSITION_SCHEMES["learned_slopes"]


@pytest.mark.parametrize("pattern", ["full", "sliding", "block", "memory", "focused"])
def test_a_new_scheme_is_one_class(learned_slopes, build_tiny_model, tmp_path, pattern):
    fields = {"position_embedding_type": "learned_slopes", "attention_patterns": pattern}
    model = build_tiny_model(attn_implementation="eager", **fields)
    documents = torch.randint(1, 64, (2, 30))
    with torch.no_grad():
        for layer in model.layers[::2]:
            layer.attention.distance.slope.copy_(torch.rand(4))
    expected = model(documents).last_hidden_state
    model.set_attn_implementation("longembed_varlen")
    torch.testing.assert_close(model(documents).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(LongEmbedModel.from_pretrained(tmp_path)(documents)[0], model(documents)[0])
    assert model.config.base_model_tp_plan["layers.*.attention.distance.slope"] == "colwise"
    with pytest.raises(ValueError, match=r"learned_slopes.*looks both ways"):
        LongEmbedConfig(**fields, is_causal=True)
    with pytest.raises(ValueError, match="'learned_slopes' positions have no trained length to extend"):
        LongEmbedConfig(**fields, position_extension={"method": "repeat"})
    with pytest.raises(ValueError, match=r"relative_attention_num_buckets and .*learned_slopes.* choose one"):
        LongEmbedConfig(**fields, relative_attention_num_buckets=8)


def test_an_existing_model_is_switched_to_a_new_scheme(learned_slopes, build_tiny_model):
    model = build_tiny_model().switch_positions("learned_slopes")
    assert model.embeddings.position_embeddings is None
    assert isinstance(model.layers[0].attention.distance, LearnedSlope)
    assert model(torch.randint(1, 64, (2, 30))).pooler_output.isfinite().all()


# Files that are about one scheme, or translate to other architectures, whose names are other architectures' business.
OWN_FILES = re.compile(r"position_\w+|conversion_families|export_native|hub")


@pytest.mark.parametrize("axis", ["positions", "patterns"])
def test_no_other_file_of_the_model_asks_which_choice_an_axis_has(axis):
    """What depends on the choice is a method of it: a branch elsewhere would be one more place to change."""
    names = {"positions": [name for name in POSITION_SCHEMES if name != "none"], "patterns": ["landmark"]}[axis]
    asked = re.compile(rf"""(==|!=|\bin\b) \(?["']({"|".join(names)})["']""")
    assert axis == "positions" or set(names) <= set(PATTERNS)
    for path in FOLDER.glob("*.py"):
        if not OWN_FILES.fullmatch(path.stem.removesuffix("_longembed")) and not path.stem.startswith(
            "pattern_landmark"
        ):
            found = asked.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path.name}: {found.group()}"
