"""Every pattern that claims to be one graph is one, for documents of any lengths; and the GPU against the CPU."""

import pytest
import torch

from experiments.gpu import check, compilation
from experiments.gpu.check import batch_of, tiny_model
from experiments.gpu.compilation import check_compilation, check_device, compile_whole, one_graph_patterns
from modeling_longembed.pattern_registry_longembed import PATTERNS, build_pattern
from tests.modeling_longembed.pattern_settings import entries

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CLAIMING = [e for name in PATTERNS for e in entries(name, reach=20) if build_pattern(e).is_one_graph]
LENGTHS = [(7, 45), (1, 30, 0, 50), (33, 64, 5), (12, 90, 2, 2), (80,)]


def one_layer(entry):
    return tiny_model(entry, "cpu", torch.float32, position_embedding_type="rope", num_hidden_layers=1)


def test_patterns_claim_to_be_one_graph():
    assert {entry["type"] for entry in CLAIMING} == {"full", "block", "shifted", "sliding"}
    assert [build_pattern(name).type for name in one_graph_patterns() if ":" not in name] == sorted(
        {entry["type"] for entry in CLAIMING}, key=lambda name: (name != "shifted", list(PATTERNS).index(name))
    )


def programs_and_breaks(entry, lengths):
    """The number of graphs that are compiled for batches of these lengths, and why one is not whole."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    _, reason = compile_whole(one_layer(entry), [batch_of(x, "cpu") for x in lengths], backend)
    return len(graphs), reason


# One setting of each pattern here, its parameters away from their smallest; the others are slow.
@pytest.mark.parametrize("entry", [next(e for e in CLAIMING[::-1] if e["type"] == "shifted")], ids=str)
def test_a_pattern_is_one_graph_for_documents_of_any_lengths(as_on_cuda, entry):
    graphs, reason = programs_and_breaks(entry, LENGTHS)
    assert not reason
    # The first batch is compiled for its lengths, the second for any, one document alone and none longer than a block
    # once more.
    assert graphs <= 4


@pytest.mark.slow
@pytest.mark.parametrize("entry", CLAIMING, ids=str)
def test_every_setting_of_every_pattern_is_one_graph(as_on_cuda, entry):
    graphs, reason = programs_and_breaks(entry, LENGTHS)
    assert not reason
    assert graphs <= 4


@pytest.mark.parametrize("pattern", ["full", "sliding"])
def test_without_being_told_to_the_compiler_makes_one_graph_too(as_on_cuda, pattern):
    # `fullgraph=True` captures what a plain `torch.compile` breaks the graph for: a number asked of the device.
    model, batch = tiny_model(pattern, "cpu", torch.float32), batch_of((7, 12), "cpu")
    with torch.no_grad():
        report = torch._dynamo.explain(model)(**batch)
    assert report.graph_count == 1, report.break_reasons


def test_a_break_of_the_graph_is_found_and_its_place_told():
    model = one_layer("full")
    forward = model.layers[0].forward

    def broken(*args, **kwargs):
        print("a break")
        return forward(*args, **kwargs)

    model.layers[0].forward = broken
    found, reason = compile_whole(model, [batch_of((7,), "cpu")], "eager")
    assert not found
    assert "test_compilation.py" in reason


@pytest.mark.slow
def test_the_checks_of_the_gpu_pass_on_what_is_traced_here(as_on_cuda):
    checks = list(check_compilation("cpu", backend="eager"))
    assert len(checks) == len(one_graph_patterns())
    for found in checks:
        assert found.passed, found


def test_every_pattern_is_compared_with_the_cpu(monkeypatch):
    monkeypatch.setattr(compilation, "LENGTHS", (1, 67, 0, 130))
    monkeypatch.setattr(check, "SIZES", check.SIZES | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96})
    checks = list(check_device("cpu"))
    assert [found.name for found in checks[::2]] == [f"device: {name} in inference" for name in PATTERNS]
    assert all(found.passed for found in checks)


# With CUDA ------------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("part", [check_compilation, check_device])
def test_the_checks_pass_on_the_gpu(part):
    checks = list(part("cuda"))
    assert checks
    assert all(found.passed for found in checks), checks
