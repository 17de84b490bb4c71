"""Transformer-XL's recurrence written out, segment by segment, which the memory pattern has to equal."""

import pytest
import torch
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

import tests.modeling_longembed.pattern_settings as pattern_settings
from tests.covering import covering_first

NEIGHBOURS, GROUP = 6, 3
SCHEMES = pattern_settings.SCHEMES | {
    "rope+group": {
        "position_embedding_type": "rope",
        "position_extension": {
            "method": "group",
            "original_max_position_embeddings": 16,
            "factor": GROUP,
            "neighbours": NEIGHBOURS,
            "keep_short": False,
        },
    },
}
PRE_NORM = {"norm_placement": "pre", "final_norm": True, "first_attention_norm": True}
KERNELS_OF_MEMORY = ("longembed_varlen", "eager")


def remember(size, memory):
    return {"type": "memory", "size": size, "memory": memory}


def sinusoid(place, width):
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = place.float()[..., None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2).double()


def turned(states, place):
    """Rotary embeddings of `(H, L, D)`, channels t and t + D/2 as one complex number; angles in float32."""
    half = states.shape[-1] // 2
    angle = place.float()[:, None] * 10_000.0 ** (-torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    product = torch.complex(states[..., :half], states[..., half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat([product.real, product.imag], dim=-1)


def scores_of(model, attention, query, key, i, j):
    """Scores `(H, Q, K)` of queries at the places `i` and keys at `j`, pair by pair, for every scheme."""
    config, distance = model.config, i[:, None] - j[None, :]
    scheme, scaling = config.position_embedding_type, config.head_dim**-0.5
    if scheme == "rope":
        near = turned(query, i) @ turned(key, j).transpose(1, 2)
        if config.position_extension is None:
            return near * scaling
        shift, far_key = NEIGHBOURS - NEIGHBOURS // GROUP, turned(key, j // GROUP).transpose(1, 2)
        left, right = (turned(query, i // GROUP + move) @ far_key for move in (shift, -shift))
        return torch.where(distance.abs() < NEIGHBOURS, near, torch.where(distance > 0, left, right)) * scaling
    if scheme == "relative":
        own = attention.distance
        keys = own.r_proj(sinusoid(distance, config.hidden_size)).unflatten(-1, (-1, config.head_dim))  # (Q, K, H, D)
        content = torch.einsum("hqd,hkd->hqk", query + own.content_bias[:, None], key)
        return scaling * (content + torch.einsum("hqd,qkhd->hqk", query + own.distance_bias[:, None], keys))
    scores = query @ key.transpose(1, 2) * scaling
    if scheme == "alibi":
        scores = scores - torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]).double()[:, None, None] * distance.abs()
    if config.relative_attention_num_buckets:
        bucket = MPNetEncoder.relative_position_bucket(-distance, config.relative_attention_num_buckets, 20)
        scores = scores + model.relative_attention_bias.weight[bucket].permute(2, 0, 1)
    return scores


def recurrence(model, input_ids):
    """One document `(L,)` segment by segment, with what each sublayer remembers and no gradient into that: `(L, d)`.

    All sublayers have segments of one size.
    """
    config, embeddings = model.config, model.embeddings
    patterns = iter(config.attention_patterns * len(input_ids))
    size, outputs = config.attention_patterns[0]["size"], []
    remembered = [torch.zeros(0, config.hidden_size).double() for _ in model.layers]
    for start in range(0, len(input_ids), size):
        place = torch.arange(start, min(start + size, len(input_ids)))
        states = embeddings.word_embeddings(input_ids[place]) + embeddings.token_type_embeddings.weight[0]
        if config.position_embedding_type == "absolute":
            states = states + embeddings.position_embeddings.weight[place]
        if config.position_embedding_type == "sinusoidal":
            states = states + sinusoid(place, config.hidden_size)
        states = embeddings.norm(states)
        for number, layer in enumerate(model.layers):
            read = layer.norm(states) if config.norm_placement == "pre" else states
            if layer.attention is None:
                added = layer.feed_forward(read)
            else:
                attention, memory = layer.attention, next(patterns)["memory"]
                both = torch.cat([remembered[number], read])
                before = torch.arange(start - len(remembered[number]), place[-1] + 1)
                query, key, value = (
                    project(x).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
                    for project, x in ((attention.q_proj, read), (attention.k_proj, both), (attention.v_proj, both))
                )
                scores = scores_of(model, attention, query, key, place, before)
                if config.is_causal:
                    scores = scores.masked_fill(before[None] > place[:, None], float("-inf"))
                added = attention.o_proj((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))
                remembered[number] = both[len(both) - min(memory, len(both)) :].detach()
            states = states + added
            states = layer.norm(states) if config.norm_placement == "post" else states
        outputs.append(states if model.final_norm is None else model.final_norm(states))
    return torch.cat(outputs)


def packed(lengths, seed=0):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (1, sum(lengths)), generator=generator), cu_seqlens


def gradients(model, output):
    weights = torch.linspace(-1, 1, output.numel()).double().view(output.shape)
    loss = (output * weights).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(model.parameters(), grads, strict=True)]


def assert_gradients(model, output, expected):
    pairs = list(zip(gradients(model, output), expected, strict=True))
    scale = max(theirs.abs().max().item() for _, theirs in pairs)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-10 * max(1.0, scale), rtol=0)


FIELDS = [
    pytest.param(SCHEMES[scheme] | placement | {"is_causal": causal}, id=case.id, marks=case.marks)
    for case in covering_first(
        [
            pytest.param(scheme, placement, causal, id=f"{scheme}{'-pre' * bool(placement)}{'-causal' * causal}")
            for scheme in SCHEMES
            for placement in ({}, PRE_NORM)
            for causal in (False, True)
            if causal or scheme != "none"
        ]
    )
    for scheme, placement, causal in [case.values]
]
