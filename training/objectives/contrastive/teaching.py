"""The late interaction of a model, maybe with BM25, as the teacher of its one vector a text."""

import torch.nn.functional as F
from torch import Tensor

from common.score_scaling import min_max_
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.blocks import GatheredBatch, Metrics, in_blocks
from training.objectives.losses.matryoshka import matryoshka
from training.objectives.losses.similarity import in_one, similarity
from training.objectives.losses.soft_targets import soft_targets


def teach_vector(batch: GatheredBatch, arguments: ObjectiveArguments) -> tuple[Tensor, Metrics]:
    """Compute how far the scores of one vector a text are from those of the token vectors of the same forward pass.

    The loss is the divergence KL( softmax(MaxSim / T) || softmax(cosine / t) ) over all documents of the batch, a mean
    over the queries of this process. The token vectors get no gradient from it. With `--teach_bm25_weight w` the
    teacher's scores are (1 - w) MaxSim + w BM25, both scaled for each query from 0 to 1 over these documents.

    Args:
        batch: the gathered batch, with vectors and token vectors, and with words if BM25 has a weight.
        arguments: parsed command-line options; with `--matryoshka_dims` the losses of all sizes are added.

    Returns:
        The loss, and `agreement`: the share of the queries for which both find the same document nearest.
    """
    assert batch.tokens is not None
    tokens, columns = batch.tokens.detach(), range(1, batch.embeddings.shape[1])
    token_query, token_document = tokens[:, 0], in_one([tokens[:, column] for column in columns])

    def loss(query: Tensor, document: Tensor, rows: slice) -> tuple[Tensor, Metrics]:
        teacher = similarity(token_query[rows], token_document, 1.0)
        if weight := arguments.teach_bm25_weight:
            assert batch.words is not None
            words = min_max_(batch.words[rows].to(teacher, copy=True))
            teacher = (1 - weight) * min_max_(teacher) + weight * words
        teacher = teacher / arguments.temperature_of_teacher

        def of_size(query: Tensor, document: Tensor) -> tuple[Tensor, Metrics]:
            return soft_targets(similarity(query, document, arguments.teach_vector_temperature), teacher)

        dims, weights = arguments.matryoshka_dims, arguments.matryoshka_weights
        return (matryoshka(of_size, dims, weights or None) if dims else of_size)(query[rows], document)

    vectors = F.normalize(batch.embeddings, dim=-1)
    over_blocks = in_blocks(loss, batch.rows, len(vectors))
    return over_blocks(vectors[:, 0], in_one([vectors[:, column] for column in columns]))
