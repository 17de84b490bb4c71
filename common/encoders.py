"""How texts become vectors: one a text as the model does it itself, or one a chunk of it for the chunking baselines."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from mteb.types import PromptType
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.util import get_device_name
from tqdm.auto import tqdm

from common.errors import UserError
from common.files import sha256_file
from common.quantization import int8_weights
from common.vector_cache import VectorCache

# The import also registers our Auto classes, so that folders of ours load without trust_remote_code.
from modeling_longembed.encoding_longembed import is_fast_in_bfloat16

PRECISIONS = ("auto", "float32", "bfloat16")
ENCODER_PRECISIONS = (*PRECISIONS, "int8")
_CHARACTERS_A_TOKEN = 16  # of a window of texts: four times what a token has, so that a window holds several batches


@dataclass(frozen=True)
class ModelFolder:
    """A model's files: a local folder, or the Hub's snapshot of a commit.

    Attributes:
        path: the folder.
        name: `org/model`; `local/<folder name>` for a local one.
        revision: the Hub's commit, or the hash of everything in the folder that shapes a vector.
    """

    path: Path
    name: str
    revision: str

    @classmethod
    def find(cls, name_or_path: str) -> "ModelFolder":
        """The files of a model by path or by Hub id (downloaded when the Hub can be reached).

        Raises:
            UserError: no such folder or model, or a folder that holds none.
        """
        path = Path(name_or_path)
        if path.is_dir():
            return cls._local(path)
        try:
            snapshot = Path(
                snapshot_download(name_or_path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.py"])
            )
        except (OSError, HFValidationError) as error:
            reason = re.sub(r"\s+", " ", str(error))[:120]
            raise UserError(
                f"unknown model {name_or_path}: there is no such folder, and the Hub or its cache has none ({reason})"
            ) from None
        return cls(snapshot, name_or_path, snapshot.name)

    @classmethod
    def _local(cls, path: Path) -> "ModelFolder":
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise UserError(f"the folder {path} is not a model: it needs config.json and *.safetensors weights")
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            relative = file.relative_to(path)
            hidden = any(part.startswith(".") for part in relative.parts)
            if file.suffix in (".safetensors", ".json", ".txt", ".model", ".py") and not hidden:
                digest.update(f"{relative.as_posix()}:{sha256_file(file)}\n".encode())
        return cls(path, f"local/{path.resolve().name}", digest.hexdigest()[:40])

    @cached_property
    def parameters(self) -> int:
        """How many numbers the weight files hold, read from their headers.

        Raises:
            UserError: a file that is no safetensors file.
        """
        total = 0
        for file in self.path.glob("*.safetensors"):
            try:
                with safe_open(file, framework="numpy") as weights:
                    total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
            except SafetensorError as error:
                raise UserError(f"{file} is damaged: {error}; copy or download it again") from None
        return total


class Encoder:
    """One vector a text, by the model itself: by its own `encode` where it brings one, else by sentence-transformers.

    Args:
        folder: the model's files.
        max_length: tokens of a text that are read, the rest is cut off; None: what the model is set to.
        precision: `float32`, `bfloat16` (autocast), or `int8`: the weights of linear layers in 8 bits, on the CPU.
        batch_tokens: token budget of a forward pass; it bounds memory and changes no vector in float32 beyond rounding.
        trust_remote_code: run code that the folder brings (our own models need none).
        normalize: unit vectors of a model with its own `encode`; others end in what their folder says.

    Raises:
        UserError: the folder does not load, or `max_length` is more than the model's context.
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
            self.model = SentenceTransformer(str(folder.path), trust_remote_code=trust_remote_code).eval()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            reason = re.sub(r"\s+", " ", str(error))[:200]
            raise UserError(f"the model in {folder.path} does not load: {reason}") from None
        if precision == "int8":
            int8_weights(self.model.to("cpu"))
        self.folder, self.precision, self.batch_tokens, self.normalize = folder, precision, batch_tokens, normalize
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
        """What the vectors depend on beside the text and its kind."""
        length = "" if self.normalize else ":not normalized"
        return f"{self.folder.revision}:{self.max_length}:{self.precision}{length}"

    @property
    def dimension(self) -> int:
        """Width of a vector."""
        return int(self.model.get_embedding_dimension() or 0)

    @property
    def prompts(self) -> dict[str, str | None]:
        """What the model wants before texts, by their kind."""
        return self.model.prompts

    def prompt_ids(self, prompt_type: Any) -> list[int]:
        """Tokens of the prompt that the model wants before texts of this kind."""
        prompts = self.prompts
        names = ("query",) if prompt_type == PromptType.query else ("document", "passage", "corpus")
        prompt = next((prompts[name] for name in names if prompts.get(name)), "")
        return self.model.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []

    @torch.inference_mode()
    def __call__(self, texts: list[str], prompt_type: Any) -> list[np.ndarray]:
        """A matrix (1, d) for each text; `prompt_type` is MTEB's `PromptType` or None."""
        if self.own is not None:
            return list(self._encode_by_itself(texts, prompt_type)[:, None])
        encode = self.model.encode_query if prompt_type == PromptType.query else self.model.encode_document
        vectors: list[np.ndarray] = [np.empty(0)] * len(texts)
        for batch in token_batches([len(ids) for ids in self._tokenize(texts)], self.batch_tokens):
            with self._autocast():
                encoded = encode([texts[i] for i in batch], batch_size=len(batch), show_progress_bar=False)
            for i, vector in zip(batch, encoded, strict=True):
                vectors[i] = vector[None]
        return vectors

    def _encode_by_itself(self, texts: list[str], prompt_type: Any) -> np.ndarray:
        if self.max_length < self.context:
            cut = self.own.tokenizer(
                texts, truncation=True, max_length=self.max_length, return_offsets_mapping=True
            ).offset_mapping
            texts = [text[: max((end for _, end in spans), default=0)] for text, spans in zip(texts, cut, strict=True)]
        return self.own.encode(
            texts,
            prompt_name=prompt_type.value if prompt_type else None,
            batch_tokens=self.batch_tokens,
            normalize=self.normalize,
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
    """A vector for every chunk of `max_length` tokens (special tokens and prompt included), without overlap.

    A chunk's row is the model's pooled vector before any normalisation, times the chunk's number of tokens: with mean
    pooling the sum of its token vectors. The sum of a text's rows is then the direction of the token-weighted mean over
    its chunks, and each row that of its chunk, so that both chunking baselines share the same rows.
    """

    @property
    def identity(self) -> str:
        return f"{super().identity}:chunks"

    @torch.inference_mode()
    def __call__(self, texts: list[str], prompt_type: Any) -> list[np.ndarray]:
        """A matrix (chunks, d) for each text."""
        tokenizer = self.model.tokenizer
        prompt = self.prompt_ids(prompt_type)
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length - len(prompt),
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        chunks, leads = [], []
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            lead = special.index(0) if 0 in special else 1  # the special tokens before the text, such as [CLS]
            chunks.append(ids[:lead] + prompt + ids[lead:])
            leads.append(lead)
        rows = np.empty((len(chunks), self.dimension), np.float32)
        for batch in token_batches([len(ids) for ids in chunks], self.batch_tokens):
            features = dict(tokenizer.pad({"input_ids": [chunks[i] for i in batch]}, return_tensors="pt"))
            tokens = features["attention_mask"].sum(1, keepdim=True)
            features = {key: value.to(self.model.device) for key, value in features.items()}
            if prompt:
                features["prompt_length"] = leads[batch[0]] + len(prompt)
            with self._autocast():
                for module in self.model:
                    if not isinstance(module, Normalize):
                        features = module(features)
            rows[batch] = (features["sentence_embedding"].float().cpu() * tokens).numpy()
        owners = np.asarray(encoded["overflow_to_sample_mapping"])
        return [rows[owners == i] for i in range(len(texts))]


class TextEncoder(Protocol):
    """What `stream` asks of whatever makes vectors of texts."""

    @property
    def identity(self) -> str: ...

    @property
    def prompts(self) -> dict[str, str | None]: ...

    @property
    def batch_tokens(self) -> int: ...

    def __call__(self, texts: list[str], prompt_type: Any) -> list[np.ndarray]: ...


def cache_keys(texts: Iterable[str], encoder: TextEncoder, prompt_type: Any) -> list[bytes]:
    """Under which key the matrix of each text is cached: all that it depends on, hashed."""
    head = f"{encoder.identity}:{prompt_type}:{json.dumps(encoder.prompts, sort_keys=True)}:".encode()
    return [hashlib.sha256(head + text.encode()).digest() for text in texts]


def stream(
    texts: Sequence[str], encoder: TextEncoder, prompt_type: Any, cache: VectorCache, label: str
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """The matrices of all texts, a window at a time, longest texts first: what does not fit in memory fails at once.

    Args:
        texts: any sequence, also a column of a table on disk: only a window of texts and matrices is in memory.
        encoder: texts -> matrices (k, d).
        prompt_type: the kind of the texts.
        cache: where finished matrices are and go; a killed run goes on there.
        label: what the progress bar says.

    Yields:
        Indices into `texts` and their matrices, each text once.
    """
    keys, sizes = cache_keys(texts, encoder, prompt_type), [len(text) for text in texts]
    with tqdm(total=sum(sizes), desc=label, unit="char", unit_scale=True) as progress:
        for window in _windows(sizes, _CHARACTERS_A_TOKEN * encoder.batch_tokens):
            matrices = cache.get([keys[i] for i in window])
            missing = {keys[i]: texts[i] for i in window if keys[i] not in matrices}
            if missing:
                new = dict(zip(missing, encoder(list(missing.values()), prompt_type), strict=True))
                cache.put(new)
                matrices |= new
            yield window, [matrices[keys[i]] for i in window]
            progress.update(sum(sizes[i] for i in window))


def vectors_of(texts: Sequence[str], encoder: Encoder, prompt_type: Any, cache: VectorCache) -> np.ndarray:
    """One vector for each text, float32 `(n, d)`: the sum of its rows, whose direction is what counts.

    Args:
        texts: n of them, as in `stream`.
        encoder: texts -> matrices (k, d).
        prompt_type: the kind of the texts.
        cache: where finished matrices are and go.
    """
    vectors = np.empty((len(texts), encoder.dimension), np.float32)
    label = "queries" if prompt_type == PromptType.query else "documents"
    for window, matrices in stream(texts, encoder, prompt_type, cache, label):
        vectors[window] = [matrix.sum(0) for matrix in matrices]
    return vectors


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches, longest first, whose padded size `len(batch) * longest` stays within `batch_tokens`.

    A text longer than the budget is a batch of its own.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def resolve_precision(precision: str, choices: Sequence[str] = PRECISIONS) -> str:
    """`auto` as what it means on this machine: bfloat16 where the processor multiplies in it, else float32."""
    if precision not in choices:
        raise UserError(f"--precision {precision} is not one of {', '.join(choices)}")
    if precision != "auto":
        return precision
    return "bfloat16" if is_fast_in_bfloat16(torch.device(get_device_name())) else "float32"


def _windows(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in groups, longest first, that sum to at most `budget` (a single larger one is a group of its own)."""
    window: list[int] = []
    total = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if window and total + sizes[i] > budget:
            yield window
            window, total = [], 0
        window.append(i)
        total += sizes[i]
    if window:
        yield window


def context_length(core: Any) -> int:
    """How many tokens a model can read, as its position table says; 2**31 for one without any limit (T5)."""
    limit = getattr(getattr(core, "config", None), "max_position_embeddings", None)
    if core is None or limit is None:
        return 1 << 31
    for name, module in core.named_modules():
        # RoBERTa's positions start after the padding index, so that its first rows are no positions.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1
    return int(limit)
