"""The registry behind `config.position_embedding_type`; importing this module fills it.

To add a scheme, write a subclass of `PositionScheme` in a file of its own, register it, and import the file here.
"""

# The loader of remote code finds only imports of the form `from .file import name`.
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
    """Return the position scheme with the given name, a value of `config.position_embedding_type`.

    Raises:
        ValueError: there is no such scheme.
    """
    if name not in POSITION_SCHEMES:
        raise ValueError(
            f"position_embedding_type={name!r} is not a position scheme; choose from {', '.join(POSITION_SCHEMES)}"
        )
    return POSITION_SCHEMES[name]
