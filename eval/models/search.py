"""Systems that score every document for every query, behind MTEB's search protocol."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from mteb._create_dataloaders import create_dataloader
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType

from common.bm25 import BM25Index
from common.encoders.kept_tokens import KeptTokens, TokenEncoder, packed, query_vectors
from common.encoders.text_vectors import TextEncoder, stream, vectors_of
from common.encoders.token_settings import TokenSettings
from common.encoders.token_store import TokenStore
from common.encoders.vector_cache import VectorCache
from common.provenance import device_kind
from common.score_scaling import min_max_
from eval.models.costs import Costs
from modeling_longembed.output_maxsim_longembed import maxsim


class Scorer(Protocol):
    """What gives the scores of queries and documents."""

    def blocks(
        self, queries: Sequence[str], documents: Sequence[str], costs: Costs
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Score all documents, block by block.

        Args:
            queries: Q texts.
            documents: any sequence of texts, also a column of a table on disk.
            costs: what the documents and the queries take is added to it.

        Yields:
            Indices of n documents, and their scores `(Q, n)`; each document comes once.
        """

    def best(
        self, queries: Sequence[str], documents: Sequence[str], k: int, costs: Costs, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the k largest scores of each query.

        Args:
            queries: Q texts.
            documents: D texts, as in `blocks`.
            k: number of documents for each query.
            costs: what they take is added to it.
            allowed: `(Q, D)` bool, false where a document is no candidate for a query; None: all are.

        Returns:
            Scores, -inf of documents that are no candidates, and indices of documents, both `(Q, min(k, D))`.
        """
        best = torch.full((len(queries), 0), -torch.inf)
        indices = torch.zeros((len(queries), 0), dtype=torch.long)
        for window, scores in self.blocks(queries, documents, costs):
            if allowed is not None:
                scores = scores.where(allowed[:, torch.tensor(window)], -torch.inf)
            best = torch.cat([best, scores], dim=1)
            indices = torch.cat([indices, torch.tensor(window).expand(len(best), -1)], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            indices = indices.gather(1, order)
        return best, indices


class Search:
    """A scorer behind MTEB's search protocol.

    Args:
        scorer: gives the scores.
        meta: MTEB's description of the model.
    """

    def __init__(self, scorer: Scorer, meta: ModelMeta):
        self.scorer, self.mteb_model_meta = scorer, meta
        self.costs: dict[str, Costs] = {}

    def index(self, corpus: Any, **kwargs: Any) -> None:
        """Keep the corpus; it is encoded during the search, so that its vectors are never all in memory."""
        self.corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """Search the corpus, as MTEB asks for it.

        Args:
            queries: MTEB's data set of queries.
            task_metadata: MTEB's description of the task.
            hf_split: name of the split, under which `costs` has what the search took.
            top_k: number of documents for each query.
            top_ranked: query id -> ids of the documents that a reranking task puts in order; None: all are searched.

        Returns:
            Query id -> id of each of the `top_k` best documents -> score.
        """
        query_texts = _texts(queries, task_metadata, PromptType.query)
        texts = _texts(self.corpus, task_metadata, PromptType.document)
        costs = self.costs.setdefault(hf_split, Costs())  # several subsets of a split add up
        costs.documents += len(texts)
        costs.queries += len(query_texts)
        ids = list(self.corpus["id"])
        allowed = None
        if top_ranked is not None:
            places = {name: place for place, name in enumerate(ids)}
            allowed = torch.zeros(len(query_texts), len(ids), dtype=torch.bool)
            for row, query in zip(allowed, queries["id"], strict=True):
                row[[places[name] for name in top_ranked.get(query, ())]] = True
        best, indices = self.scorer.best(query_texts, texts, top_k, costs, allowed)
        return {
            query: {ids[i]: score for i, score in zip(row, values, strict=True) if score > -torch.inf}
            for query, row, values in zip(queries["id"], indices.tolist(), best.tolist(), strict=True)
        }


class ChunkScores(Scorer):
    """The score of a document is the cosine of its best chunk (MaxP, Dai & Callan 2019, arXiv:1905.09217).

    Args:
        encoder: gives one row for each chunk.
        cache: of vectors.
    """

    def __init__(self, encoder: TextEncoder, cache: VectorCache):
        self.encoder, self.cache = encoder, cache

    def blocks(
        self, queries: Sequence[str], documents: Sequence[str], costs: Costs
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Score documents, block by block; see `Scorer`."""
        normalize = torch.nn.functional.normalize
        vectors = normalize(torch.from_numpy(vectors_of(queries, self.encoder, "query", self.cache)))
        for window, matrices in stream(documents, self.encoder, "document", self.cache, "documents"):
            rows = np.concatenate(matrices)
            costs.bytes += rows.nbytes
            chunks = normalize(torch.from_numpy(rows))
            with costs.comparing():
                nearest = [s.amax(1) for s in (vectors @ chunks.T).split([len(m) for m in matrices], dim=1)]
                scores = torch.stack(nearest, dim=1)
            yield window, scores


class WordScores(Scorer):
    """The scores of BM25."""

    def blocks(
        self, queries: Sequence[str], documents: Sequence[str], costs: Costs
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Score all documents as one block; see `Scorer`."""
        words = BM25Index(documents)
        costs.bytes += words.nbytes
        with costs.comparing():
            scores = np.stack([words.scores(query) for query in queries])
        yield range(len(documents)), torch.from_numpy(scores)

    def best(
        self, queries: Sequence[str], documents: Sequence[str], k: int, costs: Costs, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the k largest scores of each query; see `Scorer`. Only these are in memory, if `allowed` is None."""
        if allowed is not None:
            return super().best(queries, documents, k, costs, allowed)
        words = BM25Index(documents)
        costs.bytes += words.nbytes
        with costs.comparing():
            scores, indices = words.search(queries, k)
        return torch.from_numpy(scores), torch.from_numpy(indices)


class TokenScores(Scorer):
    """MaxSim of token vectors (ColBERT, Khattab and Zaharia 2020, arXiv:2004.12832).

    A window of documents at a time is read from the store and compared, so that their number does not decide the
    memory.

    Args:
        encoder: gives one row for each token.
        settings: what is kept of documents, and whether queries are weighted.
        cache: of the vectors of queries.
        store: of the vectors of documents.

    Raises:
        UserError: the encoder's vectors have fewer dimensions than the settings ask for.
    """

    def __init__(self, encoder: TokenEncoder, settings: TokenSettings, cache: VectorCache, store: TokenStore):
        self.encoder, self.settings, self.cache = encoder, settings, cache
        self.kept = KeptTokens(encoder, settings, store)

    def blocks(
        self, queries: Sequence[str], documents: Sequence[str], costs: Costs
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Score documents, block by block; see `Scorer`."""
        device = device_kind()
        asked = packed(query_vectors(queries, self.encoder, self.settings, self.cache))
        packed_queries, query_cu = (tensor.to(device) for tensor in asked)
        mean = self.encoder.similarity_fn_name == "meanmaxsim"
        for window, keys in self.kept.windows(documents):
            with costs.comparing():
                vectors, cu = (tensor.to(device) for tensor in packed([self.kept.vectors(key) for key in keys]))
                scores = maxsim(packed_queries, query_cu, vectors, cu, mean=mean).cpu()
            costs.bytes += len(vectors) * self.kept.bytes_per_vector
            yield window, scores


class HybridScores(Scorer):
    """A convex combination of two scorers, each min-max normalized a query over the corpus.

    `weight * norm(first) + (1 - weight) * norm(second)`, where `norm` is `min_max_` over all documents (Bruch et al.
    2023, arXiv:2210.11934, equation 3). Where all scores are equal, they count nothing. All scores are in memory: 4
    bytes a query and document, at most three times.

    Args:
        first: scores with this weight.
        second: scores with the rest.
        weight: 0 to 1.
    """

    def __init__(self, first: Scorer, second: Scorer, weight: float):
        self.first, self.second, self.weight = first, second, weight

    def blocks(
        self, queries: Sequence[str], documents: Sequence[str], costs: Costs
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Score all documents as one block; see `Scorer`."""
        combined = torch.zeros(len(queries), len(documents))
        for scorer, weight in ((self.first, self.weight), (self.second, 1 - self.weight)):
            scores = torch.empty_like(combined)
            for window, found in scorer.blocks(queries, documents, costs):
                scores[:, torch.tensor(window)] = found.float()
            with costs.comparing():
                combined += min_max_(scores).mul_(weight)
        yield range(len(documents)), combined


def _texts(dataset: Any, task_metadata: Any, prompt_type: Any) -> Sequence[str]:
    """Return the texts as MTEB gives them to an encoder (title first, stripped), so that all systems read the same."""
    loader: Any = create_dataloader(dataset, task_metadata=task_metadata, prompt_type=prompt_type)
    return loader.dataset["text"]
