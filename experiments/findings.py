"""Measure findings of contrastive learning, each by trainings that differ in one thing: docs/reports/objectives.md.

    python experiments/findings.py --model_name_or_path runs/extension/rows/base/final \\
        --teacher sentence-transformers/all-MiniLM-L6-v2 --questions questions.jsonl.gz --titles titles.jsonl.gz \\
        --nli nli.jsonl.gz --documents papers.jsonl.gz --sts_dir sts --task_data_dir tasks --output_dir runs/findings

A finding is a file of experiments/findings: what its rows share, and what each row changes. A row is trained by
training/contrastive.py. What is finished is not repeated; a killed run goes on. `<output_dir>/<finding>/` holds
results.json, table.md and plot.png, and plane.png shows alignment and uniformity of all rows. Further reports are
batches-and-negatives.md, dropout.md and plain-documents.md.
"""

import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from rich.console import Console
from rich.markdown import Markdown
from safetensors.torch import load_file
from transformers import AutoConfig

from common.arguments import parse
from common.encoders.model_folder import ModelFolder
from common.errors import UserError, run
from common.files import atomic_folder, atomic_write, sha256_file
from eval.tasks import similarity
from eval.tasks.evaluation import EvaluationArguments, RetrievalArguments, evaluate_retrieval, evaluate_tasks
from experiments.studies.findings_data import DATA, DataArguments, data_file
from experiments.studies.findings_report import as_markdown, draw, draw_plane
from experiments.studies.training_runs import check_stamp, train, training_cost
from modeling_longembed import LongEmbedModel

ROOT = Path(__file__).resolve().parent.parent
FINDINGS = ROOT / "experiments" / "findings"
PROGRAMS = {"contrastive": ROOT / "training" / "contrastive.py", "one_mask": ROOT / "experiments" / "one_mask.py"}
BLOCK = {"type": "block", "size": 254}  # attention pattern of the models of long documents
SIMILARITY = {"cosine_spearman": "Spearman", "alignment": "alignment", "uniformity": "uniformity"}  # MTEB's -> ours


@dataclass(kw_only=True)
class Arguments(DataArguments):
    """Options of the script."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of the encoder that all rows start from"})
    findings: list[str] = field(default_factory=list, metadata={"help": "names of files of --recipes; default: all"})
    recipes: str = field(default=str(FINDINGS), metadata={"help": "folder of the findings"})
    sts_dir: str | None = field(default=None, metadata={"help": "folder of sentence pairs, as eval/sts.py reads them"})
    sts_tasks: list[str] = field(default_factory=lambda: ["STS16"], metadata={"help": "tasks of --sts_dir"})
    task_data_dir: str | None = field(
        default=None, metadata={"help": "folder with one sub-folder for each retrieval task"}
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "tasks of --task_data_dir; default: all"})
    precision: str = field(default="auto", metadata={"help": "precision of the evaluation: float32, bfloat16 or auto"})
    batch_tokens: int = field(default=8192, metadata={"help": "tokens in one forward pass of the evaluation"})


@dataclass(frozen=True)
class Row:
    """A training of a finding.

    Attributes:
        name: of its row in the table and of its folder.
        start: `plain`, the encoder as it is, or `long`, the encoder with attention in blocks.
        data: a name of `DATA`.
        program: a name of `PROGRAMS`.
        recipe: options of training/contrastive.py.
        stages: number of evaluations, at equal distances, the last one at the end of the training.
    """

    name: str
    start: str
    data: str
    program: str
    recipe: dict[str, Any]
    stages: int


@dataclass(frozen=True)
class Finding:
    """A file of `--recipes`.

    Attributes:
        name: of the file.
        title: of the plot.
        rows: the trainings.
        evaluations: name of an evaluation (`similarity`, `tasks`, or a name of `DATA`) -> its options, `max_length` and
            `metrics`.
        plot: columns of the table that are drawn.
    """

    name: str
    title: str
    rows: list[Row]
    evaluations: dict[str, dict[str, Any]]
    plot: list[str]

    @classmethod
    def read(cls, path: Path) -> "Finding":
        """Read a file.

        The recipe of a row is the training recipe that it names, overridden by the options that the finding's rows
        share, overridden by the row's own options.

        Args:
            path: the YAML file.

        Raises:
            UserError: the file cannot be read.
        """
        content = _read_yaml(path)
        rows = []
        for name, own in content["rows"].items():
            own = dict(own or {})
            options = {key: own.pop(key, content.get(key)) for key in ("start", "data", "program")}
            named = own.pop("recipe", None)
            recipe = _read_yaml(ROOT / "training" / "recipes" / "contrastive" / f"{named}.yaml") if named else {}
            recipe |= content["training"] | own
            stages = content.get("stages", 1)
            every = max(1, recipe["max_steps"] // stages)
            # Rounded up, because the last step has a checkpoint even between two stages.
            recipe |= {"save_steps": every, "save_total_limit": math.ceil(recipe["max_steps"] / every)}
            start, program = options["start"] or "plain", options["program"] or "contrastive"
            rows.append(Row(name, start, options["data"], program, recipe, stages))
        return cls(path.stem, content["title"], rows, content["evaluations"], content["plot"])


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def start_model(name: str, arguments: Arguments) -> Path:
    """Return the folder of the encoder that rows start from: `plain`, or `long` with attention in blocks."""
    given, folder = arguments.model_name_or_path, Path(arguments.output_dir, "starts", name)
    is_ours = AutoConfig.from_pretrained(given).model_type == LongEmbedModel.config_class.model_type
    if name == "plain" and is_ours:
        return Path(given)
    stamp = folder.with_suffix(".json")
    made_from = {"model": ModelFolder.find(given).revision}
    if not (folder.exists() and stamp.exists()):
        stamp.unlink(missing_ok=True)
        check_stamp(stamp, made_from, folder)  # before the folder, which a kill would leave without one
        shutil.rmtree(folder, ignore_errors=True)
        if name == "plain":
            model = LongEmbedModel.from_encoder(given)
        else:
            model = LongEmbedModel.from_pretrained(start_model("plain", arguments), attention_patterns=BLOCK)
            model.extend_context(65536, "restart", period=BLOCK["size"])
        with atomic_folder(folder) as temporary:
            model.eval().save_pretrained(temporary, title=name)
    check_stamp(stamp, made_from, folder)
    return folder


def make(row: Row, folder: Path, arguments: Arguments) -> dict[int, Path]:
    """Train a row unless its model exists.

    Args:
        row: the training.
        folder: of the row.
        arguments: parsed command-line options.

    Returns:
        Step of each stage -> folder of its model, including the final one.

    Raises:
        UserError: an existing model was made otherwise, or the training failed.
    """
    start, data = start_model(row.start, arguments), data_file(row.data, arguments)
    recipe = row.recipe | ({"guide_model": str(arguments.given("teacher"))} if "guide_model" in row.recipe else {})
    made_by = {"start": ModelFolder.find(str(start)).revision, "data": sha256_file(data), "program": row.program}
    check_stamp(folder / "made_by.json", made_by | {"recipe": recipe})
    final, checkpoints = folder / "final", folder / "checkpoints"
    if not final.exists():
        atomic_write(folder / "recipe.yaml", yaml.safe_dump(recipe))
        options = ["--config", str(folder / "recipe.yaml"), "--model_name_or_path", str(start)]
        train(PROGRAMS[row.program], folder, [*options, "--train_data", str(data)])
    if checkpoints.exists():
        for path in checkpoints.glob("step-*"):
            step = int(path.name.removeprefix("step-"))
            saved = folder / "steps" / str(step)
            # If the model is saved, the checkpoint may be incomplete: a run was killed while it removed checkpoints.
            if step < recipe["max_steps"] and not saved.exists():
                save_step(start, path, saved)
        shutil.rmtree(checkpoints)  # each is three times as large as the model
    steps = {int(path.name): path for path in folder.glob("steps/[0-9]*")}
    return dict(sorted(steps.items())) | {recipe["max_steps"]: final}


def save_step(start: Path, checkpoint: Path, folder: Path) -> None:
    """Save the model of a training checkpoint.

    Args:
        start: folder of the model that the training started from.
        checkpoint: folder of the checkpoint.
        folder: where the model is saved.
    """
    model = LongEmbedModel.from_pretrained(start)
    tensors = load_file(checkpoint / "model.safetensors")
    model.load_state_dict({n: tensor for n, tensor in tensors.items() if not n.startswith("objective.")}, strict=False)
    with atomic_folder(folder) as temporary:
        model.eval().save_pretrained(temporary, title=folder.name)


def evaluate(model: Path, evaluations: dict[str, dict[str, Any]], arguments: Arguments) -> dict[str, float]:
    """Evaluate a model; what has been evaluated before is read from the results.

    Args:
        model: its folder.
        evaluations: of a finding.
        arguments: parsed command-line options.

    Returns:
        Column of the table -> score, as eval/mteb_long.py and eval/sts.py report it.
    """
    scores = {}
    for name, options in evaluations.items():
        settings: dict[str, Any] = {
            "model": [str(model)],
            "output_dir": arguments.output_dir,
            "max_length": options.get("max_length"),
            "precision": arguments.precision,
            "batch_tokens": arguments.batch_tokens,
        }
        if name == "similarity":
            tasks = similarity.get_tasks(arguments.sts_tasks, str(arguments.given("sts_dir")))
            found = evaluate_tasks(EvaluationArguments(**settings), tasks, list(SIMILARITY))
            for metric, column in SIMILARITY.items():
                value = mean(score.value for score in found if score.metric == metric)
                scores[column] = value if column == "Spearman" else value / 100
            continue
        if name == "tasks":
            folder, names = arguments.given("task_data_dir"), arguments.tasks
        else:
            data_file(name, arguments)
            folder, names = arguments.data, [name.capitalize()]
        settings |= {"data_dir": str(folder), "tasks": names, "metrics": options.get("metrics", [])}
        for score in evaluate_retrieval(RetrievalArguments(**settings)):
            scores[score.column.replace("hit_rate_at_", "top ")] = score.value
    return scores


def measure(row: Row, finding: Finding, arguments: Arguments) -> dict[str, Any]:
    """Train and evaluate a row. Its stages are evaluated on textual similarity alone.

    Args:
        row: the training.
        finding: of the row.
        arguments: parsed command-line options.

    Returns:
        An entry of results.json.
    """
    folder = Path(arguments.output_dir, finding.name, row.name)
    *steps, (last, final) = make(row, folder, arguments).items()
    at_stages = {"similarity": finding.evaluations.get("similarity", {})}
    return {
        "row": row.name,
        "steps": last,
        "pairs": last * row.recipe["per_device_train_batch_size"],
        "training": training_cost(folder / "metrics.jsonl"),
        "scores": evaluate(final, finding.evaluations, arguments),
        "stages": [[step, evaluate(model, at_stages, arguments)] for step, model in steps],
    }


def compare(arguments: Arguments) -> dict[str, list[dict[str, Any]]]:
    """Train and evaluate all rows; the table and the plots are written after each of them.

    Args:
        arguments: parsed command-line options.

    Returns:
        Finding -> its results, the untrained encoder first.

    Raises:
        UserError: there is no such finding, or data is missing or cannot be read; raised before any training.
    """
    names = arguments.findings or sorted(path.stem for path in Path(arguments.recipes).glob("*.yaml"))
    findings = [Finding.read(Path(arguments.recipes, f"{name}.yaml")) for name in names]
    ModelFolder.find(arguments.model_name_or_path)
    for finding in findings:
        for name in [row.data for row in finding.rows] + [name for name in finding.evaluations if name in DATA]:
            data_file(name, arguments)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in findings:
        start = start_model(finding.rows[0].start, arguments)
        results = found[finding.name] = []
        results.append({"row": "start", "training": None, "stages": []})
        results[0]["scores"] = evaluate(start, finding.evaluations, arguments)
        for row in finding.rows:
            print(f"{finding.name}: {row.name}", flush=True)
            results.append(measure(row, finding, arguments))
            folder = Path(arguments.output_dir, finding.name)
            atomic_write(folder / "results.json", json.dumps(results, indent=1))
            atomic_write(folder / "table.md", as_markdown(results))
            draw(finding.title, finding.plot, results, folder / "plot.png")
        draw_plane(found, Path(arguments.output_dir, "plane.png"))
    return found


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for name, results in compare(arguments).items():
        console.rule(name)
        console.print(Markdown(as_markdown(results)))


if __name__ == "__main__":
    run(main)
