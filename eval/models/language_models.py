"""Masked and causal language models, of LongEmbed and of transformers, behind one method that returns logits."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.util import get_device_name
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

# The import also registers the Auto classes, so that LongEmbed folders load without trust_remote_code.
from common.encoders.encoder import context_length
from common.encoders.model_folder import ModelFolder
from common.errors import UserError, reading
from common.files import sha256_file
from modeling_longembed.encoding_tokens_longembed import special_tokens_around

_OURS = "LongEmbedForMaskedLM"


class LanguageModel:
    """A model with a head over the vocabulary, and its tokenizer.

    Args:
        name_or_path: folder or Hub id of a `LongEmbedForMaskedLM`, or of a masked or causal language model of
            transformers; or a .gguf file. A `LongEmbedForMaskedLM` whose config has `is_causal` is a next-token model:
            its logits at a position are those of the token after it.
        precision: `float32`, or `bfloat16` (autocast).
        trust_remote_code: run code that comes with a model (LongEmbed models need none).

    Attributes:
        folder: the model's files.
        is_causal: whether logits at a position are those of the next token, or of the token at that position.
        context: maximum number of tokens that the model can read.
        computed_by: what computes its logits; see `common.provenance`.
        lead: ids of the special tokens that the tokenizer puts before a text.
        closing: ids of the special tokens that it puts after a text.

    Raises:
        UserError: there is no such model, it does not load, or its head over the vocabulary is not trained.
    """

    def __init__(self, name_or_path: str, precision: str = "float32", trust_remote_code: bool = False):
        path = Path(name_or_path)
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if path.suffix == ".gguf" and path.is_file():
            self.folder = ModelFolder(path.parent, f"local/{path.stem}", sha256_file(path)[:40])
            options["gguf_file"] = path.name
        else:
            self.folder = ModelFolder.find(name_or_path)
        with reading(f"the model {name_or_path} does not load", path):
            config = AutoConfig.from_pretrained(self.folder.path, **options)
            self.is_causal, auto = _head(name_or_path, config, "gguf_file" in options)
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder.path, **options)
            model, loading = auto.from_pretrained(
                self.folder.path, dtype=torch.float32, output_loading_info=True, **options
            )
        if missing := sorted(loading["missing_keys"]):  # transformers would initialise them at random
            raise UserError(f"the model {name_or_path} has no weights for {missing[0]}; train its head first")
        self.model = model.eval().to(get_device_name())
        if getattr(model.config, "use_cache", False):
            model.config.use_cache = False  # each call reads a whole text, so that no past keys and values are needed
        self.precision, self.context = precision, context_length(model)
        self.computed_by = self.folder.computed_by(
            __name__,
            "modeling_longembed.encoding_tokens_longembed",
            trust_remote_code=trust_remote_code,
            device=self.model.device.type,
        )
        self.lead, self.closing = special_tokens_around(self.tokenizer)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, chosen: Tensor) -> Tensor:
        """Compute scores over the vocabulary at some positions.

        Args:
            input_ids: `(B, L)`, documents of one length.
            chosen: `(B, L)` bool, true at the P positions.

        Returns:
            `(P, V)`, on the model's device, in float32 or float64.
        """
        input_ids, chosen = input_ids.to(self.model.device), chosen.to(self.model.device)
        with self._autocast():
            if self.model.config.model_type == "longembed":
                # Only positions with labels are projected to the vocabulary.
                logits = self.model(input_ids, labels=input_ids.where(chosen, -100), only_predicted=True).logits
            else:
                logits = self.model(input_ids).logits[chosen]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)


def _head(name: str, config: Any, is_gguf: bool) -> tuple[bool, Any]:
    """Return whether a model predicts the next token, and the class that loads it."""
    architecture = (config.architectures or [""])[0]
    if config.model_type == "longembed" and architecture == _OURS:
        return config.is_causal, AutoModelForMaskedLM
    if is_gguf or architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return True, AutoModelForCausalLM
    if architecture in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return False, AutoModelForMaskedLM
    # A model whose code is in its folder declares its class there.
    for auto in (AutoModelForCausalLM, AutoModelForMaskedLM):
        if auto.__name__ in getattr(config, "auto_map", {}) and config.model_type != "longembed":
            return auto is AutoModelForCausalLM, auto
    raise UserError(
        f"the model {name} is a {architecture or config.model_type}, which predicts no tokens; give a {_OURS}, or a "
        "masked or causal language model of transformers"
    )
