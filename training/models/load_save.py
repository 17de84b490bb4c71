"""The model of a script: how it is named, loaded, written and published."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError
from common.files import atomic_folder
from modeling_longembed import LongEmbedModel  # registers the Auto classes, so that our own folders need no remote code
from training.data.masked_batches import tokenizer_identity
from training.models.tuning import TuningArguments, save_adapter


@dataclass
class ModelArguments:
    """The model to train."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of a LongEmbed model"})
    model_revision: str = field(default="main", metadata={"help": "revision of a model on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code in the model's folder, not ours"})
    dropout: float | None = field(default=None, metadata={"help": "of hidden states; the model's own if not given"})
    attention_dropout: float | None = field(
        default=None,
        metadata={
            "help": "of attention probabilities; the model's own if not given. 0 makes full attention on a CPU faster, "
            "and its memory grow with the length instead of its square"
        },
    )

    layerdrop: float | None = field(
        default=None,
        metadata={
            "help": "probability that a layer is left out of a step, after which a model can lose layers (LayerDrop); "
            "the model's own if not given"
        },
    )
    layerdrop_unit: Literal["layer", "sublayer"] | None = field(
        default=None, metadata={"help": "what LayerDrop leaves out; the model's own if not given"}
    )

    def dropouts(self) -> dict[str, Any]:
        """Fields of the model's config that are to be others."""
        given: dict[str, Any] = {"hidden_dropout_prob": self.dropout, "attention_dropout": self.attention_dropout}
        given |= {"layerdrop": self.layerdrop, "layerdrop_unit": self.layerdrop_unit}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class HubArguments:
    """Where the final model is published."""

    push_to_hub: bool = field(default=False, metadata={"help": "upload the final model"})
    hub_model_id: str | None = field(default=None, metadata={"help": "where to: org/name"})
    hub_private_repo: bool = field(default=True, metadata={"help": "whether a repository that is made is private"})

    def __post_init__(self) -> None:
        if self.push_to_hub and not self.hub_model_id:
            raise UserError("--push_to_hub needs --hub_model_id org/name")


def load_encoder(arguments: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder, of our code or of its folder's, and a tokenizer of its own beside that of the model.

    Raises:
        UserError: there is no such model, or it is none of ours.
    """
    name = arguments.model_name_or_path
    options: dict[str, Any] = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    try:
        # Looked at before the model is made: another architecture does not know our names of its dropouts.
        model_type = AutoConfig.from_pretrained(name, **options).model_type
        if model_type != LongEmbedModel.config_class.model_type:
            raise UserError(
                f"--model_name_or_path {name}: is a {model_type} model; convert it with "
                "LongEmbedModel.from_encoder(...) and save_pretrained first"
            )
        model = AutoModel.from_pretrained(name, dtype=torch.float32, **options, **arguments.dropouts())
        return model, AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {name}: {' '.join(str(error).split())}") from None


def model_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that an embedding depends on, weights, config and tokenizer, wherever they were read from."""
    of_training = {"hidden_dropout_prob", "attention_dropout", "layerdrop", "layerdrop_unit"}
    passed_over = of_training | {"_name_or_path", "transformers_version"}
    config = {name: value for name, value in model.config.to_dict().items() if name not in passed_over}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(tokenizer_identity(tokenizer).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:40]


def text_length(option: str, wanted: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens at which a model cuts texts off: its context if no number is wanted.

    Raises:
        UserError: the context is shorter, or there is no room for text; names the option.
    """
    context = model.config.max_position_embeddings
    length = context if wanted is None else wanted
    if not tokenizer.num_special_tokens_to_add() < length <= context:
        raise UserError(
            f"--{option} {length}: must be at most {context}, the context of {model.name_or_path} in tokens, and "
            "leave room for text"
        )
    return length


def save_and_push(
    model: PreTrainedModel | PeftModel, tuning: TuningArguments, output_dir: str, hub: HubArguments
) -> None:
    """Write what a training ends with, and publish it where that is asked for."""
    folder = Path(output_dir).absolute()
    final = save(model, tuning, folder, title=hub.hub_model_id or folder.name)
    if hub.push_to_hub:
        assert hub.hub_model_id  # HubArguments has checked it
        push(final, hub.hub_model_id, hub.hub_private_repo)


def save(model: PreTrainedModel | PeftModel, tuning: TuningArguments, output_dir: Path, title: str) -> Path:
    """Write the model to `output_dir/final`; a LoRA one merged, and its adapter to `output_dir/adapter`."""
    if isinstance(model, PeftModel):
        with atomic_folder(output_dir / "adapter") as folder:
            save_adapter(model, tuning.tuning, folder)
        model = model.merge_and_unload()
    with atomic_folder(output_dir / "final") as folder:
        model.eval().save_pretrained(str(folder), title=title)  # with its tokenizer
    return output_dir / "final"


def push(final: Path, repository: str, private: bool) -> None:
    """Upload the final folder as it stands."""
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=final)
    except (OSError, ValueError) as error:
        raise UserError(f"{repository}: upload failed, the model is in {final}: {error}") from None
