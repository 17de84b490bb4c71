"""What a request may ask for."""

from dataclasses import dataclass, field


@dataclass
class Limits:
    """What a request may ask for."""

    max_inputs: int = field(
        default=2048, metadata={"help": "most texts of one request for embeddings", "within": "[1, inf)"}
    )
    max_request_mb: float = field(default=16.0, metadata={"help": "most MiB of a request", "within": "(0, inf)"})
    timeout: float = field(
        default=60.0, metadata={"help": "seconds after which a request is given up", "within": "(0, inf)"}
    )


@dataclass
class OwnLimits:
    """What visitors of the page may bring along."""

    own_mb: float = field(
        default=2.0,
        metadata={"help": "most MiB of own text files that a visitor searches; 0: none", "within": "[0, inf)"},
    )
    own_visitors: int = field(
        default=16, metadata={"help": "visitors whose files are kept at a time", "within": "[1, inf)"}
    )
    own_minutes: float = field(
        default=30.0, metadata={"help": "minutes without a search after which they are removed", "within": "(0, inf)"}
    )
