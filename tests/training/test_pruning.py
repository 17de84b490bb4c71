"""The search for layers to keep: what it finds, what it costs, that it goes on; a pruned model is the slice."""

import itertools
import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.errors import UserError
from common.provenance import computed_by
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import random_pairs, tiny_config, write_jsonl
from training import pruning
from training.pruning import pruned, search


def read_scores(folder: Path) -> dict[tuple[int, ...], float]:
    """Return the scores of a search, by the layers that were kept."""
    rows = json.loads((folder / "search.json").read_text())
    return {tuple(row["case"]["kept"]): row["ndcg_at_10"] for row in rows}


@pytest.mark.parametrize(("count", "depth"), [(6, 3), (12, 6), (4, 4), (5, 1)])
def test_the_cost_is_the_one_of_the_docs(count, depth):
    asked = []

    def score(kept):
        asked.append(kept)
        return float(sum(kept))

    search(score, count, depth)
    assert len(asked) == 1 + (count * (count + 1) - depth * (depth + 1)) // 2
    assert len(set(asked)) == len(asked)


def test_layers_of_additive_worth_are_found_as_by_trying_all():
    """Where each layer adds its own worth, the greedy path is the best subset of every depth."""
    worth = [0.5, 0.1, 0.9, 0.3, 0.7, 0.2]
    for kept in search(lambda kept: sum(worth[unit] for unit in kept), 6, 1):
        best = max(itertools.combinations(range(6), len(kept)), key=lambda some: sum(worth[unit] for unit in some))
        assert kept == best


def test_of_equal_scores_the_earlier_layers_stay():
    assert search(lambda kept: 1.0, 5, 2) == [(0, 1, 2, 3, 4), (0, 1, 2, 3), (0, 1, 2), (0, 1)]


@pytest.fixture
def model_with_empty_layers(tmp_path, word_tokenizer) -> Path:
    """Six layers of which three do nothing at all: their outputs are zero, before norms that come first."""
    torch.manual_seed(0)
    fields = {"norm_placement": "pre", "final_norm": True, "initializer_range": 0.3}
    model = LongEmbedModel(tiny_config(num_hidden_layers=6, **fields))
    for layer in (1, 2, 4):
        for sublayer in model.layers[2 * layer : 2 * layer + 2]:
            last = sublayer.attention.o_proj if sublayer.attention is not None else sublayer.feed_forward.down_proj
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    model.tokenizer = word_tokenizer
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def prune(model_with_empty_layers, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", random_pairs(40))

    def run(options: str) -> Path:
        given = f"--model_name_or_path {model_with_empty_layers} --eval_data {pairs} --output_dir {tmp_path}/out "
        pruning.main((given + options).split())
        return tmp_path / "out"

    return run


@pytest.mark.promise("L3")
def test_a_pruned_model_is_rebuilt_from_the_kept_sublayers(prune, model_with_empty_layers):
    """Bitwise: the weights of the kept layers under their new numbers, and what that model computes."""
    output = prune("--depth 3")
    scores = read_scores(output)
    best = max(value for kept, value in scores.items() if len(kept) == 3)
    found = LongEmbedModel.from_pretrained(output / "final")
    whole = LongEmbedModel.from_pretrained(model_with_empty_layers)
    weights = load_file(output / "final" / "model.safetensors")
    layers = next(
        layers
        for layers in itertools.combinations(range(6), 3)
        if all(
            torch.equal(
                weights[f"layers.{2 * new}.attention.v_proj.weight"], whole.layers[2 * old].attention.v_proj.weight
            )
            for new, old in enumerate(layers)
        )
    )
    assert best == scores[layers]
    rebuilt = LongEmbedModel(found.config)
    for name in ("embeddings", "final_norm"):
        getattr(rebuilt, name).load_state_dict(getattr(whole, name).state_dict())
    for new, old in enumerate(layers):
        for part in (0, 1):
            rebuilt.layers[2 * new + part].load_state_dict(whole.layers[2 * old + part].state_dict())
    ids = torch.randint(5, 30, (2, 40))
    assert torch.equal(rebuilt.eval()(ids).pooler_output, found.eval()(ids).pooler_output)


def test_layers_that_do_nothing_can_go_without_a_loss(prune, model_with_empty_layers):
    """A model whose other layers matter keeps its score as long as there are empty ones to drop."""
    output = prune("--depth 3")
    scores = read_scores(output)
    full = scores[tuple(range(6))]
    for depth in (5, 4, 3):
        assert max(value for kept, value in scores.items() if len(kept) == depth) >= full
    model = LongEmbedModel.from_pretrained(model_with_empty_layers).eval()
    ids = torch.randint(5, 30, (2, 40))
    torch.testing.assert_close(pruned(model, (0, 3, 5), "layer")(ids).pooler_output, model(ids).pooler_output)


def test_a_search_that_is_killed_goes_on(prune, monkeypatch, tmp_path):
    """What was scored is not scored again, and the end is the same."""
    whole = (prune("--depth 4") / "search.json").read_text()
    (tmp_path / "out" / "search.json").unlink()
    score, calls = pruning.pruned, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(pruning, "pruned", failing)
    with pytest.raises(KeyboardInterrupt):
        prune("--depth 4")
    assert len(read_scores(tmp_path / "out")) == 4
    assert (prune("--depth 4") / "search.json").read_text() == whole
    assert len(calls) == 5 + (12 - 4) + 1  # the five before, what was missing, and the model that is written


def test_sublayers_are_searched_one_by_one(prune):
    found = LongEmbedModel.from_pretrained(prune("--unit sublayer --depth 9") / "final")
    assert len(found.layers) == 9


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--depth 7", "--depth 7: the model has 6 layers"),
        ("--depth 0", "--depth 0: must be at least 1"),
        ("--depth 3 --max_length 999", "--max_length 999: must be at most 128"),
    ],
)
def test_a_mistake_is_one_sentence(prune, options, complaint):
    with pytest.raises(UserError, match=complaint):
        prune(options)


def test_scores_of_another_length_are_not_taken(prune):
    prune("--depth 5")
    with pytest.raises(UserError, match=r"search\.json: was made with max_length 128, and this run has 20; give"):
        prune("--depth 5 --max_length 20")


def test_scores_of_another_version_are_not_taken(prune, monkeypatch):
    prune("--depth 6")
    monkeypatch.setattr(pruning, "computed_by", lambda *code, **of: computed_by(*code, **of) | {"torch": "9"})
    with pytest.raises(UserError, match=f"was made with torch {re.escape(version('torch'))}, and this run has 9; give"):
        prune("--depth 6")


def in_file(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def another_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["layers.0.attention.q_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES = {
    "weight": (another_weight, "model"),
    "config": (lambda folder: in_file(folder / "config.json", '"pooling": "mean"', '"pooling": "cls"'), "model"),
    "tokenizer": (lambda folder: in_file(folder / "tokenizer.json", '"river"', '"rivers"'), "model"),
    "pairs": (lambda folder: write_jsonl(folder.parent / "pairs.jsonl", random_pairs(40, seed=5)), "texts"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_scores_of_another_model_or_of_other_pairs_are_not_taken(prune, model_with_empty_layers, change):
    (row,) = json.loads((prune("--depth 6") / "search.json").read_text())
    make, name = CHANGES[change]
    make(model_with_empty_layers)
    complaint = rf"search\.json: was made with {name} (\w+), and this run has (\w+); give another --output_dir"
    with pytest.raises(UserError, match=complaint) as refused:
        prune("--depth 6")
    found = re.search(complaint, str(refused.value))
    assert found is not None
    assert row["case"][name] == found[1] != found[2]


def test_scores_are_those_of_a_model_that_was_moved(prune, model_with_empty_layers, monkeypatch):
    """Or that is given another dropout, which no score depends on."""
    prune("--depth 5")
    moved = model_with_empty_layers.rename(model_with_empty_layers.with_name("moved"))
    monkeypatch.setattr(pruning, "embed", lambda *_: pytest.fail("scored again"))
    prune(f"--depth 5 --model_name_or_path {moved} --dropout 0.3")


@pytest.mark.parametrize("content", ["{", '{"made_by": {}, "scores": []}', '[{"kept": [3]}]', "null"])
def test_a_damaged_file_is_one_sentence(prune, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "search.json").write_text(content)
    with pytest.raises(UserError, match=r"search\.json holds no results of this script .*give another") as caught:
        prune("--depth 5")
    assert "\n" not in str(caught.value)


def test_a_row_without_a_score_is_refused(prune):
    file = prune("--depth 6") / "search.json"
    rows = [{"case": row["case"]} for row in json.loads(file.read_text())]
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"search\.json: a score is missing; give another --output_dir"):
        prune("--depth 6")


def far_from_whole_when_pruned(layerdrop: float) -> float:
    """Mean squared distance of a model's vectors from those of its every other layer, after the same training."""
    torch.manual_seed(0)
    fields = {"norm_placement": "pre", "final_norm": True, "initializer_range": 0.2, "hidden_dropout_prob": 0.0}
    model = LongEmbedModel(tiny_config(num_hidden_layers=4, layerdrop=layerdrop, **fields)).train()
    ids = torch.randint(5, 30, (64, 8), generator=torch.Generator().manual_seed(1))
    target = torch.nn.functional.normalize(torch.randn(25, 32, generator=torch.Generator().manual_seed(2)), dim=1)
    target = torch.nn.functional.normalize(target[ids - 5].mean(1), dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(90):
        loss = (torch.nn.functional.normalize(model(ids).pooler_output, dim=1) - target).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    whole, half = (
        torch.nn.functional.normalize(each(ids).pooler_output, dim=1)
        for each in (model, pruned(model, (0, 2), "layer"))
    )
    return (whole - half).square().sum(1).mean().item()


@pytest.mark.promise("L3")
def test_a_model_trained_with_layerdrop_can_lose_layers_without_finetuning():
    """Half of its layers give what all of them give, far more nearly than in a model trained without."""
    assert far_from_whole_when_pruned(0.5) < 0.25 * far_from_whole_when_pruned(0.0)
