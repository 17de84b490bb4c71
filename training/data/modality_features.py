"""Labelled features of another modality, such as images or sound: rows of vectors, and batches of them."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data_files import PARQUET_SUFFIX
from common.errors import UserError, one_line
from common.provenance import code_hash, content_hashes
from modeling_longembed.encoding_longembed import budget_batches
from training.data.packing import cumulative_lengths
from training.data.row_order import RowOrder
from training.data.sources import Columns, check_class, data_files, json_rows

FEATURES = Columns(("features",), None, "rows of features", ("label",))
ORDER, PARTNERS = 1000, 1001  # streams of random numbers that the sources of texts do not use


@dataclass(frozen=True)
class FeatureSource:
    """Rows of features.

    Args:
        name: as the user gave it.
        rows: `features`, `(n, f)` numbers with any n, and `label`, memory-mapped.
        width: length of a vector, f.
        longest: largest number of vectors in a row, n.
        label: `(rows,)` int64, equal where the labels are equal.
    """

    name: str
    rows: datasets.Dataset
    width: int
    longest: int
    label: np.ndarray

    def content(self) -> str:
        """Return a hash of the features and labels, and the number of the rows."""
        digest = hashlib.blake2b(self.label.tobytes(), digest_size=8)
        for chunk in self.rows.data.column("features").chunks:
            digest.update(chunk.value_lengths().to_numpy().tobytes() + chunk.flatten().flatten().to_numpy().tobytes())
        return f"{len(self.rows)} rows with the hash {digest.hexdigest()}"

    def features(self, row: int) -> np.ndarray:
        """Return the features of a row, `(n, f)` float32."""
        return np.array(self.rows[row]["features"], dtype=np.float32)


def read_features(name: str, longest: int) -> FeatureSource:
    """Open a file or folder, Parquet or JSON lines, with the columns `features` and `label`.

    The features of a row are a list of n vectors, such as the patches of an image or the frames of a recording, or a
    single vector; all vectors have the same length. Labels are integers or texts, and each occurs at least twice.

    Args:
        name: the path.
        longest: most vectors of a row: the context of the model.

    Returns:
        The rows.

    Raises:
        UserError: the file cannot be read or is not as described; names the file, row and column.
    """
    if not Path(name).exists():
        raise UserError(f"{name}: no such file or folder; give rows with {FEATURES}")
    files = data_files(Path(name))
    try:
        rows = datasets.Dataset.from_generator(
            _checked_rows,
            features=datasets.Features(
                {"features": datasets.List(datasets.List(datasets.Value("float32"))), "label": datasets.Value("string")}
            ),
            gen_kwargs={
                "paths": [str(file.absolute()) for file in files],
                "longest": longest,
                "versions": (code_hash(__name__, "training.data.sources", "common.jsonl"), *content_hashes(files)),
            },
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    names, label, counts = np.unique(rows.with_format("numpy")["label"][:], return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise UserError(f"{name}: every label is {str(names[0])!r}, which leaves nothing to tell apart")
    if counts.min() < 2:
        row = int(np.flatnonzero(label == counts.argmin())[0])
        raise UserError(
            f"{name}: the label {str(names[counts.argmin()])!r} is in row {row + 1} alone; give each label two rows or "
            "more, of which one is the positive of the other"
        )
    lengths = pyarrow.compute.list_value_length(rows.data.column("features"))
    return FeatureSource(
        name, rows, len(rows[0]["features"][0]), pyarrow.compute.max(lengths).as_py(), label.astype(np.int64)
    )


def _checked_rows(paths: list[str], longest: int, versions: object) -> Iterator[dict[str, Any]]:
    """Yield the rows of all files; `versions` only is a part of the key of the cache."""
    width = None
    for path in paths:
        for number, row in _parquet_rows(path) if path.endswith(PARQUET_SUFFIX) else json_rows(Path(path), FEATURES):
            for column in ("features", "label"):
                if column not in row:
                    raise UserError(f"{path}, row {number}: the column {column} is missing")
            check_class(path, number, "label", row["label"])
            features = _vectors(path, number, row["features"])
            width = width or features.shape[1]
            complaint = None
            if width < 2:
                complaint = "has vectors of a single number; give them two or more"
            elif features.shape[1] != width:
                complaint = f"has vectors of {features.shape[1]} numbers, the rows before it of {width}"
            elif len(features) > longest:
                complaint = f"has {len(features)} vectors, more than the model's context of {longest}"
            elif not np.isfinite(features).all():
                complaint = "holds a number that is not finite"
            if complaint:
                raise UserError(f"{path}, row {number}: features {complaint}")
            yield {"features": features, "label": str(row["label"])}


def _parquet_rows(path: str) -> Iterator[tuple[int, dict]]:
    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = [column for column in ("features", "label") if column in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(batch_size=64, columns=columns):
            for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020 (goes on counting)
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not readable Parquet: {one_line(error)}") from None
    if not number:
        raise UserError(f"{path}: holds no rows; give rows with {FEATURES}")


def _vectors(path: str, number: int, value: object) -> np.ndarray:
    """Return the features of a row as `(n, f)`, n and f at least 1."""
    try:
        features = np.array(value, dtype=np.float32)
    except (TypeError, ValueError):
        features = np.empty((), dtype=np.float32)
    if features.ndim == 1:
        features = features[None]
    if features.ndim != 2 or not features.size:
        raise UserError(
            f"{path}, row {number}: features are no list of vectors of the same length, nor a single vector of numbers"
        )
    return features


@dataclass(frozen=True)
class PackedFeatures:
    """Rows of features one after another, in the form in which the model takes packed documents.

    Args:
        features: `(1, T, f)`, the vectors of all rows.
        cu_seq_lens_q: `(n + 1,)` int32, cumulative numbers of vectors, from 0.
        max_length_q: vectors of the longest row.
    """

    features: Tensor
    cu_seq_lens_q: Tensor
    max_length_q: int

    def to(self, device: torch.device) -> "PackedFeatures":
        """Return a copy on a device."""
        return replace(
            self,
            features=self.features.to(device, non_blocking=True),
            cu_seq_lens_q=self.cu_seq_lens_q.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class FeatureBatch:
    """One process's share of a batch.

    Args:
        chunks: the packed rows.
        label: `(rows,)` int64.
        seed: random seed for the forward pass.
    """

    chunks: list[PackedFeatures]
    label: Tensor
    seed: int

    def to(self, device: torch.device) -> "FeatureBatch":
        """Return a copy on a device."""
        return replace(
            self, chunks=[chunk.to(device) for chunk in self.chunks], label=self.label.to(device, non_blocking=True)
        )


class FeatureBatches(Dataset):
    """Batch number `index` of an endless run, for one process: shuffled epochs, each row with another one of its label.

    So every row has a positive in its batch. Batches are a pure function of the seed and the index.

    Args:
        source: the rows.
        batch_size: rows per batch and process, each of which comes with another one of its label.
        batch_tokens: vectors of a packed chunk.
        seed: random seed.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        UserError: there are fewer rows than a batch has.
    """

    def __init__(
        self,
        source: FeatureSource,
        *,
        batch_size: int,
        batch_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.source, self.batch_tokens, self.seed = source, batch_tokens, seed
        self.batch_size, self.rank, self.global_batch_size = batch_size, rank, batch_size * world_size
        if len(source.rows) < self.global_batch_size:
            raise UserError(
                f"{source.name}: has {len(source.rows)} rows, fewer than a batch of {self.global_batch_size} over all "
                "processes; give more data or a smaller --per_device_feature_batch_size"
            )
        self.order = RowOrder(np.arange(len(source.rows))[:, None], self.global_batch_size, seed, ORDER)
        self.rows_of_label: dict[int, list[int]] = defaultdict(list)
        for row, label in enumerate(source.label.tolist()):
            self.rows_of_label[label].append(row)

    def describe(self) -> dict[str, Any]:
        """Return what options stand for, by option: the content of the data, and the batch of all processes."""
        return {
            "feature_data": self.source.content(),
            "per_device_feature_batch_size": f"{self.global_batch_size} over all processes",
        }

    def global_rows(self, index: int) -> list[tuple[int, int]]:
        """Return the rows of all processes of batch `index`, each with another one of its label."""
        generator = np.random.default_rng((self.seed, PARTNERS, index))
        pairs = []
        for row in self.order.batch(index):
            alike = self.rows_of_label[int(self.source.label[row])]
            other = alike[int(generator.integers(len(alike) - 1))]
            pairs.append((row, alike[-1] if other == row else other))
        return pairs

    def __getitem__(self, index: int) -> FeatureBatch:
        own = self.global_rows(index)[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        seed = np.random.SeedSequence((self.seed, PARTNERS, index, self.rank)).generate_state(1, np.uint64)
        return self._collate([row for pair in own for row in pair], int(seed[0] >> 1))

    def heaviest(self) -> FeatureBatch:
        """Return a batch that takes at least as much memory as any of the run: the longest rows."""
        lengths = pyarrow.compute.list_value_length(self.source.rows.data.column("features"))
        longest = pyarrow.compute.array_sort_indices(lengths.combine_chunks(), order="descending").to_pylist()
        return self._collate((longest * 2)[: 2 * self.batch_size], 0)

    def _collate(self, rows: list[int], seed: int) -> FeatureBatch:
        features = list(map(self.source.features, rows))
        chunks = budget_batches([len(vectors) for vectors in features], self.batch_tokens, longest_first=False)
        packed = [_pack([features[number] for number in chunk]) for chunk in chunks]
        return FeatureBatch(packed, torch.from_numpy(self.source.label[rows]), seed)


def _pack(rows: list[np.ndarray]) -> PackedFeatures:
    lengths = [len(features) for features in rows]
    return PackedFeatures(torch.from_numpy(np.concatenate(rows))[None], cumulative_lengths(lengths), max(lengths))
