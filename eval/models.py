"""What `--model` may name, each as a model that MTEB can judge: models, and what a user would pick instead.

| name | what |
|---|---|
| `PATH` or Hub id | a model: one of ours, or any that sentence-transformers loads |
| `truncate:PATH:N` | the same, reading the first N tokens of every text |
| `chunk-mean:PATH:N` | one vector: the token-weighted mean over chunks of N tokens (special tokens included) |
| `chunk-max:PATH:N` | one vector a chunk; a document's score is that of its best chunk |
| `bm25` | word statistics: Lucene's BM25 with k1 = 1.5, b = 0.75, English stop words, no stemming |

Queries are treated like documents, but for chunk-max, where a query is one vector: the mean over its chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import bm25s
import numpy as np
import torch
from mteb._create_dataloaders import create_dataloader
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.similarity_functions import cos_sim
from mteb.types import PromptType

from common.errors import UserError
from eval.encoders import ChunkEncoder, Encoder, ModelFolder, stream
from eval.vector_cache import VectorCache

KINDS = ("model", "truncate", "chunk-mean", "chunk-max", "bm25")


@dataclass(frozen=True)
class ModelSpec:
    """One value of `--model`, parsed and found, but not loaded.

    Attributes:
        kind: one of `KINDS`.
        folder: the model's files; None for `bm25`.
        tokens: N of `truncate` and the chunk baselines; for a model the `--max_length`; None: what the model is set to.
        precision: `float32` or `bfloat16`.
    """

    kind: str
    folder: ModelFolder | None = None
    tokens: int | None = None
    precision: str = "float32"

    @classmethod
    def parse(cls, text: str, max_length: int | None = None, precision: str = "float32") -> "ModelSpec":
        """Read one value of `--model`.

        Args:
            text: see the module's table.
            max_length: tokens that a model reads; baselines say theirs themselves.
            precision: `float32` or `bfloat16`.

        Raises:
            UserError: a form that the table does not have, or a model that is not there.
        """
        if text == "bm25":
            return cls("bm25")
        kind, _, rest = text.partition(":")
        if kind not in ("truncate", "chunk-mean", "chunk-max"):
            return cls("model", ModelFolder.find(text), max_length, precision)
        path, _, tokens = rest.rpartition(":")
        if not path or not tokens.isdigit() or int(tokens) < 8:
            raise UserError(f"--model {text}: write {kind}:PATH:N with N tokens, at least 8, such as {kind}:PATH:256")
        return cls(kind, ModelFolder.find(path), int(tokens), precision)

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

    def load_encoder(self, batch_tokens: int, trust_remote_code: bool) -> Encoder:
        """What makes vectors of texts; `bm25` has no such thing.

        Raises:
            UserError: it does not load, or `tokens` is more than its context.
        """
        assert self.folder is not None
        kind = ChunkEncoder if self.kind.startswith("chunk") else Encoder
        return kind(self.folder, self.tokens, self.precision, batch_tokens, trust_remote_code)

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
        return OneVector(encoder, cache, meta)


class OneVector(AbsEncoder):
    """MTEB's encoder protocol for everything that gives one vector a text: the sum of its rows, up to length.

    A model has one row; for chunk-mean the sum of the chunks' rows has the direction of their token-weighted mean.
    Vectors are compared by cosine, except those of a model that says otherwise.
    """

    def __init__(self, encoder: Encoder, cache: VectorCache, meta: ModelMeta):
        self.encoder, self.cache, self.mteb_model_meta = encoder, cache, meta

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **kwargs: Any) -> np.ndarray:
        """Vectors (n, d) of the n texts of MTEB's data loader."""
        return _vectors(inputs.dataset["text"], self.encoder, prompt_type, self.cache)

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
            torch.from_numpy(_vectors(query_texts, self.encoder, PromptType.query, self.cache))
        )
        best = torch.full((len(vectors), 0), -torch.inf)
        indices = torch.zeros((len(vectors), 0), dtype=torch.long)
        texts = _texts(self.corpus, task_metadata, PromptType.document)
        for window, matrices in stream(texts, self.encoder, PromptType.document, self.cache, "documents"):
            chunks = torch.nn.functional.normalize(torch.from_numpy(np.concatenate(matrices)))
            nearest = [s.amax(1) for s in (vectors @ chunks.T).split([len(m) for m in matrices], dim=1)]
            best = torch.cat([best, torch.stack(nearest, dim=1)], dim=1)
            indices = torch.cat([indices, torch.tensor(window).expand(len(vectors), -1)], dim=1)
            best, order = best.topk(min(top_k, best.shape[1]), dim=1)
            indices = indices.gather(1, order)
        return _by_id(queries, self.corpus, indices, best)


class BM25:
    """MTEB's search protocol over bm25s (Lù 2024), which computes Lucene's BM25.

    Without stemming, unlike MTEB's own baseline: on long documents stemming loses (MeetingRetrieval 94.9 against 93.3,
    StoryRetrieval 81.6 against 80.3), and a rival is to be met at its best.
    """

    def __init__(self, meta: ModelMeta):
        self.mteb_model_meta = meta

    def index(self, corpus: Any, *, task_metadata: Any, **kwargs: Any) -> None:
        """Count the words of the corpus."""
        self.corpus = corpus
        self.retriever = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        self.retriever.index(bm25s.tokenize(list(_texts(corpus, task_metadata, PromptType.document)), stopwords="en"))

    def search(self, queries: Any, *, task_metadata: Any, top_k: int, **kwargs: Any) -> dict[str, dict[str, float]]:
        """The `top_k` documents of each query with their scores."""
        words = bm25s.tokenize(list(_texts(queries, task_metadata, PromptType.query)), stopwords="en")
        indices, scores = self.retriever.retrieve(words, k=min(top_k, len(self.corpus)))
        return _by_id(queries, self.corpus, torch.from_numpy(indices.astype(np.int64)), torch.from_numpy(scores))


def _texts(dataset: Any, task_metadata: Any, prompt_type: Any) -> Sequence[str]:
    """The texts as MTEB hands them to an encoder (title in front, stripped), so that all systems read the same."""
    loader: Any = create_dataloader(dataset, task_metadata=task_metadata, prompt_type=prompt_type)
    return loader.dataset["text"]


def _vectors(texts: Sequence[str], encoder: Encoder, prompt_type: Any, cache: VectorCache) -> np.ndarray:
    """Sums of rows (n, d) of n texts."""
    vectors = np.empty((len(texts), encoder.dimension), np.float32)
    label = "queries" if prompt_type == PromptType.query else "documents"
    for window, matrices in stream(texts, encoder, prompt_type, cache, label):
        vectors[window] = [matrix.sum(0) for matrix in matrices]
    return vectors


def _by_id(queries: Any, corpus: Any, indices: torch.Tensor, scores: torch.Tensor) -> dict[str, dict[str, float]]:
    """Indices and scores, both (queries, k), as MTEB wants them."""
    ids = list(corpus["id"])
    return {
        query: {ids[i]: score for i, score in zip(row, values, strict=True)}
        for query, row, values in zip(queries["id"], indices.tolist(), scores.tolist(), strict=True)
    }
