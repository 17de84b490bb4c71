"""What `--model` may name: each ranks as its definition says, and MTEB accepts it as a model."""

from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset

from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from eval.models.mteb_models import EvaluatedModel
from eval.synthetic import write_synthetic_task
from eval.tasks.retrieval import load, local_task

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly brew tea in large kettles".split()  # noqa: SIM905
METADATA = mteb.get_task("LEMBQMSumRetrieval").metadata


def model_of(text: str, tmp_path, **settings):
    return EvaluatedModel.parse(text, **settings).load(VectorCache(tmp_path / "v.sqlite"), 400, False)


def random_texts(count: int, longest: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, longest))) for _ in range(count)]


def as_dataset(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"id": [f"t{i}" for i in range(len(texts))], "text": texts})


def ranking(model, queries: list[str], documents: list[str], top_k: int, **more) -> dict[str, dict[str, float]]:
    where = {"task_metadata": METADATA, "hf_split": "test", "hf_subset": "default"}
    model.index(as_dataset(documents), **where, encode_kwargs={}, num_proc=None)
    return model.search(as_dataset(queries), **where, top_k=top_k, encode_kwargs={}, num_proc=None, **more)


def search(model, queries: list[str], documents: list[str], top_k: int) -> list[dict[str, float]]:
    return list(ranking(model, queries, documents, top_k).values())


@pytest.mark.parametrize("top_k", [3, 1000])
def test_chunk_max_is_the_best_cosine_over_chunks(tiny_sentence_transformer, tmp_path, top_k):
    model = model_of(f"chunk-max:{tiny_sentence_transformer}:16", tmp_path)
    documents, queries = random_texts(30, 90, 0), random_texts(5, 20, 1)
    found = search(model, queries, documents, top_k)
    chunks, asked = (
        model.scorer.encoder(documents, mteb.types.PromptType.document),
        model.scorer.encoder(queries, mteb.types.PromptType.query),
    )
    for q, scores in zip(asked, found, strict=True):
        query = q.sum(0) / np.linalg.norm(q.sum(0))
        exact = np.array([max(c @ query / np.linalg.norm(c) for c in matrix) for matrix in chunks])
        best = np.argsort(-exact)[:top_k]
        assert set(scores) == {f"t{i}" for i in best}
        np.testing.assert_allclose([scores[f"t{i}"] for i in best], exact[best], atol=1e-5)


def test_chunks_of_a_whole_text_are_the_model_itself(tiny_sentence_transformer, tmp_path):
    """Where nothing is longer than a chunk, all baselines over one model are that model."""
    documents, queries = random_texts(12, 12, 0), random_texts(4, 8, 1)
    loaders = [SimpleNamespace(dataset=as_dataset(texts)) for texts in (queries, documents)]
    scores = []
    for name in (
        f"{tiny_sentence_transformer}",
        f"truncate:{tiny_sentence_transformer}:40",
        f"chunk-mean:{tiny_sentence_transformer}:40",
    ):
        model = model_of(name, tmp_path)
        vectors = [
            model.encode(loader, prompt_type=kind)
            for loader, kind in zip(loaders, (mteb.types.PromptType.query, mteb.types.PromptType.document), strict=True)
        ]
        scores.append(np.asarray(model.similarity(*vectors)))
    found = search(model_of(f"chunk-max:{tiny_sentence_transformer}:40", tmp_path), queries, documents, 100)
    scores.append(np.array([[row[f"t{i}"] for i in range(len(documents))] for row in found]))
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], atol=1e-5)


def test_bm25_is_lucenes_formula(tmp_path):
    """score = sum over query terms of ln(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 (1 - b + b |d| / mean |d|))."""
    vocabulary = ["fox", "whale", "frog", "lantern", "kettle", "wizard", "teapot", "bridge"]
    generator = np.random.default_rng(0)
    documents = [" ".join(generator.choice(vocabulary, generator.integers(3, 30))) for _ in range(20)]
    queries = [" ".join(generator.choice(vocabulary, 2, replace=False)) for _ in range(6)]
    counts = np.array([[text.split().count(word) for word in vocabulary] for text in documents], dtype=float)
    n, lengths = (counts > 0).sum(0), counts.sum(1, keepdims=True)
    weights = np.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
    weights = weights * counts / (counts + 1.5 * (1 - 0.75 + 0.75 * lengths / lengths.mean()))
    for query, scores in zip(queries, search(model_of("bm25", tmp_path), queries, documents, 20), strict=True):
        exact = weights[:, [vocabulary.index(word) for word in query.split()]].sum(1)
        np.testing.assert_allclose([scores[f"t{i}"] for i in range(20)], exact, rtol=1e-5)


@pytest.mark.promise("E1")
def test_passkey_is_all_for_an_oracle_and_one_in_a_hundred_for_chance(minilm_tokenizer, tmp_path):
    """BM25 sees the name of the person wherever it is; MTEB's random encoder sees nothing."""
    write_synthetic_task(tmp_path / "Passkey", "passkey", minilm_tokenizer, [128, 256, 512, 1024])
    task = local_task(tmp_path / "Passkey")
    load(task)
    means = []
    for model in (model_of("bm25", tmp_path), mteb.get_model("mteb/baseline-random-encoder")):
        result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
        means.append(np.mean([subsets[0]["ndcg_at_1"] for subsets in result.task_results[0].scores.values()]))
    assert means[0] > 0.99
    assert means[1] < 0.04  # 200 queries at 1/100: mean 0.01, standard deviation 0.007


@pytest.mark.parametrize(
    "name",
    ["{}", *(pytest.param(f"chunk-{kind}:{{}}:16", marks=pytest.mark.slow) for kind in ("mean", "max")), "bm25"],
)
def test_mtebs_own_check_of_models_passes(tiny_sentence_transformer, tmp_path, name):
    from mteb.mocks.mock_run import mock_run

    results = mock_run(model_of(name.format(tiny_sentence_transformer), tmp_path))
    failed = {task: result for task, result in results.task_results.items() if type(result).__name__ == "TaskError"}
    assert not failed
    assert any(type(result).__name__ == "TaskResult" for result in results.task_results.values())


def test_settings_that_change_vectors_change_where_results_lie(tiny_sentence_transformer):
    names = [
        str(tiny_sentence_transformer),
        *(
            f"{kind}:{tiny_sentence_transformer}:{n}"
            for kind in ("truncate", "chunk-mean", "chunk-max")
            for n in (16, 32)
        ),
    ]
    metas = [EvaluatedModel.parse(name).meta for name in [*names, "bm25"]]
    metas += [
        EvaluatedModel.parse(names[0], max_length=16).meta,
        EvaluatedModel.parse(names[0], precision="bfloat16").meta,
    ]
    places = {(meta.name, meta.revision, meta.experiment_name) for meta in metas}
    assert len(places) == len(metas)
    assert metas[0].n_parameters == sum(p.numel() for p in _bert(tiny_sentence_transformer).parameters())


def _bert(folder) -> torch.nn.Module:
    from transformers import BertModel

    return BertModel.from_pretrained(folder)


@pytest.mark.parametrize("text", ["truncate:x", "truncate:x:0", "chunk-mean::64", "chunk-max:x:many", "truncate:x:"])
def test_a_malformed_baseline_is_told_how_to_write_it(text):
    with pytest.raises(UserError, match=r"write (truncate|chunk-mean|chunk-max):PATH:N with N tokens"):
        EvaluatedModel.parse(text)
