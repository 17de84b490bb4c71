"""What a training ends with: the final model and its LoRA adapter on disk, and the model on the Hub."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from common.errors import UserError, one_line
from common.files import atomic_folder
from modeling_longembed.hub_files_longembed import CLIENT_ERROR
from modeling_longembed.hub_longembed import HubModel
from training.engine.record import Record

TUNING = "tuning.json"
WHOLE_WEIGHTS = "train_embed_norm.safetensors"


@dataclass(kw_only=True)
class HubArguments:
    """Whether and where the final model is published.

    Raises:
        UserError: the model is to be published, and no repository is named.
    """

    push_to_hub: bool = field(default=False, metadata={"help": "upload the final model to the Hugging Face Hub"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository to upload to: org/name"})
    hub_private_repo: bool = field(
        default=True, metadata={"help": "make a new repository private", "applies": {"push_to_hub": True}}
    )

    def __post_init__(self) -> None:
        if self.push_to_hub and not self.hub_model_id:
            raise UserError("--push_to_hub needs --hub_model_id org/name")


def save(
    model: PreTrainedModel | PeftModel,
    output_dir: Path,
    title: str,
    tuning: str = "full",
    made: Record | None = None,
) -> Path:
    """Write a model to `output_dir/final`; merge a LoRA model first and write its adapter to `output_dir/adapter`.

    Args:
        model: a model with its tokenizer, which is saved with it.
        output_dir: folder of the training.
        title: heading of the model card.
        tuning: the `--tuning` of the training, which the adapter's folder records.
        made: what the model card says about the training.

    Returns:
        The folder of the final model.
    """
    if isinstance(model, PeftModel):
        with atomic_folder(output_dir / "adapter") as folder:
            save_adapter(model, tuning, folder)
        model = model.merge_and_unload()
    if made is not None and isinstance(model, HubModel):
        model.training_rows, model.results, model.datasets = made.rows, made.results, made.datasets
    with atomic_folder(output_dir / "final") as folder:
        model.eval().save_pretrained(str(folder), title=title)
    return output_dir / "final"


def push(final: Path, repository: str, private: bool) -> None:
    """Upload the folder of a final model as it is.

    Args:
        final: the folder.
        repository: `org/name` on the Hub, created if it does not exist.
        private: whether a new repository is private.

    Raises:
        UserError: the upload failed.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=final)
    except (OSError, ValueError, CLIENT_ERROR) as error:
        command = shlex.join(["hf", "upload", repository, str(final), *(["--private"] if private else [])])
        raise UserError(
            f"{repository}: the upload failed ({failure(error)}); the model is in {final}, and this uploads it: "
            f"{command}"
        ) from None


def failure(error: Exception) -> str:
    """Return in one sentence without a full stop why an upload failed, and what helps.

    Args:
        error: what huggingface_hub raised.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return one_line(error) or type(error).__name__
    if status >= 500:
        return f"the Hub is out of order, it answered {status}: try again later"
    helps = {
        401: "nobody is logged in, or the token has expired: hf auth login",
        403: "your token may not write there: log in with one that may",
        404: "there is no such repository for you: look at its name and your token",
        409: "somebody else changes the repository at this moment: try again",
        413: "the Hub takes no file as large as the largest here: load the model, and save it in smaller ones with "
        "save_pretrained(..., max_shard_size='1GB')",
        429: "too many requests: wait a few minutes",
    }
    return f"the Hub answered {status}: {helps.get(status) or one_line(error)}"


def save_adapter(model: PeftModel, tuning: str, folder: Path) -> None:
    """Write a LoRA adapter, and next to it the parameters that were trained whole, which peft does not save.

    These are the embeddings and norms of `--tuning longlora`, and a language-modelling head that was new.

    Args:
        model: the model with the adapter.
        tuning: the `--tuning` of the training.
        folder: an existing folder.
    """
    model.save_pretrained(str(folder))
    whole = {
        name: parameter.detach().contiguous()
        for name, parameter in model.get_base_model().named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    if whole:
        save_file(whole, folder / WHOLE_WEIGHTS)
    (folder / TUNING).write_text(json.dumps({"tuning": tuning, "whole_parameters": sorted(whole)}))


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load an adapter that `save_adapter` wrote onto the model that it was trained on.

    Args:
        model: the model before the training.
        folder: the `adapter` folder of the training.

    Raises:
        UserError: the file of the parameters that were trained whole is missing. Without them the adapter would
            silently give other embeddings.
    """
    whole = json.loads((folder / TUNING).read_text())["whole_parameters"]
    adapted = PeftModel.from_pretrained(model, str(folder))
    if whole:
        if not (folder / WHOLE_WEIGHTS).is_file():
            raise UserError(f"{folder}: {WHOLE_WEIGHTS} is missing; copy it beside the adapter, it was trained too")
        weights = load_file(folder / WHOLE_WEIGHTS)
        with torch.no_grad():
            for name in whole:
                adapted.get_base_model().get_parameter(name).copy_(weights[name])
    return adapted
