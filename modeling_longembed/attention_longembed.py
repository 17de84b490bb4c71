"""Self-attention of the encoder: projections, positions, and the table of kernels.

`config.attention_patterns` says WHICH keys a query sees and is part of the model. `attn_implementation` says HOW the
numbers are computed and is never saved. All kernels take packed tensors and give the same numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention_flex_longembed import attend_by_flex
from .attention_interface_longembed import register
from .attention_kernels_longembed import attend, masked_softmax
from .packing_longembed import PackedDocuments
from .pattern_base_longembed import AttentionInputs, AttentionPattern, Places, chunked_attention
from .pattern_memory_longembed import Stream
from .position_base_longembed import Positions
from .tensor_parallel_longembed import heads_here

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # optional: the `flash` extra
    flash_attn_varlen_func = None


class LayerContext(NamedTuple):
    """What the sublayers of one forward pass share."""

    documents: PackedDocuments  # the rows that the sublayers compute
    positions: Positions  # what the position scheme contributes
    stream: Stream | None = None  # set if the documents are encoded in chunks


def eager_attention(inputs: AttentionInputs) -> tuple[Tensor, list[Tensor]]:
    """Compute the definition of the pattern and the attention weights, one document at a time, in L x L memory."""
    parts = [inputs.pattern.dense(inputs, slice(start, end)) for start, end in inputs.documents.bounds]
    context = torch.cat([context for context, _ in parts]) if parts else torch.zeros_like(inputs.query)
    return context, [weights for _, weights in parts]


def sdpa_attention(inputs: AttentionInputs) -> tuple[Tensor, None]:
    """Compute torch's fused attention with a mask per document, of L x L elements unless every token sees all."""
    contexts = []
    for start, end in inputs.documents.bounds:
        rows = slice(start, end)
        query, key, value = (x[rows].transpose(0, 1) for x in inputs[:3])
        mask, places = None, inputs.places(rows)
        if not inputs.pattern.sees_all(end - start):
            mask = inputs.mask(places, places)
        if inputs.bias is not None:
            bias = inputs.bias.dense(query, places.index, places.index)
            mask = inputs.mask(places, places) if inputs.causal else mask
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        contexts.append(attend(query, key, value, mask, inputs.scaling, inputs.dropout, inputs.causal).transpose(0, 1))
    return torch.cat(contexts) if contexts else torch.zeros_like(inputs.query), None


def varlen_attention(inputs: AttentionInputs) -> tuple[Tensor, None]:
    """Compute the pattern by its own implementation, without padding and with torch alone; the default kernel."""
    return inputs.pattern.attend(inputs), None


def memory_efficient_attention(inputs: AttentionInputs) -> tuple[Tensor, None]:
    """Compute any mask, bias and Self-Extend in linear memory, without a fused kernel (Rabe & Staats 2021)."""
    return chunked_attention(inputs), None


def padded_attention(inputs: AttentionInputs) -> tuple[Tensor, None]:
    """Compute one masked product of all documents, padded to the longest.

    It holds B x H x S x S scores and has no loop over documents, so that it can be written as an ONNX graph.
    """
    documents = inputs.documents
    lengths, longest = documents.cu_seqlens.diff(), documents.max_seqlen
    batch, index = lengths.shape[0], torch.arange(longest, device=lengths.device)
    move = torch.arange(batch, device=lengths.device) * longest - documents.cu_seqlens[:-1]
    row = torch.arange(inputs.query.shape[0], device=lengths.device)
    cell = documents.once("cells", lambda: row + move[documents.document_ids])  # (T,), places in the padded batch

    def padded(x: Tensor) -> Tensor:  # (T, ...) to (B, S, ...)
        return x.new_zeros(batch * longest, *x.shape[1:]).index_copy(0, cell, x).unflatten(0, (batch, longest))

    def padded_mask() -> Tensor:  # (B, 1 or H, S, S)
        marked = torch.zeros_like(cell, dtype=torch.bool) if documents.is_global is None else documents.is_global
        places = Places(index.expand(batch, -1), lengths[:, None].expand(-1, longest), padded(marked))
        return inputs.mask(places, places) & (index < lengths[:, None])[:, None, None]

    query, key, value = (padded(x).transpose(1, 2) for x in inputs[:3])  # (B, H, S, D)
    mask = documents.once(("padded", inputs.pattern), padded_mask)
    scores = query @ key.transpose(2, 3) * inputs.scaling
    if inputs.bias is not None:
        scores = scores + inputs.bias.dense(query, index, index)
    weights = masked_softmax(scores, mask).to(value.dtype)
    attended = torch.dropout(weights, inputs.dropout, train=inputs.dropout > 0) @ value
    return attended.transpose(1, 2).flatten(0, 1)[cell], None


def flash_attention(inputs: AttentionInputs) -> tuple[Tensor, None]:
    """Call flash-attn's variable-length kernel (Dao 2023): full and block patterns, and windows without global tokens.

    Raises:
        ValueError: the kernel cannot compute the pattern.
    """
    segments = inputs.pattern.segments(inputs.documents)
    if segments is None:
        raise ValueError(
            "flash_attention_2 computes full, block and sliding attention without global tokens; "
            f"load with attn_implementation={DEFAULT_KERNEL!r}"
        )
    cu_seqlens, longest, window = segments
    context = flash_attn_varlen_func(
        *inputs[:3],
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        inputs.dropout,
        softmax_scale=inputs.scaling,
        causal=inputs.causal,
        window_size=(window, window),
    )
    return context, None


class Kernel(NamedTuple):
    """One implementation of attention, and the features that it supports in addition to a mask.

    Args:
        function: computes the context `(T, H, D)`, and the weights `(H, L, L)` of each document or None.
        bias: whether it adds a bias by distance to the scores.
        query_bias: whether it adds a bias that depends on the query (Transformer-XL).
        grouped: whether it computes the merged scores of Self-Extend.
        beyond_masks: whether it computes patterns that are more than a mask.
    """

    function: Callable[[AttentionInputs], tuple[Tensor, list[Tensor] | None]]
    bias: bool = True
    query_bias: bool = True
    grouped: bool = True
    beyond_masks: bool = False


KERNELS = {
    "eager": Kernel(eager_attention, beyond_masks=True),
    "sdpa": Kernel(sdpa_attention, grouped=False),
    "longembed_varlen": Kernel(varlen_attention, beyond_masks=True),
    "longembed_chunked": Kernel(memory_efficient_attention),
    "longembed_padded": Kernel(padded_attention, query_bias=False, grouped=False),
    "flash_attention_2": Kernel(flash_attention, bias=False, query_bias=False, grouped=False),
    "flex_attention": Kernel(attend_by_flex, query_bias=False, grouped=False),
}
DEFAULT_KERNEL = "longembed_varlen"


def check_kernel(name: str, config: Any = None, training: bool = False) -> None:
    """Check that a kernel exists and can compute a model.

    Args:
        name: `attn_implementation`.
        config: the config of the model; None checks the name alone.
        training: whether to check the training patterns instead of those for inference.

    Raises:
        ValueError: the kernel does not exist, is not installed, or cannot compute the model's patterns or positions.
    """
    if name not in KERNELS:
        raise ValueError(f"attn_implementation={name!r} is not one of our kernels; choose from {', '.join(KERNELS)}")
    if name == "flash_attention_2" and flash_attn_varlen_func is None:
        raise ValueError(
            f"attn_implementation={name!r} needs the package flash-attn, which is not installed; use {DEFAULT_KERNEL!r}"
        )
    if config is None:
        return
    kernel, scheme, refused = KERNELS[name], config.position_scheme, None
    has_bias = scheme.adds_bias or config.relative_attention_num_buckets > 0
    beyond_masks = [
        pattern.type
        for pattern in (config.get_training_patterns() if training else config.get_patterns())
        if not pattern.is_mask
    ]
    if has_bias and not (kernel.query_bias if scheme.bias_reads_query else kernel.bias):
        refused = "cannot add the position bias of this scheme (alibi, relative, relative buckets)"
    elif scheme.merges_scores(config) and not kernel.grouped:
        refused = "cannot compute Self-Extend (method 'group' on rope)"
    elif beyond_masks and not kernel.beyond_masks:
        refused = f"computes masks alone, and the pattern {beyond_masks[0]!r} is more than a mask"
    if refused:
        raise ValueError(f"attn_implementation={name!r} {refused}; use {DEFAULT_KERNEL!r}")


class ResidualLinear(nn.Linear):
    """A linear layer whose output is added to the residual stream; its initialisation may be scaled."""


class LongEmbedAttention(nn.Module):
    """Multi-head self-attention of one sublayer on packed tokens.

    Args:
        config: the config of the model.
        pattern: the attention pattern in inference.
        training_pattern: the attention pattern in training; None: the same.
    """

    def __init__(self, config, pattern: AttentionPattern, training_pattern: AttentionPattern | None = None):
        super().__init__()
        self.config, self.pattern, self.training_pattern = config, pattern, training_pattern or pattern
        self.layer_type, self.head_dim = pattern.layer_type, config.head_dim
        width, bias = config.num_attention_heads * self.head_dim, config.attention_bias
        # Separate projections: LoRA on a fused one would share its A matrix, and tensor parallelism could not split it.
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = None if pattern.shares_query_key else nn.Linear(config.hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.o_proj = ResidualLinear(width, config.hidden_size, bias=bias)
        self.own = pattern.build(config)
        self.distance = config.position_scheme.build(config)

    def project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value `(T, H, D)` of states `(T, d)`, without positions."""
        query = self.q_proj(states)
        key = query if self.k_proj is None else self.k_proj(states)
        heads = (-1, self.head_dim)
        return query.unflatten(-1, heads), key.unflatten(-1, heads), self.v_proj(states).unflatten(-1, heads)

    def attention_inputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: LayerContext,
        pattern: AttentionPattern,
        dropout: float = 0.0,
        own: Any = None,
    ) -> AttentionInputs:
        """Apply the positions and build the inputs of a kernel.

        Args:
            query, key, value: `(T, H, D)`, the results of `project`.
            context: the state that the sublayers share.
            pattern: the pattern to compute, in training or inference.
            dropout: probability to leave out an attention weight.
            own: the result of `pattern.prepare`.

        Returns:
            The inputs of one attention call.
        """
        num_heads = self.config.num_attention_heads
        here = heads_here(self.q_proj, query.shape[1], num_heads)
        query, key, bias, grouped = context.positions.apply(self, query, key, pattern, context.documents)
        if bias is context.positions.bias and bias is not None and query.shape[1] < num_heads:
            bias = bias.heads(here)  # the shared bias has all heads of the model, a sublayer's own bias only those here
        return AttentionInputs(
            query=query,
            key=key,
            value=value,
            pattern=pattern,
            documents=context.documents,
            scaling=self.head_dim**-0.5,
            dropout=dropout,
            bias=bias,
            grouped=grouped,
            causal=self.config.is_causal,
            training=self.training,
            own=own,
            first_head=here.start,
            num_heads=num_heads,
        )

    def forward(self, hidden_states: Tensor, context: LayerContext) -> tuple[Tensor, list[Tensor] | None]:
        """Compute the attention of one sublayer.

        Args:
            hidden_states: `(T, d)`.
            context: the state that the sublayers share.

        Returns:
            `(T, d)`, and the weights `(H, L, L)` of each document if the kernel returns them.
        """
        pattern = self.training_pattern if self.training else self.pattern
        inputs = self.attention_inputs(
            *self.project(hidden_states),
            context,
            pattern,
            dropout=self.config.attention_dropout if self.training else 0.0,
            own=pattern.prepare(self, hidden_states, context),
        )
        attended, weights = KERNELS[self.config._attn_implementation].function(inputs)
        return self.o_proj(attended.flatten(1)), weights


# transformers accepts only registered names as `attn_implementation`; other models can use them too.
register([name for name in KERNELS if name.startswith("longembed")])
