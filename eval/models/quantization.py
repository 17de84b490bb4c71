"""Vectors in fewer bits, as an index would store them."""

import numpy as np
from sentence_transformers.util import quantize_embeddings

VECTORS = ("float32", "int8", "binary")


def quantize(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Quantize vectors with sentence-transformers' `quantize_embeddings`, and reconstruct them.

    Args:
        vectors: `(n, d)` float32; for int8 n is at least 2, and each dimension is divided into 256 steps between its
            smallest and its largest value.
        precision: `float32`: unchanged; `int8`: 8 bits per dimension; `binary`: the sign of each dimension.

    Returns:
        `(n, d)` float32: for int8 the middle of the step, for binary 1 or -1.
    """
    if precision == "int8":
        steps = np.asarray(quantize_embeddings(vectors, "uint8"), np.float32)
        low, high = vectors.min(0), vectors.max(0)
        return np.minimum(low + (steps + 0.5) * (high - low) / 255, high)
    if precision == "binary":
        bits = np.unpackbits(quantize_embeddings(vectors, "ubinary"), axis=-1, count=vectors.shape[1])
        return 2 * bits.astype(np.float32) - 1
    return vectors
