"""A batch in several forward passes gives what one pass gives, for every pattern, position scheme and layout."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from modeling_longembed.layout_layerdrop_longembed import layers_drawn_once
from modeling_longembed.layout_registry_longembed import expand_layout
from modeling_longembed.pattern_registry_longembed import PATTERNS, build_pattern
from tests.modeling_longembed.pattern_settings import SCHEMES, entries, refused
from tests.training.tiny_training import tiny_config
from training.data.packing import PackedTexts, pack
from training.engine.chunks import parts_of_batch
from training.engine.gradient_cache import cached_backward
from training.objectives.chunked_loss import backward_over_chunks
from training.objectives.contrastive.momentum import MomentumEncoder
from training.objectives.embed import embed
from training.objectives.losses.contrastive import info_nce

LENGTHS = [23, 5, 17, 12]  # two queries and their documents
WHOLE = 10_000  # tokens of a chunk that holds every batch of these tests
FOCUSED = {"type": "focused", "size": 8}
LAYOUTS = {name: expand_layout(name, 2) for name in ("interleaved", "sandwich(1)", "par(3)")}


def build(entry: dict | str = "full", **fields) -> LongEmbedModel:
    torch.manual_seed(1)
    layout = {"num_hidden_layers": None, "sublayer_pattern": LAYOUTS["interleaved"]}
    return LongEmbedModel(tiny_config(attention_patterns=entry, **(layout | fields))).double().train()


def chunks_of(budget: int, lengths: list[int] = LENGTHS) -> list[PackedTexts]:
    generator = torch.Generator().manual_seed(0)
    return pack([torch.randint(5, 31, (length,), generator=generator).tolist() for length in lengths], budget)


def contrastive_gradients(model, budget: int) -> dict[str, torch.Tensor]:
    """Gradients of InfoNCE of a batch in chunks of so many tokens."""
    torch.manual_seed(7)
    model.zero_grad()
    half = len(LENGTHS) // 2
    cached_backward(model, chunks_of(budget), lambda c: embed(model, c), lambda rows: info_nce(*rows.split(half)))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-10 * scale, rtol=1e-9, msg=name)


def settings_of(name: str) -> list[dict]:
    """Settings of a pattern that divide documents of these lengths; the first and the last are in the fast cases."""
    return entries(name, reach=2)


FAST = [entry for name in PATTERNS for entry in (settings_of(name)[0], settings_of(name)[-1])]


def cases() -> list:
    """Every setting with every scheme that it allows, in changing layouts; of the fast ones, each with one scheme."""
    chosen = []
    for number, entry in enumerate(entry for name in PATTERNS for entry in settings_of(name)):
        allowed = [scheme for scheme, fields in SCHEMES.items() if not refused(entry, fields)]
        for place, scheme in enumerate(allowed):
            layout, layerdrop = list(LAYOUTS)[(number + place) % len(LAYOUTS)], 0.4 * (number % 2)
            fast = entry["type"] == "full" or (entry in FAST and place == number % len(allowed))
            identity = f"{build_pattern(entry)}-{scheme}-{layout}-layerdrop{layerdrop}"
            marks = [] if fast else [pytest.mark.slow]
            chosen.append(pytest.param(entry, scheme, layout, layerdrop, id=identity, marks=marks))
    return chosen


def test_every_pattern_scheme_and_layout_occurs_among_the_fast_cases():
    fast = [case.values for case in cases() if not case.marks]
    patterns, schemes, layouts, rates = zip(*fast, strict=True)
    assert {entry["type"] for entry in patterns} == set(PATTERNS)
    assert all(entry in patterns for entry in FAST)
    assert (set(schemes), set(layouts), len(set(rates))) == (set(SCHEMES), set(LAYOUTS), 2)
    coupling = {build_pattern(entry).couples_documents for entry in patterns if entry["type"] == "focused"}
    assert coupling == {False, True}  # with the segments of other documents, and with those of none


def test_the_layouts_are_those_of_the_registry():
    with pytest.raises(ValueError, match="give letters") as refusal:
        expand_layout("no layout", 2)
    named = re.findall(r"'(\w+)(?:\(\w\))?'", str(refusal.value).partition(", or ")[2])
    assert named == [name.partition("(")[0] for name in LAYOUTS]


@pytest.mark.promise("C8")
@pytest.mark.parametrize(("entry", "scheme", "layout", "layerdrop"), cases())
def test_the_budget_of_a_chunk_does_not_change_the_gradient(entry, scheme, layout, layerdrop):
    model = build(entry, sublayer_pattern=LAYOUTS[layout], layerdrop=layerdrop, **SCHEMES[scheme])
    expected = contrastive_gradients(model, WHOLE)
    for budget in (1, 30):  # every text alone; two together
        if build_pattern(entry).couples_documents:
            with pytest.raises(UserError, match=rf"'{entry['type']}' lets the documents of a batch see each other"):
                contrastive_gradients(model, budget)
        else:
            assert_alike(contrastive_gradients(model, budget), expected)


@pytest.mark.parametrize("entry", FAST, ids=str)
def test_the_registry_knows_which_documents_see_each_other(entry):
    """The vector of a document changes with its neighbours in training under these patterns, and under no others."""
    model = build(entry)
    (together,) = chunks_of(WHOLE)
    alone = torch.cat([embed(model, chunk) for chunk in chunks_of(1)])
    difference = (embed(model, together) - alone).abs().max()
    assert (difference > 1e-6) == build_pattern(entry).couples_documents
    evaluated = torch.cat([embed(model.eval(), chunk) for chunk in chunks_of(1)])
    torch.testing.assert_close(embed(model, together), evaluated, atol=1e-10, rtol=0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_coupling_pattern_is_refused_in_training_mode_only_and_only_in_chunks(lora):
    def wrap(model):
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if lora else model

    model = wrap(build([{"type": "block", "size": 5}, FOCUSED]))
    with parts_of_batch(model, 1):
        pass
    with pytest.raises(UserError, match=r"'focused' .* divided into 2 chunks"), parts_of_batch(model, 2):
        pass
    with parts_of_batch(model.eval(), 2):
        pass
    training_only = wrap(build("full", training_attention_patterns=FOCUSED))
    with pytest.raises(UserError, match="'focused'"), parts_of_batch(training_only, 2):
        pass


# LayerDrop: all parts of a batch are read with the same layers -------------------------------------------------------


def masked_sums_gradients(model, budget: int) -> dict[str, torch.Tensor]:
    """Gradients of a mean over tokens of a batch, as masked-language modelling has them."""
    torch.manual_seed(7)
    model.zero_grad()

    def parts_of(chunk: PackedTexts) -> dict[str, torch.Tensor]:
        output = model(input_ids=chunk.input_ids, cu_seq_lens_q=chunk.cu_seq_lens_q, max_length_q=chunk.max_length_q)
        return {"masked_lm_loss": output.last_hidden_state.sin().sum()}

    backward_over_chunks(model, chunks_of(budget), parts_of, {}, scale=1.0, synchronize=True)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_layers_are_drawn_once_for_a_batch_of_sums_over_tokens():
    model = build(layerdrop=0.5)
    expected = masked_sums_gradients(model, WHOLE)
    for budget in (1, 30):
        assert_alike(masked_sums_gradients(model, budget), expected)


def test_layers_are_drawn_once_for_the_keys_of_a_momentum_encoder():
    model = build(layerdrop=0.5)
    encoder = MomentumEncoder(model, 0.9)
    keys = []
    for budget in (WHOLE, 1):
        torch.manual_seed(7)
        keys.append(encoder(model, chunks_of(budget)))
    torch.testing.assert_close(keys[1], keys[0], atol=1e-12, rtol=0)


def test_with_a_draw_for_each_pass_the_gradient_would_be_another():
    model = build(layerdrop=0.5)
    expected = contrastive_gradients(model, WHOLE)
    torch.manual_seed(7)
    model.zero_grad()
    rows = torch.cat([embed(model, chunk) for chunk in chunks_of(1)])
    info_nce(*rows.split(len(LENGTHS) // 2))[0].backward()
    with pytest.raises(AssertionError):
        assert_alike({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


def test_every_batch_draws_anew_and_nothing_is_drawn_after_it():
    model = build(layerdrop=0.5)
    (chunk,) = chunks_of(WHOLE)
    inside = []
    for _ in range(12):
        with layers_drawn_once(model):
            first, second = embed(model, chunk), embed(model, chunk)
        assert torch.equal(first, second)
        inside.append(first)
    assert not all(torch.equal(vectors, inside[0]) for vectors in inside)
    assert model.layers_of_batch is None


def test_the_script_refuses_before_the_first_step(train_contrastive, word_tokenizer, tmp_path):
    torch.manual_seed(0)
    LongEmbedModel(tiny_config(attention_patterns=FOCUSED)).save_pretrained(tmp_path / "focused")
    word_tokenizer.save_pretrained(tmp_path / "focused")
    with pytest.raises(UserError, match=r"'focused' .* give more --batch_tokens"):
        train_contrastive(f"--model_name_or_path {tmp_path / 'focused'} --batch_tokens 64")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    train_contrastive(f"--model_name_or_path {tmp_path / 'focused'} --batch_tokens 4096 --max_steps 1")
