"""Models and baselines behind MTEB's interfaces: everything that `--model` may name (common/encoders/model_spec.py)."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.similarity_functions import cos_sim
from mteb.types import PromptType

from common.encoders.encoder import ChunkEncoder, Encoder
from common.encoders.longembed_encoder import LongEmbedTokenEncoder
from common.encoders.model_spec import ModelSpec
from common.encoders.text_vectors import keep, stream, vectors_of
from common.encoders.token_store import TokenStore
from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from eval.models.costs import Costs
from eval.models.quantization import quantize
from eval.models.search import ChunkScores, HybridScores, Scorer, Search, TokenScores, WordScores


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
            UserError: the model has several vectors per document, which are not stored so.
        """
        if vectors != "float32" and self.kind == "tokens":
            raise UserError(f"--vectors {vectors}: of token vectors, write PATH@tokens:precision=...")
        if vectors != "float32" and self.kind in ("chunk-max", "chunks"):
            raise UserError(f"--vectors {vectors}: {self.kind} has a vector a chunk; leave it out, or use chunk-mean")
        return replace(self, vectors=vectors)

    @cached_property
    def meta(self) -> ModelMeta:
        """MTEB's description of the model, from its files alone.

        The name, the revision and the settings decide in which folder its results lie.
        """
        if self.folder is None:
            name, revision, parameters = "baseline/bm25s", version("bm25s"), 0
        else:
            own = self.kind in ("model", "tokens")
            suffix = "" if own else f"-{'late-' if self.kind == 'chunks' else ''}{self.kind}-{self.tokens}"
            name, revision, parameters = self.folder.name + suffix, self.folder.revision, self.folder.parameters
        settings: dict[str, Any] = {}
        if self.kind in ("model", "tokens") and self.tokens is not None:
            settings["max_length"] = self.tokens
        if self.token_settings is not None:
            settings["output"] = "tokens"
            settings |= {f"token_{name}": value for name, value in self.token_settings.differences.items()}
        if self.hybrid is not None:
            settings["hybrid_weight"] = self.hybrid
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
            similarity_fn_name=self._similarity,
            use_instructions=False,
            training_datasets=None,
            adapted_from=self.folder.name if self.folder and self.kind != "model" else None,
            model_type=self._types,
            experiment_kwargs=settings or None,
        )

    @property
    def _similarity(self) -> ScoringFunction | None:
        if self.folder is None or self.hybrid is not None:
            return None
        return ScoringFunction("MaxSim" if self.kind == "tokens" else "cosine")

    @property
    def _types(self) -> list[Any]:
        if self.hybrid is not None:
            return ["hybrid"]
        return [{"bm25": "sparse", "tokens": "late-interaction"}.get(self.kind, "dense")]

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
        loaded = replace(self, hybrid=None)._load(cache, batch_tokens, trust_remote_code)
        if self.hybrid is None:
            return loaded
        scorer: Scorer = loaded.scorer if isinstance(loaded, Search) else loaded
        details = {
            name: getattr(loaded.mteb_model_meta, name) for name in ("embed_dim", "max_tokens", "use_instructions")
        }
        return Search(HybridScores(scorer, WordScores(), self.hybrid), self.meta.model_copy(update=details))

    def _load(self, cache: VectorCache, batch_tokens: int, trust_remote_code: bool) -> Any:
        """Load the model itself, as `load` does where it is not combined with BM25."""
        if self.folder is None:
            return Search(WordScores(), self.meta)
        if self.kind == "chunks":
            chunks = self.load_chunk_encoder(batch_tokens)
            return Search(ChunkScores(chunks, cache), self._described(chunks))
        if self.token_settings is not None:
            tokens = self.load_token_encoder(batch_tokens, trust_remote_code)
            if isinstance(tokens, LongEmbedTokenEncoder):
                self._keep_vectors(tokens, cache, trust_remote_code)
            store = TokenStore(cache.path.parent / "tokens")
            return Search(TokenScores(tokens, self.token_settings, cache, store), self._described(tokens))
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
            return Search(ChunkScores(encoder, cache), meta)
        return OneVector(encoder, cache, meta, self.vectors)

    def _keep_vectors(self, tokens: LongEmbedTokenEncoder, cache: VectorCache, trust_remote_code: bool) -> None:
        """Keep the one vectors of documents that are read for their token vectors, so that they are not read again."""
        one_vector = replace(self, kind="model", token_settings=None)
        with suppress(UserError):  # a folder that has no one vector for sentence-transformers still has token vectors
            encoder = one_vector.load_encoder(tokens.batch_tokens, trust_remote_code)
            if tokens.gives_vectors_of(encoder):
                tokens.keep_vectors = partial(keep, encoder=encoder, cache=cache)

    def _described(self, encoder: Any) -> ModelMeta:
        """Return MTEB's description of a model that is loaded as a vector a chunk or a token."""
        details = {
            "embed_dim": encoder.dimension,
            "max_tokens": encoder.max_length,
            "use_instructions": any(encoder.prompts.values()),
        }
        return self.meta.model_copy(update=details)


class OneVector(AbsEncoder, Scorer):
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
        self.costs: dict[str, Costs] = {}
        self._current = Costs()

    def encode(
        self, inputs: Any, *, prompt_type: PromptType | None = None, hf_split: str = "", **kwargs: Any
    ) -> np.ndarray:
        """Encode texts as MTEB asks for it.

        Args:
            inputs: MTEB's data loader of n texts.
            prompt_type: whether they are queries or documents; None if they are neither.
            hf_split: name of the split, under which `costs` has what the search took.

        Returns:
            Vectors `(n, d)`.
        """
        texts = inputs.dataset["text"]
        if prompt_type == PromptType.query:  # a search encodes the queries, then the corpus in parts, each compared
            self._current = self.costs.setdefault(hf_split, Costs())  # several subsets of a split add up
            self._current.queries += len(texts)
        elif prompt_type == PromptType.document:
            self._current.documents += len(texts)
            self._current.bytes += len(texts) * self._bytes_per_document
        return self._encode(texts, prompt_type)

    @property
    def _bytes_per_document(self) -> float:
        return self.encoder.dimension * {"float32": 4, "int8": 1, "binary": 1 / 8}[self.vectors]

    def _encode(self, texts: Sequence[str], prompt_type: PromptType | None) -> np.ndarray:
        kind = prompt_type.value if prompt_type else None
        vectors = vectors_of(texts, self.encoder, kind, self.cache)
        return vectors if prompt_type == PromptType.query else self._stored(vectors)

    def _stored(self, vectors: np.ndarray) -> np.ndarray:
        """Return the vectors of documents `(n, d)` as they are when they have been stored."""
        if self.vectors == "float32":
            return vectors
        if isinstance(self.encoder, ChunkEncoder):  # their norms are numbers of tokens, which are not stored
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
        return quantize(vectors, self.vectors)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return scores `(n, m)` of vectors `(n, d)` against `(m, d)`."""
        compare = cos_sim if isinstance(self.encoder, ChunkEncoder) else self.encoder.model.similarity
        with self._current.comparing():
            return compare(embeddings1, embeddings2)

    def blocks(
        self, queries: Sequence[str], documents: Sequence[str], costs: Costs
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Score documents, block by block; see `Scorer`."""
        self._current = costs
        costs.bytes += len(documents) * self._bytes_per_document
        asked = self._encode(queries, PromptType("query"))
        if self.vectors == "int8":  # the steps of a dimension are those of the whole corpus
            vectors = self._encode(documents, PromptType("document"))
            yield range(len(documents)), torch.as_tensor(self.similarity(asked, vectors))
            return
        for window, matrices in stream(documents, self.encoder, "document", self.cache, "documents"):
            vectors = self._stored(np.stack([matrix.sum(0) for matrix in matrices]))
            yield window, torch.as_tensor(self.similarity(asked, vectors))
