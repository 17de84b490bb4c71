"""Losses: pure functions of tensors, each with its shapes, formula, source and an example.

Every loss takes embeddings, scores or logits and returns a scalar and a dict of detached scalars for the log; the
relation losses return one value per token. None of them gathers over processes or caches gradients: that is done around
them. Losses that are means over rows take `rows`, the rows of this process in a gathered batch. Losses that are
statistics of the batch are computed whole on every process.
"""
