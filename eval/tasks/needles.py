"""Needles and haystacks: facts to find, and long texts to hide them in, at any length and depth."""

import bisect
import random
import re
from dataclasses import dataclass
from typing import Any

from common.errors import UserError

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
    """A fact that is hidden in one document.

    Attributes:
        text: the fact, with a space at its end.
        question: what it answers.
    """

    text: str
    question: str


def passkey_needles(count: int, seed: int) -> list[Needle]:
    """Draw pass keys of different people and with different digits.

    Args:
        count: at most `MOST_DOCUMENTS["passkey"]`.
        seed: random seed.
    """
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
    """Draw invented facts, no two of which answer the same question.

    Args:
        count: at most `MOST_DOCUMENTS["needle"]`.
        seed: random seed.
    """
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
    """A long text from which passages of any length are cut, from any place; it is tokenized once.

    Args:
        text: the text; a longer passage continues with its beginning.
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
        """Build a document that holds a needle between two of its sentences.

        Args:
            needle: the fact.
            tokens: length of the document with special tokens; it has fewer where whole tokens do not fit.
            depth: place of the needle, 0 (at the start) to 1 (at the end).
            start: index of the sentence that the document starts with, modulo the number of sentences.
            before, after: texts around the document, which count towards its length but not towards the depth.

        Returns:
            The document.

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
        """Return `tokens` tokens of the text from the character `begin` on."""
        first = bisect.bisect_right(self.ends, begin)
        whole, last = divmod(first + tokens, len(self.ends))
        if whole == 0:
            return self.text[begin : self.ends[last - 1]] if tokens else ""
        return self.text[begin:] + self.text * (whole - 1) + (self.text[: self.ends[last - 1]] if last else "")

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False)["input_ids"])
