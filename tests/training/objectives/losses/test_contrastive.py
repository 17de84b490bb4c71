"""InfoNCE against cross entropy, sentence-transformers and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, MultipleNegativesRankingLoss

from tests.training.tiny_training import unit
from training.objectives.losses.contrastive import info_nce


def published_loss(query, positive, negative, temperature, symmetric):
    """sentence-transformers' loss of ready embeddings; its constructor wants a model that it then does not use."""
    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    loss = MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=1 / temperature, directions=directions, partition_mode="per_direction"
    )
    columns = [query, positive] + ([] if negative is None else list(negative.split(len(query))))
    return loss.compute_loss_from_embeddings(columns, labels=None)


@pytest.mark.promise("C1")
@given(
    pairs=st.integers(1, 9),
    negatives=st.integers(0, 3),
    temperature=st.floats(0.01, 2.0),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_sentence_transformers(pairs, negatives, temperature, symmetric, seed):
    query, positive = unit(pairs, 8, seed=seed), unit(pairs, 8, seed=seed + 100)
    negative = unit(pairs * negatives, 8, seed=seed + 200) if negatives else None
    ours, _ = info_nce(query, positive, negative, temperature=temperature, symmetric=symmetric)
    theirs = published_loss(query, positive, negative, temperature, symmetric)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.promise("C1")
def test_equals_cross_entropy_and_its_accuracy():
    query, positive = unit(7, 8), unit(7, 8, seed=1)
    scores = query @ positive.T / 0.05
    loss, metrics = info_nce(query, positive)
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.arange(7)), atol=1e-12, rtol=0)
    assert metrics["accuracy"] == (scores.argmax(1) == torch.arange(7)).double().mean()


@pytest.mark.promise("C1")
def test_is_ln_of_the_columns_when_all_vectors_are_equal():
    same = unit(1, 8).expand(6, 8)
    assert math.isclose(info_nce(same, same)[0].item(), math.log(6), abs_tol=1e-12)
    assert math.isclose(info_nce(same, same, same)[0].item(), math.log(12), abs_tol=1e-12)


@pytest.mark.promise("C1")
def test_gradient_is_the_closed_form():
    temperature, query, positive = 0.1, unit(5, 8), unit(5, 8, seed=1).requires_grad_()
    info_nce(query, positive, temperature=temperature)[0].backward()
    p = (query @ positive.detach().T / temperature).softmax(dim=1)
    expected = (p - torch.eye(5)).T @ query / (5 * temperature)
    torch.testing.assert_close(positive.grad, expected, atol=1e-12, rtol=0)


@pytest.mark.promise("C1")
def test_does_not_change_under_rotation_and_under_permutation_of_pairs():
    query, positive, negative = unit(6, 8), unit(6, 8, seed=1), unit(12, 8, seed=2)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    order = torch.randperm(6)
    loss, _ = info_nce(query, positive, negative, symmetric=True)
    rotated, _ = info_nce(query @ rotation, positive @ rotation, negative @ rotation, symmetric=True)
    permuted, _ = info_nce(query[order], positive[order], negative[torch.randperm(12)], symmetric=True)
    torch.testing.assert_close(rotated, loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(permuted, loss, atol=1e-12, rtol=0)


@pytest.mark.promise("C1")
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_all_processes_average_to_the_whole(symmetric):
    query, positive, negative = unit(6, 8), unit(6, 8, seed=1), unit(6, 8, seed=2)
    whole, _ = info_nce(query, positive, negative, symmetric=symmetric)
    parts = [
        info_nce(query, positive, negative, symmetric=symmetric, rows=rows)[0] for rows in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole, atol=1e-12, rtol=0)


@pytest.mark.promise("C1")
def test_equal_texts_are_no_negatives_of_each_other():
    # Pair 3 repeats the positive of pair 0, pair 4 the query of pair 1, negative 2 is the positive of pair 2.
    query, positive, negative = unit(5, 8), unit(5, 8, seed=1), unit(5, 8, seed=2)
    query_id = torch.tensor([0, 1, 2, 3, 1])
    positive_id = torch.tensor([10, 11, 12, 10, 14])
    negative_id = torch.tensor([20, 21, 12, 23, 24])
    scores = torch.cat([query @ positive.T, query @ negative.T], dim=1) / 0.05
    left_out = {0: [3], 1: [4], 2: [7], 3: [0], 4: [1]}
    expected = torch.stack(
        [
            scores[row, [c for c in range(10) if c not in left_out[row]]].logsumexp(0) - scores[row, row]
            for row in range(5)
        ]
    ).mean()
    ids = {"query_id": query_id, "positive_id": positive_id, "negative_id": negative_id}
    torch.testing.assert_close(info_nce(query, positive, negative, **ids)[0], expected, atol=1e-12, rtol=0)

    back = positive @ query.T / 0.05
    kept = [[c for c in range(5) if c not in left_out[row]] for row in range(5)]
    other_way = torch.stack([back[row, kept[row]].logsumexp(0) - back[row, row] for row in range(5)]).mean()
    both, _ = info_nce(query, positive, negative, symmetric=True, **ids)
    torch.testing.assert_close(both, (expected + other_way) / 2, atol=1e-12, rtol=0)


@pytest.mark.promise("C1")
def test_half_precision_embeddings_are_scored_in_full():
    query, positive = unit(6, 8).bfloat16(), unit(6, 8, seed=1).bfloat16()
    exact, _ = info_nce(query.double(), positive.double(), temperature=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = info_nce(query, positive, temperature=0.01)
    torch.testing.assert_close(loss.double(), exact, atol=1e-4, rtol=0)


@pytest.mark.promise("C1")
def test_a_learned_temperature_has_the_gradient_of_finite_differences():
    query, positive = unit(5, 8), unit(5, 8, seed=1)
    log_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: info_nce(query, positive, temperature=(-s).exp(), symmetric=True)[0], [log_scale]
    )


def own_negatives(pairs: int, columns: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Hard negatives, in an order that is neither row by row nor column by column, and the row of each."""
    order = torch.randperm(pairs * columns, generator=torch.Generator().manual_seed(seed))
    return unit(pairs * columns, 8, seed=seed), torch.arange(pairs).repeat(columns)[order]


@pytest.mark.promise("C3")
@pytest.mark.parametrize("columns", [1, 3])
def test_a_weight_of_minus_infinity_drops_the_own_negatives(columns):
    query, positive = unit(5, 8), unit(5, 8, seed=1)
    negative, row = own_negatives(5, columns)
    loss, _ = info_nce(query, positive, negative, negative_weight=-math.inf, negative_row=row)
    without = [
        F.cross_entropy(query[i] @ torch.cat([positive, negative[row != i]]).T / 0.05, torch.tensor(i))
        for i in range(5)
    ]
    torch.testing.assert_close(loss, torch.stack(without).mean(), atol=1e-12, rtol=0)


@pytest.mark.promise("C3")
def test_a_weight_of_minus_infinity_leaves_a_gradient_without_nan():
    query, positive = unit(1, 8).requires_grad_(), unit(1, 8, seed=1)
    negative, row = own_negatives(1, 2)
    info_nce(query, positive, negative, negative_weight=-math.inf, negative_row=row)[0].backward()
    torch.testing.assert_close(query.grad, torch.zeros_like(query), atol=1e-12, rtol=0)


@pytest.mark.promise("C3")
@pytest.mark.parametrize("copies", [1, 2, 4])
def test_a_weight_is_the_logarithm_of_how_often_the_own_negative_counts(copies):
    query, positive = unit(4, 8), unit(4, 8, seed=1)
    negative, row = own_negatives(4, 2)
    loss, _ = info_nce(query, positive, negative, negative_weight=math.log(copies), negative_row=row)
    repeated = [
        F.cross_entropy(
            query[i] @ torch.cat([positive, negative[row != i], negative[row == i].repeat(copies, 1)]).T / 0.05,
            torch.tensor(i),
        )
        for i in range(4)
    ]
    torch.testing.assert_close(loss, torch.stack(repeated).mean(), atol=1e-12, rtol=0)


@pytest.mark.promise("C3")
def test_a_weight_asks_whose_the_negatives_are():
    with pytest.raises(ValueError, match="negative_row"):
        info_nce(unit(2, 8), unit(2, 8), unit(2, 8), negative_weight=1.0)


@given(
    pairs=st.integers(1, 7),
    columns=st.integers(0, 2),
    margin=st.floats(-0.3, 0.6),
    relative=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_guide_takes_out_what_gistembed_takes_out(word_tokenizer, pairs, columns, margin, relative, seed):
    ours = [unit(pairs, 8, seed=seed + number) for number in range(2 + columns)]
    guides = [unit(pairs, 5, seed=seed + 100 + number) for number in range(2 + columns)]
    # sentence-transformers' loss of ready embeddings wants models with tokenizers, and does not use them.
    stub = torch.nn.Sequential(torch.nn.Identity())
    stub.tokenizer, stub.max_seq_length = word_tokenizer, 1
    published = CachedGISTEmbedLoss(
        stub,
        stub,
        temperature=0.05,
        mini_batch_size=3,
        margin_strategy="relative" if relative else "absolute",
        margin=margin,
        contrast_anchors=False,
        contrast_positives=False,
    ).calculate_loss([[column] for column in ours], [[column] for column in guides])
    query, positive, *negatives = ours
    guide = (guides[0], guides[1], torch.cat(guides[2:]) if columns else None)
    options = {"guide": guide, "guide_margin": margin, "guide_relative": relative}
    loss, _ = info_nce(query, positive, torch.cat(negatives) if columns else None, **options)
    torch.testing.assert_close(loss, published, atol=1e-12, rtol=1e-12)


def test_its_own_score_takes_out_what_is_nearer_than_the_own_positive_by_a_margin():
    query, positive, negative = unit(6, 4), unit(6, 4, seed=1), unit(6, 4, seed=2)
    loss, metrics = info_nce(
        query, positive, negative, symmetric=True, guide=(query, positive, negative), guide_margin=-0.1
    )

    def kept_loss(rows, columns):
        losses, left_out = [], 0
        for i, row in enumerate(rows):
            scores = columns @ row
            kept = scores <= scores[i] + 0.1
            left_out += int((~kept).sum())
            losses.append((scores[kept] / 0.05).logsumexp(0) - scores[i] / 0.05)
        return torch.stack(losses).mean(), left_out

    there, left_out = kept_loss(query, torch.cat([positive, negative]))
    back, _ = kept_loss(positive, query)
    assert left_out
    torch.testing.assert_close(loss, (there + back) / 2, atol=1e-12, rtol=0)
    assert metrics["false_negative_share"].item() == pytest.approx(left_out / (6 * 11))
