"""Models and baselines behind MTEB's interfaces: everything that `--model` may name (common/encoders/model_spec.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from mteb._create_dataloaders import create_dataloader
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.similarity_functions import cos_sim
from mteb.types import PromptType

from common.bm25 import BM25Index
from common.encoders.encoder import ChunkEncoder, Encoder
from common.encoders.model_spec import ModelSpec
from common.encoders.text_vectors import stream, vectors_of
from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from eval.models.quantization import quantize


@dataclass(frozen=True)
class EvaluatedModel(ModelSpec):
    """One value of `--model` with the settings of its evaluation.

    Attributes:
        vectors: storage of the document vectors: `float32`, `int8` or `binary`.
    """

    vectors: str = "float32"

    def storing(self, vectors: str) -> "EvaluatedModel":
        """Return the same model with another storage of its document vectors.

        Args:
            vectors: `float32`, `int8` or `binary`.

        Raises:
            UserError: the model has one vector per chunk, which cannot be stored so.
        """
        if vectors != "float32" and self.kind == "chunk-max":
            raise UserError(f"--vectors {vectors}: chunk-max has a vector a chunk; leave it out, or use chunk-mean")
        return replace(self, vectors=vectors)

    @cached_property
    def meta(self) -> ModelMeta:
        """MTEB's description of the model, from its files alone.

        The name, the revision and the settings decide in which folder its results lie.
        """
        if self.folder is None:
            name, revision, parameters = "baseline/bm25s", version("bm25s"), 0
        else:
            suffix = "" if self.kind == "model" else f"-{self.kind}-{self.tokens}"
            name, revision, parameters = self.folder.name + suffix, self.folder.revision, self.folder.parameters
        settings: dict[str, Any] = {}
        if self.kind == "model" and self.tokens is not None:
            settings["max_length"] = self.tokens
        if self.precision != "float32" and self.kind != "bm25":
            settings["precision"] = self.precision
        if self.vectors != "float32" and self.kind != "bm25":
            settings["vectors"] = self.vectors
        return ModelMeta(
            loader=None,
            name=name,
            revision=revision,
            release_date=None,
            languages=None,
            n_parameters=parameters,
            memory_usage_mb=parameters * 4 / 2**20,
            max_tokens=self.tokens if self.kind == "truncate" else None,
            embed_dim=None,
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=[] if self.folder is None else ["Sentence Transformers", "PyTorch"],
            similarity_fn_name=ScoringFunction("cosine") if self.folder else None,
            use_instructions=False,
            training_datasets=None,
            adapted_from=self.folder.name if self.folder and self.kind != "model" else None,
            model_type=["sparse"] if self.kind == "bm25" else ["dense"],
            experiment_kwargs=settings or None,
        )

    def load(self, cache: VectorCache, batch_tokens: int, trust_remote_code: bool) -> Any:
        """Load the model for `mteb.evaluate`.

        Args:
            cache: of vectors.
            batch_tokens: tokens in one forward pass.
            trust_remote_code: whether code that comes with a model may run.

        Returns:
            A model behind MTEB's encoder or search protocol.

        Raises:
            UserError: the model does not load, or its `tokens` are more than its context.
        """
        if self.folder is None:
            return BM25(self.meta)
        encoder = self.load_encoder(batch_tokens, trust_remote_code)
        meta = self.meta.model_copy(
            update={
                "embed_dim": encoder.dimension,
                "max_tokens": self.meta.max_tokens or (encoder.max_length if self.kind == "model" else None),
                "use_instructions": any(encoder.model.prompts.values()),
                "similarity_fn_name": ScoringFunction(
                    "cosine" if isinstance(encoder, ChunkEncoder) else encoder.model.similarity_fn_name
                ),
            }
        )
        if self.kind == "chunk-max":
            return ChunkMax(encoder, cache, meta)
        return OneVector(encoder, cache, meta, self.vectors)


class OneVector(AbsEncoder):
    """A model with one vector per text, behind MTEB's encoder protocol.

    The vector is the sum of the encoder's rows: a model has one row, and the rows of chunk-mean sum up to the direction
    of the token-weighted mean of its chunks. Vectors are compared by cosine, unless the model has another similarity.
    Document vectors may be stored in fewer bits.

    Args:
        encoder: computes the rows.
        cache: of vectors.
        meta: MTEB's description of the model.
        vectors: storage of the document vectors: `float32`, `int8` or `binary`.
    """

    def __init__(self, encoder: Encoder, cache: VectorCache, meta: ModelMeta, vectors: str = "float32"):
        self.encoder, self.cache, self.mteb_model_meta, self.vectors = encoder, cache, meta, vectors

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **kwargs: Any) -> np.ndarray:
        """Return vectors `(n, d)` of the n texts of MTEB's data loader."""
        kind = prompt_type.value if prompt_type else None
        vectors = vectors_of(inputs.dataset["text"], self.encoder, kind, self.cache)
        if self.vectors == "float32" or prompt_type == PromptType.query:
            return vectors
        if isinstance(self.encoder, ChunkEncoder):  # their norms are numbers of tokens, which are not stored
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
        return quantize(vectors, self.vectors)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return scores `(n, m)` of vectors `(n, d)` against `(m, d)`."""
        compare = cos_sim if isinstance(self.encoder, ChunkEncoder) else self.encoder.model.similarity
        return compare(embeddings1, embeddings2)


class ChunkMax:
    """A model that scores a document by its best chunk (MaxP, Dai & Callan 2019), behind MTEB's search protocol.

    Args:
        encoder: gives one row for each chunk.
        cache: of vectors.
        meta: MTEB's description of the model.
    """

    def __init__(self, encoder: Encoder, cache: VectorCache, meta: ModelMeta):
        self.encoder, self.cache, self.mteb_model_meta = encoder, cache, meta

    def index(self, corpus: Any, **kwargs: Any) -> None:
        """Keep the corpus; it is encoded during the search, so that its chunk vectors are never all in memory."""
        self.corpus = corpus

    def search(self, queries: Any, *, task_metadata: Any, top_k: int, **kwargs: Any) -> dict[str, dict[str, float]]:
        """Search the corpus, as MTEB asks for it.

        Args:
            queries: MTEB's data set of queries.
            task_metadata: MTEB's description of the task.
            top_k: number of documents for each query.

        Returns:
            Query id -> id of each of the `top_k` best documents -> score.
        """
        query_texts = _texts(queries, task_metadata, PromptType.query)
        vectors = torch.nn.functional.normalize(
            torch.from_numpy(vectors_of(query_texts, self.encoder, "query", self.cache))
        )
        best = torch.full((len(vectors), 0), -torch.inf)
        indices = torch.zeros((len(vectors), 0), dtype=torch.long)
        texts = _texts(self.corpus, task_metadata, PromptType.document)
        for window, matrices in stream(texts, self.encoder, "document", self.cache, "documents"):
            chunks = torch.nn.functional.normalize(torch.from_numpy(np.concatenate(matrices)))
            nearest = [s.amax(1) for s in (vectors @ chunks.T).split([len(m) for m in matrices], dim=1)]
            best = torch.cat([best, torch.stack(nearest, dim=1)], dim=1)
            indices = torch.cat([indices, torch.tensor(window).expand(len(vectors), -1)], dim=1)
            best, order = best.topk(min(top_k, best.shape[1]), dim=1)
            indices = indices.gather(1, order)
        return _by_id(queries, self.corpus, indices, best)


class BM25:
    """`BM25Index` behind MTEB's search protocol.

    Args:
        meta: MTEB's description of the model.
    """

    def __init__(self, meta: ModelMeta):
        self.mteb_model_meta = meta

    def index(self, corpus: Any, *, task_metadata: Any, **kwargs: Any) -> None:
        """Index the words of the corpus."""
        self.corpus = corpus
        self.words = BM25Index(_texts(corpus, task_metadata, PromptType.document))

    def search(self, queries: Any, *, task_metadata: Any, top_k: int, **kwargs: Any) -> dict[str, dict[str, float]]:
        """Search the corpus, as MTEB asks for it.

        Args:
            queries: MTEB's data set of queries.
            task_metadata: MTEB's description of the task.
            top_k: number of documents for each query.

        Returns:
            Query id -> id of each of the `top_k` best documents -> score.
        """
        scores, indices = self.words.search(_texts(queries, task_metadata, PromptType.query), top_k)
        return _by_id(queries, self.corpus, torch.from_numpy(indices), torch.from_numpy(scores))


def _texts(dataset: Any, task_metadata: Any, prompt_type: Any) -> Sequence[str]:
    """Return the texts as MTEB gives them to an encoder (title first, stripped), so that all systems read the same."""
    loader: Any = create_dataloader(dataset, task_metadata=task_metadata, prompt_type=prompt_type)
    return loader.dataset["text"]


def _by_id(queries: Any, corpus: Any, indices: torch.Tensor, scores: torch.Tensor) -> dict[str, dict[str, float]]:
    """Convert indices and scores, both `(queries, k)`, to query id -> document id -> score."""
    ids = list(corpus["id"])
    return {
        query: {ids[i]: score for i, score in zip(row, values, strict=True)}
        for query, row, values in zip(queries["id"], indices.tolist(), scores.tolist(), strict=True)
    }
