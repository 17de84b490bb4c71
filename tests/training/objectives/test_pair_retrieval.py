"""Held-out pairs: nDCG against scikit-learn, the loss against cross entropy."""

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score

from tests.training.tiny_training import WORDS
from training.data.pairs.batches import PairTokenizer
from training.data.sources import Source
from training.objectives.pair_retrieval import PairRetrieval


def retrieval(rows, tokenizer, batch_size=100) -> PairRetrieval:
    data = datasets.Dataset.from_dict(
        dict(zip(("anchor", "positive"), map(list, zip(*rows, strict=True)), strict=True))
    )
    source = Source("held-out", data, ("anchor", "positive"))
    return PairRetrieval(source, PairTokenizer(tokenizer, 32, 32, {}), batch_size=batch_size, batch_tokens=20)


def by_number(table):
    """An "encoder" that reads the one number that a text holds, `[CLS] number [SEP]`, as a row of `table`."""
    return lambda chunk, kind: F.normalize(table[chunk.input_ids.view(-1, 3)[:, 1]], dim=-1)


@pytest.mark.parametrize("seed", range(5))
def test_ndcg_and_loss_are_those_of_the_libraries(word_tokenizer, seed):
    table = torch.randn(len(word_tokenizer), 4, generator=torch.Generator().manual_seed(seed))
    words = WORDS + [str(number) for number in range(6)]
    queries, documents = words[:11], words[11:22]
    metrics = retrieval(list(zip(queries, documents, strict=True)), word_tokenizer)(by_number(table), 0.05)
    vector = F.normalize(table[word_tokenizer.convert_tokens_to_ids(queries + documents)], dim=-1)
    scores = vector[:11] @ vector[11:].T
    assert metrics["eval_ndcg_at_10"] == pytest.approx(ndcg_score(np.eye(11), scores.numpy(), k=10), abs=1e-6)
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(scores / 0.05, torch.arange(11)).item(), rel=1e-4)
    assert metrics["eval_accuracy"] == pytest.approx((scores.argmax(1) == torch.arange(11)).float().mean().item())


def test_accuracies_and_mrr_are_those_of_the_library(word_tokenizer):
    """40 pairs of texts of two words each, whose vector is the sum of theirs."""
    table = torch.randn(len(word_tokenizer), 16, generator=torch.Generator().manual_seed(0))
    texts = [f"{one} {two}" for one in WORDS for two in WORDS if one < two][:80]
    queries, documents = texts[::2], texts[1::2]
    metrics = retrieval(list(zip(queries, documents, strict=True)), word_tokenizer)(
        lambda chunk, kind: F.normalize(table[chunk.input_ids.view(-1, 4)[:, 1:3]].sum(1), dim=-1), 0.05
    )
    ids = torch.tensor([word_tokenizer.convert_tokens_to_ids(text.split()) for text in queries + documents])
    vector = F.normalize(table[ids].sum(1), dim=-1)
    scores = (vector[:40] @ vector[40:].T).numpy()
    found = [metrics[f"eval_accuracy_at_{k}"] for k in (1, 5, 20)]
    assert found == pytest.approx([top_k_accuracy_score(range(40), scores, k=k) for k in (1, 5, 20)])
    assert 0 < found[0] < found[1] < found[2] < 1
    assert metrics["eval_mrr"] == pytest.approx(label_ranking_average_precision_score(np.eye(40), scores))
    assert metrics["eval_documents"] == 40


@pytest.mark.promise("C12")
def test_alignment_and_uniformity_by_their_definition(word_tokenizer):
    """The second and third pair share their query, which is in the uniformity once; distances are numpy's."""
    rows = [("river", "stone"), ("cloud", "table"), ("cloud", "green"), ("seven", "night")]
    table = torch.randn(len(word_tokenizer), 4, generator=torch.Generator().manual_seed(1))
    metrics = retrieval(rows, word_tokenizer)(by_number(table), 0.05)
    vectors = F.normalize(table, dim=-1).double().numpy()
    query, positive = (vectors[word_tokenizer.convert_tokens_to_ids(column)] for column in zip(*rows, strict=True))

    def uniformity(points):
        first, second = np.triu_indices(len(points), 1)
        return np.log(np.exp(-2 * ((points[first] - points[second]) ** 2).sum(1)).mean())

    assert metrics["eval_alignment"] == pytest.approx(((query - positive) ** 2).sum(1).mean(), rel=1e-5)
    expected = (uniformity(query[[0, 1, 3]]) + uniformity(positive)) / 2
    assert metrics["eval_uniformity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_equal_vectors_and_no_numbers_earn_nothing(word_tokenizer, value):
    words = WORDS + [str(number) for number in range(6)]
    metrics = retrieval(list(zip(words[:11], words[11:], strict=True)), word_tokenizer)(
        by_number(torch.full((len(word_tokenizer), 4), value)), 0.05
    )
    assert metrics["eval_ndcg_at_10"] == metrics["eval_accuracy_at_5"] == 0
    assert metrics["eval_mrr"] == pytest.approx(1 / 11)


def test_a_repeated_document_and_a_second_positive_do_not_count_against_the_model(word_tokenizer):
    rows = [("river", "stone"), ("river", "cloud"), ("table", "glass"), ("green", "glass")]
    table = torch.zeros(len(word_tokenizer), 2)
    for number, group in enumerate((["river", "stone", "cloud"], ["table", "green", "glass"])):
        table[word_tokenizer.convert_tokens_to_ids(group), number] = 1.0
    metrics = retrieval(rows, word_tokenizer)(by_number(table), 0.01)
    assert metrics["eval_ndcg_at_10"] == 1.0
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["eval_loss"] == pytest.approx(0.0, abs=1e-3)
