"""Every objective trains on real text, the docstrings of Python's standard library, and resumes where it was killed."""

import ast
import json
import re
import shutil
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.arguments import parse
from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.objectives.objective_cases import CASES
from tests.training.tiny_training import tiny_config, write_jsonl
from training.contrastive import main
from training.data.pairs.batches import PairTokenizer
from training.data.sources import read_sources
from training.engine.checkpoints.folders import WEIGHTS
from training.engine.loop_arguments import LoopArguments
from training.models.encoder import ModelArguments
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.registry import OBJECTIVES
from training.objectives.embed import embed
from training.objectives.pair_data import ContrastiveArguments
from training.objectives.pair_retrieval import PairRetrieval
from training.objectives.second_modality import FeatureArguments

RECIPES = Path(__file__).parents[3] / "training" / "recipes" / "contrastive"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Small heads and queues; a queue is no multiple of the batch.
OPTIONS = {
    "info_nce": "--symmetric",
    "simcse": "--learning_rate 3e-4",
    "nt_xent": "--learning_rate 1e-3 --head_dims 128 32",
    "sup_con": "",
    "vicreg": "--learning_rate 2e-3 --head_dims 256 128 --per_device_train_batch_size 48",
    "momentum": "--queue_size 70 --momentum 0.99 --matryoshka_dims 32 16",
}


def docstring_pairs(path: Path) -> list[tuple[str, str]]:
    """The first paragraph and the remaining text of each docstring in a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds))
    halves = (docstring.split("\n\n", 1) for docstring in texts if docstring)
    return [(half[0], half[1]) for half in halves if len(half) == 2 and min(map(len, half)) > 30]


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory) -> Path:
    """A folder with an untrained model and its tokenizer, pairs of paragraphs of a docstring, and held-out ones."""
    folder = tmp_path_factory.mktemp("docstrings")
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    documents = {path.stem: docstring_pairs(path) for path in files}
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits()])
    words = Counter(
        word
        for pairs in documents.values()
        for pair in pairs
        for text in pair
        for word, _ in split.pre_tokenize_str(text.lower())
    )
    frequent = sorted(words, key=lambda word: (-words[word], word))[:2000]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIALS, *frequent])}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), split
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=128, **names)
    torch.manual_seed(0)
    LongEmbedModel(tiny_config(vocab_size=len(tokenizer), hidden_dropout_prob=0.1)).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    rows, held_out = [], []
    for name, pairs in documents.items():
        for number, (first, rest) in enumerate(pairs):
            (held_out if number % 6 == 5 else rows).append({"anchor": first, "positive": rest, "label": name})
    assert len(rows) > 500
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "held-out.jsonl", held_out)
    return folder


@pytest.fixture(scope="module")
def untrained(docstrings) -> dict[str, float]:
    """The held-out metrics of the untrained model."""
    return held_out_metrics(docstrings / "start", docstrings)


def train(docstrings: Path, output: Path, name: str, options: str = "") -> list[dict]:
    """Train with an objective; return the lines of metrics.jsonl."""
    given = f"--model_name_or_path {docstrings}/start --train_data {docstrings}/train.jsonl --output_dir {output} "
    given += f"--objective {name} --per_device_train_batch_size 16 --max_length 48 --batch_tokens 600 "
    given += "--learning_rate 3e-3 --logging_steps 1 "
    given += f"--dataloader_num_workers 0 --report_to none --warmup_steps 2 {OPTIONS[name]} "
    main((given + options).split())
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def held_out_metrics(folder: Path, docstrings: Path) -> dict[str, float]:
    """Evaluate a saved model on the held-out pairs."""
    model = LongEmbedModel.from_pretrained(folder).eval()
    tokenize = PairTokenizer(model.tokenizer, 48, 48, {})
    (source,) = read_sources([str(docstrings / "held-out.jsonl")])
    retrieval = PairRetrieval(source, tokenize, batch_size=32, batch_tokens=2000)
    return retrieval(lambda chunk, kind: embed(model, chunk), 0.05)


def test_every_objective_is_trained():
    assert OPTIONS.keys() == OBJECTIVES.keys() == {case.split()[0] for case in CASES}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read(recipe):
    given = ["--config", str(recipe), "--model_name_or_path", "m", "--train_data", "d", "--output_dir", "o"]
    given += ["--feature_data", "f"] if recipe.stem == "non_linguistic" else []
    objective, *_ = parse(
        ObjectiveArguments, ModelArguments, ContrastiveArguments, FeatureArguments, LoopArguments, argv=given
    )
    assert objective.objective == yaml.safe_load(recipe.read_text()).get("objective", "info_nce")


def test_every_objective_has_a_recipe():
    trained = {yaml.safe_load(recipe.read_text()).get("objective") for recipe in RECIPES.glob("*.yaml")}
    assert trained - {None} == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_and_held_out_retrieval_improve(name, docstrings, untrained, tmp_path):
    lines = train(docstrings, tmp_path, name, f"--max_steps {26 if name == 'vicreg' else 40}")
    losses = [line["loss"] for line in lines if "loss" in line]
    if name == "momentum":
        losses = losses[5:]  # until the queue is full there are fewer negatives, and the loss is lower
    assert sum(losses[-8:]) < 0.98 * sum(losses[:8])
    before, after = untrained, held_out_metrics(tmp_path / "final", docstrings)
    if name == "simcse":
        # SimCSE first spreads the texts. To retrieve one by another, it needs an encoder that already knows words.
        assert after["eval_uniformity"] < 2 * before["eval_uniformity"]
    else:
        assert after["eval_ndcg_at_10"] > before["eval_ndcg_at_10"] + 0.02
        assert after["eval_loss"] < before["eval_loss"]
    saved = load_file(tmp_path / "final" / "model.safetensors")
    # No parameter of the objective is saved.
    assert saved.keys() == load_file(docstrings / "start" / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("name", "options", "state"),
    [
        ("info_nce", "--learnable_temperature --objective_learning_rate 0.1", {"log_scale"}),
        ("nt_xent", "", {"head.layers.0.weight", "head.layers.3.weight"}),
        pytest.param(
            "vicreg", "", {"head.layers.0.weight", "head.layers.1.bias"}, marks=pytest.mark.slow
        ),  # a head too
        ("momentum", "", {"queue.keys", "queue.count", "momentum_encoder.layers/0/attention/q_proj/weight"}),
    ],
)
@pytest.mark.promise("C5")
def test_a_resumed_run_is_bitwise_the_same(name, options, state, docstrings, tmp_path):
    options += " --max_steps 8 --save_steps 4 --gradient_accumulation_steps 2"
    train(docstrings, tmp_path / "whole", name, options)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-4", tmp_path / "resumed" / "checkpoints" / "step-4")
    train(docstrings, tmp_path / "resumed", name, options + " --resume_from_checkpoint last")
    for file in (f"checkpoints/step-8/{WEIGHTS}", "final/model.safetensors"):
        whole, resumed = load_file(tmp_path / "whole" / file), load_file(tmp_path / "resumed" / file)
        torch.testing.assert_close(resumed, whole, atol=0, rtol=0)
    early, late = (load_file(tmp_path / "whole" / "checkpoints" / f"step-{n}" / WEIGHTS) for n in (4, 8))
    for tensor in state:
        assert not early[f"objective.{tensor}"].equal(late[f"objective.{tensor}"])


def test_a_guide_masks_false_negatives(docstrings, tmp_path):
    lines = train(docstrings, tmp_path, "info_nce", f"--max_steps 3 --guide_model {docstrings}/start")
    assert all(0 < line["false_negative_share"] < 0.9 for line in lines if "loss" in line)


def test_a_loss_that_is_no_number_stops_before_the_step_and_names_the_rows(docstrings, tmp_path):
    """The embedding of one word is NaN, and one row contains the word."""
    folder, poisoned = tmp_path / "start", 37
    shutil.copytree(docstrings / "start", folder)
    model = LongEmbedModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[model.tokenizer.mask_token_id] = torch.nan
    model.save_pretrained(folder)
    rows = [json.loads(line) for line in (docstrings / "train.jsonl").read_text().splitlines()][:64]
    rows[poisoned]["positive"] = "[MASK] " + rows[poisoned]["positive"]
    data = write_jsonl(tmp_path / "poisoned.jsonl", rows)
    output = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"the loss is nan at step \d, whose batch is \S+poisoned.jsonl, rows"
    ) as caught:
        train(
            docstrings,
            output,
            "info_nce",
            f"--model_name_or_path {folder} --train_data {data} --save_steps 1 --seed 3",
        )
    step, named = re.search(r"at step (\d), .* rows ([\d, ]+);", str(caught.value)).groups()
    named = [int(row) for row in named.split(", ")]
    assert poisoned + 1 in named
    assert len(named) == 16
    assert int(step) > 1  # so that there is a checkpoint to inspect
    (checkpoint, *_) = sorted((output / "checkpoints").iterdir(), reverse=True)
    assert checkpoint.name == f"step-{int(step) - 1}"
    weights = load_file(checkpoint / WEIGHTS)
    word_embeddings = weights.pop("embeddings.word_embeddings.weight")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert word_embeddings.isnan().any(dim=1).sum() == 1


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("sup_con", "", "the column label is missing; it has anchor, positive"),
        ("info_nce", "--debias_weight 1", "the column group is missing; it has anchor, positive"),
        ("simcse", "--dropout 0", "--objective simcse: this model has no dropout"),
        ("vicreg", "--per_device_train_batch_size 1", "compares the rows of a batch, which has 1"),
        ("info_nce", "--guide_model nowhere/at-all", "--guide_model nowhere/at-all: unknown model"),
        ("info_nce", "--matryoshka_dims 33", "--matryoshka_dims 33: must be from 1 to 32"),
    ],
)
def test_a_mistake_is_one_sentence(name, options, complaint, docstrings, tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"anchor": f"a {n}", "positive": f"b {n}"} for n in range(16)])
    with pytest.raises(UserError, match=complaint) as caught:
        train(docstrings, tmp_path / "out", name, f"--train_data {data} {options}")
    assert "\n" not in str(caught.value)
