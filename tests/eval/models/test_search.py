"""Late interaction, late chunks and combinations with BM25 score as their definitions say, on any MTEB task."""

import json
import re
import shutil

import mteb
import numpy as np
import pytest
import torch
from mteb.models.search_wrappers import SearchEncoderWrapper
from mteb.types import PromptType
from tokenizers.processors import TemplateProcessing

from common.encoders.encoder import Encoder
from common.encoders.model_spec import ModelSpec
from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from eval.models.costs import Costs
from eval.models.mteb_models import EvaluatedModel, OneVector
from eval.tasks.retrieval import load, local_task
from tests.eval.models.test_mteb_models import model_of, ranking, search
from tests.training.tiny_training import random_documents, tiny_config, word_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny models of ours: with token vectors of 8 dimensions and weights of query words, and without a head."""
    from modeling_longembed import LongEmbedModel

    root = tmp_path_factory.mktemp("models")
    for name, changes in (("head", {"token_dim": 8, "query_token_weights": "idf"}), ("states", {})):
        torch.manual_seed(0)
        model = LongEmbedModel(tiny_config(initializer_range=0.5, **changes)).eval()
        model.tokenizer = word_tokenizer()
        if changes:
            model.token_output.query_table.uniform_(0.1, 3)
        model.save_pretrained(root / name)
    return root


DOCUMENTS = [row["text"] for row in random_documents(12)]
QUERIES = ["river stone 3", "table green seven night", "music 7 river", "winter garden bread"]


def matrix(model) -> np.ndarray:
    """The scores of all documents, `(queries, documents)`."""
    found = search(model, QUERIES, DOCUMENTS, 1000)
    return np.array([[row[f"t{i}"] for i in range(len(DOCUMENTS))] for row in found])


def searching(model):
    """A model of one vector behind the wrapper that MTEB itself puts it behind."""
    return SearchEncoderWrapper(model) if isinstance(model, OneVector) else model


def double_loop(queries, documents) -> np.ndarray:
    """MaxSim, written out: for each query token the largest inner product with a token of the document; their sum."""
    return np.array(
        [[sum(max(float(a @ b) for b in document) for a in query) for document in documents] for query in queries]
    )


def token_vectors(folder):
    from modeling_longembed import LongEmbedModel

    model = LongEmbedModel.from_pretrained(folder).eval()
    kept = {"output_value": "tokens", "precision": "float32"}
    return model.encode(QUERIES, is_query=True, **kept), model.encode(DOCUMENTS, is_query=False, **kept)


@pytest.mark.promise("T20")
@pytest.mark.parametrize("name", ["head", "states"])
def test_token_scores_are_the_double_loop(folders, tmp_path, name):
    exact = double_loop(*token_vectors(folders / name))
    found = matrix(model_of(f"{folders / name}@tokens:precision=float32", tmp_path))
    np.testing.assert_allclose(found, exact, atol=1e-4)
    half = matrix(model_of(f"{folders / name}@tokens", tmp_path))
    assert 0 < np.abs(half - exact).max() < 2e-2  # a step of float16 is 0.0005 of a coordinate


def test_fewer_dimensions_and_no_weights_are_those_of_the_vectors(folders, tmp_path):
    queries, documents = token_vectors(folders / "head")

    def cut(matrices, dim):
        return [m[:, :dim] / np.linalg.norm(m[:, :dim], axis=1, keepdims=True) for m in matrices]

    weights = [np.linalg.norm(m, axis=1, keepdims=True) for m in queries]
    assert max(w.max() for w in weights) > 1.5  # otherwise this test would not see that they are left out
    weighted = [w * m for w, m in zip(weights, cut(queries, 3), strict=True)]
    found = matrix(model_of(f"{folders / 'head'}@tokens:dim=3,precision=float32", tmp_path))
    np.testing.assert_allclose(found, double_loop(weighted, cut(documents, 3)), atol=1e-4)
    plain = matrix(model_of(f"{folders / 'head'}@tokens:precision=float32,weights=none", tmp_path))
    np.testing.assert_allclose(plain, double_loop(cut(queries, 8), documents), atol=1e-4)


@pytest.mark.promise("T20")
def test_late_chunks_are_the_best_cosine_over_passages(folders, tmp_path):
    from modeling_longembed import LongEmbedModel

    model = LongEmbedModel.from_pretrained(folders / "states").eval()
    passages = model.encode(DOCUMENTS, late_chunk_tokens=16, normalize=True, precision="float32")
    assert max(map(len, passages)) > 2
    exact = np.stack([(model.encode(QUERIES, precision="float32") @ p.T).max(1) for p in passages], axis=1)
    np.testing.assert_allclose(matrix(model_of(f"{folders / 'states'}@chunks:16", tmp_path)), exact, atol=1e-5)


@pytest.mark.promise("T20")
def test_a_hybrid_is_the_convex_combination_of_scores_between_0_and_1(folders, tmp_path):
    for name in (f"{folders / 'head'}@tokens", f"{folders / 'states'}"):
        if "@" in name:
            first = matrix(model_of(name, tmp_path))
        else:
            encoder = model_of(name, tmp_path).encoder
            first = np.concatenate(encoder(QUERIES, "query")) @ np.concatenate(encoder(DOCUMENTS, "document")).T
        second = matrix(model_of("bm25", tmp_path))
        scaled = [(s - s.min(1, keepdims=True)) / np.ptp(s, axis=1)[:, None] for s in (first, second)]
        for weight in (0, 0.3, 1):
            found = matrix(model_of(f"hybrid:{name}:{weight}", tmp_path))
            np.testing.assert_allclose(found, weight * scaled[0] + (1 - weight) * scaled[1], atol=1e-5)


def test_words_that_no_document_has_leave_the_ranking_to_the_model(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.eval.models.test_search.QUERIES", ["glass"])
    documents = [text.replace("glass", "stone") for text in DOCUMENTS]
    monkeypatch.setattr("tests.eval.models.test_search.DOCUMENTS", documents)
    hybrid = matrix(model_of(f"hybrid:{folders / 'head'}@tokens:0.25", tmp_path))
    assert np.isfinite(hybrid).all()
    alone = matrix(model_of(f"{folders / 'head'}@tokens", tmp_path))
    assert (hybrid.argsort() == alone.argsort()).all()


@pytest.mark.promise("T20")
def test_mtebs_own_wrapper_gives_the_same_scores(tmp_path, tiny_sentence_transformer, make_task):
    """A late-interaction folder of others is recognised, and judged as `mteb` judges it."""
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.0")
    from mteb.models.sentence_transformer_wrapper import MultiVectorWrapper
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    modules = [
        Transformer(str(tiny_sentence_transformer)),
        Dense(32, 8, bias=False, activation_function=None, module_input_name="token_embeddings"),
        MultiVectorMask(skiplist_words=["."]),
        Normalize(module_input_name="token_embeddings"),
    ]
    sentence_transformers.MultiVectorEncoder(
        modules=modules, prompts={"query": "ask: ", "document": ""}, device="cpu"
    ).save(str(tmp_path / "colbert"))
    make_task("Words", DOCUMENTS, [*QUERIES, *DOCUMENTS[6:9]])
    task = local_task(tmp_path / "data" / "Words")
    scores = []
    for model in (
        MultiVectorWrapper(sentence_transformers.MultiVectorEncoder(str(tmp_path / "colbert"), device="cpu")),
        model_of(f"{tmp_path / 'colbert'}@tokens:precision=float32", tmp_path),
        model_of(str(tmp_path / "colbert"), tmp_path),
    ):
        load(task)
        result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
        scores.append(result.task_results[0].scores["test"][0])
    for name in ("ndcg_at_10", "mrr_at_10", "recall_at_3"):
        assert scores[0][name] == scores[1][name]
        assert scores[2][name] == pytest.approx(scores[0][name], abs=0.02)  # float16, the default
    assert 0.05 < scores[0]["ndcg_at_10"] < 0.95  # the task tells rankings apart


def test_documents_are_read_once_and_other_settings_are_derived(folders, tmp_path, monkeypatch):
    """`@tokens:dim=3` after `@tokens` computes no document; alone it computes them all, with the same scores."""
    from common.encoders.longembed_encoder import LongEmbedTokenEncoder

    read, encode = [], LongEmbedTokenEncoder.__call__
    monkeypatch.setattr(
        LongEmbedTokenEncoder,
        "__call__",
        lambda self, texts, kind: read.extend([kind] * len(texts)) or encode(self, texts, kind),
    )
    matrix(model_of(f"{folders / 'head'}@tokens", tmp_path / "a"))
    assert sorted(read) == ["document"] * len(DOCUMENTS) + ["query"] * len(QUERIES)
    read.clear()
    derived = matrix(model_of(f"{folders / 'head'}@tokens:dim=3", tmp_path / "a"))
    assert not read
    alone = matrix(model_of(f"{folders / 'head'}@tokens:dim=3", tmp_path / "b"))
    assert read.count("document") == len(DOCUMENTS)
    np.testing.assert_array_equal(derived, alone)


@pytest.mark.parametrize("changed", [False, True], ids=["as saved", "another pooling"])
def test_the_one_vector_comes_from_the_reading_for_token_vectors(folders, tmp_path, monkeypatch, changed):
    """A folder whose settings for sentence-transformers give another vector is read again, with that vector."""
    folder = shutil.copytree(folders / "head", tmp_path / "model")
    if changed:
        pooling = folder / "1_Pooling" / "config.json"
        settings = json.loads(pooling.read_text())
        pooling.write_text(json.dumps({name: value for name, value in settings.items() if "pooling_mode" not in name}))
        pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"pooling_mode_cls_token": True}))
    alone = matrix(searching(model_of(str(folder), tmp_path / "alone")))
    matrix(model_of(f"{folder}@tokens", tmp_path / "beside"))
    read, encode = [], Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, texts, kind: read.append(kind) or encode(self, texts, kind))
    beside = matrix(searching(model_of(str(folder), tmp_path / "beside")))
    assert ("document" in read) == changed
    np.testing.assert_allclose(beside, alone, atol=1e-6)


def test_costs_are_the_bytes_that_are_kept(folders, tmp_path):
    from modeling_longembed import LongEmbedModel

    _, documents = token_vectors(folders / "head")
    tokens = sum(map(len, documents)) / len(documents)
    model = LongEmbedModel.from_pretrained(folders / "head").eval()
    passages = np.mean([len(rows) for rows in model.encode(DOCUMENTS, late_chunk_tokens=16)])
    # Of each word in each document a score and a place, of each word where these begin, and its letters.
    counts = [set(re.findall(r"\w\w+", text)) for text in DOCUMENTS]
    known = set().union(*counts)
    words = (sum(map(len, counts)) * 8 + (len(known) + 1) * 8 + sum(map(len, known))) / len(DOCUMENTS)
    for name, expected in (
        (f"{folders / 'head'}@tokens", 8 * 2 * tokens),
        (f"{folders / 'head'}@tokens:precision=float32,dim=3", 3 * 4 * tokens),
        (f"{folders / 'head'}@tokens:precision=binary", tokens),
        (f"{folders / 'head'}@chunks:16", 32 * 4 * passages),
        (f"{folders / 'head'}", 32 * 4),
        (f"hybrid:{folders / 'head'}:0.5", 32 * 4 + words),
        ("bm25", words),
    ):
        judged = model_of(name, tmp_path)
        model = searching(judged)
        matrix(model)
        (costs,) = judged.costs.values()
        assert (costs.documents, costs.queries) == (len(DOCUMENTS), len(QUERIES))
        assert costs.seconds_per_query > 0
        assert costs.bytes_per_document == pytest.approx(expected)
        matrix(model)  # another subset of the same split
        (costs,) = judged.costs.values()
        assert (costs.documents, costs.queries) == (2 * len(DOCUMENTS), 2 * len(QUERIES))
        assert costs.bytes_per_document == pytest.approx(expected)


def test_empty_texts_score_0(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.eval.models.test_search.QUERIES", ["", "river stone"])
    monkeypatch.setattr("tests.eval.models.test_search.DOCUMENTS", ["river stone", ""])
    from modeling_longembed import LongEmbedModel

    bare = LongEmbedModel.from_pretrained(folders / "head")  # "" has no special tokens here either
    bare.tokenizer = word_tokenizer()
    bare.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    bare.save_pretrained(tmp_path / "bare")
    names = [f"{folders / 'head'}@tokens{more}" for more in ("", ":pool=2,dim=3", ":precision=residual2")]
    names += [f"{tmp_path / 'bare'}@tokens", f"{tmp_path / 'bare'}@chunks:16"]
    for name in (*names, *names):  # computed, and read from the cache
        found = matrix(model_of(name, tmp_path))
        assert found[0].tolist() == [0, 0]
        assert found[1, 0] > 0
        assert found[1, 1] == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{head}@token", "write .*@vector, .*@chunks:N"),
        ("{head}@chunks", "write .*@vector, .*@chunks:N"),
        ("{head}@vector:3", "write .*@vector, .*@chunks:N"),
        ("{head}@tokens:dim=0", "dim=0 is no setting of token vectors; write dim=64"),
        ("{head}@tokens:size=3", "size=3 is no setting of token vectors"),
        ("{head}@tokens:dim=2,dim=3", "dim is there twice"),
        ("{head}@tokens:precision=half", "precision=half is no setting"),
        ("{head}@tokens:pool=0", "pool=0 is no setting"),
        ("{head}@tokens:pool=33", "pool=33 is no setting of token vectors; write dim=64, pool=1 to 32"),
        ("{head}@tokens:dim=²", "dim=² is no setting of token vectors"),
        ("{head}@chunks:²", "write .*@vector, .*@chunks:N"),
        ("truncate:{head}:²", "write truncate:PATH:N"),
        ("{head}@:dim=3", "write .*@vector, .*@chunks:N"),
        ("{head}@x/absent", "unknown model .*head@x/absent"),
        ("{head}@tokens:dim=9", "token vectors of 8 dimensions, fewer than 9"),
        ("{states}@tokens:dim=3", "has no token head"),
        ("{plain}@tokens", "is no LongEmbed model"),
        ("hybrid:{head}", "write hybrid:MODEL:W"),
        ("hybrid:{head}:1.5", "write hybrid:MODEL:W"),
        ("hybrid:bm25:0.5", "write hybrid:MODEL:W"),
    ],
)
def test_a_mistake_is_told(folders, tiny_sentence_transformer, tmp_path, value, words):
    places = {"head": folders / "head", "states": folders / "states", "plain": tiny_sentence_transformer}
    with pytest.raises(UserError, match=words):
        model_of(value.format(**places), tmp_path)


def test_a_mistake_is_told_before_a_model_is_downloaded(monkeypatch):
    monkeypatch.setattr("common.encoders.model_folder.snapshot_download", None)
    for value in ("org/model@token", "org/model@chunks:0", "org/model@tokens:size=3", "hybrid:org/model@token:0.5"):
        with pytest.raises(UserError, match=r"write|is no setting"):
            ModelSpec.parse(value)


def test_a_reranking_task_ranks_its_candidates_alone(folders, tmp_path):
    """As MTEB's own wrapper does for the model of one vector."""
    candidates = {"t0": ["t3", "t8", "t5"], "t1": ["t2"], "t3": [f"t{i}" for i in range(len(DOCUMENTS))]}
    folder = folders / "head"
    for name in (f"{folder}", f"{folder}@tokens", f"{folder}@chunks:16", "bm25", f"hybrid:{folder}:0.5"):
        model = searching(model_of(name, tmp_path))
        every, found = (
            ranking(model, QUERIES, DOCUMENTS, 1000, top_ranked=top_ranked) for top_ranked in (None, candidates)
        )
        assert found == {
            query: {name: pytest.approx(every[query][name], abs=1e-6) for name in candidates.get(query, ())}
            for query in every
        }
        best = ranking(model, QUERIES, DOCUMENTS, 2, top_ranked=candidates)["t0"]
        assert set(best) == set(sorted(found["t0"], key=lambda name: -found["t0"][name])[:2])


@pytest.mark.parametrize("vectors", ["float32", "int8", "binary"])
def test_a_hybrid_reads_stored_vectors_window_by_window(folders, tmp_path, vectors):
    """The scores are those of all vectors at once, and only ranges over the corpus need them so."""
    spec = EvaluatedModel.parse(str(folders / "head")).storing(vectors)
    model = spec.load(VectorCache(tmp_path / "v.sqlite"), 40, False)
    sides = ((QUERIES, PromptType.query), (DOCUMENTS, PromptType.document))
    exact = model.similarity(*(model._encode(texts, kind) for texts, kind in sides))
    blocks = list(model.blocks(QUERIES, DOCUMENTS, Costs()))
    assert (len(blocks) > 2) == (vectors != "int8")
    found = torch.empty_like(torch.as_tensor(exact))
    for window, scores in blocks:
        found[:, torch.tensor(window)] = scores
    np.testing.assert_allclose(found, exact, atol=1e-6)


def test_settings_that_change_scores_change_where_results_lie(folders):
    values = [
        "{}",
        "{}@tokens",
        "{}@tokens:dim=3",
        "{}@tokens:weights=none",
        "{}@tokens:pool=2",
        "{}@tokens:precision=float32",
    ]
    values += ["{}@chunks:16", "{}@chunks:32", "hybrid:{}:0.5", "hybrid:{}@tokens:0.5", "hybrid:{}@tokens:0.25"]
    specs = [EvaluatedModel.parse(value.format(folders / "head")) for value in values]
    places = {(spec.meta.name, spec.meta.revision, spec.meta.experiment_name) for spec in specs}
    assert len(places) == len(values)
    same = EvaluatedModel.parse(f"{folders / 'head'}@vector").meta
    assert (same.name, same.experiment_name) == (specs[0].meta.name, None)


def test_other_scripts_refuse_outputs_that_they_do_not_know(folders):
    for value in ("{}@tokens", "{}@chunks:16", "hybrid:{}:0.5"):
        spec = ModelSpec.parse(value.format(folders / "head"))
        assert not spec.has_one_vector
        with pytest.raises(UserError, match="this script compares one vector a text; give the model"):
            spec.load_encoder(100, False)


def test_a_damaged_file_of_tokens_is_named(folders, tmp_path):
    model = model_of(f"{folders / 'head'}@tokens", tmp_path)
    matrix(model)
    file = next(tmp_path.glob("tokens/*/*.safetensors"))
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match=rf"cannot read {file}.* delete it, and the same command"):
        matrix(model)


@pytest.mark.promise("T6", "T20")
@pytest.mark.parametrize("name", ["head", "states"])
def test_mtebs_own_wrapper_judges_a_folder_of_ours_as_we_do(folders, tmp_path, make_task, name):
    """It loads the folder by `MultiVectorEncoder`, and the weights of query tokens count there too."""
    pytest.importorskip("sentence_transformers", minversion="6.0")
    from mteb.models.sentence_transformer_wrapper import MultiVectorWrapper

    make_task("Words", DOCUMENTS, [*QUERIES, *DOCUMENTS[6:9]])
    task = local_task(tmp_path / "data" / "Words")
    scores = []
    for model in (
        MultiVectorWrapper(str(folders / name), device="cpu", trust_remote_code=True),
        model_of(f"{folders / name}@tokens:precision=float32", tmp_path),
    ):
        load(task)
        result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
        scores.append(result.task_results[0].scores["test"][0])
        assert model.mteb_model_meta.model_type == ["late-interaction"]
    for metric in ("ndcg_at_10", "mrr_at_10", "recall_at_3"):
        assert scores[0][metric] == scores[1][metric]
    assert 0.05 < scores[0]["ndcg_at_10"] < 0.95  # the task tells rankings apart
