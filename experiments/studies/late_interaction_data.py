"""Make the documents and pairs of docs/reports/late-interaction.md from public documents.

    python -m experiments.studies.late_interaction_data --data_dir data --questions nq.jsonl --output_dir runs/pairs

`documents.jsonl` has papers and proposals, from which the weights of query words are counted; `passages.jsonl` has
beginnings of them, abstracts and answers, which the token head is fitted to. `questions.jsonl`, `titles.jsonl` and
`sentences.jsonl` are pairs with a hard negative each: questions and their answers, titles and their abstracts, and
sentences and the passage that they were taken out of. The hard negative is near by BM25, or another passage of the same
document. No text comes from an evaluation task.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import parse
from common.bm25 import BM25Index
from common.errors import run
from common.files import write_jsonl
from common.jsonl import read_text_columns

SOURCES = ("clinical", "linguistics", "proposals")
COUNTED, PASSAGES, PASSAGE_CHARACTERS = 600, 40, 6000  # documents of each source, and characters of their beginnings
QUESTIONS, ABSTRACTS, PAIRS = 2100, 2000, 700  # of the questions, the other ones are for evaluation
NEAR, TRIED = 1, 8  # places in BM25's ranking among which the hard negative is drawn
AROUND, FAR = 5, 14  # sentences on each side of the one that is taken out, and between two passages of a document
LONGEST = 1300  # characters of a passage
SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass
class Arguments:
    """Options of the script."""

    data_dir: str = field(
        metadata={
            "help": "folder with clinical/, linguistics/ and proposals/documents.jsonl.gz (body) and "
            "pubmed/title_abstract.jsonl.gz (anchor, positive)"
        }
    )
    questions: str = field(metadata={"help": "JSON lines of Natural Questions {question, long_answer}"})
    output_dir: str = field(metadata={"help": "folder of the five files", "output": "folder"})


def with_negatives(pairs: Sequence[Sequence[str]], generator: random.Random) -> list[dict[str, str]]:
    """Give each pair a positive of another pair that BM25 finds near its anchor, in random order.

    Args:
        pairs: anchors and positives.
        generator: draws one of the near ones.
    """
    texts = [positive for _, positive in pairs]
    _, found = BM25Index(texts).search([anchor for anchor, _ in pairs], 12)
    rows = []
    for (anchor, positive), places in zip(pairs, found, strict=True):
        near = [place for place in places if texts[place] != positive][NEAR:TRIED]
        negative = texts[generator.choice(near)] if near else texts[generator.randrange(len(texts))]
        rows.append({"anchor": anchor, "positive": positive, "negative": negative})
    generator.shuffle(rows)
    return rows


def sentence_of_passage(text: str, generator: random.Random) -> dict[str, str] | None:
    """Take a sentence out of its passage; the hard negative is a passage of the same document far away.

    Args:
        text: a document.
        generator: draws both places.

    Returns:
        The row, or None if the document is too short.
    """
    sentences = [sentence.strip() for sentence in SENTENCE.split(text)]
    places = [place for place, sentence in enumerate(sentences) if 60 < len(sentence) < 300]
    if len(places) < 30:
        return None
    own = generator.choice(places)
    far = [place for place in places if abs(place - own) > FAR]
    if not far:
        return None
    other = generator.choice(far)
    before, after = sentences[max(0, own - AROUND) : own], sentences[own + 1 : own + 1 + AROUND]
    elsewhere = sentences[max(0, other - AROUND) : other + 1 + AROUND]
    return {
        "anchor": sentences[own],
        "positive": " ".join([*before, *after])[:LONGEST],
        "negative": " ".join(elsewhere)[:LONGEST],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with `argv`, or with the options of the process if None."""
    (arguments,) = parse(Arguments, argv=argv)
    data, generator = Path(arguments.data_dir), random.Random(0)
    bodies = {
        name: [x for _, (x,) in read_text_columns(data / name / "documents.jsonl.gz", "body")] for name in SOURCES
    }
    titles = read_text_columns(data / "pubmed" / "title_abstract.jsonl.gz", "anchor", "positive")
    abstracts = [pair for _, pair in titles]
    questions = [pair for _, pair in read_text_columns(arguments.questions, "question", "long_answer")][:QUESTIONS]

    counted: list[str] = []
    passages: list[str] = []
    for name in SOURCES:
        documents = list(bodies[name])
        random.Random(0).shuffle(documents)
        counted += documents[:COUNTED]
        passages += [text[:PASSAGE_CHARACTERS] for text in documents[:PASSAGES]]
    random.Random(1).shuffle(counted)
    passages += [answer for _, answer in questions[::3]]
    drawn = list(abstracts)
    random.Random(0).shuffle(drawn)
    passages += [positive for _, positive in drawn[:200]]
    random.Random(1).shuffle(passages)

    pairs = {"questions": with_negatives(questions, generator)}
    generator.shuffle(abstracts)
    pairs["titles"] = with_negatives(abstracts[:ABSTRACTS], generator)
    rows = []
    for name in SOURCES:
        generator.shuffle(bodies[name])
        rows += [row for text in bodies[name][:PAIRS] if (row := sentence_of_passage(text, generator)) is not None]
    generator.shuffle(rows)
    pairs["sentences"] = rows
    files = {
        "documents": [{"text": text} for text in counted],
        "passages": [{"text": text} for text in passages],
        **pairs,
    }
    for name, content in files.items():
        write_jsonl(Path(arguments.output_dir, f"{name}.jsonl"), content)
        print(f"{name}.jsonl: {len(content):,} rows")


if __name__ == "__main__":
    run(main)
