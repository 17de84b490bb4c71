"""Token pooling against scipy's Ward, scikit-learn's, and the pooling of sentence-transformers."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sentence_transformers.multi_vector_encoder.modules.token_pooling import HierarchicalTokenPooling
from sklearn.cluster import AgglomerativeClustering
from torch.nn.functional import normalize

from modeling_longembed import output_token_pooling_longembed as module
from modeling_longembed.output_token_pooling_longembed import keep_tokens, pool_packed_tokens, pool_tokens, ward


def unit_vectors(n: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, width, dtype=torch.float64, generator=generator)
    return normalize(vectors + vectors[:1] / 2, dim=-1)


def partition(groups) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(np.asarray(groups) == group).tolist()) for group in np.unique(groups)}


@pytest.mark.promise("T4")
@settings(max_examples=settings.default.max_examples // 2)
@given(n=st.integers(1, 256), factor=st.integers(2, 32), width=st.integers(3, 12), seed=st.integers(0, 999))
def test_one_window_is_pooled_as_in_sentence_transformers(n, factor, width, seed):
    vectors = unit_vectors(n, width, seed)
    pooled, groups = pool_tokens(vectors, factor)
    expected = HierarchicalTokenPooling(factor, num_protected_tokens=0).pool_one(vectors)
    assert len(pooled) == len(expected) == max(n // factor, 1)
    by_first = [pooled[row] for row in np.lexsort(pooled.numpy().round(9).T)]
    torch.testing.assert_close(torch.stack(by_first), expected[np.lexsort(expected.numpy().round(9).T)])
    if n > 1:
        distances = squareform((1 - vectors @ vectors.T).clamp(0, 2).numpy(), checks=False)
        assert partition(groups) == partition(fcluster(linkage(distances, "ward"), len(pooled), "maxclust"))


def test_vectors_that_stand_for_several_tokens_weigh_as_many_in_wards_method():
    # Orthogonal vectors and copies of them: the squared cosine distance is half the squared Euclidean one.
    sizes = torch.tensor([5, 1, 3, 1, 1, 2, 9])
    merged = ward(torch.eye(7, dtype=torch.float64)[None], sizes[None], torch.tensor([3]))[0]
    copies = torch.eye(7, dtype=torch.float64).repeat_interleave(sizes, 0)
    labels = AgglomerativeClustering(3).fit(copies.numpy()).labels_
    costs = [sizes[group].sum().item() for group in map(list, partition(labels[np.r_[0, sizes.cumsum(0)[:-1]]]))]
    assert sorted(costs) == sorted(sizes[list(group)].sum().item() for group in partition(merged))


@pytest.mark.promise("T4")
@settings(max_examples=settings.default.max_examples // 2)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=4), factor=st.integers(1, 32), seed=st.integers(0, 99)
)
@example(lengths=[65, 94, 66], factor=32, seed=0)
def test_each_vector_is_the_unit_mean_of_its_tokens_in_the_order_of_the_text(lengths, factor, seed):
    vectors = unit_vectors(sum(lengths), 6, seed) if sum(lengths) else torch.zeros(0, 6, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    pooled, groups, pooled_cu = pool_packed_tokens(vectors, cu_seqlens, factor, window=64)
    assert pooled_cu.diff().tolist() == [max(length // factor, min(length, 1)) for length in lengths]
    if factor == 1:
        assert torch.equal(pooled, vectors)
    firsts = [int((groups == row).nonzero()[0]) for row in range(len(pooled))]
    assert firsts == sorted(firsts)
    for row, vector in enumerate(pooled):
        own = vectors[groups == row].sum(0)
        torch.testing.assert_close(vector, own / own.norm())
        places = (groups == row).nonzero()
        document = int(torch.searchsorted(pooled_cu, row, right=True)) - 1
        assert cu_seqlens[document] <= places.min() <= places.max() < cu_seqlens[document + 1]
        assert places.max() - places.min() < 64
    for number, part in enumerate(vectors.split(lengths)):  # a document does not depend on its neighbours
        alone, _ = pool_tokens(part, factor, window=64)
        torch.testing.assert_close(pooled[pooled_cu[number] : pooled_cu[number + 1]], alone)


@pytest.mark.promise("T4")
def test_the_cost_is_linear_in_the_length(monkeypatch):
    compared = []
    original = module.ward
    monkeypatch.setattr(
        module,
        "ward",
        lambda vectors, *rest: compared.append(vectors.shape[0] * vectors.shape[1] ** 2) or original(vectors, *rest),
    )
    for n in (2048, 8192):
        compared.append(0)
        pool_tokens(unit_vectors(n), 4)
    assert sum(compared[: compared.index(0, 1)]) == 2048 * 256
    assert sum(compared) == (2048 + 8192) * 256


@pytest.mark.parametrize("value", [torch.nan, 0.0, 1.0])
def test_vectors_that_are_all_alike_or_no_numbers_end_too(value):
    pooled, groups = pool_tokens(torch.full((40, 4), value), 4)
    assert len(pooled) == 10
    assert groups.max() < 10


def test_the_gradient_goes_through_the_means():
    vectors = unit_vectors(12).requires_grad_()
    pooled, groups = pool_tokens(vectors, 3)
    expected = torch.stack([normalize(vectors[groups == row].sum(0), dim=-1) for row in range(len(pooled))])
    gradients = [torch.autograd.grad((value**3).sum(), vectors)[0] for value in (pooled, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.promise("T4")
@settings(max_examples=settings.default.max_examples // 2)
@given(n=st.integers(0, 600), budget=st.integers(1, 80), by=st.sampled_from(["saliency", "clusters"]))
def test_a_budget_is_used_up_and_never_exceeded(n, budget, by):
    vectors = unit_vectors(n) if n else torch.zeros(0, 6, dtype=torch.float64)
    kept, groups = keep_tokens(vectors, budget, by, window=64)
    assert len(kept) == min(n, budget)
    torch.testing.assert_close(kept.norm(dim=1), torch.ones(len(kept), dtype=torch.float64))
    for row, vector in enumerate(kept):
        own = vectors[groups == row].sum(0)
        torch.testing.assert_close(vector, own / own.norm())
    firsts = [int((groups == row).nonzero()[0]) for row in range(len(kept))]
    assert firsts == sorted(firsts)
    assert (groups.min() >= 0) if (by == "clusters" and n) else ((groups < 0).sum() == n - len(kept))


def test_the_weightiest_tokens_are_kept():
    vectors, weights = unit_vectors(5), torch.tensor([3.0, 0.5, 4.0, 1.0, 2.0])
    kept, groups = keep_tokens(vectors, 3, weights=weights)
    assert torch.equal(kept, vectors[[0, 2, 4]])
    assert groups.tolist() == [0, -1, 1, -1, 2]
    outlier = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [0.95, 0.0]])
    assert keep_tokens(outlier, 1)[1].tolist() == [-1, -1, 0, -1]


@pytest.mark.promise("T7")
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda vectors: pool_tokens(vectors, 0), "token pooling by 0: give a whole number from 1"),
        (lambda vectors: pool_tokens(vectors, 33), "to 32; for fewer vectors"),
        (lambda vectors: pool_tokens(vectors, 2.5), "token pooling by 2.5"),
        (lambda vectors: pool_tokens(vectors, 2, window=8), "in windows of 8 vectors: give at least 64"),
        (lambda vectors: keep_tokens(vectors, 0), "budget=0; give the number of vectors"),
        (lambda vectors: keep_tokens(vectors, 2, by="idf"), "by='idf'; choose from 'saliency', 'clusters'"),
    ],
)
def test_what_cannot_be_pooled_is_refused_in_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        call(unit_vectors(4))
    assert "\n" not in str(error.value)
