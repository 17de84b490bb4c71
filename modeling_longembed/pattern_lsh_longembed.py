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

    def of_tokens(self, rank: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chunk and the bucket of tokens in each round, `(H, R, L)` int64, given their `ranks`."""
        return rank // self.place.shape[-1], self.bucket.flatten(2).gather(-1, rank)

    def ranks(self, length: int) -> Tensor:
        """Return the rank of each of the L tokens of the document in the sorted order of each round, `(H, R, L)`."""
        return self.place.flatten(2).argsort(dim=-1)[..., :length]

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


def count_meetings(query: Tensor, key: Tensor) -> Tensor:
    """Count how often each query sees each key in all rounds, N_ij of the paper.

    Args:
        query: `(H, c, M, R)`, numbers of the queries of c chunks in R rounds, see `LshAttention.codes`.
        key: `(H, c, N, K * R)`, numbers of the keys.

    Returns:
        `(H, c, M, N)` integers, at least 1: those that never meet are masked.
    """
    rounds, most = query.shape[-1], key.shape[-1]
    # One byte for a pair: this passes over all pairs K * R times, and memory is what limits it.
    dtype = torch.uint8 if most < 256 else torch.int32
    times = torch.zeros(*query.shape[:-1], key.shape[-2], dtype=dtype, device=query.device)
    queries, keys = (x.movedim(-1, 0).contiguous() for x in (query, key))
    for number, of_key in enumerate(keys):
        times += (queries[number % rounds][..., None] == of_key[..., None, :]).view(torch.uint8)
    return times.clamp_(min=1)


@register_pattern
class LshAttention(AttentionPattern):
    """Attention by locality-sensitive hashing (Reformer, Kitaev et al. 2020, arXiv:2001.04451).

    Query and key are one projection, and the key is scaled to unit length. In each of `hashes` rounds a random rotation
    puts tokens with similar directions into the same bucket. The tokens are sorted by bucket and cut into chunks of
    `chunk` tokens. A token sees the tokens of its bucket in its own chunk and in the chunk before. It attends to the
    union of what it sees in all rounds by one softmax, and to itself only if there are no others. Each round is a
    softmax of its own; the rounds are summed with the sums of their exponentials as weights, in which a pair that meets
    in N rounds has the score minus log N in each (the paper's N_ij), and so counts once.

    The rotations are random, and different in each round, head and attention sublayer. They depend on `seed` alone,
    which is a number for each sublayer (consecutive ones if one entry is given for all), so that a document is hashed
    alike every time, in training too. A document of at most `chunk` tokens is not hashed. `buckets=0` means two buckets
    for every chunk of the document.

    The Reformer of transformers has `across_buckets=True, allow_duplicates=True`: a token also sees the other buckets
    in its two chunks, and a pair counts once for each round in which it meets, which the authors' code (trax) has under
    the names `attend_across_buckets` and `allow_duplicate_attention`. With `shared_rotations` all heads have the same
    rotations. Configs that were saved before there were the last two switches have both.

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
    seed: int = parameter(0, least=0, by_sublayer=True)
    across_buckets: bool = switch(False)
    allow_duplicates: bool = switch(False, earlier=True)
    shared_rotations: bool = switch(False, earlier=True)

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
            own = 1 if self.shared_rotations else inputs.model_heads
            return torch.randn(own, width, self.hashes, sum(sizes) // 2, generator=generator)

        wide = torch.promote_types(torch.float32, query.dtype)
        rotation = inputs.documents.once((self, "rotations", width, *sizes), rotations).to(query.device, wide)
        if self.shared_rotations:
            rotation = rotation.expand(heads, -1, -1, -1)
        else:
            rotation = rotation[inputs.first_head : inputs.first_head + heads]
        parts = []
        for part in query.to(wide).split(max(1, MAX_UNFUSED_SCORES // (heads * self.hashes * max(sizes))), dim=1):
            bucket, scale = torch.zeros((), dtype=torch.long, device=query.device), 1
            for of_hash in rotation.split([size // 2 for size in sizes], dim=-1):
                rotated = torch.einsum("hld,hdrb->hrlb", part, of_hash)
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
        seen, size, ranks = rounds.seen(), rounds.place.shape[-1], rounds.ranks(length)
        head = torch.arange(heads, device=query.device).view(-1, 1, 1, 1)
        codes = None  # nothing to count with one round
        if not self.allow_duplicates and rounds.place.shape[1] > 1:
            codes = self.codes(rounds, ranks)

        def some_chunks(query, key, value, query_place, key_place, query_bucket, key_bucket):
            """Compute the context `(H, c, M, D)` and log-sum-exp `(H, c, M)` of c chunks of one round."""
            times = None
            if codes is not None:
                of_query, of_key = codes
                times = count_meetings(
                    take(of_query, query_place.clamp(max=length - 1)), take(of_key, key_place.clamp(max=length - 1))
                )
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
            if times is not None:
                scores = scores - times.to(scores.dtype).log()
            scores = scores.masked_fill(~visible, float("-inf")).masked_fill(key_place == query_place, SELF_SCORE)
            total = scores.logsumexp(dim=-1)
            weights = (scores - total[..., None]).exp().to(value.dtype)
            return torch.dropout(weights, inputs.dropout, train=inputs.dropout > 0) @ value, total

        step = max(1, MAX_UNFUSED_SCORES // (heads * size * 2 * size))
        contexts, totals = [], []
        for number, rank in enumerate(ranks.unbind(1)):
            indices = [x[:, number] for x in (rounds.place, seen.place, rounds.bucket, seen.bucket)]
            query_place, key_place = (x.clamp(max=length - 1) for x in indices[:2])
            sorted_states = take(query, query_place), take(key, key_place), take(value, key_place)
            parts = [
                recompute_in_backward(some_chunks, *part)
                for part in zip(*(x.split(step, dim=1) for x in (*sorted_states, *indices)), strict=True)
            ]
            context, total = (torch.cat(part, dim=1).flatten(1, 2) for part in zip(*parts, strict=True))
            contexts.append(take(context, rank))
            totals.append(total.gather(1, rank))
        shares = torch.stack(totals).softmax(dim=0)[..., None].to(value.dtype).unbind(0)  # (H, L, 1) each
        mixed = contexts[0] * shares[0]
        for context, share in zip(contexts[1:], shares[1:], strict=True):
            mixed = torch.addcmul(mixed, context, share)
        return mixed.transpose(0, 1)

    def codes(self, rounds: Rounds, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Number the places of the L tokens so that a query sees a key in a round where their numbers are equal.

        Args:
            rounds: the sorted document, R > 1 rounds.
            ranks: `(H, R, L)`, what `rounds.ranks` returns.

        Returns:
            A number for each query and round, `(H, L, R)`, and the K numbers at which it sees the key, `(H, L, K * R)`:
            the key's own chunk, the next chunk, and across buckets the first chunk of the next round after the last.
        """
        chunk, bucket = rounds.of_tokens(ranks)
        chunks = rounds.place.shape[2]
        code = chunk if self.across_buckets else bucket * (chunks + 1) + chunk  # + 1: no chunk follows the last
        seen = [code, code + 1]
        if self.across_buckets:
            seen.append(torch.where(chunk.roll(1, dims=1) == chunks - 1, 0, -1))
        largest = rounds.place.shape[1] * (math.prod(self.hash_sizes(ranks.shape[-1])) + 1) * (chunks + 1)
        dtype = torch.int32 if largest < 2**31 else torch.int64
        of_query, of_key = code.to(dtype), torch.cat(seen, dim=1).to(dtype)
        return of_query.transpose(1, 2).contiguous(), of_key.transpose(1, 2).contiguous()

    def dense(self, inputs, rows):
        inputs = inputs._replace(key=unit(inputs.key))
        length, value = rows.stop - rows.start, inputs.value[rows].transpose(0, 1)
        index = torch.arange(length, device=value.device)
        itself = index == index[:, None]
        scores = inputs.scores(rows)
        scores = scores.to(torch.promote_types(torch.float32, scores.dtype))
        meetings = self.meetings(self.rounds(inputs, inputs.query[rows].transpose(0, 1)), length)  # (H, R, L, L)
        if inputs.causal:
            meetings = meetings * (index <= index[:, None])
        times = meetings.sum(dim=1) if self.allow_duplicates else meetings.any(dim=1)  # how often a pair counts
        weights = (scores + times.to(scores.dtype).log()).masked_fill(itself, SELF_SCORE).softmax(dim=-1)
        weights = weights.to(value.dtype)
        dropped = torch.dropout(weights, inputs.dropout, train=inputs.dropout > 0)
        return (dropped @ value).transpose(0, 1), weights

    def meetings(self, rounds: Rounds, length: int) -> Tensor:
        """Return how often each token sees each other in each round of a document of L tokens, int64 `(H, R, L, L)`."""
        _, count, chunks, _ = rounds.place.shape
        chunk, bucket = rounds.of_tokens(rounds.ranks(length))

        def same_bucket(first: int, second: int) -> Tensor:
            same = bucket[:, first, :, None] == bucket[:, second, None]
            return torch.ones_like(same) if self.across_buckets else same

        times = []
        for number in range(count):
            after = chunk[:, number, :, None] - chunk[:, number, None]  # chunks from key to query
            of_round = (((after == 0) | (after == 1)) & same_bucket(number, number)).long()
            if count * chunks > 1:
                wrapped = (chunk[:, number, :, None] == 0) & (chunk[:, number - 1, None] == chunks - 1)
                of_round = of_round + (wrapped & same_bucket(number, number - 1))
            times.append(of_round)
        return torch.stack(times, dim=1)
