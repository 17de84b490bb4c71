"""Schedules of masked-language modelling: sequence length and masking rate as functions of the step."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import UserError


@dataclass(frozen=True)
class LengthSchedule:
    """The sequence length, constant within each stage.

    Args:
        stages: of each its length in tokens, and the fraction of the steps after which it ends; the last one is 1.
    """

    stages: tuple[tuple[int, float], ...]

    @classmethod
    def parse(cls, words: Sequence[str], option: str = "sequence_length") -> "LengthSchedule":
        """Read a schedule from a command-line option.

        Args:
            words: `512`; phases with their shares of the steps, `128:0.9 512:0.1` (Devlin et al. 2019, appendix A.2);
                or `ramp:512-8192:5`, five stages of equal shares whose lengths grow by a constant factor.
            option: name of the option, for errors.

        Returns:
            The schedule.

        Raises:
            UserError: another format, or shares whose sum is not 1.
        """
        text = " ".join(words)
        if re.fullmatch(r"[1-9]\d*", text):
            return cls(((int(text), 1.0),))
        if match := re.fullmatch(r"ramp:([1-9]\d*)-([1-9]\d*):(\d+)", text):
            first, last, count = map(int, match.groups())
            if count < 2:
                raise UserError(f"--{option} {text}: a ramp has at least 2 stages")
            lengths = np.geomspace(first, last, count).round().astype(int).tolist()
            return cls(tuple((length, (stage + 1) / count) for stage, length in enumerate(lengths)))
        phases = [re.fullmatch(r"([1-9]\d*):(\d*\.?\d+)", word) for word in text.split()]
        if not phases or None in phases:
            raise UserError(
                f"--{option} {text}: write a number of tokens, phases with their shares of the steps such as "
                "128:0.9 512:0.1, or ramp:FROM-TO:STAGES"
            )
        shares = np.cumsum([float(phase[2]) for phase in phases if phase])
        if abs(shares[-1] - 1) > 1e-6:
            raise UserError(f"--{option} {text}: the shares of the steps must sum to 1, and sum to {shares[-1]:g}")
        ends = [*shares[:-1].tolist(), 1.0]
        return cls(tuple((int(phase[1]), end) for phase, end in zip(phases, ends, strict=True) if phase))

    @property
    def lengths(self) -> list[int]:
        """The lengths of all stages."""
        return [length for length, _ in self.stages]

    def at(self, step: int, total: int) -> int:
        """Return the length at a step of `total`, counted from 0; after them it is the last one."""
        # Rounded: 0.9 of 10 steps are 9, whatever the sum of binary fractions is.
        ends = [round(end * total) for _, end in self.stages]
        return next((length for length, end in zip(self.lengths, ends, strict=True) if step < end), self.lengths[-1])


@dataclass(frozen=True)
class RateSchedule:
    """The fraction of the tokens to predict, linear from the first step to the last.

    Args:
        first: at the first step.
        last: at the last step and after it.
    """

    first: float
    last: float

    @classmethod
    def parse(cls, words: Sequence[str], option: str = "mask_rate") -> "RateSchedule":
        """Read a schedule from a command-line option.

        Args:
            words: `0.15`, or `0.3-0.15`.
            option: name of the option, for errors.

        Returns:
            The schedule.

        Raises:
            UserError: another format, or a fraction outside (0, 1].
        """
        text = " ".join(words)
        match = re.fullmatch(r"(\d*\.?\d+)(?:-(\d*\.?\d+))?", text)
        ends = [float(match[1]), float(match[2] or match[1])] if match else []
        if not ends or not all(0 < end <= 1 for end in ends):
            raise UserError(
                f"--{option} {text}: write a fraction above 0 and up to 1, such as 0.15, or the first and the last, "
                "such as 0.3-0.15"
            )
        return cls(*ends)

    def at(self, step: int, total: int) -> float:
        """Return the fraction at a step of `total`, counted from 0; after them it is the last one."""
        place = min(1.0, step / max(1, total - 1))
        return (1 - place) * self.first + place * self.last


@dataclass(frozen=True)
class Curriculum:
    """The two schedules of a run.

    Args:
        lengths: of the sequence length.
        mask_rates: of the fraction of the tokens to predict.
        steps: number of steps of the run.
    """

    lengths: LengthSchedule
    mask_rates: RateSchedule
    steps: int

    def length(self, step: int) -> int:
        """Return the sequence length of a step, counted from 0, in tokens."""
        return self.lengths.at(step, self.steps)

    def mask_rate(self, step: int) -> float:
        """Return the fraction of the tokens to predict at a step, counted from 0."""
        return self.mask_rates.at(step, self.steps)
