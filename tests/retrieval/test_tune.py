"""`retrieval.tune`: the weight with the largest nDCG, which trec_eval computes too."""

import json
import sys

import numpy as np
import pytest
import pytrec_eval

from common.errors import UserError
from retrieval import tune
from retrieval.index.index import Index
from retrieval.ranking import Scores
from tests.retrieval.conftest import make_documents


def test_ndcg_is_that_of_trec_eval():
    random = np.random.default_rng(0)
    for _ in range(20):
        ranking = random.permutation(30)[: random.integers(1, 31)].tolist()
        relevant = set(random.permutation(30)[: random.integers(1, 15)].tolist())
        run = {"q": {str(number): -float(place) for place, number in enumerate(ranking)}}
        evaluator = pytrec_eval.RelevanceEvaluator({"q": {str(number): 1 for number in relevant}}, {"ndcg_cut.10"})
        assert tune.ndcg(ranking, relevant) == pytest.approx(evaluator.evaluate(run)["q"]["ndcg_cut_10"])


def test_the_weight_goes_to_what_finds_the_documents():
    random = np.random.default_rng(0)
    right, wrong = [[np.arange(20), random.random(20).astype(np.float32)] for _ in range(2)]
    for model, words, expected in ((right, wrong, 1.0), (wrong, right, 0.0)):
        scores = Scores(model[0], {"tokens": model[1], "words": words[1]})
        means = tune.tune_weight([scores], [{int(right[1].argmax())}])
        assert means[expected] == max(means.values()) == 1
        assert means[1 - expected] < 1
    assert tune.best_weight({0.0: 0.1, 0.3: 0.9, 0.35: 0.9, 0.4: 0.9, 1.0: 0.2}) == 0.35


def test_the_script_keeps_the_weight_in_the_index(tmp_path, tiny_model, tiny_longembed, monkeypatch, capsys):
    Index.build(tmp_path / "index", make_documents(12), str(tiny_longembed), segments="late:16")
    judged = tmp_path / "judged.jsonl"
    command = ["tune", "--index", str(tmp_path / "index"), "--queries", str(judged)]

    def run(*rows, options=()):
        judged.write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(sys, "argv", [*command, *options])
        tune.main()

    row = {"query": "river stone house", "documents": ["d3", "d5"]}
    run(row, {"query": "winter", "documents": "d1"}, options=["--save", "false"])
    assert Index.open(tmp_path / "index", tiny_model).manifest.weight == 0.5
    run(row, {"query": "winter", "documents": "d1"})
    printed = capsys.readouterr().out
    weight = Index.open(tmp_path / "index", tiny_model).manifest.weight
    assert f"2 queries: the best weight is {weight}, and that of the index was 0.5" in printed
    for bad, message in (
        ({"query": "river", "documents": ["d99"]}, r"row 2: the index has no document with the id 'd99'$"),
        ({"query": "", "documents": ["d1"]}, r"row 2: query is ''; give a text$"),
        ({"query": "river", "documents": [1]}, r"row 2: documents is \[1\]; give a list of ids$"),
    ):
        with pytest.raises(UserError, match=message):
            run(row, bad)
    with pytest.raises(UserError, match=r"holds no queries$"):
        run()
