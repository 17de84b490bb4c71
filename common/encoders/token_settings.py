"""How the token vectors of documents are kept for late interaction: the settings after `MODEL@tokens:`."""

from dataclasses import dataclass

from common.errors import UserError
from modeling_longembed.output_token_pooling_longembed import MAX_FACTOR

TOKEN_PRECISIONS = ("float32", "float16", "int8", "binary", "residual1", "residual2")
LARGEST = {"dim": 1 << 31, "pool": MAX_FACTOR}


@dataclass(frozen=True)
class TokenSettings:
    """What is kept of each token of a document, and whether the tokens of a query are weighted.

    Attributes:
        dim: number of leading dimensions of a token vector; None: all.
        pool: how many tokens of a document a vector stands for, on average; 1: each token has its own.
        precision: in which the vectors of documents are kept; those of queries are float32.
        weights: whether the tokens of a query count with the weights that the model gives them.
    """

    dim: int | None = None
    pool: int = 1
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
            if name in ("dim", "pool") and value.isdecimal() and 0 < int(value) <= LARGEST[name]:
                found[name] = int(value)
            elif name == "precision" and value in TOKEN_PRECISIONS:
                found[name] = value
            elif name == "weights" and value == "none":
                found[name] = False
            else:
                allowed = f"dim=64, pool=1 to {MAX_FACTOR}, precision={'|'.join(TOKEN_PRECISIONS)}, weights=none"
                raise UserError(f"{place}: {part} is no setting of token vectors; write {allowed}, with commas between")
        return cls(**found)  # type: ignore[arg-type]

    @property
    def storage(self) -> tuple[int | None, int, str]:
        """What is kept of documents, whatever is done with queries."""
        return self.dim, self.pool, self.precision

    @property
    def differences(self) -> dict[str, str | int]:
        """The settings that differ from those of the class, by their names on the command line."""
        default = TokenSettings()
        changed: dict[str, str | int | None] = {
            "dim": self.dim,
            "pool": None if self.pool == default.pool else self.pool,
            "precision": None if self.precision == default.precision else self.precision,
            "weights": None if self.weights else "none",
        }
        return {name: value for name, value in changed.items() if value is not None}
