"""When an option applies: a condition on other options, declared beside its help text and checked by `parse`.

    feature_weight: float = field(
        default=0.05, metadata={"help": "weight of the second task's loss", "applies": {"feature_data": GIVEN}}
    )

An option without `applies` always applies. A condition names other options of the same script, each with what it has to
be: a value, a tuple of values, `GIVEN`, `NOT_GIVEN` or `Not(values)`; all of them must hold, and a list of conditions
holds if one of them does. An option that a condition relies on must apply as well, so that `structural_gamma` names
`structural_loss`, and `structural_loss` names `structural_teacher`.

An option that was set, on the command line or in a recipe, and does not apply would be ignored: it is refused. Only
what a recipe says gives way to an option of the command line without which it would apply (`NOT_GIVEN`), because the
command line overrides recipes: `--max_steps` replaces a recipe's `num_train_epochs`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from common.errors import UserError

Condition = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Not:
    """What an option must not be.

    Args:
        values: the values that are excluded.
    """

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)


class _Given:
    """Stands for any value but the default."""


class _NotGiven:
    """Stands for the default."""


GIVEN, NOT_GIVEN = _Given(), _NotGiven()


def conditions_of(option: dataclasses.Field) -> list[Condition]:
    """Return the conditions of an option, of which one must hold; an empty list if it always applies."""
    applies = option.metadata.get("applies", [])
    return list(applies) if isinstance(applies, list) else [applies]


def words_of(conditions: Iterable[Condition]) -> str:
    """Return conditions in words, such as `with --tuning lora or longlora`."""
    return ", or ".join(
        " and ".join(_words(name, required) for name, required in condition.items()) for condition in conditions
    )


def default_of(option: dataclasses.Field) -> Any:
    """Return the default of an option; `dataclasses.MISSING` if it has to be given."""
    factory = option.default_factory
    return option.default if factory is dataclasses.MISSING else factory()


class Options:
    """The options of a script, of all its dataclasses, by name.

    Args:
        instances: the dataclasses, as `parse` has filled them.
    """

    def __init__(self, instances: Iterable[Any]) -> None:
        self.fields: dict[str, dataclasses.Field] = {}
        self.values: dict[str, Any] = {}
        for instance in instances:
            own = {option.name: option for option in dataclasses.fields(instance) if option.init}
            self.fields |= own
            self.values |= {name: vars(instance)[name] for name in own}

    def applies(self, name: str) -> bool:
        """Return whether an option applies, given the values of the others."""
        conditions = conditions_of(self.fields[name])
        return not conditions or any(
            all(self._holds(other, required) for other, required in condition.items()) for condition in conditions
        )

    def check(self, given: Mapping[str, str]) -> None:
        """Check that the options that were set apply.

        Args:
            given: the options that were set, each with the words that say where, such as ` in the recipe FILE`.

        Raises:
            UserError: an option does not apply; the sentence names it, its condition, and what to do.
        """
        for name, where in given.items():
            if name in self.fields and not self.applies(name) and not (where and self._gives_way(name, given)):
                raise UserError(
                    f"--{name}{where}: applies only {words_of(conditions_of(self.fields[name]))}"
                    f"{self._reason(name)}; change that, or leave --{name} out"
                )

    def _holds(self, name: str, required: Any) -> bool:
        """Return whether an option is what a condition requires; an option that the script does not have is not set."""
        if name not in self.fields:
            return required is NOT_GIVEN or isinstance(required, Not)
        value, default = self.values[name], default_of(self.fields[name])
        if required is NOT_GIVEN:
            return value == default
        if isinstance(required, Not):
            return value not in required.values
        if not self.applies(name):
            return False
        if required is GIVEN:
            return value != default
        return value in (required if isinstance(required, tuple) else (required,))

    def _gives_way(self, name: str, given: Mapping[str, str]) -> bool:
        """Return whether options of the command line replace an option of the recipe."""
        return any(
            all(
                self._holds(other, required) or (required is NOT_GIVEN and given.get(other) == "")
                for other, required in condition.items()
            )
            for condition in conditions_of(self.fields[name])
        )

    def _reason(self, name: str) -> str:
        """Return in words why an option does not apply, if its conditions alone do not say it."""
        for condition in conditions_of(self.fields[name]):
            for other, required in condition.items():
                if other not in self.fields or self._holds(other, required):
                    continue
                if required is NOT_GIVEN or isinstance(required, (Not, bool)):
                    continue
                if not self.applies(other):
                    return f", and that only {words_of(conditions_of(self.fields[other]))}"
                if required is not GIVEN:
                    return f", and --{other} is {self.values[other]}"
        return ""


def _words(name: str, required: Any) -> str:
    if required is GIVEN or required is True:
        return f"with --{name}"
    if required is NOT_GIVEN or required is False:
        return f"without --{name}"
    if isinstance(required, Not):
        return f"with another --{name} than {' or '.join(map(str, required.values))}"
    return f"with --{name} {' or '.join(map(str, required if isinstance(required, tuple) else (required,)))}"
