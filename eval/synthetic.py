"""Passkey and needle tasks of any context length, built as LongEmbed (Zhu et al. 2024) builds them, in our own words.

    python eval/synthetic.py --output_dir my_tasks --tokenizer runs/my/final --lengths 256 1024 4096 --haystack essays/

- passkey: each document tells the pass key of one person amid sentences that say nothing, and a query asks for a
  person's pass key. The needle stands out from its haystack, and a model only has to read that far.
- needle: each document is ordinary text with one invented fact put between two of its sentences, and a query asks for
  the fact. The haystack competes with the needle, so this is the harder of the two.

For each length there are more documents than queries, and all documents of a length are candidates, so that a model
that cannot see the needles scores 1 / documents in nDCG@1. Needles lie at depths spread evenly over the documents. The
result is a task folder that eval/mteb_long.py reads: `<task>/test_<length>/{corpus,queries,qrels}.jsonl.gz`.
"""

import bisect
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoTokenizer

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_folder, write_jsonl
from common.jsonl import read_text_columns

FILLER = (
    "The tide comes in and the tide goes out. The bread is in the oven. Rain falls on the roof all afternoon. "
    "A cart rolls slowly down the lane. The clock in the hall strikes again. "
)
# ruff: noqa: SIM905 (lists of words read better without forty quotes)
_FIRST_NAMES = (
    "Ada Bruno Clara Dmitri Elif Farid Greta Hugo Ines Jonas Keiko Lars Mira Nadia Oscar Petra Quinn Rosa Samir Tove "
    "Uma Viktor Wanda Ximena Yusuf Zora"
).split()
_LAST_NAMES = (
    "Abbott Bergman Castillo Dvorak Eriksen Fontaine Grigoryan Haddad Ibsen Jansen Kowalski Lindqvist Marino Novak "
    "Okafor Petrov Quist Rahman Sorensen Tanaka Ulrich Vasquez Weiss Xavier Yilmaz Zimmer"
).split()
_PLACES = (
    "Arvika Belmonte Corvara Dunmore Esbjerg Fontane Gradisca Hallstatt Ivrea Jelgava Kilrush Lerici Mostar Nerja "
    "Orvieto Piran Rovinj Sintra Trakai Visby"
).split()
_FACTS = (
    ("The clockmaker of {place} keeps {thing} in the attic.", "What does the clockmaker of {place} keep in the attic?"),
    ("Every spring the town of {place} gives away {thing}.", "What does the town of {place} give away every spring?"),
    ("The ferry to {place} was paid for with {thing}.", "What was the ferry to {place} paid for with?"),
    ("Under the bridge at {place} children once found {thing}.", "What did children find under the bridge at {place}?"),
    ("The mayor of {place} wears {thing} on holidays.", "What does the mayor of {place} wear on holidays?"),
    ("In {place} the winner of the race receives {thing}.", "What does the winner of the race in {place} receive?"),
    ("The oldest inn of {place} is famous for {thing}.", "What is the oldest inn of {place} famous for?"),
    ("A monk from {place} invented {thing}.", "What did a monk from {place} invent?"),
)
_COLOURS = "amber azure crimson emerald golden ivory jade lilac ochre pearl scarlet silver turquoise violet".split()
_THINGS = (
    "a {} accordion,a {} umbrella,a box of {} buttons,a {} kite,a pair of {} gloves,a {} teapot,a {} lantern,"
    "a {} compass,a {} violin,a sack of {} beans,a {} carpet,a {} telescope,a {} feather hat,a barrel of {} ink"
).split(",")


@dataclass(frozen=True)
class Needle:
    """What is hidden in one document, and the question that it answers."""

    text: str
    question: str


def passkey_needles(count: int, seed: int) -> list[Needle]:
    """`count` pass keys, of different people and with different digits."""
    generator = random.Random(f"passkey-{seed}")
    people = generator.sample([f"{first} {last}" for first in _FIRST_NAMES for last in _LAST_NAMES], count)
    keys = generator.sample(range(10_000, 100_000), count)
    return [
        Needle(
            f"The pass key of {person} is {key}. Remember it: {key} is the pass key of {person}. ",
            f"What is the pass key of {person}?",
        )
        for person, key in zip(people, keys, strict=True)
    ]


def fact_needles(count: int, seed: int) -> list[Needle]:
    """`count` invented facts, no two of which answer the same question."""
    generator = random.Random(f"needle-{seed}")
    subjects = generator.sample([(fact, place) for fact in _FACTS for place in _PLACES], count)
    objects = generator.sample([thing.format(colour) for thing in _THINGS for colour in _COLOURS], count)
    return [
        Needle(statement.format(place=place, thing=thing) + " ", question.format(place=place))
        for ((statement, question), place), thing in zip(subjects, objects, strict=True)
    ]


NEEDLES = {"passkey": passkey_needles, "needle": fact_needles}
MOST_DOCUMENTS = {"passkey": len(_FIRST_NAMES) * len(_LAST_NAMES), "needle": len(_FACTS) * len(_PLACES)}


class Haystack:
    """A long text, tokenized once, that gives a passage of any number of tokens from any place.

    Args:
        text: the text; passages longer than it go round and start again.
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, text: str, tokenizer: Any):
        self.text = text.rstrip() + " "
        self.tokenizer = tokenizer
        encoded = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.ends = [end for _, end in encoded["offset_mapping"]]
        # Where a sentence begins: the only places where a passage starts and a needle may lie.
        self.starts = [0, *(match.end() for match in re.finditer(r"[.!?]['\")\]]*\s+", self.text))]

    def document(self, needle: Needle, tokens: int, depth: float, start: int, before: str = "", after: str = "") -> str:
        """A document of at most `tokens` tokens, special ones included, and as near to it as whole tokens allow.

        Args:
            needle: put whole between two sentences.
            tokens: the document's length.
            depth: where the needle lies, 0 (at the start) to 1 (at the end).
            start: index of the sentence that the document starts with, taken modulo the number of sentences.
            before, after: what stands around all of it, and counts as part of its length but not of its depth.

        Raises:
            UserError: there is no room for the needle.
        """
        begin = self.starts[start % len(self.starts)]
        room = tokens - self._count(before + needle.text + after)
        while room >= 0:
            passage = self._passage(begin, room)
            places = [0, *(match.end() for match in re.finditer(r"[.!?]['\")\]]*\s+", passage))]
            place = min(places, key=lambda place: abs(place - depth * len(passage)))
            document = before + passage[:place] + needle.text + passage[place:] + after
            excess = self._count(document) - tokens
            if excess <= 0:
                return document.strip()
            room -= excess
        raise UserError(f"{tokens} tokens have no room for {needle.text.strip()!r}; make the shortest length longer")

    def _passage(self, begin: int, tokens: int) -> str:
        """`tokens` tokens of text from the character `begin` on."""
        first = bisect.bisect_right(self.ends, begin)
        whole, last = divmod(first + tokens, len(self.ends))
        if whole == 0:
            return self.text[begin : self.ends[last - 1]] if tokens else ""
        return self.text[begin:] + self.text * (whole - 1) + (self.text[: self.ends[last - 1]] if last else "")

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False)["input_ids"])


def write_task(
    folder: Path,
    kind: str,
    tokenizer: Any,
    lengths: Sequence[int],
    queries: int = 50,
    documents: int = 100,
    seed: int = 0,
    haystack: str | None = None,
) -> None:
    """Write one task, whole or not at all.

    Args:
        folder: the task's folder, such as `my_tasks/Passkey`; replaced if it is there.
        kind: `passkey` or `needle`.
        tokenizer: what counts the tokens: a fast tokenizer of transformers.
        lengths: tokens a document, special tokens included; one split each.
        queries, documents: of each length.
        seed: the same seed gives the same files.
        haystack: the text around the needles; None: filler sentences (passkey only).

    Raises:
        UserError: numbers that make no task, or a kind without its haystack.
    """
    if kind not in NEEDLES:
        raise UserError(f"there is no kind of task {kind!r}; choose from {', '.join(NEEDLES)}")
    if kind == "needle" and not (haystack or "").strip():
        raise UserError("the needle task needs a text to hide in; give --haystack, or --tasks passkey")
    if not 1 <= queries <= documents <= MOST_DOCUMENTS[kind]:
        raise UserError(
            f"{queries} queries and {documents} documents make no {kind} task: give 1 <= queries <= documents <= "
            f"{MOST_DOCUMENTS[kind]}"
        )
    if not lengths or min(lengths) < 1 or len(set(lengths)) != len(lengths):
        raise UserError(f"--lengths {' '.join(map(str, lengths))}: give different positive numbers of tokens")
    source = Haystack(haystack or FILLER * 50, tokenizer)
    with (
        atomic_folder(folder) as temporary,
        tqdm(total=len(lengths) * documents, desc=f"{kind} documents", unit="doc") as progress,
    ):
        for length in lengths:
            needles = NEEDLES[kind](documents, seed=seed + length)
            generator = random.Random(f"{kind}-{seed}-{length}")
            depths = [i / max(1, documents - 1) for i in range(documents)]
            generator.shuffle(depths)
            corpus = []
            for i, (needle, depth) in enumerate(zip(needles, depths, strict=True)):
                text = source.document(needle, length, depth, generator.randrange(len(source.starts)))
                corpus.append({"doc_id": f"d{i}", "text": text})
                progress.update()
            asked = generator.sample(range(documents), queries)
            split = temporary / f"test_{length}"
            split.mkdir()
            write_jsonl(split / "corpus.jsonl.gz", corpus)
            write_jsonl(split / "queries.jsonl.gz", ({"qid": f"q{i}", "text": needles[i].question} for i in asked))
            write_jsonl(split / "qrels.jsonl.gz", ({"qid": f"q{i}", "doc_id": f"d{i}"} for i in asked))


def read_haystack(path: str) -> str:
    """The text of a .txt file, or the `text` fields of a .jsonl or .jsonl.gz file, or all such files of a folder."""
    return "\n\n".join(read_texts(path, "--haystack"))


def read_texts(path: str, argument: str) -> list[str]:
    """The texts of a .txt file (one), of a .jsonl or .jsonl.gz file (its `text` fields), or of all such in a folder.

    Args:
        path: the file or folder.
        argument: what the user gave it as, for the complaint.

    Raises:
        UserError: a file that cannot be read, or no text at all.
    """
    root = Path(path)
    files = sorted(root.iterdir()) if root.is_dir() else [root]
    texts = [text for file in files for text in _texts(file)]
    if not texts:
        raise UserError(
            f"{argument} {path} holds no text; give a .txt or .jsonl file with text fields, or a folder of such"
        )
    return texts


def _texts(file: Path) -> Iterator[str]:
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        yield from (text for _, (text,) in read_text_columns(file, "text"))
    elif file.suffix == ".txt":
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None


@dataclass
class Arguments:
    """Which tasks to make, and how large."""

    output_dir: str = field(metadata={"help": "folder that the task folders Passkey/ and Needle/ go into"})
    tokenizer: str = field(metadata={"help": "folder or Hub id of the tokenizer that counts the tokens"})
    tasks: list[str] = field(default_factory=lambda: list(NEEDLES), metadata={"help": "passkey, needle"})
    lengths: list[int] = field(
        default_factory=lambda: [2**n for n in range(8, 16)],
        metadata={"help": "tokens a document; LongEmbed's are 256 to 32768"},
    )
    queries: int = field(default=50, metadata={"help": "queries of each length"})
    documents: int = field(default=100, metadata={"help": "documents of each length"})
    seed: int = field(default=0, metadata={"help": "the same seed gives the same files"})
    haystack: str | None = field(
        default=None, metadata={"help": "text for the needle task: .txt, .jsonl with text fields, or a folder of such"}
    )


def main() -> None:
    """The script."""
    (arguments,) = parse(Arguments)
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tokenizer {arguments.tokenizer}: there is no tokenizer ({str(error).splitlines()[0]})"
        ) from None
    haystack = read_haystack(arguments.haystack) if arguments.haystack else None
    for kind in arguments.tasks:
        folder = Path(arguments.output_dir, kind.capitalize())
        write_task(
            folder,
            kind,
            tokenizer,
            arguments.lengths,
            arguments.queries,
            arguments.documents,
            arguments.seed,
            haystack if kind == "needle" else None,
        )
        print(folder)


if __name__ == "__main__":
    run(main)
