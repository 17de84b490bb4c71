"""How the token vectors of documents are kept for late interaction: the settings after `MODEL@tokens:`."""

from dataclasses import dataclass

from common.errors import UserError

TOKEN_PRECISIONS = ("float32", "float16")


@dataclass(frozen=True)
class TokenSettings:
    """What is kept of each token of a document, and whether the tokens of a query are weighted.

    Attributes:
        dim: number of leading dimensions of a token vector; None: all.
        precision: in which the vectors of documents are kept; those of queries are float32.
        weights: whether the tokens of a query count with the weights that the model gives them.
    """

    dim: int | None = None
    precision: str = "float16"
    weights: bool = True

    @classmethod
    def parse(cls, text: str, place: str) -> "TokenSettings":
        """Parse settings such as `dim=64,precision=float16`.

        Args:
            text: the settings, separated by commas; empty: those of the class.
            place: what the user wrote, for errors.

        Raises:
            UserError: there is no such setting, or its value is not allowed.
        """
        found: dict[str, str | int | bool] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name in found:
                raise UserError(f"{place}: {name} is there twice; give it once")
            if name == "dim" and value.isdigit() and int(value) > 0:
                found[name] = int(value)
            elif name == "precision" and value in TOKEN_PRECISIONS:
                found[name] = value
            elif name == "weights" and value == "none":
                found[name] = False
            else:
                allowed = f"dim=64, precision={'|'.join(TOKEN_PRECISIONS)}, weights=none"
                raise UserError(f"{place}: {part} is no setting of token vectors; write {allowed}, with commas between")
        return cls(**found)  # type: ignore[arg-type]

    @property
    def differences(self) -> dict[str, str | int]:
        """The settings that differ from those of the class, by their names on the command line."""
        default = TokenSettings()
        changed: dict[str, str | int | None] = {
            "dim": self.dim,
            "precision": None if self.precision == default.precision else self.precision,
            "weights": None if self.weights else "none",
        }
        return {name: value for name, value in changed.items() if value is not None}
