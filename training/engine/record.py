"""What the card of a trained model says about its training: from what, on which data, with which options, how well."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.conditions import Options, default_of
from common.data_files import is_hub_id

# Options with which the same training would give the same model: where files are, and what is shown and kept.
WITHOUT_INFLUENCE = {
    "output_dir",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "resume_from_checkpoint",
    "allow_reshard",
    "change_settings",
    "report_to",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "gradient_checkpointing",
    "rehearse",
    "find_batch_tokens",
    "trust_remote_code",
}
# Options that a reader looks for, whether they were set or have their defaults.
ALWAYS = {"learning_rate", "per_device_train_batch_size", "lr_scheduler_type", "weight_decay", "seed"}
LIBRARIES = ("torch", "transformers", "accelerate")


@dataclasses.dataclass(frozen=True)
class Record:
    """What the card of a trained model says about its training.

    Attributes:
        rows: of a table, name -> value.
        results: rows of the card's results: `task`, `metric`, `score`.
        datasets: those of the training data that are on the Hub.
    """

    rows: Mapping[str, str]
    results: Sequence[dict[str, Any]]
    datasets: Sequence[str]


def record(options: Sequence[Any], metrics: Path | None = None) -> Record:
    """Describe a training.

    Args:
        options: the parsed dataclasses of the script.
        metrics: the `metrics.jsonl` of a run; None: the script is no training, and measures nothing.
    """
    known = Options(options)
    values = {
        name: value
        for name, value in known.values.items()
        if name not in WITHOUT_INFLUENCE
        and (value != default_of(known.fields[name]) or (name in ALWAYS and known.applies(name)))
    }
    datasets = [name.split("@")[0] for name in _words(values.get("train_data")) if is_hub_id(name)]
    rows = {name: ", ".join(map(_shown, _words(value))) for name, value in values.items()}
    rows["versions"] = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    return Record(rows, list(_results(metrics)) if metrics else [], [name for name in datasets if not _exists(name)])


def _results(metrics: Path) -> Iterator[dict[str, Any]]:
    """Yield the loss of the last steps that were logged, and what the last evaluation found."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    training = [line for line in lines if "learning_rate" in line]
    held_out = [line for line in lines if "learning_rate" not in line]
    for line in held_out[-1:]:
        for name, value in line.items():
            if name != "step" and not name.endswith("_count"):
                yield {"task": "held-out rows", "metric": name.removeprefix("eval_"), "score": value}
    for line in training[-1:]:
        yield {"task": f"training, step {line['step']}", "metric": "loss", "score": line["loss"]}


def _words(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _exists(name: Any) -> bool:
    return isinstance(name, str) and Path(name).exists()


def _shown(value: Any) -> str:
    """Return a value for the card, and of a path only the end: the rest says something about a machine alone."""
    if not (_exists(value) and "/" in value):
        return f"`{value}`"
    path = Path(value)
    return f"`{Path(path.parent.name, path.name) if path.name == 'final' else path.name}`"
