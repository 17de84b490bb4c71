"""`attn_implementation="longembed_varlen"` for any other model: transformers' attention interface on packed sequences.

transformers gives an attention function its mask in two steps: a mask function of our own is called once in a forward
pass with transformers' predicate, and what it returns is handed to every layer. Ours returns a `PackedMask`, which says
which keys a query sees without a tensor of S x S elements.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .attention_kernels_longembed import (
    online_attention,
    segment_attention,
    varlen_kernel,
    varlen_kernel_applies,
    window_attention,
)
from .packing_longembed import PackedDocuments

# Arguments of transformers' models that change the numbers, and that this function cannot compute.
REFUSED = ("s_aux", "sinks", "position_bias", "head_mask", "indices", "block_indices", "cache", "output_attentions")
INSTEAD = "load the model with attn_implementation='sdpa' or 'eager'"


class PackedRows(NamedTuple):
    """The tokens of a padded batch without the padding.

    Attributes:
        documents: which packed tokens belong to which sequence.
        places: `(T,)` int64, place of each token in its row of the batch.
        batch_rows: `(T,)` int64, the row of the batch.
        has_gaps: whether there is padding inside a sequence, so that places are not consecutive.
    """

    documents: PackedDocuments
    places: Tensor
    batch_rows: Tensor
    has_gaps: bool


@dataclass
class PackedMask:
    """Which keys a query sees, in the place of a mask tensor.

    Attributes:
        back: number of earlier tokens that a token sees; None: all.
        ahead: number of later tokens that it sees; None: all. 0 is a causal mask.
        predicate: transformers' function of batch, head, query and key, where `back` and `ahead` do not say it all.
        padding: `(B, S)` bool, true on real tokens; None: there is no padding.
        sequences: `(B, S)` int64, numbers of the sequences that are packed into a row; None: a row is one sequence.
        cache: the packed rows by device, and by the lengths that a caller packed with, which all layers share.
    """

    back: int | None = None
    ahead: int | None = None
    predicate: Callable | None = None
    padding: Tensor | None = None
    sequences: Tensor | None = None
    cache: dict[Any, Any] = field(default_factory=dict)

    def rows(self, batch: int, length: int, device: torch.device) -> PackedRows:
        """Return the packed rows of a batch.

        Args:
            batch: number of rows B.
            length: tokens S of a row.
            device: where they are used.

        Raises:
            ValueError: the mask is for another shape.
        """
        for name, tensor in (("attention_mask", self.padding), ("position_ids", self.sequences)):
            if tensor is not None and tensor.shape != (batch, length):
                raise ValueError(
                    f"longembed_varlen: {name} has shape {tuple(tensor.shape)} and the batch {(batch, length)}; it "
                    f"computes no cache of keys; {INSTEAD}"
                )
        key = str(device)
        if key not in self.cache:
            self.cache[key] = self._pack(batch, length, device)
        return self.cache[key]

    def _pack(self, batch: int, length: int, device: torch.device) -> PackedRows:
        padding = torch.ones(batch, length, dtype=torch.bool) if self.padding is None else self.padding
        documents = PackedDocuments.from_attention_mask(padding.to(device))
        index: Any = documents.padded_index
        if self.sequences is not None:
            numbers = self.sequences.to(device)
            numbers = (numbers + torch.arange(batch, device=device)[:, None] * (numbers.max() + 1)).flatten()[index]
            begins = (numbers.diff(prepend=numbers[:1] - 1) != 0).nonzero(as_tuple=True)[0]
            cu_seqlens = torch.cat([begins, begins.new_tensor([len(numbers)])]).to(torch.int32)
            documents = replace(documents, cu_seqlens=cu_seqlens, max_seqlen=int(cu_seqlens.diff().max()), cache={})
        places = index % length
        has_gaps = self.padding is not None and bool((places - documents.token_index).diff()[_inside(documents)].any())
        return PackedRows(documents, places, index // length, has_gaps)

    def sees(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return whether a query sees a key; all tensors broadcast against each other.

        Args:
            batch, head: int64, numbers of the row of the batch and of the head.
            query, key: int64, places in the row.
        """
        if self.predicate is not None:
            return self.predicate(batch, head, query, key)
        visible = (query >= 0) & (key >= 0)
        visible = visible if self.back is None else visible & (key >= query - self.back)
        return visible if self.ahead is None else visible & (key <= query + self.ahead)

    @property
    def is_band(self) -> bool:
        """Whether the fast paths compute it: all keys, a causal mask, or a window, alike on both sides or causal."""
        return self.predicate is None and (self.ahead == 0 or self.back == self.ahead)


def _inside(documents: PackedDocuments) -> Tensor:
    """Return which tokens have a successor in their document, bool `(T - 1,)`."""
    return documents.document_ids.diff() == 0


def least(first: int | None, second: int | None) -> int | None:
    """Return the smaller of two limits, of which None is no limit."""
    return first if second is None else second if first is None else min(first, second)


def read_mask_function(function: Callable) -> PackedMask | None:
    """Read off a mask function of transformers which keys a query sees.

    Args:
        function: of batch, head, query and key.

    Returns:
        The mask without padding; None if the function is none that this reads, so that it has to be called.
    """
    if function is causal_mask_function:
        return PackedMask(ahead=0)
    if function is bidirectional_mask_function:
        return PackedMask()
    if not inspect.isfunction(function):
        return None
    values = inspect.getclosurevars(function).nonlocals
    maker = (
        function.__qualname__.partition(".<locals>")[0] if function.__module__ == "transformers.masking_utils" else ""
    )
    if maker == "sliding_window_overlay":
        return PackedMask(back=values["sliding_window"] - 1)
    if maker == "sliding_window_bidirectional_overlay":
        return PackedMask(back=values["sliding_window"], ahead=values["sliding_window"])
    if maker == "packed_sequence_mask_function":
        return PackedMask(sequences=values["packed_sequence_mask"])
    if maker == "remap_positions_for_packed_sequence":  # places in the sequence, which the packed tokens have anyway
        return read_mask_function(values["mask_function"])
    if maker != "and_masks":
        return None
    both = PackedMask()
    for part in map(read_mask_function, values["mask_functions"]):
        if part is None or (both.sequences is not None and part.sequences is not None):
            return None
        sequences = part.sequences if both.sequences is None else both.sequences
        both = PackedMask(least(both.back, part.back), least(both.ahead, part.ahead), sequences=sequences)
    return both


def packed_mask(
    *, mask_function: Callable = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any
) -> PackedMask:
    """Return the mask of one kind of layer, with the signature of transformers' mask functions.

    Args:
        mask_function: which keys a query sees.
        attention_mask: `(B, S)`, non-zero on real tokens; None: there is no padding.
        **kwargs: sizes and types, which the attention function reads off its inputs.
    """
    mask = read_mask_function(mask_function) or PackedMask(predicate=mask_function)
    return mask if attention_mask is None else replace(mask, padding=attention_mask != 0)


def mask_of_arguments(
    module: Any, attention_mask: Tensor | None, is_causal: bool | None, sliding_window: int | None
) -> PackedMask:
    """Return the mask of a model that calls the attention function without transformers' mask functions.

    Args:
        module: the attention module; its `is_causal` counts where the argument is None.
        attention_mask: `(B, S)`, non-zero on real tokens; None: there is no padding.
        is_causal: whether no query sees a later key.
        sliding_window: number of tokens that a token sees on a side, counting itself, as in flash attention; None: all.

    Raises:
        ValueError: the mask has another shape, or nobody says whether the model is causal.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"longembed_varlen: attention_mask has shape {tuple(attention_mask.shape)}, and only a padding mask (B, S) "
            f"can be computed without scores of S x S; {INSTEAD}"
        )
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        raise ValueError(
            f"longembed_varlen: {type(module).__name__} does not say whether it is causal; pass is_causal, or {INSTEAD}"
        )
    back = None if sliding_window is None else sliding_window - 1
    return PackedMask(back, 0 if causal else back, padding=None if attention_mask is None else attention_mask != 0)


def longembed_varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention without padding, with the signature of transformers' attention functions.

    Args:
        module: the attention module.
        query: `(B, H, S, D)`; packed: `(1, H, T, D)`.
        key, value: `(B, G, S, D)`, G heads of which each serves H / G heads of the query.
        attention_mask: what `packed_mask` returned; or `(B, S)`, non-zero on real tokens; or None.
        scaling: factor of the scores; None: `D ** -0.5`.
        dropout: probability to leave out an attention weight.
        is_causal: whether no query sees a later key, where `attention_mask` does not say it; None: `module.is_causal`.
        sliding_window: number of tokens that a token sees on a side, counting itself, where `attention_mask` does not
            say it; None: all.
        softcap: the scores s become `softcap * tanh(s / softcap)` (Gemma 2); None: they stay.
        cu_seq_lens_q: `(N + 1,)` int32, cumulative lengths of packed sequences; None: a row is a sequence, or the
            packing is in `attention_mask`.
        cu_seq_lens_k: the same for the keys; None: the same.
        **kwargs: arguments that do not change the numbers; those that do are refused.

    Returns:
        `(B, S, H, D)` with zeros at padding, and None for the weights.

    Raises:
        ValueError: the model asks for what this function does not compute.
    """
    for name in REFUSED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"longembed_varlen does not compute {name!r}; {INSTEAD}")
    (batch, heads, length, width), key_heads = query.shape, key.shape[1]
    if key.shape[2] != length:
        raise ValueError(
            f"longembed_varlen: {length} queries and {key.shape[2]} keys; it computes neither a cache of keys nor "
            f"cross-attention; {INSTEAD}, or pass use_cache=False"
        )
    if is_cross_attention(module):  # its mask pads the keys alone, and may have as many of them as there are queries
        raise ValueError(f"longembed_varlen does not compute cross-attention ({type(module).__name__}); {INSTEAD}")
    if isinstance(attention_mask, PackedMask):
        mask = attention_mask
    else:
        mask = mask_of_arguments(module, attention_mask, is_causal, sliding_window)
    rows = mask.rows(batch, length, query.device)
    if cu_seq_lens_q is not None:
        rows = rows_of_packed(cu_seq_lens_q, cu_seq_lens_k, mask, rows)

    packed = [rows.documents.pack(x.transpose(1, 2)) for x in (query, key, value)]
    if key_heads != heads:
        packed[1:] = [x.repeat_interleave(heads // key_heads, dim=1) for x in packed[1:]]
    scaling = width**-0.5 if scaling is None else scaling
    same_width = value.shape[-1] == width
    if mask.is_band and softcap is None and same_width and not (rows.has_gaps and mask.back is not None):
        context = band_attention(packed, rows.documents, mask, scaling, dropout)
    else:
        context = masked_attention(packed, rows, mask, scaling, dropout, softcap)
    return rows.documents.unpack(context), None


def is_cross_attention(module: Any) -> bool:
    """Return whether an attention module declares that its keys are of other tokens than its queries.

    GPT-2 has a flag, the models after BERT a class, and those after BART a decoder's attention that is not causal.
    """
    return (
        bool(getattr(module, "is_cross_attention", False))
        or "CrossAttention" in type(module).__name__
        or (getattr(module, "is_decoder", False) is True and getattr(module, "is_causal", None) is False)
    )


def rows_of_packed(
    cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor | None, mask: PackedMask, rows: PackedRows
) -> PackedRows:
    """Return the rows of sequences that the caller packed, derived once for all layers that share the mask.

    Args:
        cu_seq_lens_q: `(N + 1,)` int32, cumulative lengths of the queries.
        cu_seq_lens_k: the same for the keys, or None.
        mask: the mask of the layer.
        rows: of the one row of the batch.

    Raises:
        ValueError: there is padding too, the keys have other lengths, or the mask is a predicate, which counts places
            in the whole row.
    """
    lengths = cu_seq_lens_q, cu_seq_lens_k
    key = tuple(map(id, lengths))
    if key in mask.cache:
        return mask.cache[key][0]
    if mask.predicate is not None:
        raise ValueError(
            "longembed_varlen: the mask of this model counts places in the whole row and not in the sequences of "
            "cu_seq_lens_q; leave that out and give position_ids, which begin anew with each sequence"
        )
    if mask.padding is not None and not bool(mask.padding.all()):
        raise ValueError("longembed_varlen: give either cu_seq_lens_q or a mask with padding, not both")
    if (
        cu_seq_lens_k is not None
        and cu_seq_lens_k is not cu_seq_lens_q
        and not torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    ):
        raise ValueError(f"longembed_varlen: cu_seq_lens_q and cu_seq_lens_k differ; {INSTEAD}")
    documents = PackedDocuments(cu_seq_lens_q.to(torch.int32), int(cu_seq_lens_q.diff().max()))
    rows = rows._replace(documents=documents, has_gaps=False)
    mask.cache[key] = rows, lengths  # they are kept with it, so that no other tensor gets their ids
    return rows


def band_attention(
    packed: Sequence[Tensor], documents: PackedDocuments, mask: PackedMask, scaling: float, dropout: float
) -> Tensor:
    """Compute full or causal attention, or a window.

    Args:
        packed: query, key and value `(T, H, D)`.
        documents: the sequences.
        mask: a band, under which padding inside a sequence has no effect.
        scaling: factor of the scores.
        dropout: probability to leave out an attention weight.

    Returns:
        `(T, H, D)`.
    """
    (query, key, value), cu_seqlens, longest = packed, documents.cu_seqlens, documents.max_seqlen
    causal = mask.ahead == 0
    if mask.back is None or mask.back >= longest:
        return segment_attention(query, key, value, cu_seqlens, longest, scaling, dropout, causal=causal)
    if varlen_kernel_applies(query, dropout):
        return varlen_kernel(query, key, value, cu_seqlens, longest, scaling, mask.back, causal)
    parts = [
        window_attention(query[start:end], key[start:end], value[start:end], mask.back, scaling, dropout, causal=causal)
        for start, end in documents.bounds
    ]
    return torch.cat(parts) if parts else torch.zeros_like(value)


def masked_attention(
    packed: Sequence[Tensor], rows: PackedRows, mask: PackedMask, scaling: float, dropout: float, softcap: float | None
) -> Tensor:
    """Compute attention under any mask, and capped scores, by an online softmax.

    Args:
        packed: query, key and value `(T, H, D)`.
        rows: the sequences, and the places of their tokens in the batch, which the mask counts.
        mask: which keys a query sees.
        scaling: factor of the scores.
        dropout: probability to leave out an attention weight.
        softcap: bound of the scores, or None.

    Returns:
        `(T, H, D)`.
    """
    head = torch.arange(packed[0].shape[1], device=packed[0].device)[:, None, None]
    parts = []
    for start, end in rows.documents.bounds:
        places, batch = rows.places[start:end], rows.batch_rows[start]

        def visible(query_index: Tensor, key_index: Tensor, places: Tensor = places, batch: Tensor = batch) -> Tensor:
            query, key = places[query_index][None, :, None], places[key_index][None, None, :]
            return mask.sees(batch, head, query, key) & ((query >= 0) & (key >= 0))

        query, key, value = (x[start:end] for x in packed)
        parts.append(online_attention(query, key, value, scaling, dropout, mask=visible, softcap=softcap))
    return torch.cat(parts) if parts else torch.zeros_like(packed[2])


def register(names: list[str]) -> None:
    """Make `longembed_varlen` available to all models of transformers under these names, which its configs accept."""
    for name in names:
        AttentionInterface.register(name, longembed_varlen)
        AttentionMaskInterface.register(name, packed_mask)
