"""What holds for every registered pattern inside a model: one definition, one config, one set of weights."""

import json
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_longembed import LongEmbedConfig, LongEmbedModel
from modeling_longembed.pattern_registry_longembed import PATTERNS, build_pattern
from tests.covering import covering_first
from tests.modeling_longembed.clean_environment import CleanEnvironment
from tests.modeling_longembed.pattern_settings import SCHEMES, entries, refused
from tests.modeling_longembed.tiny_checkpoints import leave_out_code, save_checkpoint

ALL_ENTRIES = [entry for name in PATTERNS for entry in entries(name)]
LARGEST = list({entry["type"]: entry for entry in ALL_ENTRIES}.values())  # of each kind, with all switches on
LONGEST = 47


def case_id(entry, scheme, causal, training) -> str:
    return f"{build_pattern(entry)}-{scheme}{'-causal' * causal}-{'training' if training else 'evaluation'}"


CASES = covering_first(
    [
        pytest.param(entry, scheme, causal, training, id=case_id(entry, scheme, causal, training))
        for entry in ALL_ENTRIES
        for scheme, fields in SCHEMES.items()
        for causal in (False, True)
        if (causal or scheme != "none") and refused(entry, fields | {"is_causal": causal}) is None
        for training in (False, True)
    ],
    # One setting of each kind under every scheme. Kernels of masks are compared under all of them in test_attention.py.
    factors=lambda entry, scheme, causal, training: (
        entry,
        scheme if entry in LARGEST and not build_pattern(entry).is_mask else None,
        causal,
        training,
    ),
)


def test_every_pattern_can_be_combined_with_absolute_positions_and_most_with_rope():
    for entry in ALL_ENTRIES:
        assert refused(entry, SCHEMES["absolute"]) is None, entry
    for name in PATTERNS:
        assert any(refused(entry, {"is_causal": True}) is None for entry in entries(name)), name


@pytest.mark.parametrize("entry", ALL_ENTRIES, ids=str)
def test_a_refusal_is_one_sentence_that_names_the_field(entry):
    for scheme, causal in product(SCHEMES, (False, True)):
        message = refused(entry, SCHEMES[scheme] | {"is_causal": causal or scheme == "none"})
        if message is not None:
            assert message.startswith(("attention_patterns: ", "position_extension: ")), message
            assert "\n" not in message
            assert len(message) < 300


def batch(*lengths):
    torch.manual_seed(1)
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {"input_ids": torch.randint(1, 64, mask.shape), "attention_mask": mask}


def build(build_tiny_model, entry, kernel=None, **fields):
    fields = {"hidden_dropout_prob": 0.0, "max_position_embeddings": 512} | fields
    return build_tiny_model(attention_patterns=entry, attn_implementation=kernel, **fields).double()


def outputs_and_gradients(model, documents):
    output = model(**documents)
    weights = torch.linspace(-1, 1, output.last_hidden_state.numel()).double().view(output.last_hidden_state.shape)
    model.zero_grad()
    ((output.last_hidden_state * weights).sum() + output.pooler_output.sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.last_hidden_state.detach(), gradients


@pytest.mark.promise("A1")
@pytest.mark.parametrize(("entry", "scheme", "causal", "training"), CASES)
def test_the_fast_path_is_the_definition_with_its_gradients(build_tiny_model, entry, scheme, causal, training):
    fields = SCHEMES[scheme] | {"is_causal": causal, "num_hidden_layers": 1}
    documents = batch(LONGEST, 1, 17, 2)
    results = [
        outputs_and_gradients(build(build_tiny_model, entry, kernel, **fields).train(training), documents)
        for kernel in ("eager", "longembed_varlen")
    ]
    (expected, expected_gradients), (output, gradients) = results
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-10)
    assert gradients.keys() == expected_gradients.keys()
    scale = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-10 * scale, rtol=1e-9, msg=name)


@pytest.mark.promise("P10")
@pytest.mark.parametrize("entry", ALL_ENTRIES, ids=str)
def test_a_document_is_read_alike_whatever_stands_beside_it(build_tiny_model, entry):
    model = build(build_tiny_model, entry)
    documents = batch(LONGEST, 5, 30)
    together = model(**documents).pooler_output
    for number, length in enumerate((LONGEST, 5, 30)):
        alone = model(documents["input_ids"][number : number + 1, :length]).pooler_output
        torch.testing.assert_close(together[number], alone[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "entry",
    [entry if entry in LARGEST else pytest.param(entry, marks=pytest.mark.slow) for entry in ALL_ENTRIES],
    ids=str,
)
def test_gradient_checkpointing_changes_nothing(build_tiny_model, entry):
    documents = batch(40, 9)
    plain = outputs_and_gradients(build(build_tiny_model, entry).train(), documents)
    model = build(build_tiny_model, entry).train()
    model.gradient_checkpointing_enable()
    checkpointed = outputs_and_gradients(model, documents)
    torch.testing.assert_close(plain[0], checkpointed[0], atol=1e-12, rtol=1e-12)
    assert plain[1].keys() == checkpointed[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(checkpointed[1][name], gradient, atol=1e-10, rtol=1e-8)


# What survives --------------------------------------------------------------------------------------------------------


SURVIVES = ("sublayer_pattern", "attention_patterns", "training_attention_patterns", "layer_types")


def survivor(build_tiny_model, entry):
    """A layout and patterns that no default would give; a second pattern where the first allows one."""
    plain = {"type": "sliding", "window": 9}
    patterns = [entry, entry if refused([entry, plain, entry], {"sublayer_pattern": "sssf"}) else plain, entry]
    own = any(build_pattern(p).own_weights for p in patterns)
    training = None if own else [{"type": "shifted", "size": 6}, plain, {"type": "block", "size": 6}]
    layout = {"num_hidden_layers": None, "sublayer_pattern": "ssffsf"}
    return build(build_tiny_model, patterns, **layout, training_attention_patterns=training)


def assert_same(model, other, documents):
    for name in SURVIVES:
        assert getattr(other.config, name) == getattr(model.config, name)
    for training in (False, True):
        output, expected = (m.train(training)(**documents).last_hidden_state for m in (other, model))
        torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.promise("X1")
@pytest.mark.parametrize(
    "entry",
    # That every setting comes back from its file is seen below, in a test that takes less.
    [entry if entry in LARGEST else pytest.param(entry, marks=pytest.mark.slow) for entry in ALL_ENTRIES],
    ids=str,
)
@pytest.mark.usefixtures("without_code")
def test_it_survives_disk_lora_and_pruning(build_tiny_model, entry, tmp_path):
    model, documents = survivor(build_tiny_model, entry), batch(LONGEST, 7)
    model.save_pretrained(tmp_path / "saved")
    assert_same(model, LongEmbedModel.from_pretrained(tmp_path / "saved", dtype=torch.float64), documents)

    before = {name: getattr(model.config, name) for name in SURVIVES}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = adapted.eval()(**documents).last_hidden_state
    merged = adapted.merge_and_unload()
    assert {name: getattr(merged.config, name) for name in SURVIVES} == before
    torch.testing.assert_close(merged.eval()(**documents).last_hidden_state, expected, atol=1e-9, rtol=1e-9)
    merged.save_pretrained(tmp_path / "merged")
    assert_same(merged, LongEmbedModel.from_pretrained(tmp_path / "merged", dtype=torch.float64), documents)

    merged.keep_sublayers([0, 2, 4, 5])
    assert merged.config.sublayer_pattern == "sfsf"
    kept = [before["attention_patterns"][place] for place in (0, 2)]
    assert merged.config.attention_patterns == kept
    merged.save_pretrained(tmp_path / "pruned")
    assert_same(merged, LongEmbedModel.from_pretrained(tmp_path / "pruned", dtype=torch.float64), documents)


@pytest.mark.parametrize("entry", [e for e in ALL_ENTRIES if not build_pattern(e).shares_query_key], ids=str)
@pytest.mark.usefixtures("without_code")
def test_it_survives_conversion(entry, tmp_path, capsys):
    save_checkpoint(tmp_path / "bert", "bert")
    model = LongEmbedModel.from_encoder(tmp_path / "bert", 128, attention_patterns=entry)
    expected = LongEmbedConfig(num_hidden_layers=2, attention_patterns=entry).attention_patterns
    assert model.config.attention_patterns == expected
    model.save_pretrained(tmp_path / "saved")
    loaded = LongEmbedModel.from_pretrained(tmp_path / "saved")
    documents = batch(30, 7)
    torch.testing.assert_close(loaded(**documents)[0], model(**documents)[0], atol=1e-6, rtol=1e-6)


@pytest.mark.promise("X1")
def test_every_pattern_loads_where_this_package_is_not_installed(build_tiny_model, tmp_path, monkeypatch):
    """The code of the first folder reads all: a copy is the same in each, and takes seconds to import."""
    expected = {}
    documents = batch(LONGEST, 7)
    # The first and the last of each: all switches off, and all on.
    chosen = [entry for name in PATTERNS for entry in entries(name)[:: max(1, len(entries(name)) - 1)]]
    for number, entry in enumerate(chosen):
        if number == 1:
            leave_out_code(monkeypatch)
        model = survivor(build_tiny_model, entry).float()
        model.save_pretrained(tmp_path / "models" / str(number))
        expected[number] = model(**documents).pooler_output
    torch.save(documents, tmp_path / "documents.pt")
    script = """
import json, pathlib, torch
from transformers import AutoModel
folder = pathlib.Path(sys.argv[1])
documents = torch.load(folder / "documents.pt", weights_only=True)
outputs, patterns = {}, {}
remote = type(AutoModel.from_pretrained(folder / "models" / "0", trust_remote_code=True))
assert remote.__module__.startswith("transformers_modules."), remote
for path in sorted((folder / "models").iterdir(), key=lambda path: int(path.name)):
    model = remote.from_pretrained(path).eval()
    outputs[path.name] = model(**documents).pooler_output
    patterns[path.name] = [model.config.sublayer_pattern, model.config.attention_patterns[0]]
torch.save(outputs, folder / "outputs.pt")
print(json.dumps(patterns))
"""
    environment = CleanEnvironment(tmp_path / "bare", ["torch", "transformers", "safetensors"])
    process = environment.run(script, tmp_path)
    assert process.returncode == 0, process.stderr
    patterns = json.loads(process.stdout.splitlines()[-1])
    assert patterns == {str(number): ["ssffsf", entry] for number, entry in enumerate(chosen)}
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for number, output in expected.items():
        torch.testing.assert_close(outputs[str(number)], output, atol=1e-6, rtol=1e-6)
