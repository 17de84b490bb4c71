"""Losses of a document's tokens under a language model: masked tokens of pieces, or all tokens of windows."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from eval.models.language_models import LanguageModel

IGNORED = -100  # a target where nothing is scored
_ROWS = 1024  # of logits that are worked on at a time: their logarithms take as much memory again


def masked_pieces(masks: Iterable[set[int]], size: int, total: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """The pieces of a stretch in which masked tokens are scored.

    Args:
        masks: sets of places that are masked together.
        size: tokens of a piece.
        total: tokens of the stretch. Pieces lie side by side from its start; the last one ends where the stretch does.

    Yields:
        Where a piece starts, the places masked in it, and those of them that are scored in it: each place of each mask
        once.
    """
    for mask in masks:
        pieces: dict[int, list[int]] = defaultdict(list)
        for place in sorted(mask):
            pieces[min(place // size * size, total - size)].append(place)
        for start, scored in pieces.items():
            yield start, sorted(place for place in mask if start <= place < start + size), scored


def masked_losses(
    model: LanguageModel, stretch: Tensor, masks: Iterable[set[int]], length: int, batch_tokens: int
) -> Tensor:
    """Losses of masked tokens.

    Args:
        model: a masked language model.
        stretch: `(M,)` ids without special tokens.
        masks: sets of places of the stretch that are masked together.
        length: tokens of a piece with its special tokens.
        batch_tokens: pieces are read together up to so many tokens.

    Returns:
        `(n,)`, negative log-likelihoods of the tokens under the masks.
    """
    lead, closing = torch.tensor(model.lead, dtype=torch.long), torch.tensor(model.closing, dtype=torch.long)
    size = length - len(lead) - len(closing)
    rows, targets = [], []
    for start, masked, scored in masked_pieces(masks, size, len(stretch)):
        piece, target = stretch[start : start + size].clone(), torch.full((length,), IGNORED)
        piece[torch.tensor(masked) - start] = model.tokenizer.mask_token_id
        target[torch.tensor(scored) - start + len(lead)] = stretch[scored]
        rows.append(torch.cat([lead, piece, closing]))
        targets.append(target)
    return torch.cat(list(_losses(model, rows, targets, batch_tokens)))


def window_losses(
    model: LanguageModel, ids: Tensor, ends: Sequence[int], length: int, batch_tokens: int
) -> list[Tensor]:
    """Losses of all tokens of windows.

    Args:
        model: a causal language model.
        ids: `(M,)`, a document without special tokens.
        ends: where windows end.
        length: tokens of a window with the special tokens before it.
        batch_tokens: windows are read together up to so many tokens.

    Returns:
        For each window `(n,)`, negative log-likelihoods of its tokens in their order; the first token of a window has
        none where the tokenizer puts nothing before it.
    """
    lead = torch.tensor(model.lead, dtype=torch.long)
    size = length - len(lead)
    rows = [torch.cat([lead, ids[end - size : end]]) for end in ends]
    targets = []
    for row in rows:
        target = torch.cat([row[1:], torch.tensor([IGNORED])])  # what comes next
        target[: max(0, len(lead) - 1)] = IGNORED
        targets.append(target)
    return list(_losses(model, rows, targets, batch_tokens))


def _losses(
    model: LanguageModel, rows: Sequence[Tensor], targets: Sequence[Tensor], batch_tokens: int
) -> Iterator[Tensor]:
    """Cross entropies of the targets of each row, in float64 on the CPU; rows `(L,)` of one length."""
    for first in range(0, len(rows), max(1, batch_tokens // len(rows[0]))):
        batch = slice(first, first + max(1, batch_tokens // len(rows[0])))
        wanted = torch.stack(list(targets[batch]))
        chosen = wanted != IGNORED
        logits = model.logits(torch.stack(list(rows[batch])), chosen)
        parts = zip(logits.split(_ROWS), wanted[chosen].to(logits.device).split(_ROWS), strict=True)
        losses = torch.cat([nn.functional.cross_entropy(*part, reduction="none") for part in parts])
        yield from losses.double().cpu().split(chosen.sum(1).tolist())
