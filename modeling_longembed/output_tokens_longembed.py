"""The output axis: a vector a token, which late interaction compares by MaxSim (ColBERT, Khattab and Zaharia 2020).

Shapes: T packed tokens, d model width, k width of a token vector, V size of the vocabulary.
"""

import string
import unicodedata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize
from transformers import initialization as init

# Texts on either side: only query tokens have weights.
SIDES = ("query", "document")


class TwoLayerHead(nn.Module):
    """`projection(gelu(dense(h)))`, with two inner units for each state.

    Since gelu(x) - gelu(-x) = x, two layers can start as any linear map: `dense` is `[I, -I]`, `projection` `[W, -W]`.

    Args:
        hidden_size: d.
        token_dim: k.
    """

    def __init__(self, hidden_size: int, token_dim: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.projection = nn.Linear(2 * hidden_size, token_dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.projection(gelu(self.dense(hidden_states)))


class LongEmbedTokenOutput(nn.Module):
    """Token states to unit vectors, and the weights of query tokens.

    There are no parameters without `token_dim` and `query_token_weights`: the vectors are then the states themselves.

    Args:
        config: the config of the model, whose `token_min_weight` may change later.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head: nn.Module | None = None
        if config.token_dim is not None:
            if config.token_head == "mlp":
                self.head = TwoLayerHead(config.hidden_size, config.token_dim)
            else:
                self.head = nn.Linear(config.hidden_size, config.token_dim, bias=False)
        # Both have one name in the weights, so that a table of idf can be trained later.
        if config.query_token_weights == "idf":
            self.register_buffer("query_table", torch.ones(config.vocab_size))
        elif config.query_token_weights in ("table", "state"):
            self.query_table = nn.Parameter(torch.ones(config.vocab_size))
        else:
            self.query_table = None
        self.query_gate = nn.Linear(config.hidden_size, 1) if config.query_token_weights == "state" else None

    def initialize(self) -> None:
        """Give all query tokens the weight 1. The weights of a checkpoint are kept."""
        if self.query_table is not None:
            init.ones_(self.query_table)
        if self.query_gate is not None:
            init.zeros_(self.query_gate.weight)
            init.zeros_(self.query_gate.bias)

    def set_table(self, table: Tensor) -> None:
        """Replace the table of query weights by `(V,)`; V may differ from that of the old one."""
        table = table.to(self.query_table)
        self.query_table = nn.Parameter(table) if isinstance(self.query_table, nn.Parameter) else table

    def rarity(self, input_ids: Tensor, power: float) -> Tensor:
        """Return a power of the entries of the table, `(T,)`, by which pooling weighs tokens.

        Nothing trains the table through it: the root of the entry 0 of a special token has no finite derivative.

        Args:
            input_ids: `(T,)`.
            power: above 0.
        """
        return self.query_table.detach()[input_ids].float().abs() ** power

    def query_weights(self, hidden_states: Tensor, input_ids: Tensor) -> Tensor:
        """Return the weight of each query token, `(T,)`, at least 0, fp32 or wider.

        A negative weight would make plain MaxSim look for the document token that is least like the query token, so
        that the sign of an entry of the table is ignored.

        Args:
            hidden_states: `(T, d)`.
            input_ids: `(T,)`.
        """
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        if self.query_table is None:
            return torch.ones(input_ids.shape, dtype=wide, device=hidden_states.device)
        weights = self.query_table[input_ids].to(wide).abs()
        if self.query_gate is not None:
            weights = weights * 2 * torch.sigmoid(self.query_gate(hidden_states)[:, 0].to(wide))
        return weights

    def has_vector(self, input_ids: Tensor, left_out: Tensor, side: str | Tensor) -> Tensor:
        """Return which tokens have a vector, `(T,)` bool.

        Args:
            input_ids, left_out, side: as in `forward`.
        """
        kept, min_weight = ~left_out[input_ids], self.config.token_min_weight
        if min_weight and not (isinstance(side, str) and side == "query"):
            is_rare = self.query_table.detach()[input_ids].abs() >= min_weight
            kept &= is_rare | side if isinstance(side, Tensor) else is_rare
        return kept

    def forward(
        self, hidden_states: Tensor, input_ids: Tensor, left_out: Tensor, side: str | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the token vectors of packed texts.

        Args:
            hidden_states: `(T, d)`, the states of the last sublayer, before they are weighted for pooling.
            input_ids: `(T,)`.
            left_out: `(V,)` bool, ids that have no vector, beside those whose weight is too small in a document.
            side: `query` or `document`; if texts of both kinds are among them `(T,)` bool, True for tokens of queries.

        Returns:
            `(T, k)`, fp32 or wider: unit vectors, those of a query times their weights, zeros for tokens that are left
            out; and `(T,)` bool, False for these tokens.
        """
        vectors = hidden_states if self.head is None else self.head(hidden_states)
        kept = self.has_vector(input_ids, left_out, side)
        if isinstance(side, Tensor):  # every parameter has a gradient, which DDP waits for, whatever the texts are
            scale = torch.where(side, self.query_weights(hidden_states, input_ids), 1.0)
        else:
            scale = self.query_weights(hidden_states, input_ids) if side == "query" else kept
        with torch.autocast(hidden_states.device.type, enabled=False):  # a norm in half precision is off by 0.4 %
            vectors = normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
            return vectors * (scale * kept).to(vectors.dtype)[:, None], kept


def truncate_tokens(vectors: Tensor, token_dim: int) -> Tensor:
    """Keep the first dimensions of token vectors `(..., k)`, at the length that they had, which is a query's weight."""
    length = vectors.norm(dim=-1, keepdim=True)
    return normalize(vectors[..., :token_dim], dim=-1) * length


def check_side(side: str | Tensor | None, has_ids: bool) -> None:
    """Check the `token_vectors` of a forward pass.

    Raises:
        ValueError: there is no such side, or which tokens are special cannot be told.
    """
    if not isinstance(side, Tensor) and side not in (None, *SIDES):
        raise ValueError(f"token_vectors={side!r}; choose from None, 'query', 'document'")
    if side is not None and not has_ids:
        raise ValueError(
            "token_vectors needs input_ids: inputs_embeds do not tell which tokens are special and have no vector"
        )


def left_out_ids(tokenizer: Any, punctuation: bool) -> list[int]:
    """Return the ids of tokens that have no vector: special tokens and, if asked for, punctuation.

    Args:
        tokenizer: the tokenizer of the model.
        punctuation: whether tokens of punctuation marks and ASCII symbols alone are among them.

    Returns:
        The ids in ascending order.
    """
    ids = set(tokenizer.all_special_ids)
    if punctuation:
        rows = sorted(set(tokenizer.get_vocab().values()) - ids)
        texts = tokenizer.batch_decode([[number] for number in rows], clean_up_tokenization_spaces=False)
        ids.update(number for number, text in zip(rows, texts, strict=True) if _is_punctuation(text))
    return sorted(ids)


def _is_punctuation(text: str) -> bool:
    text = text.strip()
    text = text[2:] if text.startswith("##") and len(text) > 2 else text  # WordPiece, inside a word
    return bool(text) and all(mark in string.punctuation or unicodedata.category(mark)[0] == "P" for mark in text)
