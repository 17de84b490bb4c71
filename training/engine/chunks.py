"""A batch that is read in several forward passes: what has to be the same as in one pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from common.errors import UserError
from modeling_longembed.layout_layerdrop_longembed import layers_drawn_once


@contextmanager
def parts_of_batch(model: nn.Module, count: int) -> Iterator[None]:
    """Let the forward passes inside the block compute what one pass over their whole batch would.

    Everything that reads the chunks of a training batch one by one does it inside this block.

    Args:
        model: the model in training, maybe wrapped.
        count: number of chunks that the batch is divided into.

    Raises:
        UserError: there are several chunks, and the documents of a pass see each other in training.
    """
    if count > 1 and (pattern := coupling_pattern(model)):
        raise UserError(
            f"the attention pattern {pattern!r} lets the documents of a batch see each other in training, and this "
            f"batch was divided into {count} chunks, in which they would not; give more --batch_tokens or smaller "
            "batches, so that a batch is one chunk, or negatives=0 in the pattern"
        )
    with layers_drawn_once(model):
        yield


def coupling_pattern(model: nn.Module) -> str | None:
    """Return the type of a pattern under which documents see each other in the model's present mode; None if none."""
    for module in model.modules():
        pattern: Any = getattr(module, "training_pattern", None)
        # Code in a model's folder may be older than the attribute.
        if module.training and getattr(pattern, "couples_documents", False):
            return pattern.type
    return None
