"""Passkeys: documents as deep and long as asked, models of which the accuracy is known, greedy decoding, resuming."""

import json
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common.encoders.model_folder import ModelFolder
from common.errors import UserError
from eval import passkey
from eval.models.language_models import LanguageModel
from eval.passkey import Arguments, depths, measure
from eval.report.heat_maps import Cell, draw, grids
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval
from eval.tasks.needles import FILLER, Haystack, passkey_needles
from eval.tasks.passkey import (
    GARBAGE,
    EmbeddingTest,
    GenerationTest,
    accuracy,
    is_greedy,
    passkey_documents,
    passkey_prompt,
)

TRIALS = 5


class Reader:
    """An encoder that reads the first `reach` tokens of a text and knows whom it is about: one axis a person.

    A text that names nobody within reach has the same vector as any other such.
    """

    identity = "reader"
    computed_by: dict[str, str] = {}

    def __init__(self, tokenizer, reach: int, prompt: str = ""):
        self.tokenizer, self.reach, self.prompt, self.read = tokenizer, reach, prompt, []
        self.model = self  # where the tokenizer and the similarity of an encoder are

    def prompt_ids(self, prompt_type) -> list[int]:
        return self.tokenizer(self.prompt, add_special_tokens=False)["input_ids"]

    def __call__(self, texts, prompt_type) -> list[np.ndarray]:
        self.read += texts
        rows = []
        for text in texts:
            spans = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"][: self.reach]
            seen = text[: max(end for _, end in spans)]
            row = np.full((1, 676), 0.1, np.float32)
            if person := re.search(r"pass key of (\w+ \w+)[?.]|pass key of (\w+ \w+) is", seen):
                name = person[1] or person[2]
                row[0, passkey_axis(name)] = 1.0
            rows.append(row / np.linalg.norm(row))
        return rows

    def similarity(self, a, b):
        return a @ b.T


def passkey_axis(name: str) -> int:
    everybody = sorted(needle.question for needle in passkey_needles(676, seed=0))
    return everybody.index(f"What is the pass key of {name}?")


class Spec:
    kind = "model"


def sentence_tokens(tokenizer, text: str) -> int:
    return max(len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in text.split(". "))


# Documents ------------------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(length=st.integers(80, 600), depth=st.floats(0, 1), seed=st.integers(0, 99))
def test_documents_have_the_key_at_the_depth_and_the_length_that_are_asked_for(minilm_tokenizer, length, depth, seed):
    needles = passkey_needles(3, seed)
    texts = passkey_documents(Haystack(FILLER * 5, minilm_tokenizer), needles, length, depth, seed)
    longest = sentence_tokens(minilm_tokenizer, FILLER)
    for needle, text in zip(needles, texts, strict=True):
        assert length - 3 <= len(minilm_tokenizer(text)["input_ids"]) <= length
        assert text.count(needle.text.strip()) == 1
        before, after = text.split(needle.text.strip())
        before, after = (len(minilm_tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after))
        assert abs(before - depth * (before + after)) <= longest + 2


def test_only_the_depth_differs_between_the_cells_of_a_length(minilm_tokenizer):
    needles, source = passkey_needles(4, 7), Haystack(FILLER * 5, minilm_tokenizer)
    shallow, deep = (passkey_documents(source, needles, 200, depth, 7) for depth in (0.0, 1.0))
    for needle, first, last in zip(needles, shallow, deep, strict=True):
        assert first.startswith(needle.text)
        assert first.replace(needle.text.strip(), "").split() == last.replace(needle.text.strip(), "").split()


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompts_are_those_of_landmark_attention(minilm_tokenizer, depth):
    prompt = passkey_prompt(Haystack(GARBAGE * 50, minilm_tokenizer), 12345, 300, depth)
    assert 297 <= len(minilm_tokenizer(prompt)["input_ids"]) <= 300
    start, end = (
        "There is an important info hidden inside a lot of irrelevant text.",
        "\nWhat is the pass key? The pass key is",
    )
    assert prompt.startswith(start)
    assert prompt.endswith(end)
    before, after = prompt.removesuffix(end).split("The pass key is 12345. Remember it. 12345 is the pass key.")
    before = before.split("information there.\n")[1]
    assert abs(len(before) - depth * len(before + after)) <= len("There and back again. ")
    assert f"{before.rstrip()} {after.lstrip()}".strip() in GARBAGE * 50


# Embedding models -----------------------------------------------------------------------------------------------------


@hypothesis.given(n=st.integers(1, 12), data=st.data())
def test_accuracy_is_the_mean_over_random_orders_of_what_is_tied(n, data):
    numbers = st.lists(st.integers(0, 2), min_size=n * n, max_size=n * n)
    scores = np.array(data.draw(numbers), float).reshape(n, n)
    expected = 0.0
    for i, row in enumerate(scores):
        best = [j for j in range(n) if row[j] == row.max()]
        expected += (i in best) / len(best) / n
    assert accuracy(scores) == pytest.approx(expected)
    assert accuracy(scores + 1e-9 * np.random.default_rng(0).random((n, n))) == pytest.approx(expected)


def test_a_model_that_reads_everything_finds_every_key(minilm_tokenizer):
    model = EmbeddingTest(Spec, Reader(minilm_tokenizer, 10**6), None)
    assert [model.measure(length, depth, TRIALS, 0) for length in (90, 400) for depth in depths(4)] == [1.0] * 8


def test_a_model_that_reads_the_first_tokens_finds_the_keys_that_lie_in_them(minilm_tokenizer):
    """Whose keys are read whole is counted by hand; all other documents look alike to it."""
    reach = 128
    for length in (100, 256, 512):
        for depth in depths(6):
            reader = Reader(minilm_tokenizer, reach)
            found = EmbeddingTest(Spec, reader, None).measure(length, depth, TRIALS, 3)
            documents, questions = reader.read[:TRIALS], reader.read[TRIALS:]
            seen = []
            for text, question in zip(documents, questions, strict=True):
                name = question.removeprefix("What is the pass key of ").removesuffix("?")
                end = text.index(name + " is ") + len(name + " is")
                seen.append(len(minilm_tokenizer(text[:end], add_special_tokens=False)["input_ids"]) + 1 <= reach)
            # A hidden document ties with the others that are hidden; those that are read are about somebody else.
            hidden = seen.count(False)
            assert found == pytest.approx((sum(seen) + (1.0 if hidden else 0.0)) / TRIALS)
            if length == 512:
                assert (sum(seen) == TRIALS) == (depth <= 0.2)
    assert hidden == TRIALS


def test_a_model_that_tells_nothing_apart_is_right_by_chance(minilm_tokenizer):
    model = EmbeddingTest(Spec, Reader(minilm_tokenizer, 2), None)
    assert [model.measure(200, depth, TRIALS, 0) for depth in depths(3)] == pytest.approx([1 / TRIALS] * 3)


def test_the_models_prompt_counts_as_a_part_of_the_document(minilm_tokenizer):
    reader = Reader(minilm_tokenizer, 10**6, prompt="search document: ")
    EmbeddingTest(Spec, reader, None).measure(150, 0.5, TRIALS, 0)
    lengths = [len(minilm_tokenizer("search document: " + text)["input_ids"]) for text in reader.read[:TRIALS]]
    assert all(147 <= length <= 150 for length in lengths)


@pytest.mark.parametrize("kind", ["model", "chunk-mean", "chunk-max"])
def test_scores_are_those_that_tasks_are_judged_by(
    tiny_sentence_transformer, minilm_tokenizer, tmp_path, kind, make_task
):
    """The very documents as a task: MTEB's ranking by eval/mteb_long.py has the same share of first places."""
    haystack = tmp_path / "hay.txt"
    haystack.write_text("".join(f"On day {i} the ship met {i * 7 % 31} storms and a whale. " for i in range(300)))
    name = str(tiny_sentence_transformer) if kind == "model" else f"{kind}:{tiny_sentence_transformer}:32"
    asked = Arguments([name], str(tmp_path / "out"), ["64"], depths=1, trials=40, haystack=str(haystack))
    found = measure(asked)[0].accuracy
    needles, source = passkey_needles(40, seed=64), Haystack(haystack.read_text(), minilm_tokenizer)
    texts = passkey_documents(source, needles, 64, 0.5, 0)
    make_task("Keys", texts, [needle.question for needle in needles], split="test_64")
    (score,) = evaluate_retrieval(RetrievalArguments([name], str(tmp_path / "mteb"), data_dir=str(tmp_path / "data")))
    assert found == pytest.approx(score.value / 100, abs=1e-5)  # MTEB rounds
    assert 0 < found < 1


# Language models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(minilm_tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": 30522}
    GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.5)).save_pretrained(folder)
    minilm_tokenizer.save_pretrained(folder)
    return folder


def test_a_key_is_given_if_greedy_decoding_generates_it(gpt2, minilm_tokenizer):
    model = LanguageModel(str(gpt2))
    for seed in range(4):
        ids = torch.from_numpy(np.random.default_rng(seed).integers(1000, 30000, (1, 20)))
        fixed = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        whole = model.model.generate(ids, attention_mask=torch.ones_like(ids), **fixed)[0].tolist()
        assert is_greedy(model, whole, 3)
        for place in (-3, -2, -1):
            other = list(whole)
            other[place] += 1
            assert not is_greedy(model, other, 3)


class Copier:
    """Says what came after the last two tokens where they stood last, among the `reach` tokens that it remembers."""

    computed_by: dict[str, str] = {}
    is_causal, context, precision, lead, closing = True, 10**6, "float32", (101,), (102,)

    def __init__(self, tokenizer, reach: int):
        self.tokenizer, self.reach = tokenizer, reach
        self.folder = ModelFolder(Path(), "copier", "1")

    def tokenize(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def logits(self, input_ids, chosen):
        (ids,), rows = input_ids.tolist(), []
        for at in chosen[0].nonzero()[:, 0].tolist():
            row = torch.zeros(30522)
            for back in range(at - 1, max(0, at - self.reach), -1):
                if ids[back - 1 : back + 1] == ids[at - 1 : at + 1]:
                    row[ids[back + 1]] = 1.0
                    break
            rows.append(row)
        return torch.stack(rows)


def test_a_language_model_that_remembers_so_far_gives_the_keys_that_lie_so_far_back(minilm_tokenizer):
    """In "The pass key is K. Remember it. K is the pass key." the first K is what "key is" asks for."""
    for reach in (10**6, 150):
        model = GenerationTest(Copier(minilm_tokenizer, reach), None)
        for length in (130, 400):
            for depth in depths(5):
                back = (1 - depth) * (length - 60)
                expected = 1.0 if back + 40 < reach else 0.0
                if abs(back + 30 - reach) > 30:  # well within reach, or well beyond
                    assert model.measure(length, depth, 3, 0) == expected, (reach, length, depth)


def test_a_masked_model_generates_nothing(minilm_tokenizer):
    model = Copier(minilm_tokenizer, 9)
    model.is_causal = False
    with pytest.raises(UserError, match="generate:copier is a masked language model"):
        GenerationTest(model, None)


# All of it ------------------------------------------------------------------------------------------------------------


def test_the_script(tiny_longembed, tiny_sentence_transformer, gpt2, tmp_path, monkeypatch, capsys, edit_code):
    """Three kinds of models side by side; the second time from what stands there, to the same bytes."""
    command = f"passkey.py --model {tiny_longembed} truncate:{tiny_sentence_transformer}:32 generate:{gpt2}"
    command += f" --labels ours cut gpt2 --output_dir {tmp_path} --lengths 128,512 --depths 3 --trials 4"
    monkeypatch.setattr("sys.argv", command.split())
    passkey.main()
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("ours\n\n| depth | 128 | 512 |\n| ---: | ---: | ---: |\n| 0% | ")
    assert [line for line in table.splitlines() if "|" not in line and line] == ["ours", "cut", "gpt2"]
    assert table.rstrip().endswith("% |  |")  # gpt2 reads 256 tokens
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert "gpt2" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "results.json").read_text())) == 6 + 6 + 3
    monkeypatch.setattr(EmbeddingTest, "measure", None)
    monkeypatch.setattr(GenerationTest, "measure", None)
    passkey.main()
    assert (tmp_path / "table.md").read_text() == table
    edit_code("modeling_longembed")  # what computes the first of the models, which then is measured again
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        passkey.main()


def test_the_same_seed_gives_the_same_numbers(tiny_longembed, tmp_path):
    fields = {"lengths": ["128"], "depths": 2, "trials": 6}
    once, again = (measure(Arguments([str(tiny_longembed)], str(tmp_path / name), **fields)) for name in "ab")
    assert once == again


def test_cells_become_grids_with_gaps_beyond_the_context(tmp_path):
    cells = [Cell("a", 1, 0.0, 0.1), Cell("a", 2, 0.0, 0.2), Cell("a", 1, 1.0, 0.3), Cell("a", 2, 1.0, 0.4)]
    cells.append(Cell("b", 1, 0.0, 0.5))
    (_, lengths, rows, first), (name, _, _, second) = grids(cells)
    assert (lengths, rows, name) == ([1, 2], [0.0, 1.0], "b")
    np.testing.assert_array_equal(first, [[0.1, 0.2], [0.3, 0.4]])
    np.testing.assert_array_equal(second, [[0.5, np.nan], [np.nan, np.nan]])
    draw(cells, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": ["bm25"]}, "--model bm25 has no vectors"),
        ({"model": ["none"]}, "unknown model none"),
        ({"lengths": ["16"]}, "16 tokens have no room for"),
        ({"trials": 0}, "--trials 0, --depths 6 and --batch_tokens 16384 must be positive"),
        ({"trials": 677}, "the first at most 676"),
        ({"depths": 0}, "must be positive"),
        ({"labels": ["a", "b"]}, "--labels: give a different one for each"),
        ({"haystack": "none.txt"}, "none.txt cannot be read"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence_and_leaves_nothing(tiny_longembed, tmp_path, fields, words):
    fields = {"model": [str(tiny_longembed)], "lengths": ["128"]} | fields
    with pytest.raises(UserError, match=words):
        measure(Arguments(output_dir=str(tmp_path / "out"), **fields))
    assert not (tmp_path / "out").exists()


def test_lengths_that_a_language_model_cannot_read_are_told(gpt2, tmp_path):
    with pytest.raises(UserError, match="--lengths: 257 tokens are more than the context of generate:"):
        measure(Arguments([f"generate:{gpt2}"], str(tmp_path / "out"), ["257,512"]))
