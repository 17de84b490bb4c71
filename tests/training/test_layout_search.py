"""The search for a layout: mixtures that are what they mix, a schedule that is kept, and the right layout found."""

import copy
import json
import math
import re
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from common.errors import UserError
from modeling_longembed import LongEmbedConfig, LongEmbedModel
from tests.training.double_precision import double_precision
from tests.training.tiny_training import losses, tiny_config
from training import layout_search
from training.engine.loop import Loop
from training.engine.loop_arguments import LoopArguments
from training.engine.training import Training
from training.layout_search import main
from training.models.supernet import KINDS, MixedSublayer, Supernet
from training.objectives.layout_search_step import SearchArguments, alternate, cycle_end, search_groups

SCHEDULE = "--weight_steps 3 --cycle_steps 5 --architecture_share 0.4 --max_steps 18 --changed_share 0"
SHARED = {"final_norm": True, "hidden_act": "gelu"}
PRE_NORM = SHARED | {"norm_placement": "pre", "embedding_norm": False, "first_attention_norm": False}


# The mixture ----------------------------------------------------------------------------------------------------------


@given(
    logits=st.lists(st.floats(-8, 8), min_size=3, max_size=3),
    temperature=st.floats(0.1, 5),
    seed=st.integers(0, 1000),
)
def test_the_weights_are_torchs_gumbel_softmax(logits, temperature, seed):
    mixed = MixedSublayer(nn.Identity(), nn.Identity(), temperature).double()
    mixed.logits.data.copy_(torch.tensor(logits))
    torch.manual_seed(seed)
    mixed.draw()
    torch.manual_seed(seed)
    expected = F.gumbel_softmax(mixed.logits, temperature)
    torch.testing.assert_close(mixed.weights(), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(mixed.weights().sum(), torch.tensor(1.0).double(), atol=1e-12, rtol=0)


def test_at_a_low_temperature_they_are_samples_of_the_softmax():
    mixed = MixedSublayer(nn.Identity(), nn.Identity(), 1e-4)
    mixed.logits.data.copy_(torch.tensor([0.0, 1.0, -1.0]))
    draws = []
    for _ in range(2000):
        mixed.draw()
        draws.append(mixed.weights().detach())
    draws = torch.stack(draws)
    assert (draws.max(dim=1).values > 0.99).float().mean() > 0.99
    torch.testing.assert_close(draws.mean(0), mixed.logits.softmax(0).detach(), atol=0.03, rtol=0)


def tiny_supernet(pattern: str, **fields) -> tuple[LongEmbedModel, Supernet]:
    """A model in float64 with weights large enough to show, and the supernet that starts from (a copy of) it."""
    attention = pattern.count("s")
    entries = [{"type": "sliding", "window": 2}, {"type": "block", "size": 4}, "full"]
    options = {"num_hidden_layers": None, "initializer_range": 0.2, "attention_patterns": entries[:attention]}
    model = LongEmbedModel(tiny_config(**options | fields, sublayer_pattern=pattern)).double()
    return model, Supernet(copy.deepcopy(model), 1.0).double()


def pin(supernet: Supernet, kinds: str) -> None:
    for logits, kind in zip(supernet.logits(), kinds, strict=True):
        logits.data.copy_(torch.where(torch.arange(3) == KINDS.index(kind), 1000.0, 0.0))


def of_layout(supernet: Supernet, kinds: str, **fields) -> LongEmbedModel:
    """A model of a layout, put together by hand from the candidates of a supernet whose layout was `sfsf`."""
    entries = [{"type": "sliding", "window": 2}, {"type": "sliding", "window": 2}] + [{"type": "block", "size": 4}] * 2
    config = tiny_config(
        **{"num_hidden_layers": None, "sublayer_pattern": kinds.replace("-", "")} | fields,
        attention_patterns=[entry for entry, kind in zip(entries, kinds, strict=True) if kind == "s"],
    )
    model = LongEmbedModel(config).double()
    model.embeddings.load_state_dict(supernet.embeddings.state_dict())
    model.final_norm.load_state_dict(supernet.final_norm.state_dict())
    places = [(index, kind) for index, kind in enumerate(kinds) if kind != "-"]
    for layer, (index, kind) in zip(model.layers, places, strict=True):
        layer.load_state_dict(supernet.layers[index].candidates[KINDS.index(kind)].state_dict())
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kinds", "fields"),
    [
        ("sfsf", SHARED),
        ("ffss", SHARED),
        ("-sf-", SHARED),
        ("--s-", SHARED),
        ("sfsf", PRE_NORM),
        ("s-fs", PRE_NORM),
        ("-sff", PRE_NORM | {"first_attention_norm": True}),
        ("fs-s", PRE_NORM | {"first_attention_norm": True}),
    ],
)
def test_a_pinned_supernet_is_the_model_of_the_layout(kinds, fields, training):
    original, supernet = tiny_supernet("sfsf", **fields)
    pin(supernet, kinds)
    supernet.draw()
    input_ids = torch.randint(5, 20, (3, 11))
    mask = torch.arange(11) < torch.tensor([[11], [1], [6]])
    ours = supernet.train(training)(input_ids, attention_mask=mask).pooler_output
    ours.sum().backward()
    models = [of_layout(supernet, kinds, **fields), supernet.derive()] + [original] * (kinds == "sfsf")
    for model in models:
        theirs = model.train(training)(input_ids, attention_mask=mask).pooler_output
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
        theirs.sum().backward()
        torch.testing.assert_close(
            supernet.embeddings.word_embeddings.weight.grad,
            model.embeddings.word_embeddings.weight.grad,
            atol=1e-10,
            rtol=0,
        )


@pytest.mark.parametrize("kinds", ["-sfs", "sf-f", "fs--"])
def test_a_first_sublayer_without_a_norm_is_known_to_the_config(kinds):
    """ModernBERT's first attention has none; if it is dropped, the first one that is left has its own."""
    _, supernet = tiny_supernet("sfsf", **PRE_NORM)
    pin(supernet, kinds)
    input_ids = torch.randint(5, 20, (2, 7))
    found = supernet.eval().derive()
    torch.testing.assert_close(supernet(input_ids).pooler_output, found(input_ids).pooler_output, atol=1e-10, rtol=0)
    assert found.config.first_attention_norm == (kinds[0] != "s")


def test_a_layout_of_layer_types_with_rotations_of_their_own():
    """ModernBERT's: full and sliding attention rotate at different speeds. The layout that is found has one type."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    _, supernet = tiny_supernet(
        "sfsf",
        position_embedding_type="rope",
        attention_patterns=["full", {"type": "sliding", "window": 2}],
        rope_parameters={"full_attention": rope | {"rope_theta": 160_000.0}, "sliding_attention": rope},
    )
    pin(supernet, "f-sf")
    input_ids = torch.randint(5, 20, (2, 7))
    found = supernet.eval().derive()
    assert found.config.layer_types == ["sliding_attention"]
    torch.testing.assert_close(supernet(input_ids).pooler_output, found(input_ids).pooler_output, atol=1e-10, rtol=0)


def test_fresh_candidates_stand_beside_the_models_own():
    model, supernet = tiny_supernet("ssf")
    own = [layer.candidates[kind] for layer, kind in zip(supernet.layers, (0, 0, 1), strict=True)]
    for layer, ours in zip(model.layers, own, strict=True):
        torch.testing.assert_close(dict(layer.state_dict()), dict(ours.state_dict()), atol=0, rtol=0)
    patterns = [layer.candidates[0].attention.pattern.type for layer in supernet.layers]
    assert patterns == ["sliding", "block", "block"]  # the feed-forward's other candidate: as the attention before it
    assert supernet.probabilities().tolist() == [[pytest.approx(1 / 3)] * 3] * 3


def test_layerdrop_and_landmarks_are_those_of_the_layout():
    """LayerDrop waits for the model that is found; landmarks leave it with the last sublayer that has any."""
    _, supernet = tiny_supernet("sfsf", layerdrop=0.9, attention_patterns=[{"type": "landmark", "size": 4}, "full"])
    pin(supernet, "ffs-")
    supernet.train().draw()
    input_ids = torch.randint(5, 20, (2, 7))
    once, again = (supernet(input_ids).last_hidden_state for _ in range(2))
    assert once.equal(again)
    found = supernet.derive().config
    assert found.layerdrop == 0.9
    assert found.attention_patterns == [{"type": "full"}]


def test_attention_that_is_nowhere_the_likeliest_stands_where_it_is_likelier_than_elsewhere():
    _, supernet = tiny_supernet("sfsf")
    for logits, row in zip(supernet.logits(), ([0, 3, 1], [1, 0, 2], [0, 0, 1], [0, 9, 0]), strict=True):
        logits.data.copy_(torch.tensor(row))
    assert supernet.probabilities()[:, 0].argmax() == 1  # 0.245, against 0.212 at the third
    assert supernet.kinds() == "fs-f"
    pin(supernet, "----")
    assert supernet.derive().config.sublayer_pattern == "s"


# The schedule ---------------------------------------------------------------------------------------------------------


def test_the_schedule_of_the_paper():
    search = SearchArguments(weight_steps=10_000, cycle_steps=4_000)
    trained = [step for step in range(1, 50_001) if search.trains_architecture(step)]
    assert trained[:2] == [13_201, 13_202]
    assert len(trained) == 0.2 * 40_000
    assert [step for step in range(1, 30_000) if search.ends_cycle(step)] == [14_000, 18_000, 22_000, 26_000]


def test_the_search_ends_when_few_positions_change():
    _, supernet = tiny_supernet("sfsf")
    ends_after = cycle_end(supernet, SearchArguments(weight_steps=2, cycle_steps=3, architecture_share=0.4), False)
    layouts = {5: "ssss", 8: "ffff", 11: "fffs"}  # all are new, all have changed, a quarter has changed
    ended = []
    for step in range(1, 12):
        if step in layouts:
            pin(supernet, layouts[step])
        ended.append(ends_after(step))
    assert ended == [False] * 10 + [True]
    assert int(supernet.step) == 11


@pytest.fixture
def search(model_folder, pairs_file, tmp_path):
    """Run the script in this process; options that are given again win. Returns the output folder."""

    def run(options: str = "", output: str = "out") -> Path:
        given = f"--model_name_or_path {model_folder} --train_data {pairs_file} --output_dir {tmp_path / output} "
        given += "--per_device_train_batch_size 4 --dataloader_num_workers 0 --logging_steps 1 --learning_rate 1e-3 "
        main((given + f"{SCHEDULE} {options}").split())
        return tmp_path / output

    return run


def test_what_trains_in_each_step(search):
    """Read off the checkpoints of every step: the architecture or the weights, the other bitwise as it was."""
    output = search("--save_steps 1 --save_total_limit 99 --gradient_accumulation_steps 2 --batch_tokens 150")
    states = [load_file(output / "checkpoints" / f"step-{step}" / "model.safetensors") for step in range(1, 19)]
    moved = []
    for step, (before, after) in enumerate(pairwise(states), start=2):
        names = {name for name, tensor in after.items() if not tensor.equal(before[name])} - {"step", "choice"}
        architecture = {name for name in names if name.endswith("logits")}
        assert not architecture or architecture == names
        if architecture:
            assert len(architecture) == 4
            moved.append(step)
        else:
            assert "layers.1.candidates.0.attention.q_proj.weight" in names
    assert moved == [7, 8, 12, 13, 17, 18]
    assert not any(states[5][f"layers.{place}.logits"].any() for place in range(4))
    assert [int(state["step"]) for state in states] == list(range(1, 19))


# A layout that is known to be right -----------------------------------------------------------------------------------


class Riddles:
    """Two signs written as four indicators, and their XOR to be told in a fifth coordinate, in which the input is zero.

    Every vector has the same mean and length, so that a norm before a sublayer does nothing. In a document of one
    token attention is then a linear map, and cannot tell: the sublayer must be feed-forward. With the answer in another
    token than the one that is read (`elsewhere`), only attention can tell.
    """

    def __init__(self, elsewhere: bool) -> None:
        signs = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        answers = signs.sum(dim=1) % 2
        self.vectors = torch.zeros(4, 1 + elsewhere, 8)
        if elsewhere:
            self.vectors[:, 0, 0] = 1
            self.vectors[torch.arange(4), 1, answers] = 1
        else:
            self.vectors[:, 0, :4] = F.one_hot(signs, 2).flatten(1).float()
        self.answers = answers.float()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.vectors

    def describe(self) -> dict:
        return {}

    def solve(self, model, vectors, scale, synchronize):
        """The objective, as the loop takes it; the first token is what the model reads."""
        loss = F.binary_cross_entropy_with_logits(model(inputs_embeds=vectors).pooler_output[:, 4], self.answers)
        (loss * scale).backward()
        return {"loss": loss.detach()}


@pytest.mark.parametrize(("elsewhere", "kind"), [(False, "f"), (True, "s")])
def test_the_search_finds_the_only_kind_that_can_solve_the_problem(tmp_path, elsewhere, kind):
    model = LongEmbedModel(
        tiny_config(
            hidden_size=8,
            num_attention_heads=2,
            intermediate_size=32,
            num_hidden_layers=None,
            sublayer_pattern="s",
            attention_patterns="full",
            norm_placement="pre",
            embedding_norm=False,
            pooling="cls",
            type_vocab_size=0,
            position_embedding_type="rope",
            initializer_range=0.2,
        )
    )
    arguments = LoopArguments(
        output_dir=str(tmp_path),
        max_steps=300,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        dataloader_num_workers=0,
        report_to="none",
    )
    search = SearchArguments(weight_steps=50, cycle_steps=50, architecture_learning_rate=0.1, changed_share=0.0)
    supernet, riddles = Supernet(model, 1.0), Riddles(elsewhere)
    training = Training(
        model=supernet,
        batches=riddles,
        gradient=alternate(supernet, search, riddles.solve),
        groups=search_groups(supernet, search, 0.0),
        ends_after=cycle_end(supernet, search, report=False),
    )
    Loop(arguments).run(training)
    assert KINDS[supernet.choice] == kind
    assert supernet.probabilities().max() > 0.7
    assert riddles.solve(supernet.eval(), riddles[0], 1.0, True)["loss"] < 0.1  # alone, as it is in evaluation


# The script -----------------------------------------------------------------------------------------------------------


def test_it_ends_with_a_layout(search, pairs_file, capsys):
    output = search(f"--eval_data {pairs_file} --changed_share 1 --architecture_learning_rate 0.3")
    found = json.loads((output / "layout.json").read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"sublayer_pattern: {found['sublayer_pattern']}"
    search_facts = found.pop("search")
    assert search_facts["steps"] == 13  # two cycles of five after three steps of weights alone
    assert search_facts["positions"].replace("-", "") == found["sublayer_pattern"]
    likeliest = [max(row, key=row.get) for row in search_facts["probabilities"]]
    assert "".join(likeliest) == search_facts["positions"]
    config = LongEmbedConfig(**found, hidden_size=32, num_attention_heads=4)
    kinds = "".join("s" if layer.attention else "f" for layer in LongEmbedModel(config).layers)
    assert kinds == found["sublayer_pattern"]
    final = LongEmbedModel.from_pretrained(output / "final")
    assert final.config.sublayer_pattern == found["sublayer_pattern"]
    assert final.encode(["river stone"], output="torch").shape == (1, 32)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [13]
    entropies = [line["layout_entropy"] for line in lines if "loss" in line]
    assert entropies[:6] == [pytest.approx(math.log(3))] * 6
    assert entropies[-1] < entropies[0]


def end(output: Path) -> tuple:
    names = ("layout.json", "final/model.safetensors", "final/config.json")
    return *((output / name).read_bytes() for name in names), losses(output)


def test_a_search_that_is_interrupted_goes_on_to_the_same_layout(search, monkeypatch):
    """In the steps of weights alone, in the middle of the architecture's share, and in the second cycle."""
    options = "--changed_share 1 --save_steps 1 --architecture_learning_rate 0.3"
    undisturbed, optimize = end(search(options)), torch.optim.AdamW.step
    for step in (2, 7, 11):
        calls = count(1)

        def interrupted(self, *args, step=step, calls=calls, **kwargs):
            if next(calls) == step:
                raise KeyboardInterrupt
            return optimize(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(options, f"interrupted-{step}")
        monkeypatch.setattr(torch.optim.AdamW, "step", optimize)
        assert end(search(options + " --resume_from_checkpoint last", f"interrupted-{step}")) == undisturbed


def test_a_search_that_is_over_stays_over(search):
    output = search("--changed_share 1")
    before = end(output)
    search("--changed_share 1 --resume_from_checkpoint last")
    assert end(output) == before


def test_a_batch_is_embedded_by_one_mixture_whatever_the_token_budget(search):
    with double_precision():
        plain = losses(search("--dropout 0", "plain"))
        chunks = losses(search("--dropout 0 --batch_tokens 60", "chunks"))
    for one, two in zip(chunks, plain, strict=True):
        assert one == pytest.approx(two, rel=1e-8)


def test_the_recipe_is_one(model_folder, pairs_file, tmp_path):
    recipe = Path(layout_search.__file__).parent / "recipes" / "layout_search" / "default.yaml"
    options = f"--config {recipe} --model_name_or_path {model_folder} --train_data {pairs_file} "
    options += f"--output_dir {tmp_path}/out --per_device_train_batch_size 4 {SCHEDULE} --max_steps 8"
    main(options.split())
    assert re.fullmatch("[sf]+", json.loads((tmp_path / "out" / "layout.json").read_text())["sublayer_pattern"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--max_steps 7", r"the run has 7 steps, fewer than --weight_steps 3 and one cycle of --cycle_steps 5; .* 8$"),
        ("--cycle_steps 0", r"--cycle_steps.*: 0: must be at least 1"),
        ("--weight_steps -1", r"--weight_steps.*: -1: must be at least 0"),
        ("--architecture_share 0", r"--architecture_share 0.0 of --cycle_steps 5: makes 0 steps"),
        ("--architecture_share 1", r"--architecture_share 1.0 of --cycle_steps 5: makes 5 steps"),
        ("--gumbel_temperature 0", r"--gumbel_temperature.*: 0: must be more than 0"),
        ("--tuning lora", r"unknown argument --tuning"),
    ],
)
def test_a_mistake_is_one_sentence(search, tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        search(options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "layout.json").exists()
