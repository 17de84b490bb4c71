"""The encoder that a script trains: its options, how it is loaded, and how long its texts may be."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError, reading
from modeling_longembed import LongEmbedModel  # registers the Auto classes, so that our own folders need no remote code
from modeling_longembed.hub_files_longembed import check_tokenizer


@dataclass
class ModelArguments:
    """The model to train."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of a LongEmbed model"})
    model_revision: str = field(default="main", metadata={"help": "revision of a model on the Hub"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run the code in the model's folder instead of the installed package"}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "dropout of hidden states; the model's own if not given", "within": "[0, 1)"}
    )
    attention_dropout: float | None = field(
        default=None,
        metadata={
            "help": "dropout of attention probabilities; the model's own if not given. With 0, full attention on a CPU "
            "is faster, and its memory grows linearly with the length instead of quadratically",
            "within": "[0, 1)",
        },
    )
    layerdrop: float | None = field(
        default=None,
        metadata={
            "help": "probability that a training step skips a layer, so that layers can be pruned later (LayerDrop); "
            "the model's own if not given",
            "within": "[0, 1)",
        },
    )
    layerdrop_unit: Literal["layer", "sublayer"] | None = field(
        default=None, metadata={"help": "what LayerDrop skips; the model's own if not given"}
    )

    def dropouts(self) -> dict[str, Any]:
        """Return the fields of the model's config that the options override."""
        given: dict[str, Any] = {"hidden_dropout_prob": self.dropout, "attention_dropout": self.attention_dropout}
        given |= {"layerdrop": self.layerdrop, "layerdrop_unit": self.layerdrop_unit}
        return {name: value for name, value in given.items() if value is not None}


def load_encoder(arguments: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an encoder in float32, and its tokenizer.

    The tokenizer is another object than `model.tokenizer`: what training changes in it (truncation) is not saved.

    Raises:
        UserError: the model does not exist, or is not a LongEmbed model.
    """
    name = arguments.model_name_or_path
    options: dict[str, Any] = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    with reading(f"--model_name_or_path {name}", name):
        # Checked before the model is built, because another architecture does not know our names for dropout.
        model_type = AutoConfig.from_pretrained(name, **options).model_type
        if model_type != LongEmbedModel.config_class.model_type:
            raise UserError(
                f"--model_name_or_path {name}: is a {model_type} model; convert it with "
                "LongEmbedModel.from_encoder(...) and save_pretrained first"
            )
        model = AutoModel.from_pretrained(name, dtype=torch.float32, **options, **arguments.dropouts())
        # As `encode` cuts off: at the end, whatever the folder says.
        tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="right", **options)
        tokenizer("a text")  # its settings may be damaged too
        check_tokenizer(tokenizer, model.config.vocab_size)
        return model, tokenizer


def text_length(option: str, length: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens at which texts are truncated, after checking it.

    Args:
        option: name of the option, for the error message.
        length: its value; None: the model's context.
        model: the model that reads the texts.
        tokenizer: its tokenizer; a text needs room beside the special tokens.

    Raises:
        UserError: the model's context is shorter, or there is no room for text.
    """
    context = model.config.max_position_embeddings
    length = context if length is None else length
    if not tokenizer.num_special_tokens_to_add() < length <= context:
        raise UserError(
            f"--{option} {length}: must be at most {context}, the context of {model.name_or_path} in tokens, and "
            "leave room for text"
        )
    return length
