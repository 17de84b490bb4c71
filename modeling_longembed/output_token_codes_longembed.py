"""Token vectors in fewer bytes: half precision, int8, one bit a dimension, or residuals to centroids.

A `TokenCodec` turns the token vectors of documents into codes and back. Queries stay as they are.
"""

from copy import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Bits of a dimension, for each kind.
BITS = {"float32": 32, "float16": 16, "int8": 8, "binary": 1, "residual1": 1, "residual2": 2}
# Numbers in the products of vectors with centroids that are computed at a time.
PRODUCTS = 2**22


class TokenCodec:
    """Codes of token vectors, `bytes_per_vector` bytes each.

    Kinds:

    - `float32`, `float16`: the vectors in this precision.
    - `int8`: each dimension in 256 steps between its smallest and its largest value in a sample, as
      `quantize_embeddings` of sentence-transformers.
    - `binary`: the sign of each dimension, eight in a byte, as `ubinary` of sentence-transformers. After `fit`, of the
      centred vector, rotated at random if `rotate` is set, so that each bit tells equally much. Decoded to plus or
      minus the mean size of the dimension, plus the centre.
    - `residual1`, `residual2`: the nearest of some centroids, in two bytes, and 1 or 2 bits for each dimension of the
      difference (ColBERTv2, Santhanam et al. 2022, arXiv:2112.01488). The edges between the 2 or 4 values of a
      difference are quantiles of a sample, so that all are equally frequent; a value is the mean of what it stands for.

    Args:
        kind: `float32`, `float16`, `int8`, `binary`, `residual1` or `residual2`.
        rotate: `binary`: rotate the vectors; a help if some dimensions vary more than others, as after PCA.
        centroids: `residual`: number of centroids, at most 65,536; None: the power of two below 4 times the square root
            of the size of the sample.
        seed: of the rotation, and of the first centroids.
        dim: width of the vectors; None: that of the sample, or of the first vectors that are encoded.

    Raises:
        ValueError: there is no such kind, or `centroids` is out of range.
    """

    def __init__(
        self, kind: str, rotate: bool = False, centroids: int | None = None, seed: int = 0, dim: int | None = None
    ) -> None:
        if kind not in BITS:
            raise ValueError(f"TokenCodec: kind={kind!r}; choose from {', '.join(map(repr, BITS))}")
        if centroids is not None and not 1 <= centroids <= 2**16:
            raise ValueError(f"TokenCodec: centroids={centroids}; give a number from 1 to 65536")
        self.kind, self.rotate, self.centroids, self.seed = kind, rotate, centroids, seed
        self.dim = dim
        self.tables: dict[str, Tensor] = {}

    def fit(self, sample: Tensor) -> "TokenCodec":
        """Learn ranges, centre, rotation or centroids from token vectors of documents.

        Args:
            sample: `(n, k)`, n at least 1; some ten thousand vectors of different documents are enough.

        Returns:
            This codec.

        Raises:
            ValueError: the sample is no `(n, k)` array of vectors, or smaller than the number of values of a residual.
        """
        sample = torch.as_tensor(sample)
        if sample.ndim != 2 or not len(sample):
            raise ValueError(f"TokenCodec: a sample of shape {tuple(sample.shape)}; give token vectors (n, k), n >= 1")
        if self.kind.startswith("residual") and sample.numel() < 2 ** BITS[self.kind]:
            raise ValueError(
                f"TokenCodec: a sample of {sample.numel()} numbers, but a difference has {2 ** BITS[self.kind]} values "
                f"in {self.kind}; give more token vectors"
            )
        sample, self.dim, self.tables = sample.detach().float(), sample.shape[1], {}
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "int8":
            self.tables["ranges"] = torch.stack([sample.amin(0), sample.amax(0)])
        elif self.kind == "binary":
            self.tables["centre"] = sample.mean(0)
            if self.rotate:
                square = torch.randn(self.dim, self.dim, dtype=torch.float64, generator=generator)
                self.tables["rotation"] = torch.linalg.qr(square).Q.float().to(sample.device)
            self.tables["scale"] = self._centred(sample, self.tables).abs().mean(0)
        elif self.kind.startswith("residual"):
            self._fit_residuals(sample, generator)
        return self

    def _fit_residuals(self, sample: Tensor, generator: torch.Generator) -> None:
        count = min(self.centroids or 2 ** (((16 * len(sample)).bit_length() - 1) // 2), 2**16, len(sample))
        centroids = sample[torch.randperm(len(sample), generator=generator)[:count].to(sample.device)]
        for _ in range(10):
            nearest = _nearest(sample, centroids)
            sizes = torch.bincount(nearest, minlength=count)[:, None]
            means = torch.zeros_like(centroids).index_add(0, nearest, sample) / sizes.clamp(min=1)
            centroids = torch.where(sizes > 0, means, centroids)
        differences = (sample - centroids[_nearest(sample, centroids)]).flatten().sort().values
        values = differences.tensor_split(2 ** BITS[self.kind])  # equally many in each
        self.tables["centroids"] = centroids
        self.tables["edges"] = torch.stack([(low[-1] + high[0]) / 2 for low, high in pairwise(values)])
        self.tables["values"] = torch.stack([part.mean() for part in values])

    @property
    def is_ready(self) -> bool:
        """Whether this codec can encode: its kind needs no sample, or there was one."""
        return bool(self.tables) or self.kind in ("float32", "float16", "binary")

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of the code of a vector, beside the tables of the codec.

        Raises:
            ValueError: the width of the vectors is not known yet.
        """
        if self.dim is None:
            raise ValueError(f"TokenCodec: {self.kind} codes have no size yet; call fit or encode first")
        packed = -(-self.dim * BITS[self.kind] // 8)
        return packed + 2 if self.kind.startswith("residual") else packed

    def to(self, device: torch.device) -> "TokenCodec":
        """Return this codec with its tables on a device; itself if they are there."""
        if all(table.device == device for table in self.tables.values()):
            return self
        moved = copy(self)
        moved.tables = {name: table.to(device) for name, table in self.tables.items()}
        return moved

    def encode(self, vectors: Tensor) -> Tensor:
        """Turn token vectors into codes.

        Args:
            vectors: `(n, k)`.

        Returns:
            `(n, k)` float32, float16 or int8; otherwise `(n, bytes_per_vector)` uint8.

        Raises:
            ValueError: the vectors have another shape, or there was no sample and the kind needs one.
        """
        vectors = torch.as_tensor(vectors).detach()
        if not self.is_ready:
            raise ValueError(f"TokenCodec: {self.kind} needs a sample of token vectors first; call fit")
        if vectors.ndim != 2 or self.dim not in (None, vectors.shape[1]):
            raise ValueError(
                f"TokenCodec: vectors of shape {tuple(vectors.shape)}; this codec takes (n, {self.dim or 'k'})"
            )
        self.dim = vectors.shape[1]
        if self.kind in ("float32", "float16"):
            return vectors.to(getattr(torch, self.kind))
        vectors, tables = vectors.float(), self.to(vectors.device).tables
        if self.kind == "int8":
            start, step = self._steps(tables)
            number = (vectors - start) / torch.where(step == 0, 1.0, step)
            return (number.floor().clamp(0, 255) - 128).to(torch.int8)
        if self.kind == "binary":
            return pack_bits(self._centred(vectors, tables) > 0)
        nearest = _nearest(vectors, tables["centroids"])
        places = torch.bucketize(vectors - tables["centroids"][nearest], tables["edges"])
        shifts = torch.arange(BITS[self.kind] - 1, -1, -1, device=vectors.device)
        number = torch.stack([nearest % 256, nearest // 256], dim=1).to(torch.uint8)
        return torch.cat([number, pack_bits((places[:, :, None] >> shifts & 1).flatten(1) > 0)], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into the vectors that they stand for, in about twice the memory of these.

        Args:
            codes: as `encode` returns.

        Returns:
            `(n, k)` fp32; of `residual` at unit length.

        Raises:
            ValueError: the codes have another shape than those of this codec.
        """
        codes = torch.as_tensor(codes)
        if codes.ndim != 2 or codes.shape[1] * codes.element_size() != self.bytes_per_vector:
            raise ValueError(
                f"TokenCodec: {codes.dtype} codes of shape {tuple(codes.shape)}; {self.kind} codes of {self.dim} "
                f"dimensions have {self.bytes_per_vector} bytes a vector"
            )
        tables = self.to(codes.device).tables
        if self.kind in ("float32", "float16"):
            return codes.float()
        if self.kind == "int8":
            start, step = self._steps(tables)
            return codes.float().add_(128.5).mul_(step).add_(start)  # the middle of the step
        if self.kind == "binary":
            signs = unpack(codes, torch.tensor([-1.0, 1.0], device=codes.device))[:, : self.dim]
            if not tables:
                return signs / signs.shape[1] ** 0.5
            signs *= tables["scale"]
            return (signs @ tables["rotation"].T if "rotation" in tables else signs).add_(tables["centre"])
        decoded = tables["centroids"][codes[:, 0].long() + 256 * codes[:, 1].long()]
        decoded += unpack(codes[:, 2:], tables["values"])[:, : self.dim]
        return decoded.div_(decoded.norm(dim=-1, keepdim=True).clamp_(min=1e-12))

    def numbers(self, codes: Tensor) -> Tensor:
        """Turn codes into numbers whose products with prepared queries tell those with the vectors.

        Args:
            codes: as `encode` returns.

        Returns:
            `(n, k)` fp32: of `binary` signs, plus or minus 1; of `int8` the numbers of the steps; else the vectors.
        """
        codes = torch.as_tensor(codes)
        if self.kind == "binary":
            return unpack(codes, torch.tensor([-1.0, 1.0], device=codes.device))[:, : self.dim]
        return codes.float() if self.kind == "int8" else self.decode(codes)

    def prepare(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Do to a query what `decode` does to millions of codes, such as a rotation.

        Args:
            queries: `(q, k)`, token vectors of queries.

        Returns:
            Prepared queries `(q, k)` and constants `(q,)`, of which the products are made:
            `prepared @ numbers(codes).T + constants[:, None]` is `queries @ decode(codes).T`.
        """
        constants, tables = queries.new_zeros(len(queries)), self.to(queries.device).tables
        if self.kind == "int8":
            start, step = self._steps(tables)
            return queries * step, queries @ (start + 128.5 * step)
        if self.kind != "binary":
            return queries, constants
        if not tables:
            return queries / queries.shape[1] ** 0.5, constants
        rotated = queries @ tables["rotation"] if "rotation" in tables else queries
        return rotated * tables["scale"], queries @ tables["centre"]

    @staticmethod
    def _steps(tables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return where the 256 steps of each dimension begin, and how large they are."""
        start, end = tables["ranges"]
        return start, (end - start) / 255

    @staticmethod
    def _centred(vectors: Tensor, tables: dict[str, Tensor]) -> Tensor:
        """Return the vectors, centred and rotated if the codec does so."""
        if "centre" in tables:
            vectors = vectors - tables["centre"]
        return vectors @ tables["rotation"] if "rotation" in tables else vectors

    def state(self) -> dict[str, Any]:
        """Return what `from_state` makes this codec of: its `kind` and `dim`, and tensors by name."""
        return {"kind": self.kind, "dim": self.dim, **self.tables}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "TokenCodec":
        """Return the codec that `state` was called on.

        Args:
            state: what `state` returned; tensors may come from a file.
        """
        dim = None if state["dim"] is None else int(state["dim"])
        codec = cls(state["kind"], rotate="rotation" in state, dim=dim)
        codec.tables = {name: torch.as_tensor(table) for name, table in state.items() if name not in ("kind", "dim")}
        return codec


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans `(n, k)` into bytes `(n, ceil(k / 8))`, the first in the highest bit, as NumPy's `packbits`."""
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8))
    weights = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (bits.view(len(bits), bits.shape[1] // 8, 8) * weights).sum(2, dtype=torch.uint8)


def unpack(codes: Tensor, values: Tensor) -> Tensor:
    """Return what bytes `(n, b)` stand for: groups of bits, the highest first, each the place of one of `values`.

    Args:
        codes: uint8.
        values: `(2,)`, of a bit, or `(4,)`, of two bits.

    Returns:
        `(n, 8 b)`, or `(n, 4 b)`.
    """
    bits = len(values).bit_length() - 1
    shifts = torch.arange(8 - bits, -1, -bits, device=codes.device)
    of_byte = values[torch.arange(256, device=codes.device)[:, None] >> shifts & (len(values) - 1)]
    return of_byte.index_select(0, codes.flatten().int()).view(len(codes), codes.shape[1] * len(shifts))


def _nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return the number of the nearest centroid of each vector."""
    offsets = centroids.square().sum(1) / 2
    return torch.cat(
        [(part @ centroids.T - offsets).argmax(1) for part in vectors.split(max(1, PRODUCTS // len(centroids)))]
    )
