"""MaxSim against the double loop, sentence-transformers, and the gradient of the dense computation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.util import similarity

from modeling_longembed import output_maxsim_longembed as module
from modeling_longembed.output_maxsim_longembed import maxsim, maxsim_pairs
from tests.modeling_longembed.memory_use import peak_bytes

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random(lengths: list[int], width: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), width, dtype=dtype, generator=generator)


def one_by_one(query: torch.Tensor, document: torch.Tensor, mean: bool) -> torch.Tensor:
    """Score one query with one document, word by word."""
    if not len(document) or not len(query):
        return query.new_zeros(())
    total = sum(torch.stack([(word * token).sum() for token in document]).max() for word in query)
    return total / len(query) if mean else total


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Leave so little room that rows, documents and pieces of documents are all divided."""
    monkeypatch.setattr(module, "QUERY_ROWS", {"cpu": 4})
    monkeypatch.setattr(module, "CPU_BLOCK_BYTES", 300)


@pytest.mark.promise("T1")
@settings(max_examples=settings.default.max_examples // 2)
@given(queries=LENGTHS, documents=LENGTHS, width=st.integers(1, 5), mean=st.booleans(), block=st.integers(1, 2000))
def test_scores_and_gradients_are_those_of_the_double_loop_in_blocks_of_any_size(
    queries, documents, width, mean, block
):
    vectors = [random(queries, width).requires_grad_(), random(documents, width, 1).requires_grad_()]
    rows = [[one_by_one(q, d, mean) for d in vectors[1].split(documents)] for q in vectors[0].split(queries)]
    expected = torch.stack([torch.stack(row) for row in rows])
    weights = random([expected.shape[0]], expected.shape[1], 2)
    found = maxsim(vectors[0], cumulative(queries), vectors[1], cumulative(documents), block / 2**20, mean)
    torch.testing.assert_close(found, expected)
    if expected.requires_grad:
        gradients = torch.autograd.grad((expected * weights).sum(), vectors, materialize_grads=True)
        for mine, other in zip(torch.autograd.grad((found * weights).sum(), vectors), gradients, strict=True):
            torch.testing.assert_close(mine, other)
    with torch.no_grad():  # no places of maxima are kept: another path
        again = maxsim(vectors[0], cumulative(queries), vectors[1], cumulative(documents), block / 2**20, mean)
    torch.testing.assert_close(again, expected)


@pytest.mark.promise("T1")
@settings(max_examples=settings.default.max_examples // 2)
@given(queries=LENGTHS, candidates=st.integers(0, 4), data=st.data(), mean=st.booleans())
def test_pairs_score_each_query_with_its_own_candidates(queries, candidates, data, mean):
    lengths = data.draw(
        st.lists(st.integers(0, 6), min_size=len(queries) * candidates, max_size=len(queries) * candidates)
    )
    vectors = [random(queries).requires_grad_(), random(lengths, seed=1).requires_grad_()]
    found = maxsim_pairs(vectors[0], cumulative(queries), vectors[1], cumulative(lengths), mean=mean)
    everything = maxsim(vectors[0], cumulative(queries), vectors[1], cumulative(lengths), mean=mean)
    own = torch.arange(len(lengths)).view(len(queries), candidates)
    expected = everything.gather(1, own)
    torch.testing.assert_close(found, expected)
    weights = random([len(queries)], candidates, 2)
    gradients = torch.autograd.grad((expected * weights).sum(), vectors)
    for mine, other in zip(torch.autograd.grad((found * weights).sum(), vectors), gradients, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.promise("T1")
@pytest.mark.parametrize("mean", [False, True])
def test_scores_and_gradients_are_those_of_sentence_transformers(mean, tiny_blocks):
    queries, documents = [3, 1, 7], [5, 30, 2, 1, 8, 8]
    vectors = [
        random(lengths, 3, seed, torch.float32).requires_grad_() for seed, lengths in enumerate((queries, documents))
    ]
    lists = [list(vectors[0].split(queries)), list(vectors[1].split(documents))]
    found = maxsim(vectors[0], cumulative(queries), vectors[1], cumulative(documents), mean=mean)
    expected = similarity.maxsim(*lists, length_normalize=mean)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(
        torch.autograd.grad(found.sin().sum(), vectors), torch.autograd.grad(expected.sin().sum(), vectors), strict=True
    ):
        torch.testing.assert_close(mine, other)
    pairs = maxsim_pairs(vectors[0], cumulative(queries), vectors[1], cumulative(documents), mean=mean)
    repeated = [query for query in lists[0] for _ in range(2)]
    other = similarity.maxsim_pairwise(repeated, lists[1], length_normalize=mean)
    torch.testing.assert_close(pairs.flatten(), other)


@pytest.mark.promise("T2")
@pytest.mark.parametrize("candidates", [False, True])
def test_the_gradient_is_the_derivative_of_the_score(candidates, tiny_blocks):
    queries, documents, score = [3, 0, 2], [4, 9, 0, 1, 2, 3], maxsim_pairs if candidates else maxsim
    vectors = (random(queries).requires_grad_(), random(documents, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(
        lambda q, d: score(q, cumulative(queries), d, cumulative(documents), mean=True), vectors, eps=1e-7, atol=1e-5
    )


@pytest.mark.promise("T2")
def test_only_the_side_that_needs_a_gradient_gets_one():
    queries, documents = random([4]).requires_grad_(), random([9], seed=1)
    maxsim(queries, cumulative([4]), documents, cumulative([3, 6])).sum().backward()
    expected = queries.grad.clone()
    queries.grad, documents.requires_grad = None, True
    maxsim(queries.detach(), cumulative([4]), documents, cumulative([3, 6])).sum().backward()
    assert queries.grad is None
    scores = (queries.detach() @ documents.T).detach()
    best = documents.detach()[:3][scores[:, :3].argmax(1)] + documents.detach()[3:][scores[:, 3:].argmax(1)]
    torch.testing.assert_close(expected, best)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_fp32_also_under_autocast(dtype):
    queries, documents = [40, 3], [50, 7, 2]
    vectors = [random(queries, 16, dtype=torch.float32).to(dtype), random(documents, 16, 1, torch.float32).to(dtype)]
    expected = maxsim(vectors[0].float(), cumulative(queries), vectors[1].float(), cumulative(documents))
    leaves = [each.clone().requires_grad_() for each in vectors]
    with torch.autocast("cpu", torch.bfloat16):
        found = maxsim(leaves[0], cumulative(queries), leaves[1], cumulative(documents))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    found.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [dtype, dtype]


@pytest.mark.promise("T2")
def test_memory_does_not_grow_with_the_lengths():
    query, documents = random([2000], 16, dtype=torch.float32), [30_000, 1, 2000]
    vectors = random(documents, 16, 1, torch.float32)
    whole = 4 * len(query) * len(vectors)
    scores = []
    used = peak_bytes(
        lambda: scores.append(maxsim(query, cumulative([2000]), vectors, cumulative(documents), memory_mb=1))
    )
    assert used < 1.1 * 2**20 < whole / 200
    expected = [(query @ part.T).amax(1).sum() for part in vectors.split(documents)]
    torch.testing.assert_close(scores[0][0], torch.stack(expected), rtol=1e-5, atol=1e-3)


@pytest.mark.promise("T2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [[300] * 200, [60_000], [3] * 800], ids=["many", "long", "short"])
def test_memory_of_the_gradient_does_not_grow_with_the_lengths(documents, dtype):
    lengths = [300, 1, 400]
    leaves = [random(each, 64, dtype=torch.float32).to(dtype).requires_grad_() for each in (lengths, documents)]
    scores = maxsim(leaves[0], cumulative(lengths), leaves[1], cumulative(documents), memory_mb=1)
    found = []
    used = peak_bytes(lambda: found.extend(torch.autograd.grad(scores.sum(), leaves, retain_graph=True)))
    # The gradients are fp32 first, and what half precision is made of them is beside them.
    gradients = sum(leaf.numel() for leaf in leaves) * (4 if dtype == torch.float32 else 6)
    assert used - gradients < 1.1 * 2**20
    for mine, other in zip(found, torch.autograd.grad(scores.sum(), leaves), strict=True):
        assert torch.equal(mine, other)  # no order of addition is left to chance


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.ones(2, 3), cumulative([2]), torch.ones(2, 4), cumulative([2])), "width 3, but documents' of 4"),
        ((torch.ones(2, 3), cumulative([2]), torch.ones(2, 3), cumulative([3])), "document_cu_seqlens must rise"),
        ((torch.ones(2, 3), cumulative([2]), torch.ones(2, 3), cumulative([2]), 0), "memory_mb is 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        maxsim(*arguments)
    with pytest.raises(ValueError, match="3 documents cannot be shared out equally to 2 queries"):
        maxsim_pairs(torch.ones(2, 3), cumulative([1, 1]), torch.ones(3, 3), cumulative([1, 1, 1]))
