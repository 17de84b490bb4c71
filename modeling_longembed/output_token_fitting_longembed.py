"""The head of token vectors and the weights of query tokens, fitted to documents without training."""

from collections.abc import Iterable
from contextlib import closing
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .encoding_longembed import CHARACTERS_PER_BATCH_TOKEN, divide_into_windows, read_windows
from .output_tokens_longembed import LongEmbedTokenOutput, TwoLayerHead


@torch.no_grad()
def fit_token_head(
    model: Any,
    documents: Iterable[str],
    token_dim: int = 64,
    token_head: str = "linear",
    max_tokens: int = 200_000,
    batch_tokens: int = 16_384,
    precision: str = "auto",
) -> float:
    """Give the model a token head, in place, that keeps as much as possible of the token states of documents.

    The rows of the head are the principal axes of the unit states x of the tokens: among all projections to k
    dimensions they minimise the mean of |x - W^T W x|^2. The axes are in the order of what they keep, so that the first
    dimensions are the head of a smaller `token_dim`. The states are not centred, since a shift of document vectors
    would change their inner products with a query. A head of two layers starts as the same map.

    Args:
        model: the encoder; a head that it has is replaced.
        documents: any number of texts, read until there are enough tokens; give them in random order.
        token_dim: k, width of the token vectors.
        token_head: `linear` or `mlp`.
        max_tokens: number of tokens whose states are computed, at least.
        batch_tokens: largest number of tokens in one forward pass.
        precision: of the arithmetic, as in `encode`.

    Returns:
        The share of the states' squared length that the head keeps, 0 to 1.

    Raises:
        ValueError: a field is out of range, or the documents have fewer tokens than the head has dimensions; the model
            is unchanged.
    """
    _refuse_string("fit_token_head", documents)
    output: LongEmbedTokenOutput = model.token_output
    config = changed_config(model.config, token_dim=token_dim, token_head=token_head)
    width = config.hidden_size
    moment, count = torch.zeros(width, width, dtype=torch.float64), 0
    model.token_output = LongEmbedTokenOutput(changed_config(config, token_dim=None, token_head="linear"))
    model.token_output.query_table = output.query_table  # says which tokens of documents have a vector
    try:
        reading = {"prompt_name": "document", "batch_tokens": batch_tokens, "precision": precision}
        parts = model.encode_stream(documents, output_value="tokens", output="torch", **reading)
        with closing(parts):
            for states in parts:
                moment += (states.T @ states).double()
                count += len(states)
                if count >= max_tokens:
                    break
    finally:
        model.token_output = output
    if count < token_dim:
        raise ValueError(
            f"fit_token_head: the documents have {count} tokens, and the head {token_dim} dimensions; give more "
            "documents"
        )
    axes, kept = principal_axes(moment, token_dim)
    replace_output(model, config, kept="query_")
    set_head(model.token_output.head, axes)
    return kept


@torch.no_grad()
def fit_query_token_weights(model: Any, documents: Iterable[str], kind: str = "idf") -> int:
    """Weigh the query tokens, in place, by how rare they are in documents.

    A token that n of N documents have gets the weight ln((N + 1) / (n + 0.5)), its inverse document frequency, and a
    special token 0. A document is read as far as the model's context.

    Args:
        model: the encoder; weights that it has are replaced.
        documents: any number of texts, read once.
        kind: `idf`, a table that stays as it is; `table`, which starts as idf and is trained; `state`, a trained table
            times a gate on the state, which starts at 1.

    Returns:
        N, the number of documents.

    Raises:
        ValueError: there is no such kind, or no document; the model is unchanged.
    """
    _refuse_string("fit_query_token_weights", documents)
    if kind not in ("idf", "table", "state"):
        raise ValueError(f"fit_query_token_weights: kind={kind!r}; choose from 'idf', 'table', 'state'")
    config = changed_config(model.config, query_token_weights=kind)
    frequency, count = torch.zeros(config.vocab_size, dtype=torch.float64), 0
    windows = divide_into_windows(documents, CHARACTERS_PER_BATCH_TOKEN * 16_384)
    first = next(windows, None)
    if first is None:
        raise ValueError("fit_query_token_weights: there are no documents; give some")
    with closing(read_windows(model, chain([first], windows), "", "warn")) as rows_of_windows:
        for rows in rows_of_windows:
            for row in rows:
                frequency[torch.tensor(row, dtype=torch.long).unique()] += 1
            count += len(rows)
    table = ((count + 1) / (frequency + 0.5)).log()
    table[[number for number in set(model.tokenizer.all_special_ids) if number < len(table)]] = 0
    replace_output(model, config, kept="head.")
    model.token_output.set_table(table)
    return count


def principal_axes(moment: Tensor, count: int) -> tuple[Tensor, float]:
    """Return the first principal axes `(count, d)` of states, and the share of their squared length that these keep.

    Args:
        moment: `(d, d)` float64, the sum of x x^T over the states x.
        count: number of axes.
    """
    values, vectors = torch.linalg.eigh(moment)
    axes = vectors.flip(-1).T[:count]
    # The sign of an axis is arbitrary; a fixed one makes the result the same on every machine.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return axes * largest.sign(), float(values.flip(0)[:count].sum() / values.sum())


def set_head(head: Any, axes: Tensor) -> None:
    """Make a token head the linear map `axes` `(k, d)`."""
    if isinstance(head, TwoLayerHead):
        identity = torch.eye(axes.shape[1])
        head.dense.weight.copy_(torch.cat([identity, -identity]))
        head.projection.weight.copy_(torch.cat([axes, -axes], dim=1))
    elif isinstance(head, nn.Linear):
        head.weight.copy_(axes)


def changed_config(config: Any, **changes: Any) -> Any:
    """Return a copy of a config with other values, which is validated as a whole."""
    return type(config)(**config.to_dict() | changes)


def replace_output(model: Any, config: Any, kept: str) -> None:
    """Give the model the token output that `config` describes, with those old weights whose names begin with `kept`."""
    old, place = model.token_output, next(model.parameters())
    for name in ("token_dim", "token_head", "query_token_weights"):
        setattr(model.config, name, getattr(config, name))
    new = LongEmbedTokenOutput(model.config)
    new.apply(model._init_weights)
    new.load_state_dict({name: x for name, x in old.state_dict().items() if name.startswith(kept)}, strict=False)
    model.token_output = new.to(place.device, place.dtype).train(model.training)


def _refuse_string(name: str, documents: Any) -> None:
    if isinstance(documents, str):
        raise ValueError(f"{name}: takes several documents, and this is one string; give a list of texts")
