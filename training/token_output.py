"""Give a model a head for token vectors and weights for the words of a query, from documents alone, without training.

python training/token_output.py --model_name_or_path MODEL --train_data documents.jsonl --token_dim 64 \
    --query_token_weights idf --output_dir runs/tokens

Late interaction compares a query and a document token by token (MaxSim), which needs a vector a token. The head is a
principal component analysis of the token states of documents: it makes the vectors small and loses as little as a
linear map can. The weights are inverse document frequencies: rare words of a query count more. Both are a start for
training, and useful as they are. The one vector of a text stays what it was.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from common.arguments import parse
from common.errors import UserError, run
from common.provenance import device_kind
from training.data.sources import Columns, Source, read_sources
from training.engine.record import record
from training.engine.saving import save
from training.models.encoder import ModelArguments, load_encoder


@dataclass
class TokenOutputArguments:
    """The documents, the head, and the weights of query tokens.

    Raises:
        UserError: a number is out of range, or there is nothing to do.
    """

    train_data: list[str] = field(
        metadata={"help": "documents: .jsonl, .jsonl.gz, .parquet, a folder of these, or org/name on the Hub"}
    )
    output_dir: str = field(metadata={"help": "folder of final/, the model", "output": "folder"})
    text_column: str = field(default="text", metadata={"help": "the column that holds the texts"})
    token_dim: int | None = field(
        default=None,
        metadata={"help": "width of the token vectors, such as 64; the model's own head, or its states, if not given"},
    )
    token_head: Literal["linear", "mlp"] = field(
        default="linear", metadata={"help": "a linear map, or two layers that start as one and can be trained further"}
    )
    token_skip_punctuation: bool = field(default=False, metadata={"help": "give tokens of punctuation no vector"})
    token_min_weight: float | None = field(
        default=None,
        metadata={
            "help": "give tokens of documents no vector if their weight in a query is smaller, such as 0.1; the "
            "model's own limit if not given; 0: all have one",
            "within": "[0, inf)",
        },
    )
    token_weighting_power: float | None = field(
        default=None,
        metadata={
            "help": "weigh the tokens of the vector of a text by this power of their weight in a query, such as 0.25; "
            "the model's own power if not given; 0: all alike",
            "within": "[0, inf)",
        },
    )
    query_token_weights: Literal["idf", "table", "state"] | None = field(
        default=None,
        metadata={
            "help": "weigh query tokens by inverse document frequency, in a table that stays as it is (idf) or is "
            "trained later, alone (table) or with a gate on the state (state); the model's own weights if not given"
        },
    )
    max_tokens: int = field(
        default=200_000,
        metadata={"help": "tokens of randomly drawn documents that the head is fitted to", "within": "[1, inf)"},
    )
    batch_tokens: int = field(default=16_384, metadata={"help": "tokens per forward pass", "within": "[1, inf)"})
    seed: int = field(
        default=0, metadata={"help": "seed of the draw of documents for the head", "within": "[0, 4294967295]"}
    )

    def __post_init__(self) -> None:
        given = (self.token_dim, self.query_token_weights, self.token_min_weight, self.token_weighting_power)
        if given == (None, None, None, None) and not self.token_skip_punctuation:
            raise UserError("nothing to do: give --token_dim, --query_token_weights, or both")
        if self.token_dim is None and self.token_head != "linear":
            raise UserError(f"--token_head {self.token_head}: needs --token_dim, the width of the token vectors")


def main(argv: Sequence[str] | None = None) -> None:
    """Fit and write.

    Args:
        argv: command-line options; None: those of the process.

    Raises:
        UserError: the model is narrower than the head, or has no weights that a smallest one applies to, or the
            documents are too few for the head.
    """
    model_args, args = parse(ModelArguments, TokenOutputArguments, argv=argv)
    loaded, _ = load_encoder(model_args)
    model: Any = loaded.eval().to(torch.device(device_kind()))
    if args.token_dim is not None and not 1 <= args.token_dim <= model.config.hidden_size:
        raise UserError(
            f"--token_dim {args.token_dim}: must be at least 1 and at most {model.config.hidden_size}, the width of "
            "the model's states"
        )
    output_dir = Path(args.output_dir).absolute()
    sources = read_sources(args.train_data, Columns((args.text_column,), None, "texts"))
    model.config.token_skip_punctuation |= args.token_skip_punctuation
    if args.query_token_weights is not None:
        count = model.fit_query_token_weights(texts(sources), kind=args.query_token_weights)
        print(f"weights of query tokens: {args.query_token_weights}, from {count:,} documents")
    for name in ("token_min_weight", "token_weighting_power"):
        value = getattr(args, name)
        if value and model.config.query_token_weights == "none":
            raise UserError(
                f"--{name} {value}: this model has no weights of query tokens; give --query_token_weights too"
            )
        if value is not None:
            setattr(model.config, name, value)
    if args.token_weighting_power and model.config.pooling in ("cls", "last"):
        raise UserError(
            f"--token_weighting_power {args.token_weighting_power}: weighs the tokens of a mean, and this model's "
            f"pooling is {model.config.pooling!r}"
        )
    if args.token_dim is not None:
        order = np.random.default_rng(args.seed).permutation(sum(len(source.rows) for source in sources))
        drawn, choices = texts(sources, order), {"max_tokens": args.max_tokens, "batch_tokens": args.batch_tokens}
        try:
            kept = model.fit_token_head(drawn, args.token_dim, args.token_head, **choices)
        except ValueError as error:
            raise UserError(f"--train_data {' '.join(args.train_data)}: {error}") from error
        print(f"head of {args.token_dim} dimensions: keeps {kept:.1%} of the token states of the documents")
    output_dir.mkdir(parents=True, exist_ok=True)
    print(save(model, output_dir, title=output_dir.name, made=record((model_args, args))))


def texts(sources: Sequence[Source], order: Sequence[int] | np.ndarray | None = None) -> Iterator[str]:
    """Yield the documents of all sources, one by one.

    Args:
        sources: where they are, in one column each.
        order: numbers of documents, counted through all sources; None: as they are.
    """
    ends = np.cumsum([len(source.rows) for source in sources])
    for number in range(ends[-1]) if order is None else order:
        place = int(np.searchsorted(ends, number, side="right"))
        first = int(ends[place]) - len(sources[place].rows)
        yield sources[place].texts([int(number) - first])[0][0]


if __name__ == "__main__":
    run(main)
