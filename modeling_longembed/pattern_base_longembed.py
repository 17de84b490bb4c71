"""The interface of an attention pattern: a definition that every kernel is tested against, and a fast path.

A pattern that is only a mask needs nothing but its predicate `visible`; `attend` can be overridden by a faster
implementation. A pattern that is more than a mask (own projections, learned spans, hashing, memory) also defines what
it computes in `dense`, and prepares its own tensors.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .attention_kernels_longembed import masked_softmax, online_attention
from .packing_longembed import PackedDocuments
from .position_base_longembed import GroupedRotary, ScoreBias


def parameter(default: int | None, least: int = 1, by_sublayer: bool = False) -> Any:
    """Declare an integer parameter of a pattern.

    Args:
        default: its default; None: derived by the class.
        least: its minimum.
        by_sublayer: whether the attention sublayers of a model that are given one entry have consecutive values of it.

    Returns:
        The field of the dataclass.
    """
    return field(default=default, metadata={"least": least, "by_sublayer": by_sublayer})


def switch(default: bool, earlier: bool | None = None) -> Any:
    """Declare a Boolean parameter of a pattern.

    Args:
        default: its default.
        earlier: its value in configs that were saved before there was this parameter; None: there are none.

    Returns:
        The field of the dataclass.
    """
    return field(default=default, metadata={"least": None} | ({} if earlier is None else {"earlier": earlier}))


@dataclass(frozen=True)
class Places:
    """Tokens as a predicate sees them: tensors that broadcast against those of other tokens."""

    index: Tensor  # int64, place in the document from 0
    length: Tensor  # int64, length of the document
    is_global: Tensor  # bool, whether the token sees all tokens and is seen by all

    def at(self, index) -> "Places":
        """Return the tokens `index`, or the same ones in another shape."""
        return Places(self.index[index], self.length[index], self.is_global[index])


@dataclass
class TokenSequence:
    """The rows that the sublayers compute: the tokens of all documents and the rows inserted by patterns.

    Args:
        documents: which rows belong to which document.
        words: `(R, d)`, word vectors of the rows.
        segments: `(R,)` int64, segment of each row.
        places: `(R,)`, what the position scheme adds to each row (`PositionScheme.places`).
        source: `(R,)` int64, the token whose segment and position each row has; None: the rows are the tokens.
        tokens: `(T,)` int64, the row of each token; None: the rows are the tokens.
    """

    documents: PackedDocuments
    words: Tensor
    segments: Tensor
    places: Tensor
    source: Tensor | None = None
    tokens: Tensor | None = None

    def of_tokens(self, states: Tensor) -> Tensor:
        """Return the rows of the tokens `(T, ...)` of states `(R, ...)`."""
        return states if self.tokens is None else states[self.tokens]

    def weights_of_tokens(self, weights: list[Tensor]) -> list[Tensor]:
        """Return the rows and columns of the tokens of each document's attention weights `(H, L, L)`."""
        if self.tokens is None:
            return weights
        is_token = torch.zeros(len(self.words), dtype=torch.bool, device=self.words.device)
        is_token[self.tokens] = True
        kept = (is_token[start:end] for start, end in self.documents.bounds)
        return [part[:, at][:, :, at] for part, at in zip(weights, kept, strict=True)]


class AttentionInputs(NamedTuple):
    """The inputs of one attention call. T packed tokens, H heads, D head size.

    Args:
        query, key: `(T, H, D)`, with positions.
        value: `(T, H, D)`.
        pattern: which keys a query sees.
        documents: which rows belong to which document.
        scaling: factor of the scores.
        dropout: probability to leave out an attention weight.
        bias: what the position scheme adds to the scores, or None.
        grouped: the second rotation of Self-Extend, or None.
        causal: no query sees a later key.
        training: whether the model trains.
        own: what `pattern.prepare` returned.
        first_head: number of the first head on this process; under tensor parallelism it has some of the model's heads.
        num_heads: number of heads of the model; None: H.
    """

    query: Tensor  # (T, H, D), rotated
    key: Tensor  # (T, H, D), rotated
    value: Tensor  # (T, H, D)
    pattern: "AttentionPattern"
    documents: PackedDocuments
    scaling: float
    dropout: float
    bias: ScoreBias | None = None
    grouped: GroupedRotary | None = None  # Self-Extend
    causal: bool = False  # no query sees a later key
    training: bool = False
    own: Any = None  # what `pattern.prepare` returned
    first_head: int = 0  # number of the first head on this process
    num_heads: int | None = None  # number of heads of the model; H if None

    def heads(self, heads: slice) -> "AttentionInputs":
        """Return the inputs of some of the heads, a slice that counts from the first head."""
        # `slice.indices` would give the start too, but older compilers cannot trace it.
        return self._replace(
            query=self.query[:, heads],
            key=self.key[:, heads],
            value=self.value[:, heads],
            bias=self.bias and self.bias.heads(heads),
            grouped=self.grouped and self.grouped.heads(heads),
            first_head=self.first_head + (heads.start or 0),
            num_heads=self.model_heads,
        )

    @property
    def model_heads(self) -> int:
        """Number of heads of the model; `first_head` and the H - 1 after it are computed on this process."""
        return self.query.shape[1] if self.num_heads is None else self.num_heads

    @property
    def head_numbers(self) -> Tensor:
        """The numbers of the heads on this process among those of the model, `(H, 1, 1)` int64."""
        first, heads = self.first_head, self.query.shape[1]
        return torch.arange(first, first + heads, device=self.query.device)[:, None, None]

    def places(self, rows: slice) -> Places:
        """Return the tokens of one document, packed rows `rows`, each field `(L,)`."""
        index = torch.arange(rows.stop - rows.start, device=self.query.device)
        marked = self.documents.is_global
        marked = torch.zeros_like(index, dtype=torch.bool) if marked is None else marked[rows]
        return Places(index, torch.full_like(index, len(index)), marked)

    def mask(self, query: Places, key: Places) -> Tensor:
        """Return which keys `(..., K)` the queries `(..., Q)` of one document see: bool, `(..., 1 or H, Q, K)`."""
        head = self.head_numbers if self.pattern.per_head else self.head_numbers[:1]
        query, key = query.at((..., None, slice(None), None)), key.at((..., None, None, slice(None)))
        visible = self.pattern.visible(query, key, head, self.model_heads)
        return visible & (key.index <= query.index) if self.causal else visible

    def scores(self, rows: slice) -> Tensor:
        """Compute the scores `(H, L, L)` of one document before the mask, with positions and bias."""
        query, key = (x[rows].transpose(0, 1) for x in (self.query, self.key))
        index = torch.arange(query.shape[1], device=query.device)
        scores = query @ key.transpose(1, 2)
        if self.grouped is not None:
            scores = self.grouped[rows].merge(scores, index, index)
        scores = scores * self.scaling
        return scores if self.bias is None else scores + self.bias.dense(query, index, index)


@dataclass(frozen=True)
class AttentionPattern:
    """Base class of all patterns. The fields of a subclass are its parameters in `config.attention_patterns`.

    Raises:
        ValueError: a parameter is out of range.
    """

    type: ClassVar[str]
    layer_type: ClassVar[str]  # the closest name among those that transformers allows in `layer_types`
    per_head: ClassVar[bool] = False  # whether the predicate depends on the head
    shares_query_key: ClassVar[bool] = False  # one projection gives both query and key
    adds_tokens: ClassVar[bool] = False  # whether `prepare_sequence` inserts rows between the tokens

    def __post_init__(self):
        for parameter in fields(self):
            value, least = getattr(self, parameter.name), parameter.metadata["least"]
            if least is None and type(value) is not bool:
                raise ValueError(
                    f"attention_patterns: {parameter.name!r} of the pattern {self.type!r} is {value!r}; "
                    "give true or false"
                )
            if least is not None and (type(value) is not int or value < least):
                raise ValueError(
                    f"attention_patterns: {parameter.name!r} of the pattern {self.type!r} is {value!r}; "
                    f"give a whole number of at least {least}"
                )

    def check(self, config):
        """Raise ValueError, with the fields and the remedy, if `config` cannot be combined with this pattern."""

    @property
    def is_mask(self) -> bool:
        """Whether `visible` alone defines the pattern, so that any kernel that takes a mask can compute it."""
        return True

    @property
    def own_weights(self) -> bool:
        """Whether a model with this pattern has other weights than a model whose pattern is a mask."""
        return False

    @property
    def couples_documents(self) -> bool:
        """Whether in training the documents of one forward pass see each other.

        What a document gives then depends on which documents are read with it, so that a batch cannot be divided into
        several passes. In evaluation no pattern couples documents.
        """
        return False

    @property
    def is_one_graph(self) -> bool:
        """Whether `torch.compile` makes one graph of a packed forward in half precision on a GPU.

        It does if there is no loop over documents, whose lengths would be read from the device. Dropout, a position
        bias and a `global_attention_mask`, which the variable-length kernel does not compute, make any pattern loop.
        """
        return False

    @property
    def at_start(self) -> "AttentionPattern":
        """The pattern that this one equals while its own weights have their initial values; a mask if there is one."""
        return self

    def visible(self, query: Places, key: Places, head: Tensor, num_heads: int) -> Tensor:
        """Return whether the query may see the key, both of one document: the definition. A causal mask comes on top.

        Args:
            query, key: the tokens; all tensors broadcast against each other.
            head: int64, number of the head; used if `per_head`.
            num_heads: number of heads of the model.

        Returns:
            bool, of the broadcast shape. Only elementwise operations, so that flex_attention can call it as `mask_mod`.
        """
        raise NotImplementedError

    def sees_all(self, length: int) -> bool:
        """Return whether every token of a document of `length` tokens sees every other, as in full attention."""
        raise NotImplementedError

    def reach(self, documents: PackedDocuments) -> int:
        """Return the largest distance in tokens between a query and a key that it may see."""
        return max(0, documents.max_seqlen - 1)

    def segments(self, documents: PackedDocuments) -> tuple[Tensor, int, int] | None:
        """Return how a variable-length flash kernel computes the pattern; None if it cannot.

        Returns:
            `(N + 1,)` int32 cumulative lengths of the segments, the length of the longest in tokens, and the window on
            each side (-1: no window).
        """
        return None

    def dense(self, inputs: AttentionInputs, rows: slice) -> tuple[Tensor, Tensor]:
        """Compute the pattern in one document, written for clarity; it needs L x L memory.

        Args:
            inputs: the inputs of all documents.
            rows: the packed rows of the document.

        Returns:
            The context `(L, H, D)` and the weights `(H, L, L)`.
        """
        places = inputs.places(rows)
        weights = masked_softmax(inputs.scores(rows), inputs.mask(places, places)).to(inputs.value.dtype)
        dropped = torch.dropout(weights, inputs.dropout, train=inputs.dropout > 0)
        return (dropped @ inputs.value[rows].transpose(0, 1)).transpose(0, 1), weights

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Compute the context `(T, H, D)` of all documents; by default in linear memory, for any predicate."""
        return chunked_attention(inputs)

    def build_embeddings(self, config) -> dict[str, nn.Module]:
        """Return the pattern's own modules for the embeddings of the model, by name."""
        return {}

    def derive_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the initial weights of the modules of `build_embeddings` in a model converted from another encoder.

        Args:
            weights: state dict of the converted encoder, without these modules.

        Returns:
            The tensors that are missing, by name.
        """
        return {}

    def prepare_sequence(self, embeddings: nn.Module, sequence: TokenSequence) -> TokenSequence:
        """Change the rows that all sublayers compute, before segments and positions are added to them.

        This is called once per forward pass for each `type` of pattern. Only one type in a model may insert rows.

        Args:
            embeddings: the `LongEmbedEmbeddings`, which has the modules of `build_embeddings`.
            sequence: the rows before the change.

        Returns:
            The rows after the change.
        """
        return sequence

    def build(self, config) -> nn.Module | None:
        """Return the pattern's own parameters of one attention sublayer as a module; None if it has none."""
        return None

    def initialize(self, attention: nn.Module):
        """Initialise the parameters in `attention.own`, given the other weights of the sublayer.

        Use `transformers.initialization`, which keeps parameters that were loaded from a checkpoint.
        """

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Return how tensor parallelism splits the module that `build` returns: parameter names to styles."""
        return {}

    def prepare(self, attention: nn.Module, states: Tensor, context: Any) -> Any:
        """Compute the value that `dense` and `attend` read as `inputs.own`.

        Args:
            attention: the `LongEmbedAttention`; its `own` is what `build` returned.
            states: `(T, d)`, the input of the projections.
            context: the `LayerContext` of this forward pass.

        Returns:
            Any value; None if there is nothing to prepare.
        """
        return None


def chunked_attention(inputs: AttentionInputs) -> Tensor:
    """Compute attention under any predicate in linear memory, by an online softmax over chunks (Rabe & Staats 2021)."""
    contexts = []
    for start, end in inputs.documents.bounds:
        rows = slice(start, end)
        places = inputs.places(rows)

        def mask(query_index: Tensor, key_index: Tensor, places: Places = places) -> Tensor:
            return inputs.mask(places.at(query_index), places.at(key_index))

        contexts.append(
            online_attention(
                inputs.query[rows],
                inputs.key[rows],
                inputs.value[rows],
                inputs.scaling,
                inputs.dropout,
                mask=mask,
                bias=inputs.bias,
                grouped=inputs.grouped and inputs.grouped[rows],
            )
        )
    return torch.cat(contexts) if contexts else torch.zeros_like(inputs.query)


PATTERNS: dict[str, type[AttentionPattern]] = {}


def register_pattern(cls: type[AttentionPattern]) -> type[AttentionPattern]:
    """Class decorator: make a pattern available under its `type` in `config.attention_patterns`."""
    PATTERNS[cls.type] = dataclass(frozen=True)(cls)
    return PATTERNS[cls.type]
