"""The registry behind `config.position_embedding_type`; importing this module fills it.

To add a scheme, write a subclass of `PositionScheme` in a file of its own, register it, and import the file here.
"""

# Named one by one: the loader of remote code follows `from .file import name` only.
from .position_alibi_longembed import AlibiPositions
from .position_base_longembed import POSITION_SCHEMES, PositionScheme
from .position_none_longembed import NoPositions
from .position_relative_longembed import RelativePositions
from .position_rope_longembed import RopePositions
from .position_table_longembed import AbsolutePositions, SinusoidalPositions

__all__ = [
    "POSITION_SCHEMES",
    "AbsolutePositions",
    "AlibiPositions",
    "NoPositions",
    "RelativePositions",
    "RopePositions",
    "SinusoidalPositions",
    "get_scheme",
]


def get_scheme(name: str) -> PositionScheme:
    """Return the scheme that is called `name` in `config.position_embedding_type`.

    Raises:
        ValueError: there is no such scheme.
    """
    if name not in POSITION_SCHEMES:
        raise ValueError(
            f"position_embedding_type={name!r} is no position scheme; choose from {', '.join(POSITION_SCHEMES)}"
        )
    return POSITION_SCHEMES[name]
