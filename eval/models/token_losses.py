"""Losses of a document's tokens under a language model: masked tokens of chunks, or all tokens of windows."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from eval.models.language_models import LanguageModel

IGNORED = -100  # target of tokens that are not scored
_ROWS = 1024  # of logits at a time: their logarithms take as much memory again


def masked_chunks(masks: Iterable[set[int]], size: int, total: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """Find the chunks of a span in which masked tokens are scored.

    Args:
        masks: sets of positions that are masked together.
        size: tokens of a chunk.
        total: tokens of the span. Chunks follow each other from its start, and the last one ends where the span ends
            (it may overlap the one before).

    Yields:
        Start of a chunk, the positions that are masked in it, and those of them that are scored in it. Each position of
        each mask is scored once.
    """
    for mask in masks:
        chunks: dict[int, list[int]] = defaultdict(list)
        for position in sorted(mask):
            chunks[min(position // size * size, total - size)].append(position)
        for start, scored in chunks.items():
            yield start, sorted(position for position in mask if start <= position < start + size), scored


def masked_losses(
    model: LanguageModel, span: Tensor, masks: Iterable[set[int]], length: int, batch_tokens: int
) -> Tensor:
    """Compute the losses of masked tokens.

    Args:
        model: a masked language model.
        span: `(M,)` token ids without special tokens.
        masks: sets of positions of the span that are masked together.
        length: tokens of a chunk with its special tokens.
        batch_tokens: maximum tokens in one forward pass.

    Returns:
        `(n,)`, negative log-likelihoods of the masked tokens in nats.
    """
    lead, closing = torch.tensor(model.lead, dtype=torch.long), torch.tensor(model.closing, dtype=torch.long)
    size = length - len(lead) - len(closing)
    rows, targets = [], []
    for start, masked, scored in masked_chunks(masks, size, len(span)):
        chunk, target = span[start : start + size].clone(), torch.full((length,), IGNORED)
        chunk[torch.tensor(masked) - start] = model.tokenizer.mask_token_id
        target[torch.tensor(scored) - start + len(lead)] = span[scored]
        rows.append(torch.cat([lead, chunk, closing]))
        targets.append(target)
    return torch.cat(list(_losses(model, rows, targets, batch_tokens)))


def window_losses(
    model: LanguageModel, ids: Tensor, ends: Sequence[int], length: int, batch_tokens: int
) -> list[Tensor]:
    """Compute the losses of all tokens of windows.

    Args:
        model: a causal language model.
        ids: `(M,)` token ids of a document without special tokens.
        ends: positions at which windows end.
        length: tokens of a window with the special tokens before it.
        batch_tokens: maximum tokens in one forward pass.

    Returns:
        For each window `(n,)`, negative log-likelihoods of its tokens in nats, in their order. The first token of a
        window has none if the tokenizer puts nothing before it.
    """
    lead = torch.tensor(model.lead, dtype=torch.long)
    size = length - len(lead)
    rows = [torch.cat([lead, ids[end - size : end]]) for end in ends]
    targets = []
    for row in rows:
        target = torch.cat([row[1:], torch.tensor([IGNORED])])  # the next token
        target[: max(0, len(lead) - 1)] = IGNORED
        targets.append(target)
    return list(_losses(model, rows, targets, batch_tokens))


def _losses(
    model: LanguageModel, rows: Sequence[Tensor], targets: Sequence[Tensor], batch_tokens: int
) -> Iterator[Tensor]:
    """Yield the cross entropies of the targets of each row, in float64 on the CPU; rows are `(L,)` of one length."""
    for first in range(0, len(rows), max(1, batch_tokens // len(rows[0]))):
        batch = slice(first, first + max(1, batch_tokens // len(rows[0])))
        target = torch.stack(list(targets[batch]))
        chosen = target != IGNORED
        logits = model.logits(torch.stack(list(rows[batch])), chosen)
        parts = zip(logits.split(_ROWS), target[chosen].to(logits.device).split(_ROWS), strict=True)
        losses = torch.cat([nn.functional.cross_entropy(*part, reduction="none") for part in parts])
        yield from losses.double().cpu().split(chosen.sum(1).tolist())
