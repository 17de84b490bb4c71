"""Make the training texts of docs/reports/distillation.md and docs/reports/compression.md from public documents.

    python experiments/teaching_texts.py --data_dir data --output_dir runs/texts

`passages.jsonl` has passages of whole sentences, up to about 180 words, of papers, abstracts, proposals, speeches,
questions and their answers. `documents.jsonl` has 900 consecutive words of papers, proposals and speeches. Each of them
has a file of held-out texts next to it. No text comes from an evaluation task.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import parse
from common.errors import run
from common.files import write_jsonl
from common.jsonl import read_text_columns
from common.sentences import SENTENCE_END
from experiments.speeches import addresses

# Folder below `--data_dir` -> passages of each of its documents, and number of its documents in documents.jsonl.
DOCUMENTS = {"clinical": (2, 400), "linguistics": (6, 300), "proposals": (3, 250)}
SPEECH_PASSAGES, SPEECH_DOCUMENTS = 40, 400
ABSTRACTS, SENTENCES = 4000, 3000
QUESTIONS = 2100  # the other ones are for evaluation
SHORTEST, LONGEST, DOCUMENT_WORDS = 8, 180, 900  # words
HELD_OUT_PASSAGES, HELD_OUT_DOCUMENTS = 500, 70


@dataclass
class Arguments:
    """Options of the script."""

    data_dir: str = field(
        metadata={
            "help": "folder with clinical/, linguistics/ and proposals/documents.jsonl.gz (body), "
            "pubmed/title_abstract.jsonl.gz (anchor, positive), sick_nli/pairs.jsonl.gz (premise, hypothesis)"
        }
    )
    questions: str = field(metadata={"help": "JSON lines of Natural Questions {question, long_answer}"})
    output_dir: str = field(metadata={"help": "folder of the four files", "output": "folder"})


def passages(text: str, count: int, generator: random.Random) -> list[str]:
    """Return passages of whole sentences from random places of a text.

    Args:
        text: the text.
        count: number of passages.
        generator: draws the places, and the minimum numbers of words, whose logarithm is uniform.
    """
    sentences = [stripped for sentence in SENTENCE_END.split(text) if (stripped := sentence.strip())]
    found = []
    for _ in range(count if sentences else 0):
        start = generator.randrange(len(sentences))
        words, minimum = list[str](), int(SHORTEST * (LONGEST / SHORTEST) ** generator.random())
        for sentence in sentences[start:]:
            if len(words) >= minimum:
                break
            words += sentence.split()
        found.append(" ".join(words[: LONGEST + 20]))
    return found


def all_passages(arguments: Arguments) -> list[str]:
    """Draw passages of all sources, each text once, in random order."""
    data, generator = Path(arguments.data_dir), random.Random(0)
    texts = []
    for name, (count, _) in DOCUMENTS.items():
        for _, (body,) in read_text_columns(data / name / "documents.jsonl.gz", "body"):
            texts += passages(body, count, generator)
    for paragraphs in addresses(judged=False).values():
        texts += passages("\n\n".join(paragraphs), SPEECH_PASSAGES, generator)
    abstracts = [
        pair for _, pair in read_text_columns(data / "pubmed" / "title_abstract.jsonl.gz", "anchor", "positive")
    ]
    for pair in generator.sample(abstracts, min(ABSTRACTS, len(abstracts))):
        texts += pair
    questions = [pair for _, pair in read_text_columns(Path(arguments.questions), "question", "long_answer")]
    texts += [text for pair in questions[:QUESTIONS] for text in pair]
    pairs = read_text_columns(data / "sick_nli" / "pairs.jsonl.gz", "premise", "hypothesis")
    texts += sorted({sentence for _, pair in pairs for sentence in pair})[:SENTENCES]
    texts = sorted({text for text in texts if len(text.split()) >= 3})
    generator.shuffle(texts)
    return texts


def all_documents(arguments: Arguments) -> list[str]:
    """Draw spans of long documents, in random order."""
    generator = random.Random(0)
    texts = []
    for name, (_, count) in DOCUMENTS.items():
        rows = read_text_columns(Path(arguments.data_dir, name, "documents.jsonl.gz"), "body")
        bodies = [words for _, (body,) in rows if len(words := body.split()) >= DOCUMENT_WORDS * 2 // 3]
        for words in generator.sample(bodies, min(count, len(bodies))):
            start = generator.randrange(max(1, len(words) - DOCUMENT_WORDS))
            texts.append(" ".join(words[start : start + DOCUMENT_WORDS]))
    speeches = [" ".join(paragraphs).split() for paragraphs in addresses(judged=False).values()]
    starts = [(words, start) for words in speeches for start in range(0, len(words) - 600, DOCUMENT_WORDS)]
    for words, start in generator.sample(starts, min(SPEECH_DOCUMENTS, len(starts))):
        texts.append(" ".join(words[start : start + DOCUMENT_WORDS]))
    generator.shuffle(texts)
    return texts


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with `argv`, or with the options of the process if None."""
    (arguments,) = parse(Arguments, argv=argv)
    for name, texts, held_out in (
        ("passages", all_passages(arguments), HELD_OUT_PASSAGES),
        ("documents", all_documents(arguments), HELD_OUT_DOCUMENTS),
    ):
        for file, part in ((f"held-out-{name}", texts[:held_out]), (name, texts[held_out:])):
            write_jsonl(Path(arguments.output_dir, f"{file}.jsonl"), ({"text": text} for text in part))
        words = sum(len(text.split()) for text in texts)
        print(f"{name}: {len(texts):,} texts of {words:,} words, {held_out} of them held out")


if __name__ == "__main__":
    run(main)
