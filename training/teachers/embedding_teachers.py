"""Embedding teachers: models whose vectors of the training texts are computed once and cached on disk."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, wait_for_everyone
from torch import Tensor

from common.encoders.model_spec import ModelSpec
from common.encoders.precision import resolve_precision
from common.encoders.text_vectors import PromptType, cache_keys, stream
from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from common.provenance import code_hash
from modeling_longembed.encoding_tokens_longembed import tokenize_beginnings
from training.data.pairs.batches import PairBatch
from training.data.sources import Source
from training.engine.processes.distributed import own_share
from training.teachers.paragraph_vector import ParagraphVector

PARAGRAPH_VECTOR = "paragraph-vector:"


class Teacher:
    """A model that embeds all training texts before the first step; later its vectors are read from the cache.

    The key of a vector hashes all that it depends on: the teacher's files, its length and precision, its prompts, the
    text, and the code and libraries that compute it. Several teachers can therefore share a file, and a run that was
    stopped computes only what is missing.

    Args:
        option: name of the command-line option, for error messages.
        name: a folder or Hub id, `truncate:PATH:N`, `chunk-mean:PATH:N`, or `paragraph-vector:FOLDER`.
        cache: the file that caches vectors.
        batch_tokens: number of tokens of a forward pass.
        normalize: whether `read` returns unit vectors; otherwise they have the length that the model gives them.
        precision: `float32`, `bfloat16`, or `auto`: bfloat16 where the device is fast at it.

    Raises:
        UserError: there is no such teacher, or the packages that load it are not installed.

    Attributes:
        width: width of a vector.
        identity: the files and settings that the vectors depend on besides the texts.
        window: number of tokens of a text that the teacher reads; None: all of them.
        shares: for each source by name, the share of its texts that fit into the window.
    """

    def __init__(
        self,
        option: str,
        name: str,
        cache: Path,
        *,
        batch_tokens: int,
        normalize: bool = True,
        precision: str = "float32",
    ) -> None:
        self.option, self.name, self.cache, self.normalize = option, name, cache, normalize
        try:
            self._rows = _load(name, batch_tokens, precision, normalize)
        except UserError as error:
            raise UserError(f"--{option} {name}: {str(error).removeprefix(f'--model {name}: ')}") from None
        if self._rows.chunks and not normalize:
            raise UserError(
                f"--{option} {name}: the mean over chunks is a direction without a length; leave out "
                "--no_normalize_teacher"
            )
        self.shares: dict[str, float] = {}
        self.width, self.identity, self.window = self._rows.dimension, self._rows.identity, self._rows.window

    def read_all(self, sources: Iterable[Source]) -> None:
        """Embed the texts of the first column of all sources that are not cached yet, and free the model.

        The processes share the texts, and wait for each other at the end.

        Args:
            sources: the training and the held-out data.

        Raises:
            UserError: the file is not a cache of vectors, or the disk is full.
        """
        for source in sources:
            rows = source.rows.select(own_share(len(source.rows)))
            texts: Any = rows[source.columns[0]]  # a column that is read from disk as needed
            inside = self.fill(texts)
            self.shares[source.name] = sum(gather_object([inside])) / len(source.rows)
        self._rows.encoder = None
        wait_for_everyone()

    def fill(self, texts: Sequence[str], what: str = "texts") -> int:
        """Embed texts that are not cached yet.

        Args:
            texts: any sequence, also a column of a table on disk.
            what: what they are, for the progress bar.

        Returns:
            How many of them fit into the window.

        Raises:
            UserError: the file is not a cache of vectors, or the disk is full.
        """
        inside, label = 0, f"--{self.option}, {what}"
        for _, matrices in stream(texts, self._rows, self._rows.kind, VectorCache(self.cache), label):
            inside += int(self._inside(np.concatenate(matrices)[:, -1]).sum())
        return inside

    def read(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Read the vectors of the first column of a batch.

        Args:
            batch: a batch that holds its texts.

        Returns:
            Float32 vectors `(n, t)`, and whether each text fits into the teacher's window, `(n,)`.

        Raises:
            UserError: a vector is no longer in the cache.
        """
        assert batch.texts is not None
        return self.vectors(batch.texts[0])

    def vectors(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Read the vectors of texts that have been embedded.

        Args:
            texts: n texts.

        Returns:
            Float32 vectors `(n, t)`, and whether each text fits into the teacher's window, `(n,)`.

        Raises:
            UserError: a vector is no longer in the cache.
        """
        if not texts:
            return torch.empty(0, self.width), torch.empty(0, dtype=torch.bool)
        keys = cache_keys(texts, self._rows, self._rows.kind)
        # Opened for each batch: a process must not use a SQLite connection that was opened before a fork.
        rows = VectorCache(self.cache).rows(keys)
        vectors, tokens = torch.from_numpy(rows[:, :-1]), rows[:, -1]
        return (F.normalize(vectors, dim=-1) if self.normalize else vectors), torch.from_numpy(self._inside(tokens))

    def _inside(self, tokens: np.ndarray) -> np.ndarray:
        """Return whether texts of these numbers of tokens fit into the window, `(n,)`."""
        return np.full(len(tokens), True) if self.window is None else tokens <= self.window


class _Rows:
    """An encoder that returns one row for each text: its vector, followed by its number of tokens.

    Of a text that is longer than the window, the number is one of more tokens than the window has.

    Attributes:
        kind: whether the texts are queries or documents.
        chunks: whether a vector is a sum over chunks, of which only the direction has a meaning.
    """

    def __init__(self, encoder: Any, kind: PromptType, window: int | None, chunks: bool) -> None:
        self.encoder, self.kind, self.window, self.chunks = encoder, kind, window, chunks
        self.dimension, self.batch_tokens, self.prompts = encoder.dimension, encoder.batch_tokens, encoder.prompts
        self.identity = f"{encoder.identity}:with length"
        self.computed_by = encoder.computed_by | {"teacher": code_hash("training.teachers.embedding_teachers")}

    def __call__(self, texts: list[str], prompt_type: PromptType | None) -> list[np.ndarray]:
        counts = [0] * len(texts)
        if self.window is not None:
            tokenizer = self.encoder.model.tokenizer
            prompt = len(self.encoder.prompt_ids(prompt_type))
            beginnings = tokenize_beginnings(tokenizer, texts, max(1, self.window - prompt))
            counts = [prompt + len(ids) for ids in beginnings]
        matrices = self.encoder(texts, prompt_type)
        return [np.append(m.sum(0), n)[None] for m, n in zip(matrices, counts, strict=True)]


def _load(name: str, batch_tokens: int, precision: str, normalize: bool) -> _Rows:
    if name.startswith(PARAGRAPH_VECTOR):
        return _Rows(ParagraphVector.load(Path(name.removeprefix(PARAGRAPH_VECTOR))), "document", None, False)
    spec = ModelSpec.parse(name, precision=resolve_precision(precision))
    if not spec.has_one_vector:
        raise UserError(f"{name} does not give one vector a text; give a model, truncate:PATH:N or chunk-mean:PATH:N")
    encoder = spec.load_encoder(batch_tokens, False, normalize)
    chunks = spec.kind == "chunk-mean"
    return _Rows(encoder, "document", None if chunks else encoder.max_length, chunks)
