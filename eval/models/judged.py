"""What `--model` may name (common/model_spec.py), each as a model that MTEB can judge."""

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
from common.encoders import ChunkEncoder, Encoder
from common.errors import UserError
from common.model_spec import ModelSpec
from common.text_vectors import stream, vectors_of
from common.vector_cache import VectorCache
from eval.models.quantization import stored


@dataclass(frozen=True)
class JudgedModel(ModelSpec):
    """One value of `--model`, as MTEB knows it and loads it.

    Attributes:
        vectors: how vectors of documents are stored: `float32`, `int8` or `binary`.
    """

    vectors: str = "float32"

    def storing(self, vectors: str) -> "JudgedModel":
        """The same with vectors of documents in other bits.

        Raises:
            UserError: it has a vector a chunk.
        """
        if vectors != "float32" and self.kind == "chunk-max":
            raise UserError(f"--vectors {vectors}: chunk-max has a vector a chunk; leave it out, or use chunk-mean")
        return replace(self, vectors=vectors)

    @cached_property
    def meta(self) -> ModelMeta:
        """MTEB's description of the model, from its files alone; name, revision and settings say where results lie."""
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
        """The model for `mteb.evaluate`.

        Raises:
            UserError: it does not load, or `tokens` is more than its context.
        """
        if self.folder is None:
            return BM25(self.meta)
        encoder = self.load_encoder(batch_tokens, trust_remote_code)
        meta = self.meta.model_copy(
            update={
                "embed_dim": encoder.dimension,
                "max_tokens": self.meta.max_tokens or (encoder.max_length if self.kind == "model" else None),
                "use_instructions": any(encoder.model.prompts.values()),
            }
        )
        if self.kind == "chunk-max":
            return ChunkMax(encoder, cache, meta)
        return OneVector(encoder, cache, meta, self.vectors)


class OneVector(AbsEncoder):
    """MTEB's encoder protocol for everything that gives one vector a text: the sum of its rows, up to length.

    A model has one row; for chunk-mean the sum of the chunks' rows has the direction of their token-weighted mean.
    Vectors are compared by cosine, except those of a model that says otherwise. All but those of queries may be stored
    in fewer bits.
    """

    def __init__(self, encoder: Encoder, cache: VectorCache, meta: ModelMeta, vectors: str = "float32"):
        self.encoder, self.cache, self.mteb_model_meta, self.vectors = encoder, cache, meta, vectors

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **kwargs: Any) -> np.ndarray:
        """Vectors (n, d) of the n texts of MTEB's data loader."""
        kind = prompt_type.value if prompt_type else None
        vectors = vectors_of(inputs.dataset["text"], self.encoder, kind, self.cache)
        if self.vectors == "float32" or prompt_type == PromptType.query:
            return vectors
        if isinstance(self.encoder, ChunkEncoder):  # their lengths are numbers of tokens, which no store would keep
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
        return stored(vectors, self.vectors)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Scores (n, m) of vectors (n, d) against (m, d)."""
        compare = cos_sim if isinstance(self.encoder, ChunkEncoder) else self.encoder.model.similarity
        return compare(embeddings1, embeddings2)


class ChunkMax:
    """MTEB's search protocol where a document is as near to a query as its nearest chunk (MaxP, Dai & Callan 2019)."""

    def __init__(self, encoder: Encoder, cache: VectorCache, meta: ModelMeta):
        self.encoder, self.cache, self.mteb_model_meta = encoder, cache, meta

    def index(self, corpus: Any, **kwargs: Any) -> None:
        """Remember the corpus; it is encoded as it is searched, so that its chunk vectors are never all in memory."""
        self.corpus = corpus

    def search(self, queries: Any, *, task_metadata: Any, top_k: int, **kwargs: Any) -> dict[str, dict[str, float]]:
        """The `top_k` documents of each query with their scores."""
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
    """MTEB's search protocol over `BM25Index`."""

    def __init__(self, meta: ModelMeta):
        self.mteb_model_meta = meta

    def index(self, corpus: Any, *, task_metadata: Any, **kwargs: Any) -> None:
        """Count the words of the corpus."""
        self.corpus = corpus
        self.words = BM25Index(_texts(corpus, task_metadata, PromptType.document))

    def search(self, queries: Any, *, task_metadata: Any, top_k: int, **kwargs: Any) -> dict[str, dict[str, float]]:
        """The `top_k` documents of each query with their scores."""
        scores, indices = self.words.search(_texts(queries, task_metadata, PromptType.query), top_k)
        return _by_id(queries, self.corpus, torch.from_numpy(indices), torch.from_numpy(scores))


def _texts(dataset: Any, task_metadata: Any, prompt_type: Any) -> Sequence[str]:
    """The texts as MTEB hands them to an encoder (title in front, stripped), so that all systems read the same."""
    loader: Any = create_dataloader(dataset, task_metadata=task_metadata, prompt_type=prompt_type)
    return loader.dataset["text"]


def _by_id(queries: Any, corpus: Any, indices: torch.Tensor, scores: torch.Tensor) -> dict[str, dict[str, float]]:
    """Indices and scores, both (queries, k), as MTEB wants them."""
    ids = list(corpus["id"])
    return {
        query: {ids[i]: score for i, score in zip(row, values, strict=True)}
        for query, row, values in zip(queries["id"], indices.tolist(), scores.tolist(), strict=True)
    }
