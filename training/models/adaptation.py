"""A masked-language model to adapt: a LongEmbed model or an encoder to convert, with new positions and patterns."""

from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM

from common.conditions import NOT_GIVEN
from common.errors import UserError, reading
from common.patterns import parse_pattern
from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from modeling_longembed.conversion_longembed import MissingHeadError
from modeling_longembed.hub_files_longembed import check_tokenizer
from training.models.encoder import ModelArguments


@dataclass
class AdaptationArguments:
    """What is changed in the model before it trains."""

    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "new context in tokens; the model's own if not given"}
    )
    position_extension: str | None = field(
        default=None,
        metadata={
            "help": "how positions are extended to the new context: a method such as repeat, interpolate, group, yarn, "
            "or one with parameters, restart:period=254; default: the usual method of the model's positions",
            "applies": {"position_embedding_type": NOT_GIVEN},
        },
    )
    position_embedding_type: str | None = field(
        default=None,
        metadata={"help": "a new position scheme, which the model has to learn: rope, alibi, sinusoidal, ..."},
    )
    rope_theta: float | None = field(
        default=None,
        metadata={
            "help": "base of the rotation angles of a new rope scheme",
            "applies": {"position_embedding_type": "rope"},
        },
    )
    attention_patterns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "attention patterns, one for all attention sublayers or one for each: full sliding:window=128 "
            "block:size=254; the model's own if not given"
        },
    )
    training_attention_patterns: list[str] = field(
        default_factory=list,
        metadata={"help": "attention patterns used in training only, such as shifted:size=512; default: the same"},
    )

    def patterns(self) -> dict[str, list[dict]]:
        """Return the attention patterns that were given, as fields of the config."""
        names = ("attention_patterns", "training_attention_patterns")
        return {
            name: [parse_pattern(text, option=name) for text in getattr(self, name)]
            for name in names
            if getattr(self, name)
        }

    def extension(self) -> dict[str, Any] | None:
        """Return the extension method and its parameters, as the field of the config."""
        if self.position_extension is None:
            return None
        return parse_pattern(self.position_extension, option="position_extension", key="method")


def load_masked_lm(
    model_arguments: ModelArguments, arguments: AdaptationArguments
) -> tuple[LongEmbedForMaskedLM, bool]:
    """Load a masked-language model, convert it if it is not a LongEmbed model, and adapt it.

    Args:
        model_arguments: names the model.
        arguments: what is changed.

    Returns:
        The model, with its tokenizer as `model.tokenizer`, and whether its head is new.

    Raises:
        UserError: the model does not exist, cannot be converted or changed in this way, or has no tokenizer.
    """
    name = model_arguments.model_name_or_path
    options: dict[str, Any] = {
        "revision": model_arguments.model_revision,
        "trust_remote_code": model_arguments.trust_remote_code,
    }
    with reading(f"--model_name_or_path {name}", name):
        ours = AutoConfig.from_pretrained(name, **options).model_type == LongEmbedModel.config_class.model_type
        # Patterns are set before the extension, whose usual method depends on them, unless they reach beyond the old
        # context: then they can only be set after it.
        now, later = arguments.patterns(), dict[str, Any]()
        if arguments.max_position_embeddings is not None:
            switches = arguments.position_embedding_type is not None
            if switches or (ours and not _is_valid(name, now, options)):
                now, later = later, now
        model, head_is_new = (_load_ours if ours else _convert)(
            name, arguments, options, model_arguments.dropouts() | now
        )
        if arguments.position_embedding_type is not None:
            model.switch_positions(
                arguments.position_embedding_type, arguments.max_position_embeddings, arguments.rope_theta
            )
        has_tokenizer = model.has_tokenizer()
        if has_tokenizer:
            check_tokenizer(model.tokenizer, model.config.vocab_size)
        if later and has_tokenizer:
            tokenizer = model.tokenizer
            with TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model, _ = _load(folder, trust_remote_code=model_arguments.trust_remote_code, **later)
            model.tokenizer, model.name_or_path = tokenizer, name
    if not has_tokenizer:
        raise UserError(f"--model_name_or_path {name}: has no tokenizer; save one beside the model")
    return model, head_is_new


def _is_valid(name: str, patterns: dict[str, Any], options: dict[str, Any]) -> bool:
    try:
        AutoConfig.from_pretrained(name, **options, **patterns)
    except ValueError:
        return False
    return True


def _load(path: str, **choices: Any) -> tuple[Any, dict[str, Any]]:
    return AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **choices)


def _load_ours(
    name: str, arguments: AdaptationArguments, options: dict[str, Any], overrides: dict[str, Any]
) -> tuple[LongEmbedForMaskedLM, bool]:
    model, loading = _load(name, **options, **overrides)
    length, extension = arguments.max_position_embeddings, arguments.extension() or {}
    if arguments.position_embedding_type is None and (length is not None or extension):
        method = extension.pop("method", None)
        model.extend_context(length, method, **extension)
    return model, any(name.startswith("head.dense") for name in loading["missing_keys"])


def _convert(
    name: str, arguments: AdaptationArguments, options: dict[str, Any], overrides: dict[str, Any]
) -> tuple[LongEmbedForMaskedLM, bool]:
    choices = overrides | {"revision": options["revision"]}
    if arguments.position_embedding_type is None:
        choices |= {
            "max_position_embeddings": arguments.max_position_embeddings,
            "position_extension": arguments.extension(),
        }
    try:
        return LongEmbedForMaskedLM.from_encoder(name, **choices), False
    except MissingHeadError:
        encoder = LongEmbedModel.from_encoder(name, **choices)
    model = LongEmbedForMaskedLM(encoder.config)
    model.model, model.tokenizer = encoder, encoder.tokenizer
    model.tie_weights()
    return model, True


def train_new_head(model: LongEmbedForMaskedLM, word_counts: Tensor) -> None:
    """Initialise a new head from word counts, and train it under every `--tuning`: frozen, it would remain noise.

    The head starts by predicting words as often as they occur. From a bias of zeros it would learn nothing else from
    the first hundred thousand tokens, with gradients that damage the encoder meanwhile. The projection to the
    vocabulary is the table of word embeddings and trains if that does.

    Args:
        model: the model with the new head.
        word_counts: `(vocab_size,)`, how often each token occurs in the training documents.
    """
    with torch.no_grad():
        counts = word_counts.double() + 1
        model.head.decoder.bias.copy_((counts / counts.sum()).log())
    for parameter in (*model.head.dense.parameters(), *model.head.norm.parameters(), model.head.decoder.bias):
        parameter.requires_grad_(True)
