"""Findings of contrastive learning, measured: each a few small trainings that differ in one thing, judged alike.

    python experiments/findings.py --model_name_or_path runs/extension/rows/base/final \\
        --teacher sentence-transformers/all-MiniLM-L6-v2 --questions questions.jsonl.gz --titles titles.jsonl.gz \\
        --nli nli.jsonl.gz --documents papers.jsonl.gz --sts_dir sts --task_data_dir tasks --output_dir runs/findings

A finding is a file of experiments/findings: what its rows share, and what each row changes. A row is trained by
training/contrastive.py. What is finished is not done again; a killed run goes on. `<output_dir>/<finding>/` holds
results.json, table.md and plot.png, and plane.png shows alignment and uniformity of all of them.
docs/reports/objectives.md says what the numbers mean.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a script draws into a file; it needs no display
import matplotlib.pyplot as plt
import numpy as np
import yaml
from rich.console import Console
from rich.markdown import Markdown
from safetensors.torch import load_file
from transformers import AutoConfig

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_folder, atomic_write, sha256_file, write_jsonl
from common.jsonl import read_text_columns
from common.model_folder import ModelFolder
from common.sentences import SENTENCE_END
from eval import mteb_long, questions, sts
from eval.plot import save
from experiments.training_runs import check_stamp, run_script, train, training_cost
from modeling_longembed import LongEmbedModel

ROOT = Path(__file__).resolve().parent.parent
FINDINGS = ROOT / "experiments" / "findings"
PROGRAMS = {"contrastive": ROOT / "training" / "contrastive.py", "one_mask": ROOT / "experiments" / "one_mask.py"}
MINE = ROOT / "training" / "mine_negatives.py"
BLOCK = {"type": "block", "size": 254}  # of the models of long documents
SENTENCE_WORDS = range(6, 41)
SIMILARITY = {"cosine_spearman": "Spearman", "alignment": "alignment", "uniformity": "uniformity"}  # MTEB's -> ours


@dataclass
class Arguments:
    """From what, on what, and where everything goes. A finding needs no more than the data that its file names."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of the encoder that all rows start from"})
    output_dir: str = field(metadata={"help": "folder of one folder a finding, and of plane.png"})
    findings: list[str] = field(default_factory=list, metadata={"help": "names of files of --recipes; default: all"})
    recipes: str = field(default=str(FINDINGS), metadata={"help": "folder of the findings"})
    teacher: str | None = field(default=None, metadata={"help": "an encoder that guides, and mines hard negatives"})
    questions: str | None = field(default=None, metadata={"help": "rows {question, long_answer, title}, JSON lines"})
    judge_from: int = field(default=2100, metadata={"help": "the first row of --questions that is judged, not trained"})
    titles: str | None = field(
        default=None, metadata={"help": "rows {anchor, positive}: titles and abstracts; sentences are drawn from these"}
    )
    judged_titles: int = field(default=2000, metadata={"help": "rows at the end of --titles that are judged"})
    sentences: int = field(default=8192, metadata={"help": "how many are drawn"})
    nli: str | None = field(default=None, metadata={"help": "rows {premise, hypothesis, label}"})
    documents: str | None = field(default=None, metadata={"help": "long documents {title, abstract, body}"})
    document_words: int = field(default=900, metadata={"help": "of a body, at least; shorter documents are left out"})
    judged_documents: int = field(default=150, metadata={"help": "of --documents, drawn, that are judged, not trained"})
    sts_dir: str | None = field(default=None, metadata={"help": "folder of pairs, as eval/sts.py reads them"})
    sts_tasks: list[str] = field(default_factory=lambda: ["STS16"], metadata={"help": "tasks of --sts_dir"})
    task_data_dir: str | None = field(default=None, metadata={"help": "folder with one folder a retrieval task"})
    tasks: list[str] = field(default_factory=list, metadata={"help": "tasks of --task_data_dir; default: all"})
    precision: str = field(default="auto", metadata={"help": "of judging: float32, bfloat16 or auto"})
    batch_tokens: int = field(default=8192, metadata={"help": "tokens in one forward pass of judging"})

    @property
    def data(self) -> Path:
        """The folder of what is made of the user's files."""
        return Path(self.output_dir, "data")

    def given(self, option: str) -> Path:
        """The file of an option.

        Raises:
            UserError: it was not given.
        """
        if getattr(self, option) is None:
            raise UserError(f"--{option} is needed for one of the findings; give it, or choose others with --findings")
        return Path(getattr(self, option))


@dataclass(frozen=True)
class Row:
    """A training of a finding.

    Attributes:
        name: in the table, and of its folder.
        start: `plain`, the encoder as it is, or `long`, the same in blocks.
        data: a name of `DATA`.
        program: a name of `PROGRAMS`.
        recipe: arguments of training/contrastive.py.
        follow: how often it is judged, at equal distances, the end included.
    """

    name: str
    start: str
    data: str
    program: str
    recipe: dict[str, Any]
    follow: int


@dataclass(frozen=True)
class Finding:
    """A file of `--recipes`.

    Attributes:
        name: of the file.
        title: of the table and the plot.
        rows: what is trained.
        judges: name of a judge -> its options, `max_length` and `metrics`.
        plot: columns of the table that are drawn.
    """

    name: str
    title: str
    rows: list[Row]
    judges: dict[str, dict[str, Any]]
    plot: list[str]

    @classmethod
    def read(cls, path: Path) -> "Finding":
        """Rows are what the finding shares over the recipe that a row names, under what the row says itself.

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
            follow = content.get("follow", 1)
            every = max(1, recipe["max_steps"] // follow)
            # Rounded up: there is a checkpoint at the end, also between two stages.
            recipe |= {"save_steps": every, "save_total_limit": math.ceil(recipe["max_steps"] / every)}
            start, program = options["start"] or "plain", options["program"] or "contrastive"
            rows.append(Row(name, start, options["data"], program, recipe, follow))
        return cls(path.stem, content["title"], rows, content["judges"], content["plot"])


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


# Data -----------------------------------------------------------------------------------------------------------------


def write_questions(arguments: Arguments, path: Path) -> None:
    """Questions, long answers, and the titles of their pages as labels; the task of the rows behind."""
    source = arguments.given("questions")
    questions.write_task(questions.Arguments(str(source), str(arguments.data / "Questions"), arguments.judge_from))
    rows = [values for _, values in read_text_columns(source, "question", "long_answer", "title")][
        : arguments.judge_from
    ]
    write_jsonl(path, ({"anchor": a, "positive": b, "label": c} for a, b, c in rows))


def write_titles(arguments: Arguments, path: Path) -> None:
    """Titles and abstracts; the task of every fourth title of the last rows, among all abstracts of these."""
    rows = [values for _, values in read_text_columns(arguments.given("titles"), "anchor", "positive")]
    judged = rows[-arguments.judged_titles :]
    write_task(arguments.data / "Titles", judged, range(0, len(judged), 4))
    write_training(path, [{"anchor": a, "positive": b} for a, b in rows[: -arguments.judged_titles]], "titles")


def write_sentences(arguments: Arguments, path: Path) -> None:
    """Sentences of the abstracts that are not judged, each once, drawn."""
    rows = [abstract for _, (abstract,) in read_text_columns(arguments.given("titles"), "positive")]
    found: dict[str, None] = {}
    for abstract in rows[: -arguments.judged_titles]:
        found.update(dict.fromkeys(s for s in SENTENCE_END.split(abstract) if len(s.split()) in SENTENCE_WORDS))
    drawn = np.random.default_rng(0).permutation(len(found))[: arguments.sentences]
    sentences = list(found)
    write_training(path, [{"anchor": sentences[number]} for number in drawn], "titles")


def write_documents(arguments: Arguments, path: Path) -> None:
    """Long documents; the task of the abstracts of some, among the bodies of these."""
    rows = [values for _, values in read_text_columns(arguments.given("documents"), "title", "abstract", "body")]
    rows = [row for row in rows if row[0] and row[1].strip() and len(row[2].split()) >= arguments.document_words]
    rows = [rows[number] for number in np.random.default_rng(0).permutation(len(rows))]
    judged, trained = rows[: arguments.judged_documents], rows[arguments.judged_documents :]
    write_task(arguments.data / "Documents", [row[1:] for row in judged], range(len(judged)))
    write_training(path, [{"title": t, "abstract": a, "body": b} for t, a, b in trained], "documents")


def write_training(path: Path, rows: Sequence[dict[str, str]], option: str) -> None:
    """What is not judged.

    Raises:
        UserError: nothing is left; names the option whose file is too short.
    """
    if not rows:
        raise UserError(
            f"--{option} has no row to train on beside those that are judged; give more, or judge fewer "
            f"(--judged_{option})"
        )
    write_jsonl(path, rows)


def write_task(folder: Path, pairs: Sequence[tuple[str, ...]], judged: Sequence[int]) -> None:
    """A retrieval task: the anchors of the `judged` pairs find their own among the positives of all."""
    with atomic_folder(folder) as temporary:
        write_jsonl(temporary / "corpus.jsonl.gz", ({"doc_id": f"d{n}", "text": p[1]} for n, p in enumerate(pairs)))
        write_jsonl(temporary / "queries.jsonl.gz", ({"qid": f"q{n}", "text": pairs[n][0]} for n in judged))
        write_jsonl(temporary / "qrels.jsonl.gz", ({"qid": f"q{n}", "doc_id": f"d{n}"} for n in judged))


def write_mined(model: str | None, arguments: Arguments, path: Path) -> None:
    """The questions, with the nearest passage that a teacher scores below the right one as a hard negative."""
    teacher = model or str(arguments.given("teacher"))
    options = ["--model", teacher, "--data", str(data_file("questions", arguments)), "--output", str(path)]
    options += ["--num_negatives", "1", "--relative_margin", "0.05"]
    run_script(MINE, options)


DATA: dict[str, Callable[[Arguments, Path], None]] = {
    "questions": write_questions,
    "titles": write_titles,
    "sentences": write_sentences,
    "documents": write_documents,
    "mined_by_teacher": lambda arguments, path: write_mined(None, arguments, path),
    "mined_by_bm25": lambda arguments, path: write_mined("bm25", arguments, path),
}


def data_file(name: str, arguments: Arguments) -> Path:
    """The training data of a name, made if it is not there."""
    if name not in DATA:
        return arguments.given(name)
    path = arguments.data / f"{name}.jsonl"
    if not path.exists():
        DATA[name](arguments, path)
    return path


# Models ---------------------------------------------------------------------------------------------------------------


def start_model(name: str, arguments: Arguments) -> Path:
    """The encoder, `plain` or in blocks for `long` documents."""
    given, folder = arguments.model_name_or_path, Path(arguments.output_dir, "starts", name)
    is_ours = AutoConfig.from_pretrained(given).model_type == LongEmbedModel.config_class.model_type
    if name == "plain" and is_ours:
        return Path(given)
    if not folder.exists():
        if name == "plain":
            model = LongEmbedModel.from_encoder(given)
        else:
            model = LongEmbedModel.from_pretrained(start_model("plain", arguments), attention_patterns=BLOCK)
            model.extend_context(65536, "restart", period=BLOCK["size"])
        with atomic_folder(folder) as temporary:
            model.eval().save_pretrained(temporary, title=name)
    return folder


def make(row: Row, folder: Path, arguments: Arguments) -> dict[int, Path]:
    """Train a row unless it is there.

    Returns:
        Step -> folder of the model, the last one included.

    Raises:
        UserError: what is there was made otherwise; or a training that failed.
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
            # One that is saved may be a part of a checkpoint: a run that was stopped while it removed them.
            if step < recipe["max_steps"] and not saved.exists():
                save_step(start, path, saved)
        shutil.rmtree(checkpoints)  # three times the size of the model each
    steps = {int(path.name): path for path in folder.glob("steps/[0-9]*")}
    return dict(sorted(steps.items())) | {recipe["max_steps"]: final}


def save_step(start: Path, checkpoint: Path, folder: Path) -> None:
    """The model of a checkpoint."""
    model = LongEmbedModel.from_pretrained(start)
    tensors = load_file(checkpoint / "model.safetensors")
    model.load_state_dict({n: tensor for n, tensor in tensors.items() if not n.startswith("objective.")}, strict=False)
    with atomic_folder(folder) as temporary:
        model.eval().save_pretrained(temporary, title=folder.name)


# Measurements ---------------------------------------------------------------------------------------------------------


def judge(model: Path, judges: dict[str, dict[str, Any]], arguments: Arguments) -> dict[str, float]:
    """Column of the table -> score, as eval/mteb_long.py and eval/sts.py give it; what was judged before is read."""
    scores = {}
    for name, options in judges.items():
        settings: dict[str, Any] = {
            "model": [str(model)],
            "output_dir": arguments.output_dir,
            "max_length": options.get("max_length"),
            "precision": arguments.precision,
            "batch_tokens": arguments.batch_tokens,
        }
        if name == "similarity":
            tasks = sts.get_tasks(arguments.sts_tasks, str(arguments.given("sts_dir")))
            found = mteb_long.run_tasks(mteb_long.ModelArguments(**settings), tasks, list(SIMILARITY))
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
        for score in mteb_long.judge(mteb_long.Arguments(**settings)):
            scores[score.column.replace("hit_rate_at_", "top ")] = score.value
    return scores


def measure(row: Row, finding: Finding, arguments: Arguments) -> dict[str, Any]:
    """A row of results.json; the course of one that is followed is its textual similarity alone."""
    folder = Path(arguments.output_dir, finding.name, row.name)
    *steps, (last, final) = make(row, folder, arguments).items()
    along = {"similarity": finding.judges.get("similarity", {})}
    return {
        "row": row.name,
        "steps": last,
        "pairs": last * row.recipe["per_device_train_batch_size"],
        "training": training_cost(folder / "metrics.jsonl"),
        "scores": judge(final, finding.judges, arguments),
        "course": [[step, judge(model, along, arguments)] for step, model in steps],
    }


# Report ---------------------------------------------------------------------------------------------------------------

COST = {"tokens": ",d", "minutes": ".1f", "peak_memory_gib": ".2f"}


def as_markdown(results: Sequence[dict[str, Any]]) -> str:
    """One line a row: its scores, what it has seen, what that took."""
    columns = list(dict.fromkeys(column for result in results for column in result["scores"]))
    table = [["", *columns, "steps", "pairs", "tokens", "minutes", "peak GiB"]]
    table.append(["---", *["---:"] * (len(table[0]) - 1)])
    for result in results:
        scores = [_cell(column, result["scores"].get(column)) for column in columns]
        cost = [""] * (len(table[0]) - len(columns) - 1)
        if result["training"]:
            cost = [f"{result['steps']:,}", f"{result['pairs']:,}"]
            cost += [format(result["training"][name], form) for name, form in COST.items()]
        table.append([result["row"].replace("_", " "), *scores, *cost])
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return format(value, ".3f" if column in ("alignment", "uniformity") else ".1f")


def draw(finding: Finding, results: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel of bars for each column that the finding draws, and one of the course of the rows that are followed."""
    followed = [result for result in results if result["course"]]
    panels = len(finding.plot) + bool(followed)
    size = (4.6 * panels, 1.3 + 0.34 * max(6, len(results)))
    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    names = [result["row"].replace("_", " ") for result in results]
    for number, (axis, column) in enumerate(zip(axes[0], finding.plot, strict=False)):
        values = [result["scores"].get(column, float("nan")) for result in results]
        colors = ["black" if result["training"] is None else f"C{n % 10}" for n, result in enumerate(results)]
        axis.bar_label(axis.barh(names, values, color=colors), fmt="%.1f", fontsize=8, padding=2)
        axis.invert_yaxis()
        axis.set_title(column)
        axis.margins(x=0.15)
        if number:
            axis.set_yticklabels([])
    if followed:
        for number, result in enumerate(results):
            if result["course"]:
                points = [(0, results[0]["scores"]), *result["course"], (result["steps"], result["scores"])]
                line = [(step, scores["Spearman"]) for step, scores in points]
                axes[0][-1].plot(*zip(*line, strict=True), marker="o", color=f"C{number % 10}", label=names[number])
        axes[0][-1].set_title("Spearman along the way")
        axes[0][-1].set_xlabel("steps")
        axes[0][-1].legend(fontsize=8)
        axes[0][-1].grid(alpha=0.3)
    figure.suptitle(finding.title)
    save(figure, path)


def draw_plane(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Alignment against uniformity of all rows of all findings (Wang and Isola 2020; Gao et al. 2021, figure 2).

    Args:
        found: finding -> its results.
        path: of the PNG; nothing is drawn without textual similarity.
    """
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    lines = []
    for results in found.values():
        for result in results:
            course = [scores for _, scores in result["course"]] + [result["scores"]]
            if "Spearman" in result["scores"]:
                points = [[scores[name] for name in ("uniformity", "alignment", "Spearman")] for scores in course]
                lines.append((result["row"].replace("_", " "), result["training"] is None, np.array(points)))
    if not lines:
        return
    spearman = np.concatenate([line[:, 2] for _, _, line in lines])
    for number, (name, is_start, line) in enumerate(lines):
        uniform, aligned, values = line.T
        axis.plot(uniform, aligned, color="0.8", linewidth=1, zorder=0)
        shape: dict[str, Any] = {"marker": "*", "s": 160} if is_start else {"marker": "o", "s": 45}
        limits = {"vmin": spearman.min(), "vmax": spearman.max()}
        dots = axis.scatter(uniform, aligned, c=values, edgecolors="0.3", linewidths=0.5, **limits, **shape)
        place = (6, 5 if number % 2 else -10)  # neighbours in the plane are often neighbours in the list
        axis.annotate(name, (uniform[-1], aligned[-1]), fontsize=7, xytext=place, textcoords="offset points")
    figure.colorbar(dots, label="Spearman x 100")
    axis.set_xlabel("uniformity (lower: spread more evenly)")
    axis.set_ylabel("alignment (lower: what belongs together is nearer)")
    axis.grid(alpha=0.3)
    save(figure, path)


def compare(arguments: Arguments) -> dict[str, list[dict[str, Any]]]:
    """Make and measure all rows; what the folder of a finding shows is renewed after each of them.

    Returns:
        Finding -> its results, the start first.

    Raises:
        UserError: a finding that does not exist, or data that is missing or cannot be read; told before any training.
    """
    names = arguments.findings or sorted(path.stem for path in Path(arguments.recipes).glob("*.yaml"))
    findings = [Finding.read(Path(arguments.recipes, f"{name}.yaml")) for name in names]
    ModelFolder.find(arguments.model_name_or_path)
    for finding in findings:
        for name in [row.data for row in finding.rows] + [judge for judge in finding.judges if judge in DATA]:
            data_file(name, arguments)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in findings:
        start = start_model(finding.rows[0].start, arguments)
        results = found[finding.name] = []
        results.append({"row": "start", "training": None, "course": []})
        results[0]["scores"] = judge(start, finding.judges, arguments)
        for row in finding.rows:
            print(f"{finding.name}: {row.name}", flush=True)
            results.append(measure(row, finding, arguments))
            folder = Path(arguments.output_dir, finding.name)
            atomic_write(folder / "results.json", json.dumps(results, indent=1))
            atomic_write(folder / "table.md", as_markdown(results))
            draw(finding, results, folder / "plot.png")
        draw_plane(found, Path(arguments.output_dir, "plane.png"))
    return found


def main() -> None:
    """The script."""
    (arguments,) = parse(Arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for name, results in compare(arguments).items():
        console.rule(name)
        console.print(Markdown(as_markdown(results)))


if __name__ == "__main__":
    run(main)
