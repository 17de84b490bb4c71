"""Two gloo processes that share a model's heads and inner units, against one process that has all of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from modeling_longembed import LongEmbedConfig, LongEmbedForMaskedLM, LongEmbedModel
from modeling_longembed.pattern_registry_longembed import PATTERNS
from tests.fresh_processes import with_fresh_processes
from tests.modeling_longembed.tiny_checkpoints import leave_out_code
from tests.two_processes import PROCESSES, in_two_processes

pytestmark = with_fresh_processes

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
}
SLIDING = {"type": "sliding", "window": 3}
CASES = {
    "rope, full": {"position_embedding_type": "rope", "num_hidden_layers": 2},
    "absolute, block": {"attention_patterns": {"type": "block", "size": 5}},
    "alibi, sliding": {"position_embedding_type": "alibi", "attention_patterns": SLIDING},
    "buckets, full": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10},
    "gated, pre-norm, no biases": {
        "position_embedding_type": "rope",
        "feed_forward_gated": True,
        "norm_placement": "pre",
        "final_norm": True,
        "attention_bias": False,
        "feed_forward_bias": False,
    },
    "relative, full": {"position_embedding_type": "relative"},
    # Of four heads two shift: one process has those that do, the other those that do not.
    "shifted": {"attention_patterns": {"type": "shifted", "size": 4}},
    "shifted round the end": {"attention_patterns": {"type": "shifted", "size": 4, "wrap": True}},
    "global projections": {"attention_patterns": SLIDING | {"global_tokens": 2, "global_projections": True}},
    "adaptive spans": {"attention_patterns": {"type": "adaptive", "max_span": 6, "ramp": 2, "initial_span": 3}},
    "Self-Extend": {
        "position_embedding_type": "rope",
        "position_extension": {"method": "group", "original_max_position_embeddings": 8, "neighbours": 4},
        "max_position_embeddings": 32,
    },
}


def config(case: str, **changes) -> LongEmbedConfig:
    return LongEmbedConfig(**SIZES | {"num_hidden_layers": 1} | CASES[case] | changes)


def compute(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Outputs for a padded batch, and the gradients that two batches add up to."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(1, 64, (3, 13), generator=generator), torch.ones(3, 13)
    mask[1, 7:], mask[2, :4] = 0, 0
    for batch in (ids, ids.flip(1)):
        outputs = model(batch, attention_mask=mask)
        states, pooled = outputs.last_hidden_state, outputs.pooler_output
        (states.sin().sum() + pooled.cos().sum()).backward()
    with torch.no_grad():  # has a path of its own in transformers
        states = model(batch, attention_mask=mask).last_hidden_state
    gradients = {
        name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"outputs": {"states": states, "pooled": pooled.detach()}, "gradients": gradients}


def of_one_process(rank: int, folder: Path) -> dict:
    """What one of two processes computes for every case."""
    distributed = DistributedConfig(tp_size=PROCESSES, tp_plan="auto")
    results = {}
    for number, case in enumerate(CASES):
        if number == 1:  # a copy of the package is saved once: it takes most of the time of saving a tiny model
            leave_out_code(pytest.MonkeyPatch())
        model = LongEmbedModel.from_pretrained(f"{folder}/{case}", distributed_config=distributed)
        results[case] = compute(model.train())
        results[case]["rows"] = {
            name: len(parameter.to_local() if isinstance(parameter, DTensor) else parameter)
            for name, parameter in model.named_parameters()
        }
        model.save_pretrained(f"{folder}/{case}, saved")
    model = LongEmbedForMaskedLM.from_pretrained(f"{folder}/head", distributed_config=distributed)
    results["head"] = {"logits": model(torch.arange(1, 10)[None]).logits.detach()}
    try:
        LongEmbedModel.from_pretrained(f"{folder}/three heads", distributed_config=distributed)
    except ValueError as error:
        results["three heads"] = {"error": str(error)}
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every case's model."""
    if Version(transformers.__version__) < Version("5.21"):
        pytest.skip(f"transformers {transformers.__version__} does not split weights into DTensors; 5.21 and later do")
    folder = tmp_path_factory.mktemp("processes")
    for case in CASES:
        torch.manual_seed(0)
        LongEmbedModel(config(case)).save_pretrained(folder / case)
    LongEmbedForMaskedLM(config("rope, full")).save_pretrained(folder / "head")
    LongEmbedModel(config("rope, full", num_attention_heads=3, hidden_size=24)).save_pretrained(folder / "three heads")
    return folder


@pytest.fixture(scope="module")
def two_processes(folder) -> list[dict]:
    return in_two_processes(of_one_process, folder, folder)


@pytest.mark.promise("L4")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, folder, two_processes):
    expected = compute(LongEmbedModel.from_pretrained(folder / case).train())
    for results in two_processes:
        torch.testing.assert_close(results[case]["outputs"], expected["outputs"], atol=1e-5, rtol=1e-5)
        assert results[case]["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            error = (results[case]["gradients"][name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max().clamp(min=1.0), name


@pytest.mark.promise("L4")
def test_each_process_has_its_share_of_every_projection(two_processes):
    whole = dict(LongEmbedModel(config("rope, full")).named_parameters())
    for results in two_processes:
        rows = results["rope, full"]["rows"]
        for name in ("q_proj", "k_proj", "v_proj"):
            assert rows[f"layers.0.attention.{name}.weight"] == 32 // PROCESSES
        assert rows["layers.1.feed_forward.up_proj.weight"] == 48 // PROCESSES
        for name, parameter in whole.items():  # these are needed whole
            if "norm" in name or "embeddings" in name:
                assert rows[name] == len(parameter)


@pytest.mark.parametrize("case", CASES)
def test_what_two_processes_save_is_the_whole_model(case, folder, two_processes):
    original = LongEmbedModel.from_pretrained(folder / case)
    saved = LongEmbedModel.from_pretrained(folder / f"{case}, saved")
    torch.testing.assert_close(saved.state_dict(), original.state_dict(), atol=0, rtol=0)
    assert saved.config.to_diff_dict() == original.config.to_diff_dict()
    assert (folder / f"{case}, saved" / "README.md").is_file()


def test_the_language_model_head_stays_whole(folder, two_processes):
    expected = LongEmbedForMaskedLM.from_pretrained(folder / "head")(torch.arange(1, 10)[None]).logits.detach()
    for results in two_processes:
        torch.testing.assert_close(results["head"]["logits"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_snippet_of_the_page_runs_as_it_stands(folder, tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "guides" / "devices.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    saved = "\ntorch.save(embeddings, f'{torch.distributed.get_rank()}.pt')\n"
    (tmp_path / "parallel.py").write_text(snippet.replace('"my-model"', repr(str(folder / "rope, full"))) + saved)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    subprocess.run([*command, "parallel.py"], cwd=tmp_path, check=True, capture_output=True, timeout=600)
    with torch.no_grad():
        model = LongEmbedModel.from_pretrained(folder / "rope, full").eval()
        expected = model(torch.arange(1, 41).view(2, 20)).pooler_output
    for rank in range(PROCESSES):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, atol=1e-5, rtol=1e-5)


def test_heads_that_cannot_be_shared_evenly_are_refused(two_processes):
    for results in two_processes:
        error = results["three heads"]["error"]
        assert "num_attention_heads=3" in error
        assert "tp_size=2" in error


@pytest.mark.promise("L4")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("fields", [{}, {"feed_forward_gated": True}, {"sublayer_pattern": "ss"}])
def test_the_plan_names_what_exists_and_every_projection(pattern, fields):
    check_plan(LongEmbedModel(LongEmbedConfig(**SIZES | {"attention_patterns": pattern} | fields)))


@pytest.mark.promise("L4")
@pytest.mark.parametrize("case", CASES)
def test_the_plan_of_every_case_names_what_exists_and_every_projection(case):
    check_plan(LongEmbedModel(config(case)))


def check_plan(model: LongEmbedModel):
    plan = model.config.base_model_tp_plan
    names = {f".{name}." for name, _ in [*model.named_modules(), *model.named_parameters()]}
    for number in range(len(model.layers)):
        names |= {name.replace(f".{number}.", ".*.", 1) for name in names}
    assert {name for name in plan if f".{name}." not in names} == set()
    for layer in model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                assert f"layers.*.{name}" in plan
