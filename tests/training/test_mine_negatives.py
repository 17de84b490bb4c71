"""Mined negatives: those of sentence-transformers on the same vectors, and of the definition; the script in use."""

import gzip
import json
import sys
from collections import Counter
from dataclasses import replace

import datasets
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.util import cos_sim, maxsim, mine_hard_negatives, pairwise_cos_sim

from common.bm25 import BM25Index
from common.encoders.encoder import Encoder
from common.encoders.model_folder import ModelFolder
from common.errors import UserError, run
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import WORDS, tiny_config, write_jsonl
from training import contrastive, mine_negatives
from training.data.pairs.ranking import RankerWithWords
from training.mine_negatives import Arguments, PairTexts, Thresholds, mine

SETTINGS = [
    {},
    {"range_max": 6},
    {"range_min": 3},
    {"relative_margin": 0.1},
    {"absolute_margin": 0.05, "range_min": 2},
    {"max_score": 0.75},
    {"min_score": 0.7, "relative_margin": 0.02, "num_negatives": 1},
]


def random_pairs(rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Queries with one positive or several, positives of one query or several."""
    generator = np.random.default_rng(seed)
    documents = [" ".join(generator.choice(WORDS, 12)) for _ in range(rows - 3)]
    pairs = []
    for i in range(rows):
        words = documents[i % len(documents)].split()
        pairs.append({"anchor": " ".join(words[:4]), "positive": documents[i % len(documents)]})
    pairs[5]["anchor"] = pairs[4]["anchor"]
    pairs[6]["anchor"] = pairs[4]["anchor"]
    return pairs


def test_mines_by_maxsim_and_by_bm25(model_folder, tmp_path):
    """The nearest by MaxSim; with BM25, some that are not among the nearest by MaxSim are drawn too."""
    data = write_jsonl(tmp_path / "pairs.jsonl", random_pairs(20))
    mined = {}
    for name in ("top", "random", "both"):
        output = tmp_path / f"{name}.jsonl"
        arguments = Arguments(f"{model_folder}@tokens", str(data), str(output), add_bm25=name == "both")
        mine(arguments, Thresholds(num_negatives=4, range_max=4, sampling="top" if name == "top" else "random"))
        mined[name] = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(mined["top"]) == len(mined["both"]) == 20
    model = LongEmbedModel.from_pretrained(model_folder)
    row, documents = mined["top"][0], [pair["positive"] for pair in random_pairs(20)[:17]]
    vectors = [model.encode(texts, output_value="tokens") for texts in ([row["anchor"]], documents)]
    (scores,) = maxsim(*([torch.tensor(matrix) for matrix in side] for side in vectors))
    nearest = [documents[i] for i in scores.argsort(descending=True) if documents[i] != row["positive"]]
    assert [row[f"negative_{n}"] for n in range(1, 5)] == nearest[:4]
    assert mined["random"] == mined["top"] != mined["both"]  # there are no more than four to draw from


class Ordered:
    """A ranker that knows an order of all documents, one for all queries; the score falls by 1 from place to place."""

    def __init__(self, order, queries):
        self.order, self.queries = np.array(order), queries

    def nearest(self, k):
        documents = np.full((self.queries, k), -1)
        documents[:, : len(self.order)] = self.order[:k]
        return np.where(documents < 0, -np.inf, -np.arange(k)).astype(np.float32), documents

    def scores(self, query, documents):
        return -np.argsort(self.order)[documents].astype(np.float32)


@pytest.mark.parametrize("candidates", [1, 4, 7, 40])
def test_bm25_finds_its_half_of_the_candidates_of_a_query_with_many_positives(candidates):
    """By turns of both orders without the positives, which for the first query are the nearest ten of both."""
    order = np.random.default_rng(0).permutation(30)
    own = [set(order[:10].tolist()), {3}, set()]
    of_words = [*order[:10].tolist(), *order[:9:-1].tolist()]
    scores = Ordered(order, 3)
    ranker = RankerWithWords(scores, Ordered(of_words, 3), own, candidates)
    near, documents = ranker.nearest(candidates + 10)
    for query, positives in enumerate(own):
        left, right = ([d for d in one if d not in positives] for one in (order.tolist(), of_words))
        by_turns = list(dict.fromkeys(document for both in zip(left, right, strict=True) for document in both))
        expected = sorted(by_turns[:candidates], key=order.tolist().index)
        there = documents[query][documents[query] >= 0]
        assert [document for document in there.tolist() if document not in positives] == expected
        np.testing.assert_array_equal(near[query][: len(there)], scores.scores(query, there))


def test_a_document_that_the_teacher_found_is_not_scored_again():
    order = list(range(12))
    teacher, asked = Ordered(order, 1), []
    teacher.scores = lambda query, documents: asked.extend(documents.tolist()) or np.zeros(len(documents), np.float32)
    RankerWithWords(teacher, Ordered(order[::-1], 1), [set()], 6).nearest(6)
    assert asked == [11, 10, 9]


def test_token_vectors_that_are_not_finite_are_refused(word_tokenizer, tmp_path):
    model = LongEmbedModel(tiny_config(token_dim=8))
    with torch.no_grad():
        model.token_output.head.weight[3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "pairs.jsonl", random_pairs(8))
    arguments = Arguments(f"{tmp_path}/model@tokens", str(data), str(tmp_path / "mined.jsonl"))
    with pytest.raises(UserError, match="the model gives vectors that are NaN or infinite"):
        mine(arguments, Thresholds(num_negatives=1))


class Known:
    """As much of a SentenceTransformer as its mining needs, with vectors that our encoder made."""

    device = torch.device("cpu")
    similarity, similarity_pairwise = staticmethod(cos_sim), staticmethod(pairwise_cos_sim)

    def __init__(self, folder):
        self.encoder = Encoder(ModelFolder.find(str(folder)))

    def get_embedding_dimension(self):
        return self.encoder.dimension

    def _encode(self, texts, kind):
        vectors = np.concatenate(self.encoder(list(texts), kind))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_query(self, texts, **kwargs):
        return self._encode(texts, "query")

    def encode_document(self, texts, **kwargs):
        return self._encode(texts, "document")


def read(path) -> list[dict[str, str]]:
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def key(row):
    return tuple(row[name] for name in sorted(row))


@pytest.mark.parametrize("corpus", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_negatives_are_those_of_sentence_transformers(tiny_longembed, tmp_path, settings, corpus):
    pairs = random_pairs(40)
    generator = np.random.default_rng(9)
    more = [" ".join(generator.choice(WORDS, 9)) for _ in range(20)] + [pairs[0]["positive"]]
    # A range beyond all documents, or queries that have as many positives each: theirs is longer by the largest number
    # of positives of any query, so that thresholds may let documents in that are out of the range.
    settings = {"num_negatives": 3, "range_max": 60} | settings
    if settings["range_max"] < 60:
        pairs = list({row["anchor"]: row for row in pairs}.values())
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    texts = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in more]) if corpus else None
    output = tmp_path / "mined.jsonl"
    arguments = Arguments(str(tiny_longembed), str(data), str(output), corpus=texts and str(texts), precision="float32")
    mine(arguments, Thresholds(**settings))
    expected = mine_hard_negatives(
        Dataset.from_list(pairs), Known(tiny_longembed), corpus=more if corpus else None, output_format="n-tuple",
        verbose=False, **settings,
    )  # fmt: skip
    found = read(output)
    # Theirs are grouped by query, and a pair that is there twice comes once; ours are the rows as they came.
    assert {key(row) for row in found} == {key(row) for row in expected}
    mined = [{name: row[name] for name in ("anchor", "positive")} for row in found]
    assert mined == [row for row in pairs if row in mined]
    assert len({row["anchor"] for row in mined}) > 5


@hypothesis.example([-4, -6], -4, (None, 1, None, None), 0, 2)  # a share of a score below 0
@hypothesis.given(
    scores=st.lists(st.integers(-20, 20), min_size=1, max_size=12),
    positive=st.integers(-20, 20),
    margins=st.tuples(*[st.none() | st.integers(-10, 10)] * 4),
    range_min=st.integers(0, 3),
    count=st.integers(1, 4),
)
def test_what_is_chosen_is_the_nearest_that_passes_every_threshold(scores, positive, margins, range_min, count):
    """In eighths, which floats add exactly."""
    scores, positive = np.array(scores) / 8, positive / 8
    absolute, relative, most, least = (None if value is None else value / 8 for value in margins)
    thresholds = Thresholds(count, 50, range_min, relative, absolute, most, least)
    removed: Counter = Counter()
    chosen = thresholds.choose(scores, positive, 0, removed)
    passing = [
        i
        for i, score in enumerate(scores)
        if (absolute is None or score + absolute <= positive)
        and (relative is None or score + abs(positive) * relative <= positive)
        and (most is None or score <= most)
        and (least is None or score >= least)
    ]
    passing.sort(key=lambda i: (-scores[i], i))
    assert chosen.tolist() == passing[range_min:][:count]
    assert sum(removed.values()) == len(scores) - len(passing)
    drawn = replace(thresholds, sampling="random", seed=3).choose(scores, positive, 7, Counter())
    assert set(drawn.tolist()) <= set(passing[range_min:])
    assert len(set(drawn.tolist())) == len(chosen)
    assert drawn.tolist() == sorted(drawn.tolist(), key=lambda i: (-scores[i], i))


def test_only_the_nearest_of_the_range_are_looked_at(tiny_longembed, tmp_path):
    """By definition, all documents scored and sorted: a threshold lets no document in that is beyond the range."""
    pairs = random_pairs(40)
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    known, documents = Known(tiny_longembed), list(dict.fromkeys(row["positive"] for row in pairs))
    scores = known.encode_query([row["anchor"] for row in pairs]) @ known.encode_document(documents).T
    highest = float(np.median(-np.sort(-scores, axis=1)[:, 6]))  # so that of six others there is about one below it
    expected = []
    for row, near in zip(pairs, scores, strict=True):
        own = {other["positive"] for other in pairs if other["anchor"] == row["anchor"]}
        others = [d for d in np.argsort(-near) if documents[d] not in own][:6]
        left = [documents[d] for d in others if near[d] <= highest][:2]
        if len(left) == 2:
            expected.append(row | {"negative_1": left[0], "negative_2": left[1]})
    arguments = Arguments(str(tiny_longembed), str(data), str(tmp_path / "mined.jsonl"), precision="float32")
    mine(arguments, Thresholds(num_negatives=2, range_max=6, max_score=highest))
    assert read(tmp_path / "mined.jsonl") == expected
    assert 0 < len(expected) < len(pairs)


def test_random_sampling_is_uniform_and_a_function_of_seed_and_query():
    scores = np.linspace(1, 0, 10)
    thresholds = Thresholds(3, 50, range_min=2, sampling="random")
    draws = [tuple(thresholds.choose(scores, 2.0, query, Counter())) for query in range(2000)]
    assert draws == [tuple(thresholds.choose(scores, 2.0, query, Counter())) for query in range(2000)]
    counts = np.bincount(np.concatenate(draws), minlength=10)
    assert counts[:2].sum() == 0
    # 2000 * 3 / 8 = 750 expected of each; the standard deviation is 22.
    assert np.abs(counts[2:] - 750).max() < 100
    other = replace(thresholds, seed=1)
    assert draws != [tuple(other.choose(scores, 2.0, query, Counter())) for query in range(2000)]


def test_no_positive_of_the_query_and_not_the_query_itself_is_a_negative(model_folder, tmp_path):
    pairs = random_pairs(30)
    pairs += [{"anchor": row["positive"], "positive": row["anchor"]} for row in pairs]  # every text on both sides
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    for model in (str(model_folder), f"chunk-max:{model_folder}:8", f"chunk-mean:{model_folder}:8", "bm25"):
        mine(Arguments(model, str(data), str(tmp_path / "mined.jsonl.gz")), Thresholds(5))
        found = read(tmp_path / "mined.jsonl.gz")
        assert len(found) == len(pairs)
        for row in found:
            negatives = {text for name, text in row.items() if name.startswith("negative")}
            assert len(negatives) == 5
            forbidden = {pair["positive"] for pair in pairs if pair["anchor"] == row["anchor"]} | {row["anchor"]}
            assert not negatives & forbidden


def test_a_guide_orders_what_the_model_finds(tiny_longembed, tmp_path):
    """As in sentence-transformers with a cross-encoder, here one whose scores are BM25's."""
    pairs = list({row["anchor"]: row for row in random_pairs(40)}.values())
    documents = list(dict.fromkeys(row["positive"] for row in pairs))
    index = BM25Index(documents)

    class CrossEncoder:
        def predict(self, couples, **kwargs):
            return torch.tensor([index.scores(query)[documents.index(text)] for query, text in couples])

    thresholds = {"num_negatives": 2, "range_max": 50, "relative_margin": 0.2}
    arguments = Arguments(
        str(tiny_longembed),
        str(write_jsonl(tmp_path / "pairs.jsonl", pairs)),
        str(tmp_path / "mined.jsonl"),
        guide="bm25",
    )
    mine(arguments, Thresholds(**thresholds))
    expected = mine_hard_negatives(
        Dataset.from_list(pairs), Known(tiny_longembed), cross_encoder=CrossEncoder(), output_format="n-tuple",
        verbose=False, **thresholds,
    )  # fmt: skip
    found = {(row["anchor"], row["positive"]): row for row in read(tmp_path / "mined.jsonl")}
    assert len(found) == len(expected) > 0
    for row in expected:
        ours = found[row["anchor"], row["positive"]]
        scores = [
            sorted(index.scores(row["anchor"])[documents.index(r[f"negative_{i}"])] for i in (1, 2))
            for r in (ours, row)
        ]
        assert scores[0] == pytest.approx(scores[1])  # BM25 has ties, whose order is anybody's


def test_the_script_trains_on_what_it_mined_and_encodes_nothing_twice(model_folder, tmp_path, monkeypatch, capsys):
    data = write_jsonl(tmp_path / "pairs.jsonl", random_pairs(40))
    output = tmp_path / "new" / "mined.jsonl"
    argv = ["--model", str(model_folder), "--data", str(data), "--output", str(output), "--relative_margin", "0.02"]
    mine_negatives.main(argv)
    said = capsys.readouterr().out
    rows = read(output)
    assert f"{output}: {len(rows)} of 40 pairs with 3 negatives each, from 37 documents" in said
    assert "by relative_margin" in said
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded a text that is in the cache"))
    mine_negatives.main(argv)
    assert read(output) == rows
    monkeypatch.undo()
    contrastive.main(
        ["--model_name_or_path", str(model_folder), "--train_data", str(output), "--output_dir", str(tmp_path / "run"),
         "--per_device_train_batch_size", "8", "--max_steps", "1"]
    )  # fmt: skip
    assert (tmp_path / "run" / "final" / "config.json").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--num_negatives", "0"], "--num_negatives 0: must be at least 1"),
        (["--range_min", "5", "--range_max", "5"], "--range_min 5: must be from 0 to less than --range_max 5"),
        (["--range_min", "4", "--range_max", "6"], "--num_negatives 3: must be at least 1 and at most the 2"),
        (["--max_score", "-2"], "no pair has 3 negatives among its 100 nearest of 37 documents; loosen"),
        (["--sampling", "best"], "invalid choice: 'best'"),
        (["--model", "no/model"], "unknown model no/model"),
        (["--guide", "chunk-max:x"], "write chunk-max:PATH:N"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_file(model_folder, tmp_path, monkeypatch, capsys, change, words):
    data = write_jsonl(tmp_path / "pairs.jsonl", random_pairs(40))
    argv = ["x", "--model", str(model_folder), "--data", str(data), "--output", str(tmp_path / "mined.jsonl"), *change]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as left:
        run(mine_negatives.main)
    messages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert left.value.code == 2
    assert len(messages) == 1
    assert words in messages[0]
    assert not (tmp_path / "mined.jsonl").exists()


def test_negatives_that_some_rows_have_already_do_not_matter(tmp_path):
    rows = [{"anchor": "a", "positive": "b"}, {"anchor": "c", "positive": "d", "negative_1": "e"}]
    pairs = PairTexts(str(write_jsonl(tmp_path / "pairs.jsonl", rows)), None)
    assert (list(pairs.queries), list(pairs.documents)) == (["a", "c"], ["b", "d"])


@pytest.mark.parametrize("form", ["jsonl", "a later row", "a later file", "parquet", "a later parquet", "hub"])
def test_titles_of_a_corpus_are_not_dropped(tmp_path, monkeypatch, form):
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"anchor": "a", "positive": "b"}])
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    plain, titled = [{"doc_id": "0", "text": "b"}], [{"doc_id": "1", "title": "", "text": "c"}]
    if "parquet" in form:
        Dataset.from_list(plain if "later" in form else titled).to_parquet(corpus / "0.parquet")
        Dataset.from_list(titled).to_parquet(corpus / "1.parquet")
    else:
        files = {"jsonl": [titled], "a later row": [plain + titled], "a later file": [plain, titled]}.get(form, [])
        for number, rows in enumerate(files):
            write_jsonl(corpus / f"{number}.jsonl", rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Dataset.from_list(titled))
    with pytest.raises(UserError, match=r"the column title is not read; put it in front") as caught:
        PairTexts(str(data), "org/corpus" if form == "hub" else str(corpus))
    assert str(caught.value).startswith("org/corpus" if form == "hub" else str(corpus))
    assert form != "a later row" or "0.jsonl, row 2:" in str(caught.value)


def test_a_seed_below_zero_is_refused(tmp_path):
    with pytest.raises(UserError, match="seed: -1: must be at least 0 and at most 4294967295"):
        mine_negatives.main(f"--model bm25 --data x --output {tmp_path}/o.jsonl --sampling random --seed -1".split())
