"""Masking for masked-language models: which tokens are predicted, and what the model reads instead of them."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError

IGNORED = -100  # the label of a token that is not predicted
SPAN_P, SPAN_MAX = 0.2, 10  # SpanBERT's distribution of span lengths


@dataclass
class MaskingArguments:
    """Which tokens are predicted, and what the model reads instead of them.

    Raises:
        UserError: fractions below 0, or together above 1.
    """

    mask_rate: list[str] = field(
        default_factory=lambda: ["0.15"],
        metadata={
            "help": "fraction of the tokens to predict: a number (0.15), or first-last, linear over the run (0.3-0.15)"
        },
    )
    mask_unit: Literal["token", "word", "span", "token_span"] = field(
        default="token",
        metadata={
            "help": "unit that is chosen for prediction: token; word (whole words); span (spans of whole words, as in "
            "SpanBERT); token_span (spans of tokens)"
        },
    )
    mask_replace_prob: float = field(
        default=0.8, metadata={"help": "fraction of the chosen tokens replaced by the mask token"}
    )
    random_replace_prob: float = field(
        default=0.1,
        metadata={"help": "fraction of the chosen tokens replaced by a random token; the rest is unchanged"},
    )

    def __post_init__(self) -> None:
        shares = self.mask_replace_prob, self.random_replace_prob
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise UserError(
                f"--mask_replace_prob {shares[0]} --random_replace_prob {shares[1]}: must be at least 0, and together "
                "at most 1"
            )


@dataclass(frozen=True)
class Masking:
    """Mask a text as BERT does (Devlin et al. 2019, arXiv:1810.04805, section 3.1): tokens, whole words or spans.

    Args:
        mask_id: id of the mask token.
        special_ids: ids that are never chosen, and never a random replacement.
        vocab_size: random replacements are drawn uniformly from all other ids below it.
        unit: `token`; `word` (all tokens of a word together); `span` (Joshi et al. 2020, arXiv:1907.10529, section 3.1:
            spans of a geometric number of whole words); `token_span` (the same of tokens).
        mask_share: fraction of the chosen tokens replaced by the mask token; it is drawn for each token, or for each
            span if the unit is a span.
        random_share: fraction replaced by a random token. The rest is unchanged.
    """

    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    unit: str = "token"
    mask_share: float = 0.8
    random_share: float = 0.1

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, arguments: MaskingArguments) -> "Masking":
        """Build the masking of a tokenizer from the options.

        Args:
            tokenizer: the model's.
            arguments: parsed command-line options.

        Returns:
            The masking.

        Raises:
            UserError: the tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"{tokenizer.name_or_path}: this tokenizer has no mask token; masked-language modelling needs one"
            )
        return cls(
            tokenizer.mask_token_id,
            tuple(sorted(tokenizer.all_special_ids)),
            len(tokenizer),
            arguments.mask_unit,
            arguments.mask_replace_prob,
            arguments.random_replace_prob,
        )

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """All ids that are not special, in ascending order."""
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids)

    def __call__(
        self, input_ids: np.ndarray, starts_word: np.ndarray, rate: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask one text.

        Args:
            input_ids: `(n,)` integers.
            starts_word: `(n,)` bool, the first token of each word.
            rate: fraction of the tokens to predict, without special tokens; at least one token is predicted.
            generator: source of all randomness.

        Returns:
            The ids that the model reads, `(n,)`, and the labels, `(n,)`: the original id where a token is predicted,
            -100 elsewhere.
        """
        chosen = self.choose(input_ids, starts_word, rate, generator)
        labels = np.where(chosen >= 0, input_ids, IGNORED)
        spans = chosen.max(initial=-1) + 1
        draws = generator.random(spans if "span" in self.unit else len(input_ids))
        fate = np.ones(len(input_ids))
        fate[chosen >= 0] = draws[chosen[chosen >= 0]] if "span" in self.unit else draws[chosen >= 0]
        random_ids = self.ordinary_ids[generator.integers(len(self.ordinary_ids), size=len(input_ids))]
        read = np.where((chosen >= 0) & (fate < self.mask_share + self.random_share), random_ids, input_ids)
        return np.where((chosen >= 0) & (fate < self.mask_share), self.mask_id, read), labels

    def choose(
        self, input_ids: np.ndarray, starts_word: np.ndarray, rate: float, generator: np.random.Generator
    ) -> np.ndarray:
        """Choose the tokens to predict.

        Args:
            input_ids: `(n,)` integers.
            starts_word: `(n,)` bool, the first token of each word.
            rate: fraction of the tokens to predict.
            generator: source of all randomness.

        Returns:
            `(n,)`: the number, from 0, of the unit that each chosen token belongs to; -1 for the others.
        """
        candidate = ~np.isin(input_ids, self.special_ids)
        count = int(candidate.sum())
        chosen = np.full(len(input_ids), -1)
        if not count:
            return chosen
        # Rounded up at random, so that the expectation is exact.
        budget = max(1, int(rate * count + generator.random()))
        starts_unit = candidate
        if self.unit in ("word", "span"):  # a word never reaches over a special token, nor begins with one
            starts_unit = candidate & (starts_word | ~np.append(False, candidate[:-1]))
        unit_of = np.where(candidate, np.cumsum(starts_unit) - 1, -1)
        sizes = np.bincount(unit_of[candidate])
        order = generator.permutation(len(sizes))
        if "span" not in self.unit:
            before = np.cumsum(sizes[order]) - sizes[order]
            number = np.full(len(sizes), -1)
            number[order[before < budget]] = np.arange((before < budget).sum())
        else:
            number = self._choose_spans(sizes, unit_of, budget, order, generator)
        chosen[candidate] = number[unit_of[candidate]]
        return chosen

    @staticmethod
    def _choose_spans(
        sizes: np.ndarray, unit_of: np.ndarray, budget: int, order: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        """Return the number of the span of each unit (word or token), -1 for those in none; spans never overlap."""
        first_token = np.flatnonzero((unit_of >= 0) & (unit_of != np.append(-1, unit_of[:-1])))
        # Whether the next unit follows directly, without a special token between.
        continues = np.append(first_token[:-1] + sizes[:-1] == first_token[1:], False)
        number, reached = np.full(len(sizes), -1), 0
        for span, (unit, length) in enumerate(zip(order, span_lengths(len(order), generator), strict=True)):
            if reached >= budget:
                break
            for _ in range(length):
                if number[unit] >= 0:
                    break
                number[unit] = span
                reached += sizes[unit]
                if reached >= budget or not continues[unit]:
                    break
                unit += 1
        # A span that began inside another one was dropped: the numbers of the others are made consecutive.
        used = np.unique(number[number >= 0])
        return np.where(number >= 0, np.searchsorted(used, number), -1)


def span_lengths(count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw span lengths from SpanBERT's distribution: P(l) = p (1 - p)^(l - 1) / (1 - (1 - p)^10) for l = 1 ... 10.

    Args:
        count: number of draws.
        generator: source of all randomness.

    Returns:
        `(count,)` integers.
    """
    lengths = np.arange(1, SPAN_MAX + 1)
    weights = SPAN_P * (1 - SPAN_P) ** (lengths - 1)
    return generator.choice(lengths, size=count, p=weights / weights.sum())


@dataclass(frozen=True)
class NoMasking(Masking):
    """Predict nothing, and leave texts as they are.

    Args:
        mask_id, special_ids, vocab_size, unit: not used; see `Masking`.
    """

    mask_id: int = -1
    special_ids: tuple[int, ...] = ()
    vocab_size: int = 0
    unit: str = "none"

    def __call__(
        self, input_ids: np.ndarray, starts_word: np.ndarray, rate: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the text, and labels that are all -100."""
        return input_ids, np.full(len(input_ids), IGNORED)
