"""Perplexity: against loops over single tokens, closed forms, and runs that must agree; resuming; what is refused."""

import json
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel

from common.errors import UserError
from eval import perplexity
from eval.models.language_models import LanguageModel
from eval.models.token_losses import masked_chunks, masked_losses, window_losses
from eval.perplexity import Arguments, compare
from eval.report.perplexities import Point, as_markdown
from modeling_longembed import LongEmbedConfig, LongEmbedForMaskedLM

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 30522}
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly brew tea in large kettles".split()  # noqa: SIM905


def words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


@pytest.fixture(scope="module")
def folders(minilm_tokenizer, tmp_path_factory):
    """Random models of two layers: those of transformers, and ours looking both ways and back alone."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("language_models")
    ours = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 30522, "initializer_range": 0.3}
    models = {
        "bert": BertForMaskedLM(BertConfig(**ours)),
        "headless": BertModel(BertConfig(**SIZES, num_hidden_layers=1)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**gpt2)),
        "ours": LongEmbedForMaskedLM(LongEmbedConfig(**ours)),
        "blocks": LongEmbedForMaskedLM(LongEmbedConfig(**ours, attention_patterns={"type": "block", "size": 8})),
        "causal": LongEmbedForMaskedLM(LongEmbedConfig(**ours, is_causal=True)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        minilm_tokenizer.save_pretrained(folder / name)
    return folder


def loaded(folder, lead=True) -> LanguageModel:
    """In float64; without `lead` as if the tokenizer put nothing before a text."""
    model = LanguageModel(str(folder))
    model.model.double()
    if not lead:
        model.lead = []
    return model


def surprise(logits, token) -> float:
    return -torch.log_softmax(logits, -1)[token].item()


# Masked models --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("E2")
@pytest.mark.parametrize("name", ["bert", "ours"])
def test_pseudo_perplexity_masks_each_token_alone(folders, minilm_tokenizer, name):
    """Salazar et al. 2020, written out: one forward of transformers a token, in one piece and in pieces of it."""
    model = loaded(folders / name)
    plain = model.model
    ids = model.tokenize(words(40))[:30]
    for length in (32, 12):  # one piece; three pieces of ten tokens
        expected = []
        for place, token in enumerate(ids):
            start = place // (length - 2) * (length - 2)
            piece = [minilm_tokenizer.cls_token_id, *ids[start : start + length - 2], minilm_tokenizer.sep_token_id]
            piece[1 + place - start] = minilm_tokenizer.mask_token_id
            with torch.no_grad():
                logits = plain(torch.tensor([piece])).logits[0, 1 + place - start]
            expected.append(surprise(logits, token))
        losses = masked_losses(model, torch.tensor(ids), [{place} for place in range(30)], length, batch_tokens=100)
        np.testing.assert_allclose(losses, expected, atol=1e-6)


@pytest.mark.promise("E2")
def test_tokens_that_are_masked_together_do_not_see_each_other(folders, minilm_tokenizer):
    model = loaded(folders / "bert")
    ids = model.tokenize(words(40))[:20]
    piece = [minilm_tokenizer.cls_token_id, *ids, minilm_tokenizer.sep_token_id]
    for place in (2, 3, 11):
        piece[1 + place] = minilm_tokenizer.mask_token_id
    with torch.no_grad():
        logits = model.model(torch.tensor([piece])).logits[0]
    losses = masked_losses(model, torch.tensor(ids), [{2, 3, 11}], 22, batch_tokens=22)
    np.testing.assert_allclose(losses, [surprise(logits[1 + place], ids[place]) for place in (2, 3, 11)], atol=1e-6)


@hypothesis.given(total=st.integers(1, 60), data=st.data())
def test_each_masked_token_is_scored_once_in_a_whole_piece(total, data):
    size = data.draw(st.integers(1, total))
    masks = data.draw(st.lists(st.sets(st.integers(0, total - 1), min_size=1), max_size=4))
    scored = []
    for start, masked, of_piece in masked_chunks(masks, size, total):
        assert 0 <= start <= total - size
        assert set(of_piece) <= set(masked) <= set(range(start, start + size))
        scored += of_piece
    assert sorted(scored) == sorted(place for mask in masks for place in mask)


def test_more_context_changes_nothing_for_a_model_that_reads_in_blocks(folders):
    """Pieces of one and of three blocks, without special tokens, which would shift the blocks."""
    model = loaded(folders / "blocks")
    model.lead, model.closing = [], []
    table = model.model.model.embeddings.position_embeddings.weight.data
    table[:] = table[:8].repeat(8, 1)  # positions start anew in each block
    ids, masks = torch.tensor(model.tokenize(words(40))[:24]), [{place} for place in range(24)]
    short, long = (masked_losses(model, ids, masks, length, batch_tokens=64) for length in (8, 24))
    np.testing.assert_allclose(short, long, atol=1e-10)


# Causal models --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("E2")
@pytest.mark.parametrize("lead", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "causal"])
def test_windows_against_a_forward_for_every_token(folders, minilm_tokenizer, name, lead):
    """Both variants with windows of 12 and stride 5: each token from a forward that ends right before it."""
    model = loaded(folders / name, lead)
    ids = model.tokenize(words(60))[:41]
    size, ends = 12 - lead, [12, 17, 22, 27]
    losses = window_losses(model, torch.tensor(ids), ends, 12, batch_tokens=30)
    for end, window in zip(ends, losses, strict=True):
        expected = []
        for place in range(end - size + (not lead), end):
            before = [minilm_tokenizer.cls_token_id] * lead + ids[end - size : place]
            with torch.no_grad():
                expected.append(surprise(model.model(torch.tensor([before])).logits[0, -1], ids[place]))
        np.testing.assert_allclose(window, expected, atol=1e-6)
        assert len(window) == size - (not lead)


@pytest.mark.promise("E2")
def test_stride_1_is_the_exact_left_context(folders, tmp_path, monkeypatch):
    """Each token has exactly the 9 tokens before it, and it is the Press variant that the script calls `last`."""
    model = loaded(folders / "gpt2", lead=False)
    ids = model.tokenize(text := words(60))[:30]
    with torch.no_grad():
        rows = torch.tensor([ids[place - 9 : place] for place in range(9, 30)])
        expected = np.mean([surprise(logits, t) for logits, t in zip(model.model(rows).logits[:, -1], ids[9:])])  # noqa: B905
    monkeypatch.setattr(perplexity, "LanguageModel", lambda *settings: model)
    (tmp_path / "text.txt").write_text(text)
    fields = {"lengths": ["10"], "stride": 1, "windows": 21}
    last, window = compare(Arguments(["m"], str(tmp_path / "text.txt"), str(tmp_path), **fields))
    assert (last.score, last.losses[0][1]) == ("last", 21)
    assert math.log(last.perplexity) == pytest.approx(expected, abs=1e-6)
    assert window.losses[0][1] == 21 * 9
    assert window.perplexity != pytest.approx(last.perplexity, rel=1e-3)


# All of it ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def books(tmp_path):
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps({"text": words(count, seed=count)}) + "\n" for count in (120, 20, 90, 100)))
    return str(path)


def arguments_of(folders, names, books, tmp_path, **fields):
    fields = {"lengths": ["16,48"], "stride": 8, "tokens_scored": 6, "draws": 2, "windows": 3} | fields
    return Arguments([str(folders / name) for name in names], books, str(tmp_path / "out"), **fields)


@pytest.mark.promise("E2")
def test_a_model_that_knows_nothing_has_the_size_of_the_vocabulary(folders, books, tmp_path, monkeypatch):
    def uniform(*settings):
        model = LanguageModel(*settings)
        head = model.model.get_output_embeddings()
        for parameter in head.parameters():
            parameter.data.zero_()
        return model

    monkeypatch.setattr(perplexity, "LanguageModel", uniform)
    points = compare(arguments_of(folders, ["ours", "causal", "bert", "gpt2"], books, tmp_path))
    assert {point.score for point in points} == {"pseudo", "masked", "last", "window"}
    assert len(points) == 4 * 2 * 2
    for point in points:
        assert point.perplexity == pytest.approx(30522, rel=1e-6)


def test_every_length_scores_the_same_tokens_of_the_documents_that_are_long_enough(
    folders, books, tmp_path, monkeypatch
):
    scored = {16: [], 48: []}  # masks of stretches, and ends of windows

    def watched(losses):
        def record(model, ids, places, length, batch_tokens):
            places = list(places)
            scored[length].append((ids[:46].tolist(), places))
            return losses(model, ids, places, length, batch_tokens)

        return record

    monkeypatch.setattr(perplexity, "masked_losses", watched(masked_losses))
    monkeypatch.setattr(perplexity, "window_losses", watched(window_losses))
    points = compare(arguments_of(folders, ["ours", "gpt2"], books, tmp_path))
    assert len(scored[16]) == 9
    assert scored[16] == scored[48]
    counts = {(p.model[-4:], p.score, p.length): [n for _, n in p.losses] for p in points}
    for length in (16, 48):
        assert counts["ours", "pseudo", length] == [6, 6, 6]  # of 120, 90 and 100 words; not of 20
        assert counts["ours", "masked", length] == [2 * round(0.15 * 46)] * 3
        assert counts["gpt2", "last", length] == [24, 24, 24]


def test_perplexity_and_its_error_are_those_of_the_formula():
    point = Point("m", "pseudo", 8, [(10.0, 4), (24.0, 8), (3.0, 2)])
    assert point.perplexity == pytest.approx(math.exp(37 / 14))
    equal = Point("m", "pseudo", 8, [(10.0, 5), (20.0, 5), (15.0, 5)])  # documents of one size: the textbook's error
    assert equal.error == pytest.approx(math.exp(3) * np.std([2, 4, 3], ddof=1) / math.sqrt(3))
    single = Point("m", "pseudo", 8, [(40.0, 4)])
    assert single.error is None
    table = as_markdown([equal, single], [8], {"pseudo": "Pseudo-perplexity"})
    assert table.startswith("Pseudo-perplexity (4 tokens of 1 documents, 15 tokens of 3 documents)\n\n| model | 8 |\n")
    assert as_markdown([equal], [8], {"pseudo": "P"}).splitlines()[-1] == "| m | 20.09 ± 11.60 |"
    assert as_markdown([single], [8], {"pseudo": "P"}).splitlines()[-1] == "| m | 22,026 |"


def test_what_is_measured_is_not_measured_again(folders, books, tmp_path, monkeypatch, edit_code):
    calls = []
    score = perplexity.score

    def counted(*settings):
        calls.append(settings[1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*settings)

    monkeypatch.setattr(perplexity, "score", counted)
    asked = arguments_of(folders, ["ours"], books, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        compare(asked)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 3
    first = compare(asked)
    assert len(calls) == 4 + 9
    again = compare(arguments_of(folders, ["ours"], books, tmp_path, labels=["another"]))
    assert len(calls) == 13
    assert [point.losses for point in again] == [point.losses for point in first]
    compare(arguments_of(folders, ["ours"], books, tmp_path, draws=3))  # the exact one stands
    assert calls[13:] == ["masked"] * 6
    edit_code("modeling_longembed")  # the code of the model
    compare(asked)
    assert len(calls) == 19 + 12


def test_the_script_shows_models_side_by_side(folders, books, tmp_path, monkeypatch, capsys):
    command = f"perplexity.py --model {folders / 'ours'} {folders / 'blocks'} --labels before after --data {books}"
    command += f" --output_dir {tmp_path / 'out'} --lengths 16,48 --tokens_scored 3 --draws 1"
    monkeypatch.setattr("sys.argv", command.split())
    perplexity.main()
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert table[0] == "Pseudo-perplexity: 3 tokens a document, each masked alone (9 tokens of 3 documents)"
    assert table[2] == "| model | 16 | 48 |"
    assert [line.split(" | ")[0] for line in table[4:6]] == ["| before", "| after"]
    assert table[7].startswith("Masked perplexity, an estimate: 15% of the tokens masked at once")
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "after" in capsys.readouterr().out


def test_a_model_with_a_shorter_context_is_shown_as_far_as_it_reads(folders, books, tmp_path, monkeypatch):
    contexts = {"ours": 16, "bert": 64}

    def short(name, *settings):
        model = LanguageModel(name, *settings)
        model.context = contexts[name.rsplit("/", 1)[-1]]
        return model

    monkeypatch.setattr(perplexity, "LanguageModel", short)
    points = compare(arguments_of(folders, ["ours", "bert"], books, tmp_path, draws=0))
    assert [point.length for point in points] == [16, 16, 48]
    assert "| beyond context |" in as_markdown(points, [16, 48], {"pseudo": "Pseudo-perplexity"})


@pytest.mark.parametrize(
    ("names", "fields", "words"),
    [
        (["ours"], {"lengths": ["16,65"]}, "65 tokens are more than the context of .*ours; give at most 64"),
        (["gpt2"], {"stride": 16}, "--stride 16 leaves a window of 16 tokens no context"),
        (["ours"], {"lengths": ["2"]}, "2 tokens have no room for any but the special ones"),
        (["headless"], {}, "is a BertModel, which predicts no tokens; give a LongEmbedForMaskedLM"),
        (["none"], {}, "unknown model .*none"),
        (["ours", "ours"], {}, "--labels: give a different one for each --model"),
        (["ours"], {"tokens_scored": 0, "draws": 0}, "must not be negative, nor both 0"),
        (["ours"], {"share": 1.5}, "--share 1.5 must lie between 0 and 1"),
        (["ours"], {"documents": 0}, "must be positive"),
        (["ours"], {"data": "none.txt"}, "none.txt cannot be read"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence_and_leaves_nothing(folders, books, tmp_path, names, fields, words):
    arguments = arguments_of(folders, names, fields.pop("data", books), tmp_path, **fields)
    with pytest.raises(UserError, match=words):
        compare(arguments)
    assert not (tmp_path / "out").exists()


def test_texts_that_are_too_short_and_foreign_results_are_told(folders, books, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(words(20))
    with pytest.raises(UserError, match=r"short.txt: the longest text has \d+ tokens, and 46 are needed"):
        compare(arguments_of(folders, ["ours"], str(short), tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text('[{"a": 1}]')
    with pytest.raises(UserError, match=r"results\.json holds no results of this script"):
        compare(arguments_of(folders, ["ours"], books, tmp_path))


def test_a_checkpoint_without_its_head_is_refused(folders, minilm_tokenizer, tmp_path):
    model = BertModel(BertConfig(**SIZES, num_hidden_layers=1, architectures=["BertForMaskedLM"]))
    model.config.architectures = ["BertForMaskedLM"]
    model.save_pretrained(tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    minilm_tokenizer.save_pretrained(tmp_path / "cut")
    with pytest.raises(UserError, match=r"cut has no weights for cls\.predictions.*; train its head first"):
        LanguageModel(str(tmp_path / "cut"))
