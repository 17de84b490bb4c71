"""Objectives against their losses by hand, and their cached gradients against the plain backward pass."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.arguments import parse
from common.errors import UserError
from common.score_scaling import min_max_
from modeling_longembed import LongEmbedModel
from tests.covering import covering_first
from tests.training.objectives.objective_cases import (
    CASES,
    arguments_of,
    batch_of,
    double_encoder,
    double_objective,
    gradients,
    state_of,
    words_of,
)
from tests.training.tiny_training import tiny_config
from training.data.packing import pack
from training.engine.state import enable_gradient_checkpointing
from training.models.tuning import TuningArguments, select_parameters
from training.objectives import pair_step
from training.objectives.contrastive import blocks, teaching
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.blocks import GatheredBatch
from training.objectives.contrastive.objective import Objective
from training.objectives.contrastive.registry import OBJECTIVES, build_objective
from training.objectives.embed import embed, pool
from training.objectives.heads import ProjectionHead
from training.objectives.losses import contrastive as losses_contrastive
from training.objectives.losses import token_vectors
from training.objectives.losses.contrastive import info_nce
from training.objectives.losses.momentum import momentum_contrast
from training.objectives.losses.regularizers import debias, spread_out
from training.objectives.losses.simclr import nt_xent
from training.objectives.losses.similarity import similarity
from training.objectives.losses.supcon import sup_con
from training.objectives.losses.token_vectors import TokenVectors
from training.objectives.losses.vicreg import vicreg
from training.objectives.pair_step import pair_gradient

PAIRS = 6


def test_every_objective_has_a_case():
    assert {case.split()[0] for case in CASES} == set(OBJECTIVES)


def test_options_and_the_objectives_that_take_them_exist():
    options = {option.name: option.type for option in fields(ObjectiveArguments)}
    assert set(get_args(options["objective"])) == set(OBJECTIVES)


def random_batch(columns: int, **more) -> GatheredBatch:
    """PAIRS rows of random embeddings, of one process; `columns` texts each, all different."""
    generator = torch.Generator().manual_seed(3)
    embeddings = 3 * torch.randn(PAIRS, columns, 32, dtype=torch.float64, generator=generator)
    classes = {name: torch.arange(PAIRS) % 3 for name in ("label", "group")}
    text_ids = torch.arange(PAIRS * columns).view(PAIRS, columns)
    counts = torch.randint(1, 9, (PAIRS, columns), generator=generator)
    vectors = unit(torch.randn(int(counts.sum()), 16, dtype=torch.float64, generator=generator))
    vectors[: len(vectors) // 3] *= 0.5  # weights
    words = 9 * torch.rand(PAIRS, (columns - 1) * PAIRS, generator=generator)
    tokens = TokenVectors(vectors, (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts), counts)
    return GatheredBatch(embeddings, text_ids, slice(None), classes, **({"tokens": tokens, "words": words} | more))


def unit(rows: Tensor) -> Tensor:
    """Rows of unit length."""
    return F.normalize(rows, dim=-1)


def random_unit(rows: int, width: int, seed: int) -> Tensor:
    """Random rows of unit length."""
    return unit(torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


KEYS, QUEUED_KEYS = random_unit(2 * PAIRS, 32, seed=5).chunk(2)  # of the batch, and of an earlier one


# Each function below computes the loss of an objective from the gathered batch. Where it calls the production loss, it
# tests the wiring alone: which columns, options, heads and dimensions reach that loss. The formulas have independent
# oracles in tests/training/objectives/losses.


def info_nce_by_hand(objective: Objective, batch: GatheredBatch) -> Tensor:
    """Test the wiring: columns, temperature, symmetry and the weight of own negatives, by the production loss."""
    query, positive, first, second = unit(batch.embeddings).unbind(1)
    return info_nce(
        query,
        positive,
        torch.cat([first, second]),
        temperature=objective.temperature(),
        symmetric=True,
        negative_weight=-0.5,
        negative_row=torch.arange(2 * PAIRS) % PAIRS,
    )[0]


def masked_info_nce_by_hand(objective: Objective, batch: GatheredBatch) -> Tensor:
    """Compute a cross entropy over what is at most 0.02 more like the query than its positive is."""
    query, positive, *negatives = unit(batch.embeddings).unbind(1)
    scores = query @ torch.cat([positive, *negatives]).T
    own = scores.diagonal()[:, None]
    return F.cross_entropy(scores.masked_fill(scores > own + 0.02, -torch.inf) / 0.05, torch.arange(PAIRS))


def auxiliary_terms_by_hand(objective: Objective, batch: GatheredBatch) -> Tensor:
    """Test the wiring: weights and columns of both auxiliary terms, by the production losses."""
    query, positive, *negatives = unit(batch.embeddings).unbind(1)
    spread = (spread_out(query)[0] + spread_out(positive)[0]) / 2
    bias = debias(positive, batch.classes["group"])[0]
    return info_nce(query, positive, torch.cat(negatives))[0] + 0.5 * spread + 2.0 * bias


def matryoshka_by_hand(objective: Objective, batch: GatheredBatch) -> Tensor:
    """Test the wiring: dimensions, their weights and unit length, by the production loss."""

    def at(dim: int) -> Tensor:
        query, positive, *negatives = unit(batch.embeddings[..., :dim]).unbind(1)
        return info_nce(query, positive, torch.cat(negatives))[0]

    return at(32) + 0.5 * at(8)


def simcse_by_hand(objective: Objective, batch: GatheredBatch) -> Tensor:
    """Compute the cross entropy of one view against the other."""
    first, second = unit(batch.embeddings).unbind(1)
    return F.cross_entropy(first @ second.T / 0.1, torch.arange(PAIRS))


def through_head(head: ProjectionHead, rows: Tensor, dims: int = 32) -> Tensor:
    """Compute the head by its formula, with the columns of the first layer that read the first dimensions."""
    first, norm, _, last = head.layers
    inner = rows[:, :dims] @ first.weight[:, :dims].T + first.bias
    inner = (inner - inner.mean(0)) / (inner.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
    return inner.clamp(min=0) @ last.weight.T


def nt_xent_by_hand(objective: Objective, batch: GatheredBatch, dims: int = 32) -> Tensor:
    """Test the wiring: the head over both views at once, and the temperature, by the production loss."""
    first, second = unit(through_head(objective.head, torch.cat(batch.embeddings.unbind(1)), dims)).chunk(2)
    return nt_xent(first, second, temperature=objective.temperature())[0]


def sup_con_by_hand(objective: Objective, batch: GatheredBatch, dims: int = 32) -> Tensor:
    """Test the wiring: all texts of a row with its label, by the production loss."""
    views = unit(batch.embeddings[..., :dims]).unbind(1)
    return sup_con(torch.cat(views), (torch.arange(PAIRS) % 3).repeat(len(views)), temperature=0.07)[0]


def vicreg_by_hand(objective: Objective, batch: GatheredBatch) -> Tensor:
    """Test the wiring: the expander over each view, by the production loss."""
    return vicreg(*(through_head(objective.head, view) for view in batch.embeddings.unbind(1)))[0]


def momentum_by_hand(objective: Objective, batch: GatheredBatch, dims: int = 32) -> Tensor:
    """Test the wiring: anchors against the keys of the batch and of the queue, by the production loss."""
    columns = (batch.embeddings[:, 0], KEYS, QUEUED_KEYS)
    return momentum_contrast(*(unit(rows[:, :dims]) for rows in columns), temperature=objective.temperature())[0]


def summed_over(dims: tuple[int, ...], by_hand: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the sum of a loss by hand over first dimensions."""

    def summed(objective: Objective, batch: GatheredBatch) -> Tensor:
        return torch.stack([by_hand(objective, batch, dim) for dim in dims]).sum()

    return summed


def max_sim(query: Tensor, document: Tensor) -> Tensor:
    """The double loop's body: the sum over the query's tokens of the largest product with one of the document."""
    return (query @ document.T).amax(1).sum()


def late_interaction(objective: Objective, batch: GatheredBatch, dim: int = 16, margin: float | None = None) -> Tensor:
    """InfoNCE both ways over MaxSim, text by text; `margin` detects false negatives by the scores themselves."""
    tokens = batch.tokens
    texts = [
        [tokens.vectors[first : first + count] for first, count in zip(*row, strict=True)]
        for row in zip(tokens.first.tolist(), tokens.count.tolist(), strict=True)
    ]
    texts = [[text.norm(dim=1)[:, None] * unit(text[:, :dim]) for text in row] for row in texts]
    documents = [row[column] for column in range(1, 4) for row in texts]
    scores = torch.stack([torch.stack([max_sim(row[0], document) for document in documents]) for row in texts])
    own, excluded = scores[:, :PAIRS].diagonal(), torch.zeros_like(scores, dtype=torch.bool)
    if margin is not None:
        excluded = scores > own[:, None] + margin
    there = F.cross_entropy(scores.masked_fill(excluded, -torch.inf) / objective.temperature(), torch.arange(PAIRS))
    if not objective.arguments.symmetric:
        return there
    return (there + F.cross_entropy(scores[:, :PAIRS].T / objective.temperature(), torch.arange(PAIRS))) / 2


def late_interaction_by_hand(objective: Objective, batch: GatheredBatch) -> Tensor:
    return late_interaction(objective, batch, 16) + late_interaction(objective, batch, 8)


def masked_late_interaction_by_hand(objective: Objective, batch: GatheredBatch) -> Tensor:
    return late_interaction(objective, batch, margin=0.02)


def taught_by_hand(objective: Objective, batch: GatheredBatch) -> Tensor:
    """InfoNCE of the vectors, and the divergence of their scores from those of the token vectors."""
    cosine = cosines_with_all_documents(batch)
    taught = divergence(max_sims_with_all_documents(batch) / 0.2, cosine / 0.1)
    return 0.25 * F.cross_entropy(cosine / 0.05, torch.arange(PAIRS)) + 0.5 * taught


def taught_with_words_by_hand(objective: Objective, batch: GatheredBatch) -> Tensor:
    """The same from both scores of each query, one number at a time scaled to what lies between 0 and 1."""
    cosine = cosines_with_all_documents(batch)
    rows = []
    for of_query in zip(max_sims_with_all_documents(batch).tolist(), batch.words.tolist(), strict=True):
        late, words = ([(s - min(scores)) / (max(scores) - min(scores)) for s in scores] for scores in of_query)
        rows.append([(0.7 * one + 0.3 * other) / 0.05 for one, other in zip(late, words, strict=True)])
    taught = divergence(torch.tensor(rows, dtype=torch.float64), cosine / 0.05)
    return F.cross_entropy(cosine / 0.05, torch.arange(PAIRS)) + taught


def max_sims_with_all_documents(batch: GatheredBatch) -> Tensor:
    """MaxSim of each query with the documents of all columns, one column after the other."""
    tokens = batch.tokens
    texts = [
        [tokens.vectors[first : first + count] for first, count in zip(*row, strict=True)]
        for row in zip(tokens.first.tolist(), tokens.count.tolist(), strict=True)
    ]
    documents = [row[column] for column in range(1, 4) for row in texts]
    return torch.stack([torch.stack([max_sim(row[0], document) for document in documents]) for row in texts])


def cosines_with_all_documents(batch: GatheredBatch) -> Tensor:
    query, *columns = unit(batch.embeddings).unbind(1)
    return query @ torch.cat(columns).T


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL( softmax(teacher) || softmax(student) ), a mean over rows."""
    return (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1).mean()


BY_HAND = {  # the columns of the batch, and the loss
    "info_nce": (4, info_nce_by_hand),
    "info_nce masked": (4, masked_info_nce_by_hand),
    "info_nce auxiliary": (4, auxiliary_terms_by_hand),
    "info_nce matryoshka": (4, matryoshka_by_hand),
    "info_nce auxiliary teaching": (4, taught_by_hand),
    "info_nce auxiliary bm25": (4, taught_with_words_by_hand),
    "info_nce maxsim": (4, late_interaction_by_hand),
    "info_nce meanmaxsim": (4, masked_late_interaction_by_hand),
    "simcse": (2, simcse_by_hand),
    "nt_xent": (2, nt_xent_by_hand),
    "nt_xent matryoshka": (2, summed_over((32, 8), nt_xent_by_hand)),
    "sup_con": (3, sup_con_by_hand),
    "sup_con matryoshka": (3, summed_over((16, 8), sup_con_by_hand)),
    "vicreg": (2, vicreg_by_hand),
    "momentum": (2, momentum_by_hand),
    "momentum matryoshka": (2, summed_over((32, 8), momentum_by_hand)),
}


@pytest.mark.parametrize("rows_at_once", [512, 4])
@pytest.mark.parametrize("case", CASES)
def test_is_the_loss_by_hand(case, rows_at_once, monkeypatch):
    """Mostly the wiring: see the comment above the functions."""
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", rows_at_once)
    objective = double_objective(case, double_encoder(0.1), PAIRS)
    columns, by_hand = BY_HAND[case]
    batch = random_batch(columns)
    if case.startswith("momentum"):
        # The encoder in training embeds the anchors alone, although the texts have two columns.
        batch = replace(batch, embeddings=batch.embeddings[:, :1], key=KEYS)
        objective.remember(QUEUED_KEYS, torch.arange(1000, 1000 + PAIRS))
    loss, metrics = objective(batch)
    torch.testing.assert_close(loss, by_hand(objective, batch), atol=1e-10, rtol=1e-10)
    if "auxiliary" not in case:
        torch.testing.assert_close(metrics["loss"], loss.detach(), atol=0, rtol=0)


@pytest.fixture
def compared(monkeypatch) -> list[tuple[str, int]]:
    """Of each score matrix that objectives compute: of which texts it is, and the number of its rows."""
    found, compute = [], similarity

    def counted(rows, columns, temperature):
        found.append((type(rows).__name__, len(rows)))
        return compute(rows, columns, temperature)

    for module in (losses_contrastive, teaching):
        monkeypatch.setattr(module, "similarity", counted)
    return found


@pytest.mark.parametrize(("rows_at_once", "expected"), [(512, [6]), (4, [4, 6, 2, 6])])
def test_scores_are_computed_once_and_judge_themselves(compared, monkeypatch, rows_at_once, expected):
    """MaxSim is what a step of late interaction costs: the other direction of all rows is its transpose."""
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", rows_at_once)
    arguments = ObjectiveArguments(similarity="maxsim", symmetric=True, false_negative_margin=0.0)
    objective = build_objective(arguments, double_encoder(), PAIRS)
    _, metrics = objective(random_batch(4))
    assert metrics["false_negative_share"] > 0
    assert compared == [("TokenVectors", rows) for rows in expected]


def test_token_vectors_of_all_columns_are_shortened_at_once(monkeypatch):
    """For each size but the whole one: a copy of them for queries, positives and negatives each would be three."""
    shortened, cut = [], token_vectors.truncate_tokens
    monkeypatch.setattr(token_vectors, "truncate_tokens", lambda *given: shortened.append(given[1]) or cut(*given))
    objective = double_objective("info_nce maxsim", double_encoder(), PAIRS)
    objective(random_batch(4))
    assert shortened == [8]


def test_all_sizes_of_the_vector_learn_from_scores_that_are_computed_once(compared):
    batch = random_batch(4)
    arguments = ObjectiveArguments(teach_vector_by="maxsim", matryoshka_dims=[32, 8], matryoshka_weights=[1.0, 0.5])
    loss, metrics = teaching.teach_vector(batch, arguments)
    assert [kind for kind, _ in compared] == ["TokenVectors", "Tensor", "Tensor"]
    alone = ObjectiveArguments(teach_vector_by="maxsim")
    wide, narrow = (
        teaching.teach_vector(replace(batch, embeddings=batch.embeddings[..., :dim]), alone)[0] for dim in (32, 8)
    )
    torch.testing.assert_close(loss, wide + 0.5 * narrow, atol=1e-12, rtol=0)
    torch.testing.assert_close(metrics["loss_at_8"], narrow, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kind", "temperature"), [("maxsim", 1.0), ("meanmaxsim", 0.05)])
def test_the_teachers_scores_have_the_temperature_of_their_scale(kind, temperature):
    """A mean of cosines at a temperature of 1 would teach that all documents are nearly alike."""
    by_default, given = (
        teaching.teach_vector(random_batch(4), ObjectiveArguments(teach_vector_by=kind, **more))[0]
        for more in ({}, {"teach_temperature": temperature})
    )
    torch.testing.assert_close(by_default, given, atol=0, rtol=0)


def test_the_teachers_scores_with_bm25_have_the_temperature_of_cosines():
    options = {"teach_vector_by": "maxsim", "teach_bm25_weight": 0.5}
    by_default, given = (
        teaching.teach_vector(random_batch(4), ObjectiveArguments(**options, **more))[0]
        for more in ({}, {"teach_temperature": 0.05})
    )
    torch.testing.assert_close(by_default, given, atol=0, rtol=0)


def test_a_query_without_words_learns_from_late_interaction_alone():
    """All of its BM25 scores are 0, of which nothing is left when they are scaled."""
    batch = random_batch(4, words=torch.zeros(PAIRS, 3 * PAIRS))
    options = {"teach_vector_by": "maxsim", "teach_temperature": 0.5}
    with_words, _ = teaching.teach_vector(batch, ObjectiveArguments(**options, teach_bm25_weight=0.5))
    late = min_max_(max_sims_with_all_documents(batch))
    torch.testing.assert_close(with_words, divergence(late, cosines_with_all_documents(batch) / 0.05))
    torch.testing.assert_close(batch.words, torch.zeros(PAIRS, 3 * PAIRS), atol=0, rtol=0)


def test_a_guide_decides_instead_of_the_own_scores():
    """A document that the guide scores higher than the positive leaves the cross entropy."""
    objective = build_objective(ObjectiveArguments(guide_model="somewhere"), double_encoder(), PAIRS)
    guide = random_unit(PAIRS * 3, 5, seed=4).view(PAIRS, 3, 5)
    batch = random_batch(3, guide=guide)
    (q, p, n), (gq, gp, gn) = unit(batch.embeddings).unbind(1), guide.unbind(1)
    by_guide = gq @ torch.cat([gp, gn]).T
    nearer = by_guide > by_guide.diagonal()[:, None]
    assert nearer.any()
    scores = (q @ torch.cat([p, n]).T).masked_fill(nearer, -torch.inf) / 0.05
    loss, metrics = objective(batch)
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.arange(PAIRS)), atol=1e-10, rtol=0)
    assert metrics["false_negative_share"].item() == pytest.approx(nearer.sum().item() / (PAIRS * (2 * PAIRS - 1)))


def plain_backward(model, chunks, embed, loss, *, synchronize=True):
    """Embed all chunks with their graph at once: the definition of what the cache computes."""
    parts = [embed(chunk) for chunk in chunks]
    value, metrics = loss(*(torch.cat(rows) for rows in zip(*parts, strict=True)))
    value.backward()
    return metrics


def two_steps(case: str, encoder: torch.nn.Module, budget: int) -> list[tuple]:
    """Compute loss, gradients and buffers of two batches in chunks of `budget` tokens."""
    objective = double_objective(case, encoder, PAIRS)
    accumulate = pair_gradient(objective, words=words_of(case))
    torch.manual_seed(7)
    results = []
    for seed in (0, 1):
        metrics = accumulate(encoder, batch_of(case, PAIRS, budget, seed), 1.0, True)
        results.append((metrics["loss"], gradients(encoder, objective), state_of(objective)))
    return results


@pytest.mark.parametrize("case", CASES)
def test_blocks_of_rows_change_no_gradient_and_no_metric(case, monkeypatch):
    def step():
        encoder = double_encoder()
        objective = double_objective(case, encoder, PAIRS)
        accumulate = pair_gradient(objective, words=words_of(case))
        metrics = [accumulate(encoder, batch_of(case, PAIRS, 100, seed), 1.0, True) for seed in (0, 1)]
        return metrics, gradients(encoder, objective)

    whole = step()
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", 4)
    torch.testing.assert_close(step(), whole, atol=1e-10, rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize("case", ["info_nce", "info_nce masked", "nt_xent", "sup_con"])
def test_scores_take_memory_in_proportion_to_the_rows(case, monkeypatch):
    """For twice the rows autograd keeps twice, not four times, as many bytes for the backward pass."""
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", 64)
    objective = double_objective(case, double_encoder(), PAIRS)

    def kept(rows: int) -> int:
        sizes = {}
        embeddings = torch.randn(rows, 2, 32, dtype=torch.float64, requires_grad=True)
        batch = GatheredBatch(
            embeddings, torch.arange(2 * rows).view(rows, 2), slice(None), {"label": torch.arange(rows) // 2}
        )

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = objective(batch)[0]  # kept alive, so that no two tensors share an address
        assert loss.requires_grad
        return sum(sizes.values())

    assert kept(8 * blocks.ROWS_AT_ONCE) < 2.5 * kept(4 * blocks.ROWS_AT_ONCE)


@pytest.mark.promise("C8")
@pytest.mark.parametrize(
    ("case", "tuning", "dropout"),
    covering_first(
        [
            pytest.param(case, tuning, dropout, id=f"{case}-{tuning}-{dropout}")
            for case in CASES
            for tuning in ("full", "lora with checkpointing")
            for dropout in (0.0, 0.1)
        ]
    ),
)
def test_the_cached_gradient_is_the_plain_one(case, tuning, dropout, monkeypatch):
    def encoder():
        model = double_encoder(dropout)
        if tuning == "full":
            return model
        adapted = select_parameters(model, TuningArguments(tuning="lora")).double().train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # it starts at zero, at which A has no gradient
                torch.nn.init.normal_(parameter, std=0.1)
        enable_gradient_checkpointing(adapted)
        return adapted

    cached = two_steps(case, encoder(), budget=60)
    monkeypatch.setattr(pair_step, "cached_backward", plain_backward)
    plain = two_steps(case, encoder(), budget=60)
    torch.testing.assert_close(cached, plain, atol=1e-10, rtol=1e-8)
    if not dropout:  # without dropout the chunks make no difference
        torch.testing.assert_close(two_steps(case, encoder(), budget=10**6), cached, atol=1e-10, rtol=1e-8)


def test_in_evaluation_mode_nothing_is_remembered():
    """The rehearsal of the heaviest batch relies on it."""
    encoder = double_encoder()
    objective = double_objective("momentum", encoder, PAIRS).eval()
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight.mul_(2)
    before = state_of(objective)
    pair_gradient(objective)(encoder, batch_of("momentum", PAIRS, 100), 1.0, False)
    torch.testing.assert_close(state_of(objective), before, atol=0, rtol=0)


@pytest.mark.promise("C5")
def test_the_momentum_encoder_is_an_average_of_weights_and_its_keys_are_theirs():
    """Closed form after weights 1 and 2 on top of 0: m^2 w0 + m (1 - m) w1 + (1 - m) w2."""
    encoder = double_encoder()
    objective = double_objective("momentum", encoder, PAIRS, {"momentum": 0.75})
    trained = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    batch = batch_of("momentum", PAIRS, 100)
    weights = [start]
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        weights.append({name: parameter.detach().clone() for name, parameter in trained.items()})
        keys = objective.keys(encoder, batch)
    expected = {
        name: 0.75**2 * start[name] + 0.75 * 0.25 * weights[1][name] + 0.25 * weights[2][name] for name in start
    }
    torch.testing.assert_close(objective.momentum_encoder.weights(), expected, atol=1e-12, rtol=0)
    encoder.load_state_dict(expected, strict=False)
    with torch.no_grad():
        own = torch.cat([embed(encoder, chunk) for chunk in batch.column_chunks(1)])
    torch.testing.assert_close(keys, own, atol=1e-10, rtol=0)


@pytest.mark.promise("C5")
def test_the_queue_holds_the_keys_of_the_last_batches_with_their_texts():
    encoder = double_encoder()
    objective = double_objective("momentum", encoder, PAIRS, {"momentum": 1.0, "queue_size": 2 * PAIRS})
    batches = [batch_of("momentum", PAIRS, 100, seed) for seed in range(2)]
    for batch in batches:
        pair_gradient(objective)(encoder, batch, 1.0, True)
    keys, ids = objective.queue.filled()
    with torch.no_grad():
        expected = [embed(encoder, chunk) for batch in batches for chunk in batch.column_chunks(1)]
    torch.testing.assert_close(keys, torch.cat(expected), atol=1e-10, rtol=0)
    assert ids.tolist() == [number for batch in batches for number in batch.text_ids[PAIRS:].tolist()]


def test_under_lora_the_momentum_encoder_holds_the_adapters_alone():
    adapted = select_parameters(double_encoder(), TuningArguments(tuning="lora"))
    objective = build_objective(arguments_of("momentum"), adapted, PAIRS)
    held = sum(weight.numel() for weight in objective.momentum_encoder.weights().values())
    assert held == sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert all("lora_" in name for name in objective.momentum_encoder.weights())


@pytest.mark.promise("C2")
def test_twins_differ_in_training_alone():
    text = [5, 9, 7, 20]
    encoder = double_encoder(0.1)
    first, second = embed(encoder, pack([text, text], 100)[0])
    assert F.cosine_similarity(first, second, dim=0) < 0.999
    first, second = embed(encoder.eval(), pack([text, text], 100)[0])
    torch.testing.assert_close(first, second, atol=1e-12, rtol=0)


@pytest.mark.promise("C2")
def test_simcse_without_dropout_is_refused():
    with pytest.raises(UserError, match="has no dropout, so that a text and its twin are one vector"):
        build_objective(ObjectiveArguments(objective="simcse"), LongEmbedModel(tiny_config()), PAIRS)
    build_objective(ObjectiveArguments(objective="simcse"), LongEmbedModel(tiny_config(attention_dropout=0.1)), PAIRS)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"matryoshka_dims": [64, 8]}, "--matryoshka_dims 64: must be from 1 to 32, the width of the model"),
        ({"matryoshka_dims": [8], "matryoshka_weights": [1.0, 2.0]}, "2 weights for 1 --matryoshka_dims"),
        ({"objective": "nt_xent", "head_dims": [8, 0]}, "--head_dims 8 0: each must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(options, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        build_objective(ObjectiveArguments(**options), LongEmbedModel(tiny_config(hidden_dropout_prob=0.1)), PAIRS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        *[
            (name, 0, "must be more than 0")
            for name in ("temperature", "teach_temperature", "teach_vector_temperature", "objective_learning_rate")
        ],
        *[
            (name, -0.5, "must be at least 0")
            for name in ("spread_out_weight", "debias_weight", "teach_weight", "objective_weight")
        ],
        ("temperature", "nan", "nan is no finite number"),
        ("spread_out_weight", "inf", "inf is no finite number"),
        ("queue_size", 0, "must be at least 1"),
        ("momentum", 1.5, "must be at least 0 and at most 1"),
    ],
)
def test_a_number_out_of_range_is_refused(option, value, complaint):
    with pytest.raises(UserError, match=f"--{option}.*: {complaint}"):
        parse(ObjectiveArguments, argv=[f"--{option}={value}"])


@pytest.mark.parametrize("name", ["nt_xent", "vicreg", "sup_con"])
def test_a_batch_of_one_is_refused_where_rows_are_compared(name):
    with pytest.raises(UserError, match="compares the rows of a batch, which has 1"):
        build_objective(ObjectiveArguments(objective=name, **CASES[name]), double_encoder(), 1)


def test_a_learned_temperature_stays_at_one_hundredth_or_above():
    arguments = ObjectiveArguments(learnable_temperature=True, temperature=0.001)
    objective = build_objective(arguments, double_encoder(), PAIRS)
    loss, metrics = objective(random_batch(2))
    assert metrics["temperature"].item() == pytest.approx(0.01)
    loss.backward()
    assert objective.log_scale.grad is not None


def test_without_a_head_the_embedding_itself_is_compared():
    objective = build_objective(ObjectiveArguments(objective="vicreg", head_dims=[0]), double_encoder(), PAIRS)
    batch = random_batch(2)
    torch.testing.assert_close(objective(batch)[0], vicreg(*batch.embeddings.unbind(1))[0], atol=1e-12, rtol=0)
    assert not list(objective.parameters())


def test_pool_is_what_embed_normalises():
    chunk = pack([[5, 6], [7, 8, 9]], 10)[0]
    encoder = double_encoder()
    torch.testing.assert_close(embed(encoder, chunk), unit(pool(encoder, chunk)), atol=0, rtol=0)
