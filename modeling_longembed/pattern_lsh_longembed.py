"""Attention pattern of the Reformer: tokens are hashed, sorted by bucket, and attend to neighbours in that order.

H heads, L tokens of a document, D head size, R hash rounds, C chunks of M tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_kernels_longembed import MAX_UNFUSED_SCORES, recompute_in_backward
from .pattern_base_longembed import AttentionInputs, AttentionPattern, parameter, register_pattern, switch

# Score of a token with itself: so low that any other token has more weight, but finite for a token without others.
SELF_SCORE = -1e5


class Rounds(NamedTuple):
    """One document, sorted by bucket in each of R hash rounds and cut into C chunks of M tokens."""

    place: Tensor  # (H, R, C, M) int64, place in the document; L and more are padding
    bucket: Tensor  # (H, R, C, M) int64; no two rounds share a number

    @property
    def rank(self) -> Tensor:
        """The rank of each place of the document in the sorted order, `(H, R, C * M)`."""
        return self.place.flatten(2).argsort(dim=-1)

    def seen(self) -> "Rounds":
        """Return what the tokens of each chunk may see: their own chunk and the chunk before, `(H, R, C, 2M)`.

        The chunk before the first one of a round is the last one of the previous round, and for the first round that of
        the last round. If there is one chunk in all, it sees itself only.
        """
        if self.place.shape[1] * self.place.shape[2] == 1:
            return self
        before = (x.flatten(1, 2).roll(1, dims=1).view_as(x) for x in self)
        return Rounds(*(torch.cat(chunks, dim=-1) for chunks in zip(self, before, strict=True)))


def unit(states: Tensor) -> Tensor:
    """Scale vectors to length sqrt(D), as the Reformer of transformers normalizes its keys."""
    wide = states.to(torch.promote_types(torch.float32, states.dtype))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)).to(states.dtype)


def take(states: Tensor, place: Tensor) -> Tensor:
    """Return the rows of `states` `(H, N, D)` at the places `(H, ...)` of each head: `(H, ..., D)`."""
    heads, length, _ = states.shape
    first = length * torch.arange(heads, device=place.device).view(-1, *[1] * (place.ndim - 1))
    # `gather` would need an index with D entries per token.
    return states.flatten(0, 1).index_select(0, (place + first).flatten()).unflatten(0, place.shape)


@register_pattern
class LshAttention(AttentionPattern):
    """Attention by locality-sensitive hashing (Reformer, Kitaev et al. 2020, arXiv:2001.04451).

    Query and key are one projection, and the key is scaled to unit length. In each of `hashes` rounds a random rotation
    puts tokens with similar directions into the same bucket. The tokens are sorted by bucket and cut into chunks of
    `chunk` tokens. A token attends to the tokens of its bucket in its own chunk and in the chunk before, and to itself
    only if there are no others. The rounds are averaged with the sums of their exponentials as weights.

    `buckets=0` means two buckets for every chunk of the document. With `across_buckets` a token also sees the other
    buckets in its two chunks, as in the Reformer of transformers. The rotations depend on `seed` only, so that a
    document is hashed alike every time, in training too. A document of at most `chunk` tokens is not hashed.

    The pattern approximates attention with shared queries and keys, so that a model with it starts from random weights
    rather than those of another encoder. Use it for long documents in which tokens look for similar tokens anywhere.

    Cost: L x chunk x hashes in time and memory, and L^1.5 with a small factor for the hashing, because many buckets are
    split over two hashes.
    """

    type = "lsh"
    layer_type = "full_attention"
    shares_query_key = True
    chunk: int = parameter(64)
    hashes: int = parameter(4)
    buckets: int = parameter(0, least=0)
    seed: int = parameter(0, least=0)
    across_buckets: bool = switch(False)

    def check(self, config):
        if self.buckets > 1 and self.buckets % 2:
            raise ValueError(
                f"attention_patterns: buckets={self.buckets} of 'lsh' come in pairs, one for each side of a direction; "
                "give an even number, 1 for no hashing, or 0 for two per chunk"
            )
        if config.position_scheme.bias_reads_query:
            raise ValueError(
                "attention_patterns: 'lsh' hashes one vector that is query and key, and position_embedding_type="
                "'relative' adds another one to queries alone; use 'rope', 'alibi' or 'absolute'"
            )
        if config.extends_by_groups:
            raise ValueError(
                "attention_patterns: 'lsh' hashes one vector, and Self-Extend (position_extension 'group' on rope) has "
                "two for near and far; extend by 'yarn'"
            )

    @property
    def is_mask(self):
        return False

    @property
    def own_weights(self):
        return True

    def visible(self, query, key, head, num_heads):
        """Return True for all tokens, because the hash decides which are seen."""
        return (query.index >= 0) & (key.index >= 0)

    def sees_all(self, length):
        return False  # a token does not see itself

    def hash_sizes(self, length: int) -> list[int]:
        """Return the sizes of the hashes, whose product is the number of buckets for `length` tokens ([] for one)."""
        if length <= self.chunk or self.buckets == 1:
            return []
        count = self.buckets or 2 * -(-length // self.chunk)
        if count <= 2 * self.chunk:
            return [count]
        first = 2 * math.ceil(math.sqrt(count) / 2)
        return [first, 2 * math.ceil(count / first / 2)]

    @torch.no_grad()
    def hash(self, inputs: AttentionInputs, query: Tensor) -> Tensor:
        """Return the buckets `(H, R, L)` of the queries `(H, L, D)`; one round if there is only one bucket."""
        heads, length, width = query.shape
        sizes = self.hash_sizes(length)
        if not sizes:
            return torch.zeros(heads, 1, length, dtype=torch.long, device=query.device)

        def rotations() -> Tensor:
            generator = torch.Generator().manual_seed(self.seed)  # on the CPU: the same numbers on every device
            return torch.randn(width, self.hashes, sum(sizes) // 2, generator=generator)

        wide = torch.promote_types(torch.float32, query.dtype)
        rotation = inputs.documents.once((self, "rotations", width, *sizes), rotations).to(query.device, wide)
        parts = []
        for part in query.to(wide).split(max(1, MAX_UNFUSED_SCORES // (heads * self.hashes * max(sizes))), dim=1):
            bucket, scale = torch.zeros((), dtype=torch.long, device=query.device), 1
            for of_hash in rotation.split([size // 2 for size in sizes], dim=-1):
                rotated = torch.einsum("hld,drb->hrlb", part, of_hash)
                bucket = bucket + scale * torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)
                scale *= 2 * of_hash.shape[-1]
            parts.append(bucket)
        return torch.cat(parts, dim=-1)

    def rounds(self, inputs: AttentionInputs, query: Tensor) -> Rounds:
        """Sort the queries `(H, L, D)` of one document by bucket, then by place; padding comes last."""
        bucket = self.hash(inputs, query)
        length = bucket.shape[-1]
        size = min(self.chunk, length)
        chunks, padding = -(-length // size), math.prod(self.hash_sizes(length))
        bucket = torch.nn.functional.pad(bucket, (0, chunks * size - length), value=padding)
        place = bucket.argsort(dim=-1, stable=True)
        round_number = torch.arange(bucket.shape[1], device=bucket.device)[:, None]
        bucket = bucket.gather(-1, place) + round_number * (padding + 1)
        return Rounds(*(x.unflatten(-1, (chunks, size)) for x in (place, bucket)))

    def attend(self, inputs):
        lengths = [end - start for start, end in inputs.documents.bounds]
        documents = zip(*(x.split(lengths) for x in inputs[:3]), strict=True)
        contexts = [
            self.one_document(inputs, *(x.transpose(0, 1).contiguous() for x in states)) for states in documents
        ]
        return torch.cat(contexts) if contexts else torch.zeros_like(inputs.query)

    def one_document(self, inputs: AttentionInputs, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute the attention of one document.

        Args:
            inputs: the options of the call.
            query, key, value: `(H, L, D)`.

        Returns:
            The context `(L, H, D)`.
        """
        heads, length, _ = query.shape
        rounds, key = self.rounds(inputs, query), unit(key)
        seen, size = rounds.seen(), rounds.place.shape[-1]
        head = torch.arange(heads, device=query.device).view(-1, 1, 1, 1)

        def some_chunks(query, key, value, query_place, key_place, query_bucket, key_bucket):
            """Compute the context `(H, c, M, D)` and log-sum-exp `(H, c, M)` of c chunks of one round."""
            scores = query @ key.transpose(-1, -2)
            scores = scores.to(torch.promote_types(torch.float32, scores.dtype)) * inputs.scaling
            query_place, key_place = query_place[..., None], key_place[..., None, :]
            visible = key_place < length
            if inputs.bias is not None:
                scores = scores + inputs.bias.values(key_place - query_place, head)
            if not self.across_buckets:
                visible = visible & (query_bucket[..., None] == key_bucket[..., None, :])
            if inputs.causal:
                visible = visible & (key_place <= query_place)
            scores = scores.masked_fill(~visible, float("-inf")).masked_fill(key_place == query_place, SELF_SCORE)
            total = scores.logsumexp(dim=-1)
            weights = (scores - total[..., None]).exp().to(value.dtype)
            return torch.dropout(weights, inputs.dropout, train=inputs.dropout > 0) @ value, total

        step = max(1, MAX_UNFUSED_SCORES // (heads * size * 2 * size))
        contexts, totals = [], []
        for number, rank in enumerate(rounds.rank.unbind(1)):
            indices = [x[:, number] for x in (rounds.place, seen.place, rounds.bucket, seen.bucket)]
            query_place, key_place = (x.clamp(max=length - 1) for x in indices[:2])
            sorted_states = take(query, query_place), take(key, key_place), take(value, key_place)
            parts = [
                recompute_in_backward(some_chunks, *part)
                for part in zip(*(x.split(step, dim=1) for x in (*sorted_states, *indices)), strict=True)
            ]
            context, total = (torch.cat(part, dim=1).flatten(1, 2) for part in zip(*parts, strict=True))
            contexts.append(take(context, rank[:, :length]))
            totals.append(total.gather(1, rank[:, :length]))
        shares = torch.stack(totals).softmax(dim=0)[..., None].to(value.dtype).unbind(0)  # (H, L, 1) each
        mixed = contexts[0] * shares[0]
        for context, share in zip(contexts[1:], shares[1:], strict=True):
            mixed = torch.addcmul(mixed, context, share)
        return mixed.transpose(0, 1)

    def dense(self, inputs, rows):
        inputs = inputs._replace(key=unit(inputs.key))
        length, value = rows.stop - rows.start, inputs.value[rows].transpose(0, 1)
        rounds = self.rounds(inputs, inputs.query[rows].transpose(0, 1))
        _, count, chunks, size = rounds.place.shape
        rank = rounds.rank[..., :length]
        chunk, bucket = rank // size, rounds.bucket.flatten(2).gather(-1, rank)  # (H, R, L)
        index = torch.arange(length, device=rank.device)
        scores = inputs.scores(rows)
        scores = scores.to(torch.promote_types(torch.float32, scores.dtype))

        def same_bucket(first: int, second: int) -> Tensor:
            same = bucket[:, first, :, None] == bucket[:, second, None]
            return torch.ones_like(same) if self.across_buckets else same

        weights, totals = [], []
        for number in range(count):
            after = chunk[:, number, :, None] - chunk[:, number, None]  # chunks from key to query
            times = (((after == 0) | (after == 1)) & same_bucket(number, number)).long()  # how often a query sees a key
            if count * chunks > 1:
                wrapped = (chunk[:, number, :, None] == 0) & (chunk[:, number - 1, None] == chunks - 1)
                times = times + (wrapped & same_bucket(number, number - 1))
            if inputs.causal:
                times = times * (index <= index[:, None])
            of_round = (scores + times.to(scores.dtype).log()).masked_fill(index == index[:, None], SELF_SCORE)
            weights.append(of_round.softmax(dim=-1))
            totals.append(of_round.logsumexp(dim=-1))
        shares = torch.stack(totals).softmax(dim=0)[..., None]  # (R, H, L, 1)
        weights = torch.stack(weights).to(value.dtype)
        dropped = torch.dropout(weights, inputs.dropout, train=inputs.dropout > 0)
        context = (dropped @ value * shares.to(value.dtype)).sum(dim=0)
        return context.transpose(0, 1), (weights * shares.to(weights.dtype)).sum(dim=0)
