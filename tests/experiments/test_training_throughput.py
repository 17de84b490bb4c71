"""The comparison of training steps: both sides compute the same, and what the table makes of their times."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from common.errors import UserError
from experiments import training_throughput
from experiments.training_throughput import OURS, PUBLISHED, Arguments, Row, compare
from modeling_longembed import LongEmbedModel

LENGTH = 48


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> str:
    """A tiny random BERT with its tokenizer and dropout, of 32 positions."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return str(folder)


def arguments(bert: str, output, **changes) -> Arguments:
    fields = {"base_model": bert, "output_dir": str(output), "lengths": [str(LENGTH)], "pair_count": 3}
    return Arguments(**fields | {"batch_tokens": [1, 100], "repeats": 1} | changes)


@pytest.mark.slow
def test_both_sides_measure_the_same_step(bert_folder, tmp_path, capsys):
    """The oracle of our step is sentence-transformers' loss; real processes, each of them twice."""
    compare(arguments(bert_folder, tmp_path, batch_tokens=[100], attention_patterns=["full", "block:size=16"]))
    said = capsys.readouterr().out
    assert said.count("loss differs by") == 2
    assert said.count("repeat 1, ours") == said.count("repeat 1, sentence-transformers") == 2
    assert not list(tmp_path.glob("gradients*"))


@pytest.mark.slow
def test_sides_that_differ_are_not_timed(bert_folder, tmp_path):
    """The same step with one number of one side's weights changed."""
    models = training_throughput._models(bert_folder, "full", LENGTH, tmp_path)
    weights = load_file(f"{models[PUBLISHED]}/model.safetensors")
    name = "encoder.layer.1.output.dense.bias"
    save_file(
        weights | {name: weights[name] + 0.05 * torch.arange(32)},
        f"{models[PUBLISHED]}/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=r"^full at 48 tokens: loss or gradients differ by more than 0\.0001, nothing"):
        compare(arguments(bert_folder, tmp_path))


def test_dropout_is_off_on_both_sides(bert_folder, tmp_path):
    models = training_throughput._models(bert_folder, "full", LENGTH, tmp_path)
    ours = LongEmbedModel.from_pretrained(models[OURS]).config
    published = BertConfig.from_pretrained(models[PUBLISHED])
    assert ours.hidden_dropout_prob == ours.attention_dropout == 0
    assert published.hidden_dropout_prob == published.attention_probs_dropout_prob == 0


def test_models_are_kept_under_all_that_they_are_made_from(bert_folder, tmp_path, edit_code):
    def ours(pattern: str) -> str:
        return training_throughput._models(bert_folder, pattern, LENGTH, tmp_path)[OURS]

    first = ours("block:size=8")
    assert ours("block:size=8") == first != ours("block:size=16")
    assert LongEmbedModel.from_pretrained(ours("block:size=16")).config.attention_patterns[0]["size"] == 16
    edit_code("modeling_longembed")
    assert ours("block:size=8") != first


def test_the_fastest_within_the_memory_is_compared():
    """Ours is fastest where it takes too much; what fits is twice as fast as the best of the others."""
    figures = {(OURS, 1): (2.0, 3e9), (OURS, 9): (1.0, 8e9), (PUBLISHED, 1): (8.0, 2e9), (PUBLISHED, 9): (4.0, 5e9)}
    measured = {
        Row(who, "full", LENGTH, tokens, "", "", 1): [{"seconds": seconds, "peak": peak}] * 3
        for (who, tokens), (seconds, peak) in figures.items()
    }
    table = training_throughput._table(measured, pairs=4, counts={LENGTH: 200})
    assert "| full | 48 | 200 | ours | 1 | 2 ± 0% | 3.00 |" in table
    assert "2.00 times the pairs/s of sentence-transformers' fastest setting, at 3.00 GB against 5.00 GB" in table


def test_what_is_asked_for_wrongly(bert_folder, tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text('{"anchor": "a b", "positive": "c d e"}\n')
    with pytest.raises(UserError, match=r"pairs.jsonl: has 1 pairs, --pair_count asks for 3$"):
        compare(arguments(bert_folder, tmp_path, pairs=str(tmp_path / "pairs.jsonl")))
    monkeypatch.setattr("sys.argv", ["training_throughput.py", "--lengths", "8", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match=r"required: --base_model"):
        training_throughput.main()
