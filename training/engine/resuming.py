"""What a resumed run has to have in common with the run that it goes on with, and what may change.

A checkpoint records the settings of its run: the value of every option, and where an option only names something (a
model, data) or counts per process, what it stands for. A setting may differ if it is in `MAY_CHANGE`, or if
`--change_settings` names it, unless it is in `ONLY_AT_START`. An option that is in neither list is compared.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from common.conditions import default_of
from common.errors import UserError
from training.engine.optimizer import PLATEAU

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
        "structural_head_dims",
        "contextual_head_dims",
        "contextual_teacher_head_dims",
        "contextual_width",
        "next_sentence",
    }
)


class Settings:
    """The settings of a run, as a checkpoint records them.

    Args:
        options: the parsed dataclasses of the script, all of them.
        described: what options stand for, by the name of the option, such as the hash of the texts of `train_data`.

    Attributes:
        values: values of JSON types by option; those that may change are left out.
    """

    def __init__(self, options: Sequence[Any], described: Mapping[str, Any]) -> None:
        known = {option.name: (instance, option) for instance in options for option in fields(instance) if option.init}
        # vars: a value, whatever the dataclass makes of reading it.
        given = {name: vars(instance)[name] for name, (instance, _) in known.items()}
        free = MAY_CHANGE - EVALUATION if given.get("lr_scheduler_type") == PLATEAU else MAY_CHANGE
        values = {name: value for name, value in given.items() if name not in free} | dict(described)
        self.values: dict[str, Any] = json.loads(json.dumps(values))
        self.defaults = {name: default_of(option) for name, (_, option) in known.items()}
        self._only_at_start = ONLY_AT_START | ({"temperature"} if given.get("learnable_temperature") else set())

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

    def changes(self, before: Mapping[str, Any] | None, path: Path, allowed: Collection[str]) -> set[str]:
        """Return the settings that differ from those of the run that is resumed.

        Args:
            before: the settings that its checkpoint records; None: an earlier version has made it, which recorded none.
            path: the checkpoint.
            allowed: names of settings that may differ.

        Raises:
            UserError: another setting differs; the message names the old and the new values.
        """
        if before is None:
            return set(allowed)
        found = {
            name: (before[name] if name in before else self._default(name), now)
            for name, now in self.values.items()
            if (before[name] if name in before else self._default(name)) != now
        }
        refused = [name for name in found if name not in allowed]
        if not refused:
            return set(found)
        differences = ", and ".join(
            f"with {_words(name, found[name][0])}, now it is {_value(found[name][1])}" for name in refused
        )
        remedy = "use the same, or start anew in another --output_dir"
        if not self._only_at_start & set(refused):
            new = "value" if len(refused) == 1 else "values"
            remedy += f", or go on with the new {new} on purpose: add --change_settings {' '.join(refused)}"
        raise UserError(f"{path}: was made {differences}; {remedy}")

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
