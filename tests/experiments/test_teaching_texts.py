"""Texts that distillation is measured with: whole sentences, none of what judges, the same again."""

import json
import random

import pytest

from common.errors import UserError
from experiments import teaching_texts
from experiments.speeches import addresses
from tests.eval.task_files import write_rows


@pytest.fixture
def script_options(tmp_path) -> list[str]:
    data = tmp_path / "data"
    for name in teaching_texts.DOCUMENTS:
        bodies = [" ".join(f"{name} {row} says {number}." for number in range(300)) for row in range(3)]
        write_rows(
            data / name / "documents.jsonl.gz",
            [{"body": body} for body in [*bodies, "Too short for all but a passage."]],
        )
    write_rows(
        data / "pubmed" / "title_abstract.jsonl.gz",
        [{"anchor": "A title of it", "positive": "What was found. And how."}],
    )
    write_rows(data / "sick_nli" / "pairs.jsonl.gz", [{"premise": "A dog runs fast", "hypothesis": "A dog is idle"}])
    questions = [{"question": f"who was number {n}", "long_answer": f"Number {n} was it."} for n in range(2110)]
    write_rows(tmp_path / "questions.jsonl", questions)
    return ["--data_dir", str(data), "--questions", str(tmp_path / "questions.jsonl")]


def texts_of(path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_texts_are_not_of_what_judges_and_the_same_again(script_options, tmp_path):
    for name in ("one", "two"):
        teaching_texts.main([*script_options, "--output_dir", str(tmp_path / name)])
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["documents.jsonl", "held-out-documents.jsonl", "held-out-passages.jsonl", "passages.jsonl"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    judging = " ".join(" ".join(paragraphs) for paragraphs in addresses(judged=True).values())
    judging = " ".join(judging.split())
    for kind in ("passages", "documents"):
        learned, held_out = (texts_of(tmp_path / "one" / f"{part}{kind}.jsonl") for part in ("", "held-out-"))
        assert not {*learned} & {*held_out}
        assert len({*learned, *held_out}) == len(learned) + len(held_out)
        # Hardly any: some speeches say what others said, and one is there both as it was spoken and as it was written.
        assert len([text for text in learned if len(text.split()) > 20 and text in judging]) < len(learned) / 500
    everything = {
        *texts_of(tmp_path / "one" / "passages.jsonl"),
        *texts_of(tmp_path / "one" / "held-out-passages.jsonl"),
    }
    assert {"A title of it", "A dog is idle", "who was number 2099", "Number 2099 was it."} <= everything
    assert not {text for text in everything if "umber 2100" in text}
    documents = texts_of(tmp_path / "one" / "documents.jsonl")
    assert max(len(text.split()) for text in documents) == teaching_texts.DOCUMENT_WORDS
    assert min(len(text.split()) for text in documents) > 300


def test_a_passage_is_of_whole_sentences_and_as_long_as_drawn():
    sentences = [f"This is sentence {number} of the text." for number in range(200)]
    found = teaching_texts.passages(" ".join(sentences), 300, random.Random(1))
    for passage in found:
        first = int(passage.split()[3])
        count = len(passage.split()) / 7
        assert passage == " ".join(sentences[first : first + int(count)])
    lengths = sorted(len(passage.split()) for passage in found)
    assert 7 <= lengths[0] <= 14  # the last sentence has none after it
    assert 150 < lengths[-1] <= 187
    assert 30 < lengths[150] < 55  # the median is the geometric mean of 8 and 180: 38
    assert teaching_texts.passages(" \n", 3, random.Random(1)) == []


def test_a_file_that_is_not_there_is_one_sentence(script_options, tmp_path):
    with pytest.raises(UserError, match=r"clinical/documents\.jsonl\.gz: cannot be read"):
        teaching_texts.main(["--data_dir", str(tmp_path), *script_options[2:], "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
