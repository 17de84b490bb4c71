"""Encoders of texts: one vector per text from the model itself, or one per chunk for the chunking baselines."""

import contextlib
import re
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from common.encoders.model_folder import ModelFolder
from common.encoders.quantization import int8_weights
from common.encoders.text_vectors import PromptType
from common.errors import UserError

# The import also registers our Auto classes, so that our folders load without trust_remote_code.
from modeling_longembed.encoding_longembed import budget_batches, special_tokens_around


class Encoder:
    """Encode each text as one vector, with the model's own `encode` if it has one, else with sentence-transformers.

    Args:
        folder: the model's files.
        max_length: number of tokens that are read of a text, the rest is cut off; None: the model's own setting.
        precision: `float32`, `bfloat16` (autocast), or `int8`: the weights of linear layers in 8 bits, on the CPU.
        batch_tokens: token budget of a forward pass; it bounds memory and changes float32 vectors by rounding only.
        trust_remote_code: run the code in the folder (our own models need none).
        normalize: scale vectors to unit length if the folder says so; False: never, for a model with its own `encode`.

    Raises:
        UserError: sentence-transformers is not installed, the model does not load, or `max_length` exceeds its context.
    """

    def __init__(
        self,
        folder: ModelFolder,
        max_length: int | None = None,
        precision: str = "float32",
        batch_tokens: int = 16384,
        trust_remote_code: bool = False,
        normalize: bool = True,
    ):
        try:
            from sentence_transformers import SentenceTransformer  # slow to import, and part of the extra 'eval' only
        except ImportError as error:
            raise UserError(f"encoding texts needs the extra 'eval' ({error.name} is missing)") from None
        try:
            self.model = SentenceTransformer(str(folder.path), trust_remote_code=trust_remote_code).eval()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            reason = re.sub(r"\s+", " ", str(error))[:200]
            raise UserError(f"the model in {folder.path} does not load: {reason}") from None
        if precision == "int8":
            int8_weights(self.model.to("cpu"))
        self.folder, self.precision, self.batch_tokens, self.normalize = folder, precision, batch_tokens, normalize
        self.computed_by = encoder_computed_by(folder, precision, trust_remote_code)
        core: Any = getattr(self.model[0], "auto_model", None)
        self.context = context_length(core)
        if max_length is not None and max_length > self.context:
            raise UserError(
                f"{max_length} tokens are more than the context of {folder.name}; give at most {self.context}"
            )
        # A model that packs its batches itself does it better than a padded batch; nothing here asks which model it is.
        self.own: Any = core if callable(getattr(core, "encode", None)) else None
        self.max_length = max_length or (self.context if self.own else self.model.max_seq_length or self.context)
        if self.own is None and max_length is not None:
            self.model.max_seq_length = max_length

    @property
    def identity(self) -> str:
        """A string of the files and settings that the vectors depend on besides the text, its type and the prompts."""
        length = "" if self.normalize else ":not normalized"
        return f"{self.folder.revision}:{self.max_length}:{self.precision}{length}"

    @property
    def dimension(self) -> int:
        """The width d of a vector."""
        return int(self.model.get_embedding_dimension() or 0)

    @property
    def prompts(self) -> dict[str, str | None]:
        """The prompts that the model puts in front of texts, by their name."""
        return self.model.prompts

    def prompt_ids(self, prompt_type: PromptType | None) -> list[int]:
        """Return the token ids of the prompt that the model puts in front of texts of this type."""
        prompts = self.prompts
        names = ("query",) if prompt_type == "query" else ("document", "passage", "corpus")
        prompt = next((prompts[name] for name in names if prompts.get(name)), "")
        return self.model.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []

    @torch.inference_mode()
    def __call__(self, texts: list[str], prompt_type: PromptType | None) -> list[np.ndarray]:
        """Return a matrix `(1, d)` for each text."""
        if self.own is not None:
            return list(self._encode_by_itself(texts, prompt_type)[:, None])
        encode = self.model.encode_query if prompt_type == "query" else self.model.encode_document
        vectors: list[np.ndarray] = [np.empty(0)] * len(texts)
        for batch in budget_batches([len(ids) for ids in self._tokenize(texts)], self.batch_tokens, padded=True):
            with self._autocast():
                encoded = encode([texts[i] for i in batch], batch_size=len(batch), show_progress_bar=False)
            for i, vector in zip(batch, encoded, strict=True):
                vectors[i] = vector[None]
        return vectors

    def _encode_by_itself(self, texts: list[str], prompt_type: PromptType | None) -> np.ndarray:
        if self.max_length < self.context:
            cut = self.own.tokenizer(
                texts, truncation=True, max_length=self.max_length, return_offsets_mapping=True
            ).offset_mapping
            texts = [text[: max((end for _, end in spans), default=0)] for text, spans in zip(texts, cut, strict=True)]
        return self.own.encode(
            texts,
            prompt_name=prompt_type,
            batch_tokens=self.batch_tokens,
            normalize=None if self.normalize else False,
            precision="float32" if self.precision == "int8" else self.precision,
            show_progress_bar=False,
        )

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.model.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)


class ChunkEncoder(Encoder):
    """Encode each text as one vector per chunk of `max_length` tokens, without overlap.

    The special tokens and the prompt count towards `max_length`. The row of a chunk is the model's pooled vector before
    any normalization, times the number of tokens in the chunk: with mean pooling, the sum of its token vectors. The sum
    of the rows of a text then has the direction of the token-weighted mean over its chunks, and each row has the
    direction of its chunk, so that both chunking baselines share the same rows.
    """

    @property
    def identity(self) -> str:
        return f"{super().identity}:chunks"

    @torch.inference_mode()
    def __call__(self, texts: list[str], prompt_type: PromptType | None) -> list[np.ndarray]:
        """Return a matrix `(chunks, d)` for each text."""
        from sentence_transformers.sentence_transformer.modules import Normalize

        tokenizer = self.model.tokenizer
        prompt = self.prompt_ids(prompt_type)
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length - len(prompt),
            return_overflowing_tokens=True,
        )
        lead = len(special_tokens_around(tokenizer)[0])
        chunks = [ids[:lead] + prompt + ids[lead:] for ids in encoded["input_ids"]]
        rows = np.empty((len(chunks), self.dimension), np.float32)
        for batch in budget_batches([len(ids) for ids in chunks], self.batch_tokens, padded=True):
            features = dict(tokenizer.pad({"input_ids": [chunks[i] for i in batch]}, return_tensors="pt"))
            tokens = features["attention_mask"].sum(1, keepdim=True)
            features = {key: value.to(self.model.device) for key, value in features.items()}
            if prompt:
                features["prompt_length"] = lead + len(prompt)
            with self._autocast():
                for module in self.model:
                    if not isinstance(module, Normalize):
                        features = module(features)
            rows[batch] = (features["sentence_embedding"].float().cpu() * tokens).numpy()
        owners = np.asarray(encoded["overflow_to_sample_mapping"])
        return [rows[owners == i] for i in range(len(texts))]


def encoder_computed_by(folder: ModelFolder, precision: str, trust_remote_code: bool) -> dict[str, str]:
    """Describe what computes the vectors of an encoder, without loading it.

    Args:
        folder: the model's files.
        precision: `float32`, `bfloat16` or `int8`.
        trust_remote_code: whether the code in the folder may run.

    Returns:
        As `common.provenance.computed_by`.
    """
    code = ("common.encoders.encoder", "common.encoders.quantization", "modeling_longembed.encoding_longembed")
    return folder.computed_by(*code, precision=precision, trust_remote_code=trust_remote_code)


def context_length(core: Any) -> int:
    """Return how many tokens a model can read according to its position table; 2**31 if there is no limit (T5)."""
    limit = getattr(getattr(core, "config", None), "max_position_embeddings", None)
    if core is None or limit is None:
        return 1 << 31
    for name, module in core.named_modules():
        # RoBERTa's positions start after the padding index, so that its first rows are no positions.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1
    return int(limit)
