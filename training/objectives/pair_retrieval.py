"""Evaluation on held-out pairs: how well a model retrieves the positive of each query."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from common.alignment import alignment, uniformity
from training.data.packing import PackedTexts, pack
from training.data.pairs.batches import PairTokenizer
from training.data.sources import Source
from training.engine.processes.distributed import own_share
from training.objectives.losses.contrastive import info_nce
from training.objectives.losses.similarity import Texts, in_one, similarity
from training.objectives.losses.token_vectors import TokenVectors

Embed = Callable[[PackedTexts, str], Tensor | TokenVectors]
TOP = (1, 5, 20)  # of the accuracies that are logged


class PairRetrieval:
    """Retrieval on the held-out pairs of one source: each query searches its positive among all documents.

    Args:
        source: the pairs; their hard negatives are documents, too.
        tokenize: tokenizer of queries and documents.
        batch_size: number of pairs in a batch of the loss.
        batch_tokens: number of tokens of one packed chunk.
    """

    def __init__(self, source: Source, tokenize: PairTokenizer, *, batch_size: int, batch_tokens: int) -> None:
        self.tokenize, self.batch_size, self.batch_tokens = tokenize, batch_size, batch_tokens
        columns = source.texts(list(range(len(source.rows))))
        self.queries, self.documents = columns[0], list(dict.fromkeys(text for texts in columns[1:] for text in texts))
        numbers = {text: number for number, text in enumerate(self.documents)}
        self.positive = torch.tensor([numbers[text] for text in columns[1]])
        query_numbers = {text: number for number, text in enumerate(dict.fromkeys(self.queries))}
        self.query_id = torch.tensor([query_numbers[text] for text in self.queries])
        first = {text: row for row, text in reversed(list(enumerate(self.queries)))}
        self.distinct = [first[text] for text in query_numbers]

    @torch.no_grad()
    def __call__(self, embed: Embed, temperature: float) -> dict[str, float]:
        """Evaluate a model in evaluation mode; the processes share the texts.

        Args:
            embed: a function from a packed chunk, on any device, and the kind of its texts, `query` or `document`, to
                unit vectors `(n, d)`, or to n texts as token vectors.
            temperature: temperature of the loss.

        Returns:
            `eval_loss` and `eval_accuracy` of InfoNCE in batches of `batch_size`; over all documents, whose number is
            `eval_documents`, `eval_ndcg_at_10`, `eval_mrr` and the top-k accuracies `eval_accuracy_at_1`, `_5` and
            `_20`, the fraction of the pairs whose positive is among the k nearest. Of one vector a text also
            `eval_alignment` of the pairs, and `eval_uniformity`, the mean of that of queries and that of documents
            (Wang and Isola 2020, arXiv:2005.10242, section 4.1).
        """
        query = self._embed(self.queries, "query", embed)
        document = self._embed(self.documents, "document", embed)
        positive = document[self.positive]
        losses = []
        for start in range(0, len(query), self.batch_size):
            rows = slice(start, start + self.batch_size)
            loss, metrics = info_nce(
                query[rows],
                positive[rows],
                temperature=temperature,
                query_id=self.query_id[rows],
                positive_id=self.positive[rows],
            )
            losses.append(torch.stack([loss, metrics["accuracy"]]) * len(query[rows]))
        loss, accuracy = (torch.stack(losses).sum(0) / len(query)).tolist()
        rank = self._ranks(query, document)
        figures: dict[str, float] = {
            "eval_loss": loss,
            "eval_accuracy": accuracy,
            # With one relevant document per query, the ideal ranking has a gain of 1.
            "eval_ndcg_at_10": torch.where(rank <= 10, 1 / torch.log2(1 + rank), 0.0).mean().item(),
            "eval_mrr": (1 / rank).mean().item(),
            **{f"eval_accuracy_at_{k}": (rank <= k).double().mean().item() for k in TOP},
            "eval_documents": len(self.documents),
        }
        if isinstance(query, Tensor):
            figures["eval_alignment"] = alignment(query, positive).item()
            figures["eval_uniformity"] = (uniformity(query[self.distinct]) + uniformity(document)).item() / 2
        return figures

    def _embed(self, texts: list[str], kind: str, embed: Embed) -> Any:
        """Embed this process's share of the texts and gather all, `(n, d)` on the CPU."""
        own = own_share(len(texts))
        # In portions, so that the token ids of a large corpus are not held at once.
        portions = range(own.start, own.stop, 256)
        rows: list[Tensor | TokenVectors] = []
        for start in tqdm(portions, desc=f"evaluating: {kind}", disable=own.start > 0, leave=False):
            token_ids = self.tokenize(texts[start : min(start + 256, own.stop)], kind)
            for texts_of_chunk in (embed(chunk, kind) for chunk in pack(token_ids, self.batch_tokens)):
                rows.append(texts_of_chunk.float().cpu())
        return in_one(gather_object(rows))

    def _ranks(self, query: Texts, document: Texts) -> Tensor:
        """Return the rank of the positive of each pair among all documents, from 1: `(n,)` float64.

        Ties count against the model, so equal vectors rank last. Other positives of the same query are ignored.
        """
        ranks = []
        for start in range(0, len(query), 1024):
            rows = slice(start, start + 1024)
            scores = similarity(query[rows], document, temperature=1.0)
            own = scores.gather(1, self.positive[rows, None])
            other_positive = torch.zeros_like(scores, dtype=torch.bool)
            pair_row, pair = (self.query_id[rows, None] == self.query_id).nonzero(as_tuple=True)
            other_positive[pair_row, self.positive[pair]] = True
            ranks.append(1 + (~(scores < own) & ~other_positive).sum(dim=1))  # NaN counts against the model, too
        return torch.cat(ranks).double()
