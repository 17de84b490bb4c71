"""Gradient caching against the plain backward pass of the whole batch, and against sentence-transformers' own."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import random_pairs, tiny_config
from training.data.packing import pack
from training.engine import gradient_cache
from training.engine.gradient_cache import cached_backward
from training.objectives.embed import embed
from training.objectives.losses.contrastive import info_nce

PAIRS = 6


def documents(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator)
    return [torch.randint(5, 31, (int(length),), generator=generator).tolist() for length in lengths]


def pairs_loss(embeddings):
    return info_nce(*embeddings.split([PAIRS, PAIRS, len(embeddings) - 2 * PAIRS]), symmetric=True)


def double_model(dropout: float) -> LongEmbedModel:
    torch.manual_seed(1)
    return LongEmbedModel(tiny_config(hidden_dropout_prob=dropout)).double().train()


def gradients(model) -> dict[str, torch.Tensor]:
    taken = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return taken


def plain_gradients(model, chunks) -> dict[str, torch.Tensor]:
    """All chunks with their graph at once: the definition."""
    torch.manual_seed(7)
    pairs_loss(torch.cat([embed(model, chunk) for chunk in chunks]))[0].backward()
    return gradients(model)


def cached_gradients(model, chunks) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    cached_backward(model, chunks, lambda chunk: embed(model, chunk), pairs_loss)
    return gradients(model)


@pytest.mark.promise("C8")
@given(budget=st.integers(1, 400), dropout=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 9))
def test_gradient_equals_that_of_the_whole_batch(budget, dropout, seed):
    model, chunks = double_model(dropout), pack(documents(3 * PAIRS, seed), budget)
    expected, cached = plain_gradients(model, chunks), cached_gradients(model, chunks)
    torch.testing.assert_close(cached, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.promise("C8")
def test_without_replay_of_the_random_numbers_the_gradient_is_wrong(monkeypatch):
    model, chunks = double_model(0.1), pack(documents(3 * PAIRS), 60)
    expected = plain_gradients(model, chunks)
    monkeypatch.setattr(gradient_cache.RandomState, "replay", lambda self: torch.random.fork_rng([]))
    wrong = cached_gradients(model, chunks)
    name = "layers.0.attention.v_proj.weight"
    assert F.cosine_similarity(wrong[name].flatten(), expected[name].flatten(), dim=0) < 0.99


@pytest.mark.promise("C8")
def test_random_numbers_go_on_as_after_one_forward_pass():
    model, chunks = double_model(0.1), pack(documents(3 * PAIRS), 60)
    plain_gradients(model, chunks)
    after_plain = torch.rand(3)
    cached_gradients(model, chunks)
    torch.testing.assert_close(torch.rand(3), after_plain, atol=0, rtol=0)


@pytest.mark.promise("C8")
def test_a_parameter_of_the_loss_gets_its_gradient():
    model, chunks = double_model(0.0), pack(documents(3 * PAIRS), 60)
    results = []
    for run in (lambda loss: loss(torch.cat([embed(model, c) for c in chunks]))[0].backward(), None):
        log_temperature = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)

        def loss(embeddings, log_temperature=log_temperature):
            return info_nce(*embeddings.split(PAIRS), temperature=log_temperature.exp())

        run(loss) if run else cached_backward(model, chunks, lambda chunk: embed(model, chunk), loss)
        results.append(log_temperature.grad)
    torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=0)


@pytest.mark.promise("C8")
def test_holds_the_activations_of_one_chunk_however_many_there_are():
    model = double_model(0.0)

    def peak_bytes(count: int) -> int:
        held = peak = 0

        def hold(tensor: torch.Tensor) -> _Saved:
            nonlocal held, peak
            size = tensor.numel() * tensor.element_size()
            held, peak = held + size, max(peak, held + size)
            saved = _Saved(tensor)
            weakref.finalize(saved, release, size)
            return saved

        def release(size: int) -> None:
            nonlocal held
            held -= size

        chunks = pack([[5] * 30] * 3 * PAIRS * count, 30 * 3 * PAIRS)
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda saved: saved.tensor):
            cached_backward(model, chunks, lambda c: embed(model, c), lambda e: (e.square().sum(), {}))
        return peak

    few, many = peak_bytes(2), peak_bytes(8)
    assert few > 0
    assert many <= 1.05 * few


class _Saved:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.promise("C8")
def test_equals_sentence_transformers_cached_loss_on_padded_batches(model_folder, word_tokenizer):
    """Their cache over padded batches of two, ours over packed chunks: the same loss and the same gradients."""
    theirs = SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu", local_files_only=True)
    theirs = theirs.eval().double()
    rows = random_pairs(PAIRS, negatives=1)
    columns = [[row[name] for row in rows] for name in ("anchor", "positive", "negative_0")]
    loss = CachedMultipleNegativesRankingLoss(theirs, scale=20.0, mini_batch_size=2)
    value = loss([theirs.preprocess(texts) for texts in columns], None)
    value.backward()
    expected = {name.split("model.", 1)[1]: p.grad for name, p in theirs.named_parameters() if p.grad is not None}

    model = LongEmbedModel.from_pretrained(model_folder).eval().double()
    chunks = pack([ids for texts in columns for ids in word_tokenizer(texts)["input_ids"]], 50)

    def our_loss(embeddings):
        loss, _ = info_nce(*embeddings.split(PAIRS))
        return loss, {"loss": loss.detach()}

    metrics = cached_backward(
        model,
        chunks,
        lambda chunk: embed(model, chunk),
        our_loss,
    )
    torch.testing.assert_close(metrics["loss"], value.detach(), atol=1e-10, rtol=0)
    ours = {name: gradient for name, gradient in gradients(model).items() if name in expected}
    assert len(ours) == len(list(model.parameters()))
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
