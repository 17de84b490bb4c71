"""What a resumed run has to have in common with the run that it goes on with, and what may change.

A checkpoint records the settings of its run: the value of every option, and where an option only names something (a
model, data) or counts per process, what it stands for. A setting may differ if it is in `MAY_CHANGE`, or if
`--change_settings` names it, unless it is in `ONLY_AT_START`, or the place in a stream depends on it. An option that is
in neither list is compared.
"""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from common.conditions import Options, default_of
from common.errors import UserError
from training.engine.checkpoints.folders import Checkpoint, Progress, find_checkpoint, has_checkpoints
from training.engine.schedule import PLATEAU

# Options that change no number of a training. Of names of models and data it is the content that is compared.
MAY_CHANGE = frozenset(
    {
        # What is reported, and when.
        "logging_steps",
        "report_to",
        "eval_steps",
        "eval_data",
        "eval_sequence_length",
        "check_leakage",
        # What is written, and where.
        "output_dir",
        "save_steps",
        "save_total_limit",
        "teacher_cache",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        # How the same numbers are computed.
        "dataloader_num_workers",
        "gradient_checkpointing",
        "rehearse",
        "find_batch_tokens",
        "memory_limit_gib",
        # Which revision it was is in the hash of the model's weights.
        "model_revision",
        # How a run is resumed.
        "resume_from_checkpoint",
        "allow_reshard",
        "change_settings",
    }
)
# The schedules that read the results of evaluation, and the options that they make count.
EVALUATION = frozenset({"eval_steps", "eval_data", "eval_sequence_length"})

# Options that say what a training starts from: a checkpoint holds what has become of it, so another value would be
# ignored, or would not fit. --change_settings does not take them.
ONLY_AT_START = frozenset(
    {
        "model_name_or_path",
        "keep_layers",
        "max_position_embeddings",
        "position_extension",
        "position_embedding_type",
        "rope_theta",
        "attention_patterns",
        "training_attention_patterns",
        "student_layers",
        "student_hidden_size",
        "student_num_hidden_layers",
        "student_num_attention_heads",
        "student_intermediate_size",
        "student_attention_patterns",
        "student_position_embedding_type",
        "student_name_or_path",
        "tuning",
        "lora_r",
        "lora_target_modules",
        "learnable_temperature",
        "head_dims",
        "queue_size",
        "similarity",
        "structural_head_dims",
        "contextual_head_dims",
        "contextual_teacher_head_dims",
        "contextual_width",
        "next_sentence",
    }
)
# Those of them that change a model before it trains, so that the hash of the model differs too.
ADAPTING = ONLY_AT_START & {
    "max_position_embeddings",
    "position_extension",
    "position_embedding_type",
    "rope_theta",
    "attention_patterns",
    "training_attention_patterns",
}


def choose_checkpoint(folder: Path, chosen: str | None, is_main: bool) -> Checkpoint | None:
    """Return the checkpoint that a run goes on from; a collective.

    Args:
        folder: where the run's checkpoints are.
        chosen: `--resume_from_checkpoint`.
        is_main: whether this is the process that checks hashes and prints; all others use what it found.

    Returns:
        The checkpoint; None: the run starts anew.

    Raises:
        UserError: the checkpoint is missing or damaged, or there are some and none was chosen.
    """
    if chosen is None:
        if has_checkpoints(folder):
            raise UserError(
                f"{folder} holds checkpoints of an earlier run; go on with --resume_from_checkpoint last, or choose "
                "another --output_dir"
            )
        return None
    checkpoint = gather_object([find_checkpoint(folder, chosen) if is_main else None])[0]
    if is_main:
        if checkpoint:
            print(f"going on from {checkpoint.path}", file=sys.stderr)
        else:
            print(f"no checkpoint in {folder} yet: from the start", file=sys.stderr)
    return checkpoint


def change_settings(given: Sequence[str], more: Sequence[str]) -> str:
    """Return `--change_settings` with more names than were given: the option counts once, the last time."""
    return f"--change_settings {' '.join(dict.fromkeys([*given, *more]))}"


class Settings:
    """The settings of a run, as a checkpoint records them.

    Args:
        options: the parsed dataclasses of the script, all of them.
        described: what options stand for, by the name of the option, such as the hash of a model.
        data: the same of the training data and its batches.

    Attributes:
        values: values of JSON types by option; those that may change are left out.
    """

    def __init__(
        self, options: Sequence[Any], described: Mapping[str, Any], data: Mapping[str, Any] | None = None
    ) -> None:
        known, of_data = Options(options), dict(data or {})
        free = MAY_CHANGE - EVALUATION if known.values.get("lr_scheduler_type") == PLATEAU else MAY_CHANGE
        given = {name: value for name, value in known.values.items() if name not in free}
        self.values: dict[str, Any] = json.loads(json.dumps(given | of_data | dict(described)))
        self._eval_data = known.values.get("eval_data")
        self.defaults = {name: default_of(option) for name, option in known.fields.items()}
        self._data = frozenset(of_data)
        self._only_at_start = ONLY_AT_START | ({"temperature"} if known.values.get("learnable_temperature") else set())

    def check_names(self, names: Collection[str]) -> None:
        """Check what `--change_settings` names.

        Args:
            names: names of options.

        Raises:
            UserError: one of them is no setting, may change in any case, or cannot change.
        """
        for name in names:
            if name in self._only_at_start and name in self.values:
                raise UserError(
                    f"--change_settings {name}: a training starts from it, and a checkpoint holds what has become of "
                    "it; start anew in another --output_dir"
                )
            if name in self.defaults and name not in self.values:
                raise UserError(f"--change_settings {name}: it may always change; leave it out of --change_settings")
            if name not in self.values:
                raise UserError(f"--change_settings {name}: is no option of this script; --help lists them")

    def changes(self, progress: Progress, path: Path, allowed: Sequence[str]) -> set[str]:
        """Return the settings that differ from those of the run that is resumed.

        Args:
            progress: where that run was, with its settings; without them, as of an earlier version, none is compared.
            path: its checkpoint.
            allowed: names of settings that may differ.

        Raises:
            UserError: another setting differs, or one that cannot change; the message names old and new values.
        """
        if progress.settings is None:
            return set(allowed)
        before = self._as_now(progress.settings)
        found = {
            name: (old, now)
            for name, now in self.values.items()
            if (old := before[name] if name in before else self._default(name)) != now
        }
        fixed = self._fixed(progress, found)
        if fixed.keys() & ADAPTING:  # the hash is of the adapted model
            found.pop("model_name_or_path", None)
        refused = [name for name in found if name not in allowed or name in fixed]
        if not refused:
            return set(found)
        differences = ", and ".join(
            f"with {_words(name, found[name][0])}, now it is {_value(found[name][1])}" for name in refused
        )
        remedy = "use the same, or start anew in another --output_dir"
        if reasons := list(dict.fromkeys(fixed[name] for name in refused if name in fixed)):
            remedy += f" ({'; '.join(reasons)})"
        else:
            new = "value" if len(refused) == 1 else "values"
            remedy += f", or go on with the new {new} on purpose: add {change_settings(allowed, refused)}"
        raise UserError(f"{path}: was made {differences}; {remedy}")

    def _as_now(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint recorded as this version records it.

        Earlier versions recorded held-out data by its names, and a column of scores as their teacher.
        """
        settings = dict(before)
        if "eval_data" in self.values and settings.get("eval_data") == self._eval_data:
            settings["eval_data"] = self.values["eval_data"]
        teacher = settings.get("score_teacher")
        if isinstance(teacher, str) and teacher.startswith("column "):
            settings |= {"score_column": teacher, "score_teacher": None}
        return settings

    def _fixed(self, progress: Progress, found: Mapping[str, tuple[Any, Any]]) -> dict[str, str]:
        """Return which of the differing settings cannot change, each with the reason."""
        fixed = dict.fromkeys(self._only_at_start & found.keys(), "a training starts from it")
        if progress.bookmark is not None:
            place = "the place in the stream where the checkpoint stopped would be another"
            fixed |= dict.fromkeys((self._data & found.keys()) - fixed.keys(), place)
        if PLATEAU in found.get("lr_scheduler_type", ()):
            reason = f"{PLATEAU} counts evaluations and the other schedules count steps: none goes on with another"
            fixed["lr_scheduler_type"] = reason
        return fixed

    def _default(self, name: str) -> Any:
        """Return the default of an option that a checkpoint does not know: it was added later."""
        default = self.defaults.get(name)
        return None if default is MISSING else default


def _words(name: str, value: Any) -> str:
    if value in (None, []):
        return f"no --{name}"
    return f"--{name} {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)
