"""Landmark attention, and the landmarks that the model inserts between the tokens for it."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .attention_kernels_longembed import MAX_SCORES, MAX_UNFUSED_SCORES, masked_softmax, recompute_in_backward
from .packing_longembed import PackedDocuments
from .pattern_base_longembed import AttentionInputs, AttentionPattern, TokenSequence, parameter, register_pattern


class Landmarks(NamedTuple):
    """The places of the landmarks: after every `size - 1` tokens of a document, and at its end. T tokens become R rows.

    A landmark has a word vector of its own. Its position and its segment are those of the token before it, so that the
    positions of the tokens are the same with landmarks as without.
    """

    documents: PackedDocuments  # the documents with their landmarks
    source: Tensor  # (R,) int64, the token of each row; for a landmark the token before it
    tokens: Tensor  # (T,) int64, the row of each token
    is_landmark: Tensor  # (R,) bool

    @classmethod
    def insert(cls, documents: PackedDocuments, size: int) -> "Landmarks":
        """Insert landmarks into `documents`, so that a block with its landmark has `size` rows."""
        between = size - 1
        lengths = documents.cu_seqlens.diff()
        lengthened = lengths + (lengths + between - 1) // between
        cu_seqlens = pad(lengthened.cumsum(0, dtype=torch.int32), (1, 0))
        place = documents.token_index
        tokens = cu_seqlens.long()[documents.document_ids] + place + place // between
        is_landmark = torch.ones(int(cu_seqlens[-1]), dtype=torch.bool, device=tokens.device)
        is_landmark[tokens] = False
        source = torch.zeros_like(is_landmark, dtype=torch.long)
        source[tokens] = torch.arange(len(tokens), device=tokens.device)
        source = source.cummax(0).values
        longest = documents.max_seqlen + -(-documents.max_seqlen // between)
        marked = documents.is_global
        marked = None if marked is None else marked[source] & ~is_landmark
        return cls(PackedDocuments(cu_seqlens, longest, marked), source, tokens, is_landmark)


class Blocks(NamedTuple):
    """One document in B blocks of S rows; the last block is padded."""

    place: Tensor  # (B, S) int64, place in the document
    is_word: Tensor  # (B, S) bool: neither a landmark nor padding
    query: Tensor  # (H, B, S, D)
    key: Tensor  # (H, B, S, D)
    value: Tensor  # (H, B, S, D)
    landmark: Tensor  # (H, B, D), keys of the landmarks


class Choice(NamedTuple):
    """The blocks that are read: C for each block of queries and each head."""

    block: Tensor  # (H, B, C) int64, the own block first
    exists: Tensor  # (H, B, C) bool; under a causal mask, early blocks have fewer than C blocks to choose from


def block_weights(query, key, landmark, visible, is_own, scaling: float) -> Tensor:
    """Compute the grouped softmax: over the words within each block, and over the landmarks between blocks.

    The own block takes part in the second softmax with its words instead of its landmark. The sum of the exponentials
    of these words replaces the exponential of a landmark, so that one softmax over blocks is enough.

    Args:
        query: `(..., Q, D)`.
        key: `(..., C, S, D)`.
        landmark: `(..., C, D)`, keys of the landmarks.
        visible: bool, which words a query sees, broadcastable to `(..., Q, C, S)`; a block without any is not read.
        is_own: bool, whether a block is the query's own, broadcastable to `(..., Q, C)`.
        scaling: factor of the scores.

    Returns:
        `(..., Q, C, S)`, summing to 1 over C and S, in fp32 at least.
    """
    blocks, size = key.shape[-3:-1]
    wide = torch.promote_types(torch.float32, query.dtype)
    scores = (query @ key.flatten(-3, -2).transpose(-1, -2)).unflatten(-1, (blocks, size))
    # The minimum is finite, because -inf in all places of a block would give NaN in the backward pass.
    scores = (scores.to(wide) * scaling).masked_fill(~visible, torch.finfo(wide).min)
    largest = scores.detach().amax(dim=-1, keepdim=True)
    exponentials = (scores - largest).exp()
    sums = exponentials.sum(dim=-1)
    landmark_scores = (query @ landmark.transpose(-1, -2)).to(wide) * scaling
    shares = masked_softmax(torch.where(is_own, sums.log() + largest[..., 0], landmark_scores), visible.any(dim=-1))
    return exponentials * (shares / sums)[..., None]


def read_blocks(query, key, value, landmark, visible, is_own, scaling: float, dropout: float) -> Tensor:
    """Compute the context of queries that read C blocks.

    Args:
        query, key, landmark, visible, is_own, scaling: as in `block_weights`.
        value: `(..., C, S, D)`.
        dropout: probability to leave out an attention weight.

    Returns:
        `(..., Q, D)`.
    """
    weights = block_weights(query, key, landmark, visible, is_own, scaling).to(value.dtype)
    weights = torch.dropout(weights, dropout, train=dropout > 0)
    return weights.flatten(-2) @ value.flatten(-3, -2)


@register_pattern
class LandmarkAttention(AttentionPattern):
    """Landmark attention (Mohtashami & Jaggi 2023, arXiv:2305.16300), for an encoder: blocks on both sides.

    The model closes every block of `size - 1` tokens with a landmark, a learned word that represents the block. A token
    attends to the words of its own block and to the landmarks of all other blocks in one softmax. The weight of a
    landmark is then distributed over the words of its block by a second softmax. Landmarks have no value, and a token
    does not see the landmark of its own block.

    In training all blocks are read, and the result is exact. In evaluation each block of queries reads, per head, the
    `top_k` other blocks whose landmarks score highest with the mean query of the block; the result is exact if there
    are no more than `top_k` other blocks. In the paper every query selects its own blocks, and these are moved next to
    the query; here one selection serves the whole block, and all blocks keep their positions. Use the pattern for long
    documents in which a passage needs few distant passages. Sublayers with other patterns in the same model see
    landmarks as ordinary tokens. In a document shorter than `size` every token sees all.

    Cost: L^2 in training and L x size x top_k in evaluation, in time; L in memory.
    """

    type = "landmark"
    layer_type = "full_attention"
    adds_tokens = True
    size: int = parameter(64, least=2)
    top_k: int = parameter(4, least=0)

    def check(self, config):
        sizes = {p.size for p in (*config.get_patterns(), *config.get_training_patterns()) if p.type == self.type}
        if len(sizes) > 1:
            raise ValueError(
                f"attention_patterns: 'landmark' with the sizes {sorted(sizes)} in one model, whose "
                "sublayers share the landmarks; give one size"
            )
        bias = None
        if config.position_scheme.adds_bias:
            bias = f"position_embedding_type={config.position_embedding_type!r}"
        elif config.relative_attention_num_buckets:
            bias = f"relative_attention_num_buckets={config.relative_attention_num_buckets}"
        if bias:
            raise ValueError(
                f"attention_patterns: 'landmark' has no distance between a token and a block, which {bias} needs; use "
                "'rope', 'absolute' or 'sinusoidal' positions without buckets"
            )
        if config.extends_by_groups:
            raise ValueError(
                "attention_patterns: 'landmark' cannot be computed under Self-Extend (position_extension 'group' on "
                "rope); extend by 'yarn'"
            )

    @property
    def is_mask(self):
        return False

    @property
    def own_weights(self):
        return True

    def build_embeddings(self, config):
        return {"landmark_embedding": nn.Embedding(1, config.hidden_size)}

    def derive_weights(self, weights):
        """Return the mean of all word vectors as the landmark, because it represents any of them."""
        words = weights["embeddings.word_embeddings.weight"]
        return {"embeddings.landmark_embedding.weight": words.mean(0, keepdim=True)}

    def prepare_sequence(self, embeddings: Any, sequence: TokenSequence) -> TokenSequence:
        """Insert the landmarks between the tokens."""
        landmarks = Landmarks.insert(sequence.documents, self.size)
        of_tokens, landmark = sequence.words[landmarks.source], embeddings.landmark_embedding.weight
        return replace(
            sequence,
            documents=landmarks.documents,
            words=torch.where(landmarks.is_landmark[:, None], landmark.to(of_tokens.dtype), of_tokens),
            segments=sequence.segments[landmarks.source],
            places=sequence.places[landmarks.source],
            source=landmarks.source,
            tokens=landmarks.tokens,
        )

    def visible(self, query, key, head, num_heads):
        """Return whether the key has a value, which all words have and landmarks do not."""
        closes = (key.index % self.size == self.size - 1) | (key.index == key.length - 1)
        return ~closes & (query.index >= 0)

    def sees_all(self, length):
        return length < self.size

    def attend(self, inputs):
        lengths = [end - start for start, end in inputs.documents.bounds]
        contexts = []
        # `split` instead of slices, because the backward pass of each slice fills a tensor of all T tokens.
        for states in zip(*(x.split(lengths) for x in inputs[:3]), strict=True):
            blocks = self.blocks(*states)
            choice = self.choice(inputs, blocks)
            context = self.read_all(inputs, blocks) if choice is None else self.read_chosen(inputs, blocks, choice)
            contexts.append(context.flatten(1, 2)[:, : len(states[0])].transpose(0, 1))
        return torch.cat(contexts) if contexts else torch.zeros_like(inputs.query)

    def blocks(self, query: Tensor, key: Tensor, value: Tensor) -> Blocks:
        """Cut a document into blocks.

        Args:
            query, key, value: `(L, H, D)`.

        Returns:
            The blocks.
        """
        length = len(query)
        count, size = -(-length // self.size), min(self.size, length)
        place = torch.arange(count * size, device=query.device).view(count, size)
        closing = place[:, -1].clamp(max=length - 1)
        landmark = key[closing].transpose(0, 1)
        query, key, value = (
            pad(x.transpose(0, 1), (0, 0, 0, count * size - length)).contiguous().unflatten(1, place.shape)
            for x in (query, key, value)
        )
        return Blocks(place, place < closing[:, None], query, key, value, landmark)

    @torch.no_grad()
    def choice(self, inputs: AttentionInputs, blocks: Blocks) -> Choice | None:
        """Select the blocks that are read; None: all blocks, in training or if there are at most `top_k` others."""
        count, device = len(blocks.place), inputs.query.device
        if inputs.training or count - 1 <= self.top_k:
            return None
        if inputs.causal:  # use the first query only: a mean would leak later tokens of the block to earlier ones
            query = blocks.query[:, :, 0]
        else:
            real = blocks.is_word.sum(dim=1) + 1  # words and landmark
            query = blocks.query.sum(dim=2) / real[:, None].to(blocks.query.dtype)  # (H, B, D)
        number, parts = torch.arange(count, device=device), []
        for own in number.split(max(1, MAX_UNFUSED_SCORES // (len(query) * count))):
            scores = query[:, own] @ blocks.landmark.transpose(1, 2)  # (H, n, B)
            other = number < own[:, None] if inputs.causal else number != own[:, None]
            best = scores.masked_fill(~other, float("-inf")).topk(self.top_k, dim=-1)
            parts.append(Choice(best.indices, best.values > float("-inf")))
        block, exists = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        own = number[:, None].expand(len(query), -1, 1)
        return Choice(torch.cat([own, block], dim=-1), pad(exists, (1, 0), value=True))

    def read_all(self, inputs: AttentionInputs, blocks: Blocks) -> Tensor:
        """Attend to all blocks, a chunk of queries at a time; return `(H, B, S, D)`."""
        place, is_word, query, *states = blocks
        number = torch.arange(len(place), device=place.device)

        def some_queries(query: Tensor, key: Tensor, value: Tensor, landmark: Tensor, own: Tensor) -> Tensor:
            visible = is_word & (place <= own[:, None, None]) if inputs.causal else is_word
            is_own = own[:, None] // self.size == number
            return read_blocks(query, key, value, landmark, visible, is_own, inputs.scaling, inputs.dropout)

        # MAX_UNFUSED_SCORES would be too small: glibc before 2.38 rarely reuses the memory of a freed tensor unless it
        # was large enough for an allocation of its own, and the backward pass of many small steps would hold it all.
        step = max(1, MAX_SCORES // (query.shape[0] * place.numel()))
        parts = [
            recompute_in_backward(some_queries, part, *states, own)
            for part, own in zip(query.flatten(1, 2).split(step, dim=1), place.flatten().split(step), strict=True)
        ]
        return torch.cat(parts, dim=1).view_as(query)

    def read_chosen(self, inputs: AttentionInputs, blocks: Blocks, choice: Choice) -> Tensor:
        """Attend to the selected blocks.

        Args:
            inputs: the inputs of all documents.
            blocks: the blocks of one document.
            choice: the blocks that each block of queries reads.

        Returns:
            `(H, B, S, D)`.
        """
        place, is_word, query, *states = blocks
        heads, count, read = choice.block.shape
        head = torch.arange(heads, device=place.device)[:, None, None]
        is_own = torch.arange(read, device=place.device) == 0

        def some_blocks(query: Tensor, key: Tensor, value: Tensor, landmark: Tensor, own, block, exists) -> Tensor:
            rows = (block + head * count).flatten()
            key, value, landmark = (
                x.flatten(0, 1).index_select(0, rows).unflatten(0, block.shape) for x in (key, value, landmark)
            )  # (H, n, C, S, D) and (H, n, C, D)
            visible = (is_word[block] & exists[..., None])[:, :, None]  # (H, n, 1, C, S)
            if inputs.causal:
                visible = visible & (place[block][:, :, None] <= own[..., None, None])
            return read_blocks(query, key, value, landmark, visible, is_own, inputs.scaling, inputs.dropout)

        step = max(1, MAX_UNFUSED_SCORES // (heads * read * self.size**2))
        cut = (query.split(step, dim=1), place.split(step), choice.block.split(step, 1), choice.exists.split(step, 1))
        parts = [
            recompute_in_backward(some_blocks, part, *states, *choice_of_part)
            for part, *choice_of_part in zip(*cut, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def dense(self, inputs, rows):
        length, blocks = rows.stop - rows.start, self.blocks(*(x[rows] for x in inputs[:3]))
        place, choice = blocks.place.flatten()[:length], self.choice(inputs, blocks)
        number = torch.arange(len(blocks.place), device=place.device)
        visible = blocks.is_word.expand(length, *blocks.place.shape)
        if inputs.causal:
            visible = visible & (blocks.place <= place[:, None, None])
        if choice is not None:
            read = torch.zeros(*choice.block.shape[:2], len(number), dtype=torch.long, device=place.device)
            read = read.scatter_add(-1, choice.block, choice.exists.long()) > 0  # (H, B, B)
            visible = visible & read[:, place // self.size][..., None]
        is_own = place[:, None] // self.size == number
        query = blocks.query.flatten(1, 2)[:, :length]
        weights = block_weights(query, blocks.key, blocks.landmark, visible, is_own, inputs.scaling)
        weights = weights.flatten(2)[..., :length].to(inputs.value.dtype)
        dropped = torch.dropout(weights, inputs.dropout, train=inputs.dropout > 0)
        return (dropped @ inputs.value[rows].transpose(0, 1)).transpose(0, 1), weights
