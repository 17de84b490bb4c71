"""The late interaction of a model as the teacher of its one vector a text."""

import torch.nn.functional as F
from torch import Tensor

from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.blocks import GatheredBatch, Metrics, in_blocks
from training.objectives.losses.matryoshka import matryoshka
from training.objectives.losses.similarity import in_one, similarity
from training.objectives.losses.soft_targets import soft_targets


def teach_vector(batch: GatheredBatch, arguments: ObjectiveArguments) -> tuple[Tensor, Metrics]:
    """Compute how far the scores of one vector a text are from those of the token vectors of the same forward pass.

    The loss is the divergence KL( softmax(MaxSim / T) || softmax(cosine / t) ) over all documents of the batch, a mean
    over the queries of this process. The token vectors get no gradient from it.

    Args:
        batch: the gathered batch, with vectors and token vectors.
        arguments: parsed command-line options; with `--matryoshka_dims` the losses of all sizes are added.

    Returns:
        The loss, and `agreement`: the share of the queries for which both find the same document nearest.
    """
    assert batch.tokens is not None
    tokens, columns = batch.tokens.detach(), range(1, batch.embeddings.shape[1])
    token_query, token_document = tokens[:, 0], in_one([tokens[:, column] for column in columns])

    def loss(query: Tensor, document: Tensor, rows: slice) -> tuple[Tensor, Metrics]:
        teacher = similarity(token_query[rows], token_document, arguments.temperature_of_teacher)

        def of_size(query: Tensor, document: Tensor) -> tuple[Tensor, Metrics]:
            return soft_targets(similarity(query, document, arguments.teach_vector_temperature), teacher)

        dims, weights = arguments.matryoshka_dims, arguments.matryoshka_weights
        return (matryoshka(of_size, dims, weights or None) if dims else of_size)(query[rows], document)

    vectors = F.normalize(batch.embeddings, dim=-1)
    over_blocks = in_blocks(loss, batch.rows, len(vectors))
    return over_blocks(vectors[:, 0], in_one([vectors[:, column] for column in columns]))
