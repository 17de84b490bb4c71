"""The data of late interaction: pairs whose negatives are others' texts, the same again, and nothing that judges."""

import json
import random

import pytest

from common.errors import UserError
from experiments.studies import late_interaction_data as data
from tests.eval.task_files import write_rows


def sentence(name: str, row: int, number: int) -> str:
    return f"In {name} {row} the sentence number {number} says what {number * 7 + row} means, which is more than sixty."


@pytest.fixture
def script_options(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(data, "QUESTIONS", 12)
    for name in data.SOURCES:
        bodies = [" ".join(sentence(name, row, number) for number in range(40)) for row in range(3)]
        write_rows(
            tmp_path / "data" / name / "documents.jsonl.gz", [{"body": body} for body in [*bodies, "Too short."]]
        )
    abstracts = [{"anchor": f"the title of {n}", "positive": f"An abstract of title {n}."} for n in range(10)]
    write_rows(tmp_path / "data" / "pubmed" / "title_abstract.jsonl.gz", abstracts)
    questions = [{"question": f"who was number {n}", "long_answer": f"Number {n} was it."} for n in range(20)]
    write_rows(tmp_path / "questions.jsonl", questions)
    return ["--data_dir", str(tmp_path / "data"), "--questions", str(tmp_path / "questions.jsonl")]


def rows_of(folder, name) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_negatives_are_texts_of_others_and_all_is_the_same_again(script_options, tmp_path, capsys):
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        data.main([*script_options, "--output_dir", str(folder)])
    assert "questions.jsonl: 12 rows" in capsys.readouterr().out
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
    assert len(rows_of(folders[0], "documents")) == 12
    for name, count in (("questions", 12), ("titles", 10), ("sentences", 9)):
        rows = rows_of(folders[0], name)
        assert len(rows) == count
        for row in rows:
            assert row["negative"] != row["positive"]
            assert row["anchor"] not in row["positive"] + row["negative"]
    answers = {f"Number {n} was it." for n in range(12)}
    assert {row[key] for row in rows_of(folders[0], "questions") for key in ("positive", "negative")} <= answers
    for row in rows_of(folders[0], "sentences"):
        place = " ".join(row["anchor"].split()[1:3])  # both passages are of the document of the sentence
        assert place in row["positive"]
        assert place in row["negative"]
        numbers = [{int(n) for n in data.re.findall(r"number (\d+)", row[key])} for key in ("positive", "negative")]
        assert not numbers[0] & numbers[1]


def test_a_sentence_is_taken_out_of_its_neighbours():
    sentences = [sentence("paper", 1, number) for number in range(40)]
    row = data.sentence_of_passage(" ".join(sentences), random.Random(3))
    place = sentences.index(row["anchor"])
    around = sentences[max(0, place - data.AROUND) : place] + sentences[place + 1 : place + 1 + data.AROUND]
    assert row["positive"] == " ".join(around)[: data.LONGEST]


def test_a_folder_without_the_sources_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"clinical.documents\.jsonl\.gz: cannot be read"):
        data.main(["--data_dir", str(tmp_path), "--questions", "q.jsonl", "--output_dir", str(tmp_path / "out")])
