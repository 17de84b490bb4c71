"""Vectors of the texts by other models, computed once and kept on disk: what a student learns from."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, wait_for_everyone
from torch import Tensor

from common.errors import UserError
from common.model_spec import ModelSpec
from common.precision import resolve_precision
from common.text_vectors import PromptType, cache_keys, stream
from common.vector_cache import VectorCache
from training.data.pair_batches import PairBatch
from training.data.sources import Source
from training.engine.distributed import own_share

PARAGRAPH_VECTOR = "paragraph-vector:"


class Teacher:
    """A model whose vectors are read from a cache, once all of them are there.

    A vector is kept by what it depends on: the teacher's files, its length and precision, its prompts, and the text.
    Another teacher in the same file is therefore no harm, and a run that was stopped goes on with what is missing.

    Attributes:
        width: of a vector.
        identity: what the vectors depend on beside the texts.
        window: tokens that the teacher reads of a text; None: all of them.
        shares: of each source that was read, by its name: how many of its texts the teacher reads to their end.
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
        """Args:
        option: of the script, for its complaints.
        name: a folder or Hub id, `truncate:PATH:N`, `chunk-mean:PATH:N`, or `paragraph-vector:FOLDER`.
        cache: the file of the vectors.
        batch_tokens: token budget of a forward pass.
        normalize: vectors are read at unit length; otherwise as long as the model makes them.
        precision: `float32`, `bfloat16`, or `auto`: bfloat16 where it is fast.

        Raises:
            UserError: there is no such teacher, or what loads it is not installed.
        """
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
        """Compute what the cache does not hold yet of the first column of all sources, and let go of the model.

        The processes share the texts out; none has finished before all of them have.

        Raises:
            UserError: the file is no such cache, or the disk is full.
        """
        cache = VectorCache(self.cache)
        for source in sources:
            rows = source.rows.select(own_share(len(source.rows)))
            texts: Any = rows[source.columns[0]]  # read from the disk as they are needed
            inside = 0
            for _, matrices in stream(texts, self._rows, self._rows.kind, cache, f"--{self.option}"):
                inside += int(self._inside(np.concatenate(matrices)[:, -1]).sum())
            self.shares[source.name] = sum(gather_object([inside])) / len(source.rows)
        self._rows.encoder = None
        wait_for_everyone()

    def read(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Vectors of the first texts of a batch, float32 `(n, t)`, and whether the teacher reads each to its end,
        `(n,)`.

        Raises:
            UserError: the cache does not hold them: somebody has removed it.
        """
        assert batch.texts is not None
        keys = cache_keys(batch.texts[0], self._rows, self._rows.kind)
        # Opened anew: SQLite forbids that a process uses what it opened before a fork.
        rows = VectorCache(self.cache).rows(keys)
        vectors, tokens = torch.from_numpy(rows[:, :-1]), rows[:, -1]
        return (F.normalize(vectors, dim=-1) if self.normalize else vectors), torch.from_numpy(self._inside(tokens))

    def _inside(self, tokens: np.ndarray) -> np.ndarray:
        """Which texts of so many tokens the teacher reads to their end, `(n,)`."""
        return np.full(len(tokens), True) if self.window is None else tokens <= self.window


class _Rows:
    """An encoder that gives one row a text: its vector, and behind it how many tokens the text has.

    Attributes:
        kind: whether the texts are queries or documents.
        chunks: a vector is a sum over chunks, of which the direction counts.
    """

    def __init__(self, encoder: Any, kind: PromptType, window: int | None, chunks: bool) -> None:
        self.encoder, self.kind, self.window, self.chunks = encoder, kind, window, chunks
        self.dimension, self.batch_tokens, self.prompts = encoder.dimension, encoder.batch_tokens, encoder.prompts
        self.identity = f"{encoder.identity}:with length"

    def __call__(self, texts: list[str], prompt_type: PromptType | None) -> list[np.ndarray]:
        counts = [0] * len(texts)
        if self.window is not None:
            tokenizer = self.encoder.model.tokenizer
            prompt = len(self.encoder.prompt_ids(prompt_type))
            counts = [prompt + len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        matrices = self.encoder(texts, prompt_type)
        return [np.append(m.sum(0), n)[None] for m, n in zip(matrices, counts, strict=True)]


def _load(name: str, batch_tokens: int, precision: str, normalize: bool) -> _Rows:
    if name.startswith(PARAGRAPH_VECTOR):
        from training.teachers.paragraph_vector import ParagraphVector

        return _Rows(ParagraphVector.load(Path(name.removeprefix(PARAGRAPH_VECTOR))), "document", None, False)
    spec = ModelSpec.parse(name, precision=resolve_precision(precision))
    if spec.kind in ("bm25", "chunk-max"):
        raise UserError(
            f"{spec.kind} does not give one vector a text; give a model, truncate:PATH:N or chunk-mean:PATH:N"
        )
    encoder = spec.load_encoder(batch_tokens, False, normalize)
    chunks = spec.kind == "chunk-mean"
    return _Rows(encoder, "document", None if chunks else encoder.max_length, chunks)
