"""How well a model finds the positives of held-out pairs."""

from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from common.alignment import alignment, uniformity
from training.data.packing import PackedTexts, pack
from training.data.pair_batches import PairTokenizer
from training.data.sources import Source
from training.engine.distributed import own_share
from training.objectives.losses.contrastive import info_nce


class PairRetrieval:
    """Held-out pairs of one source: each query must find its own positive among all documents of the source."""

    def __init__(self, source: Source, tokenize: PairTokenizer, *, batch_size: int, batch_tokens: int) -> None:
        """Args:
        source: the pairs; hard negatives join the documents.
        batch_size: pairs a batch of the loss.
        batch_tokens: tokens of one packed chunk.
        """
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
    def __call__(self, embed: Callable[[PackedTexts], Tensor], temperature: float) -> dict[str, float]:
        """Metrics of a model in evaluation mode; the texts are shared out over the processes.

        Args:
            embed: a packed chunk, on this process's device or not, to unit vectors `(n, d)`.
            temperature: of the loss.

        Returns:
            `eval_loss` and `eval_accuracy` inside batches of `batch_size`, `eval_ndcg_at_10` over all documents, and
            `eval_alignment` of the pairs and `eval_uniformity`, the mean of queries and documents (Wang and Isola 2020,
            arXiv:2005.10242, section 4.1).
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
        return {
            "eval_loss": loss,
            "eval_accuracy": accuracy,
            "eval_ndcg_at_10": self._ndcg(query, document),
            "eval_alignment": alignment(query, positive).item(),
            "eval_uniformity": (uniformity(query[self.distinct]) + uniformity(document)).item() / 2,
        }

    def _embed(self, texts: list[str], kind: str, embed: Callable[[PackedTexts], Tensor]) -> Tensor:
        own = own_share(len(texts))
        # In portions: the token ids of a large corpus need not be held at once.
        portions = range(own.start, own.stop, 256)
        rows: list[Tensor] = []
        for start in tqdm(portions, desc=f"evaluating: {kind}", disable=own.start > 0, leave=False):
            token_ids = self.tokenize(texts[start : min(start + 256, own.stop)], kind)
            rows += [embed(chunk).float().cpu() for chunk in pack(token_ids, self.batch_tokens)]
        return torch.cat(gather_object(rows))

    def _ndcg(self, query: Tensor, document: Tensor) -> float:
        """nDCG@10 with one relevant document a query: 1 / log2(1 + rank). Ties count against the model,
        so that equal vectors earn nothing; other positives of the query are passed over."""
        total = 0.0
        for start in range(0, len(query), 1024):
            rows = slice(start, start + 1024)
            scores = query[rows] @ document.T
            own = scores.gather(1, self.positive[rows, None])
            other_positive = torch.zeros_like(scores, dtype=torch.bool)
            pair_row, pair = (self.query_id[rows, None] == self.query_id).nonzero(as_tuple=True)
            other_positive[pair_row, self.positive[pair]] = True
            rank = 1 + ((scores >= own) & ~other_positive).sum(dim=1)
            total += (1 / torch.log2(1 + rank.double()))[rank <= 10].sum().item()
        return total / len(query)
