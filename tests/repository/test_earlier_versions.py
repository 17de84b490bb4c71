"""What earlier versions wrote still loads: a published model, and a training that stopped in the middle.

`tests/fixtures/earlier_version.tar.gz` was written by the version before the files of training/ and of the model
moved: `hub/`, a model with its own code, and the vectors it gave; `start/`, a model, `pairs.jsonl`, and `run/`, a
contrastive training stopped after three of six steps, and the vectors that an undisturbed run ended with.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from modeling_longembed import LongEmbedModel
from tests.modeling_longembed.clean_environment import CleanEnvironment
from training import contrastive

pytestmark = pytest.mark.xdist_group("earlier_versions")  # what the module fixtures make is made once

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "earlier_version.tar.gz"
OWN_CODE = """
import json
import numpy as np
from transformers import AutoModel
folder, output = sys.argv[1:]
try:
    import modeling_longembed
except ImportError:
    pass
else:
    sys.exit("the package is importable: the folder's own code may not be what is tested")
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
texts = json.loads(open(f"{folder}/../texts.json").read())
np.save(output, model.encode(texts, precision="float32", prompt_name="query"))
"""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """The folder with what the earlier version wrote."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def texts(earlier) -> list[str]:
    return json.loads((earlier / "texts.json").read_text())


def assert_same_vectors(vectors: np.ndarray, file: Path) -> None:
    np.testing.assert_allclose(vectors, np.load(file), atol=1e-5, rtol=0)


def test_a_published_model_gives_the_same_vectors_with_the_code_of_today(earlier, texts):
    model = LongEmbedModel.from_pretrained(earlier / "hub")
    vectors = model.encode(texts, precision="float32", prompt_name="query")
    assert_same_vectors(vectors, earlier / "hub_vectors.npy")


def test_a_published_model_gives_the_same_vectors_with_its_own_code(earlier, tmp_path):
    clean = CleanEnvironment(tmp_path / "clean", ["torch", "transformers", "numpy"])
    done = clean.run(OWN_CODE, earlier / "hub", tmp_path / "vectors.npy")
    assert done.returncode == 0, done.stderr
    assert_same_vectors(np.load(tmp_path / "vectors.npy"), earlier / "hub_vectors.npy")


def test_a_training_goes_on_to_the_same_model(earlier, texts, tmp_path, monkeypatch):
    folder = shutil.copytree(earlier, tmp_path / "earlier")
    monkeypatch.chdir(folder)
    options = (
        "--model_name_or_path start --train_data pairs.jsonl --output_dir run --max_steps 6 --save_steps 3 "
        "--save_total_limit 2 --per_device_train_batch_size 4 --batch_tokens 150 --max_length 64 --learning_rate 1e-3 "
        "--dataloader_num_workers 0 --report_to none --logging_steps 1 --resume_from_checkpoint last"
    )
    try:
        contrastive.main(options.split())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 5, 6]
    model = LongEmbedModel.from_pretrained(folder / "run" / "final")
    assert_same_vectors(model.encode(texts, precision="float32"), earlier / "run_vectors.npy")
