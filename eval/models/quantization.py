"""Vectors in fewer bits, as a store of them gives them back."""

import numpy as np
from sentence_transformers.util import quantize_embeddings

VECTORS = ("float32", "int8", "binary")


def stored(vectors: np.ndarray, precision: str) -> np.ndarray:
    """What is left of vectors that were stored in fewer bits, by sentence-transformers' `quantize_embeddings`.

    Args:
        vectors: `(n, d)` float32; for int8 n is at least 2, and each dimension is cut into 256 steps from its smallest
            value in them to its largest.
        precision: `float32`, all of it; `int8`, 8 bits a dimension; `binary`, its sign.

    Returns:
        `(n, d)` float32: the middle of the step, or 1 and -1.
    """
    if precision == "int8":
        steps = np.asarray(quantize_embeddings(vectors, "uint8"), np.float32)
        low, high = vectors.min(0), vectors.max(0)
        return np.minimum(low + (steps + 0.5) * (high - low) / 255, high)
    if precision == "binary":
        bits = np.unpackbits(quantize_embeddings(vectors, "ubinary"), axis=-1, count=vectors.shape[1])
        return 2 * bits.astype(np.float32) - 1
    return vectors
