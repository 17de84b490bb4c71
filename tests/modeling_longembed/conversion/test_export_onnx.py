"""Models as ONNX graphs: onnxruntime against the model itself, on padded batches of any size."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_longembed import LongEmbedConfig, LongEmbedModel

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

exports = pytest.mark.skipif(torch.__version__ < "2.13", reason="to_onnx needs torch 2.13 or later")
# One process of pytest-xdist imports the exporter, which takes seconds, and makes the graph of the first case once.
pytestmark = pytest.mark.xdist_group("onnx")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "sublayer_pattern": "s",
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
FULL, BLOCK = {"type": "full"}, {"type": "block", "size": 5}
SLIDING = {"type": "sliding", "window": 3}


def extended(method: str) -> dict:
    """Documents of up to 10 tokens are read as before, longer ones are stretched: a batch has both."""
    return {"position_extension": {"method": method, "original_max_position_embeddings": 10}}


# Every pattern, scheme and pooling at least once; one export takes seconds.
CASES = {
    "full and block, absolute, mean": {"attention_patterns": [FULL, BLOCK], "sublayer_pattern": "sfs"},
    "full, rope, cls": {
        "position_embedding_type": "rope",
        "pooling": "cls",
        "sublayer_pattern": "sf",
        "feed_forward_gated": True,
    },
    "sliding with global tokens, yarn, last": {
        "position_embedding_type": "rope",
        "attention_patterns": SLIDING | {"global_tokens": 2, "dilation": 2},
        "pooling": "last",
        **extended("yarn"),
    },
    "block, alibi, weighted mean, no segments": {
        "position_embedding_type": "alibi",
        "attention_patterns": BLOCK,
        "pooling": "weighted_mean",
        "type_vocab_size": 0,
    },
    "sliding, buckets, sinusoidal, causal": {
        "position_embedding_type": "sinusoidal",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
        "attention_patterns": SLIDING,
        "is_causal": True,
        **extended("interpolate"),
    },
    "rare words": {"query_token_weights": "idf", "token_weighting_power": 0.5},
}


def model(**fields) -> LongEmbedModel:
    torch.manual_seed(0)
    encoder = LongEmbedModel(LongEmbedConfig(**SIZES | fields)).eval()
    if encoder.token_output.query_table is not None:
        encoder.token_output.set_table(3 * torch.rand(encoder.config.vocab_size))
    return encoder


def batches() -> list[torch.Tensor]:
    """Attention masks: mixed lengths, one document, one token, padding on the left and in the middle."""
    mixed = (torch.arange(29) < torch.tensor([29, 1, 10, 11, 6])[:, None]).long()
    scattered = mixed.clone()
    scattered[0, :4], scattered[2, 3:5] = 0, 0
    return [mixed, scattered, torch.ones(1, 17, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)]


@pytest.fixture(scope="module")
def first_graph(tmp_path_factory) -> bytes:
    """The graph of the first case."""
    folder = tmp_path_factory.mktemp("onnx")
    encoder = model(**next(iter(CASES.values())))
    path = encoder.to_onnx(folder / "deep" / "model.onnx")
    assert [file.name for file in folder.rglob("*") if file.is_file()] == ["model.onnx"]
    assert encoder.config._attn_implementation == "longembed_varlen"  # as it was
    return path.read_bytes()


@exports
@pytest.mark.parametrize(
    "case", [case if n < 1 else pytest.param(case, marks=pytest.mark.slow) for n, case in enumerate(CASES)]
)
def test_onnxruntime_gives_the_outputs_of_the_model(case, first_graph, tmp_path):
    encoder = model(**CASES[case])
    graph = first_graph if case == next(iter(CASES)) else encoder.to_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(graph)
    generator = torch.Generator().manual_seed(1)
    for mask in batches():
        inputs = {"input_ids": torch.randint(64, mask.shape, generator=generator), "attention_mask": mask}
        if encoder.config.type_vocab_size:
            inputs["token_type_ids"] = torch.randint(2, mask.shape, generator=generator)
        with torch.no_grad():
            expected = encoder(**inputs)
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for ours, theirs in zip((expected.last_hidden_state, expected.pooler_output), outputs, strict=True):
            assert ours.abs().max() > 0.1
            torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-4, rtol=0)


REFUSED = {
    "lsh": {"attention_patterns": "lsh"},
    "landmark": {"attention_patterns": "landmark", "position_embedding_type": "rope"},
    "adaptive": {"attention_patterns": {"type": "adaptive", "max_span": 8}},
    "position_embedding_type": {"position_embedding_type": "relative"},
    "dynamic": {"position_embedding_type": "rope", **extended("dynamic")},
    "token_weighting": {"token_weighting": "generalized_max"},
    "group": {"position_embedding_type": "rope", **extended("group")},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_express_is_refused_by_name(name, tmp_path):
    fields = SIZES | REFUSED[name] | {"max_position_embeddings": 512}
    with pytest.raises(ValueError, match=rf"to_onnx: .*{name}.*use ") as refusal:
        LongEmbedModel(LongEmbedConfig(**fields)).to_onnx(tmp_path / "model.onnx")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_other_precisions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"bfloat16.*float\(\)"):
        model().bfloat16().to_onnx(tmp_path / "model.onnx")


@exports
def test_a_graph_that_differs_is_not_kept(first_graph, tmp_path, monkeypatch):
    """The graph is right, and then one of its weights is not."""
    encoder = model(**next(iter(CASES.values()))).train()
    exported = SimpleNamespace(save=lambda path: Path(path).write_bytes(first_graph))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: exported)
    encoder.to_onnx(tmp_path / "model.onnx")
    with torch.no_grad():
        encoder.layers[0].attention.o_proj.weight[0, 0] += 0.5
    (tmp_path / "model.onnx").write_text("the one of before")
    with pytest.raises(ValueError, match="nothing was written"):
        encoder.to_onnx(tmp_path / "model.onnx")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the one of before"]
    assert encoder.training
    assert encoder.config._attn_implementation == "longembed_varlen"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'longembed\[onnx\]'"):
        model().to_onnx(tmp_path / "model.onnx")
