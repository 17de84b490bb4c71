"""Encoders of texts: one vector per text, or one per chunk for the chunking baselines.

The vector of a text is what `SentenceTransformer(folder)` gives, for every folder: what is judged is what is served.
Modules, pooling, prompts, normalization, number of dimensions and length are read from the folder by
sentence-transformers alone, also where the model has an `encode` of its own, which knows nothing of these files.
"""

import json
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from common.encoders.model_folder import ModelFolder
from common.encoders.precision import autocast
from common.encoders.quantization import int8_weights
from common.encoders.text_vectors import PromptType
from common.errors import UserError, reading

# The import also registers our Auto classes, so that our folders load without trust_remote_code.
from modeling_longembed.encoding_longembed import budget_batches
from modeling_longembed.encoding_tokens_longembed import special_tokens_around, tokenize_beginnings
from modeling_longembed.hub_sentence_transformers_longembed import TOKEN_VECTORS_REFERENCE, TokenVectors


class Encoder:
    """Encode each text as one vector, with sentence-transformers.

    Args:
        folder: the model's files.
        max_length: number of tokens that are read of a text, the first ones; None: the folder's own setting, which may
            cut off the beginning (`truncation_side`).
        precision: `float32`, `bfloat16` (autocast), or `int8`: the weights of linear layers in 8 bits, on the CPU.
        batch_tokens: token budget of a forward pass; it bounds memory and changes float32 vectors by rounding only.
        trust_remote_code: run the code in the folder (our own models need none).
        normalize: False leaves out the last module of the folder if it scales vectors to unit length.

    Raises:
        UserError: sentence-transformers is not installed, the model does not load, is saved as something else than a
            model of one vector per text, or `max_length` exceeds its context.
    """

    CODE: ClassVar[tuple[str, ...]] = (  # what decides the vectors; see `common.provenance`
        "common.encoders.encoder",
        "common.encoders.precision",
        "common.encoders.quantization",
        "modeling_longembed.encoding_longembed",
        "modeling_longembed.encoding_tokens_longembed",
    )
    pads = True  # whether batches are padded with the tokenizer's padding token

    def __init__(
        self,
        folder: ModelFolder,
        max_length: int | None = None,
        precision: str = "float32",
        batch_tokens: int = 16384,
        trust_remote_code: bool = False,
        normalize: bool = True,
    ):
        check_one_vector(folder)
        with reading(f"the model in {folder.path} does not load", folder.path):
            self.model = load_served(folder, trust_remote_code).eval()
        if wrong := [name for name, prompt in self.model.prompts.items() if not isinstance(prompt, str)]:
            raise UserError(f"the model in {folder.path} has a prompt {wrong[0]} that is no text; correct its settings")
        tokenizer = self.model.tokenizer
        if self.pads and isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.pad_token is None:
            raise UserError(
                f"the tokenizer in {folder.path} has no padding token; name one of its tokens as pad_token in "
                "tokenizer_config.json"
            )
        if precision == "int8":
            int8_weights(self.model.to("cpu"))
        self.folder, self.precision, self.batch_tokens, self.normalize = folder, precision, batch_tokens, normalize
        self.computed_by = folder.computed_by(*self.CODE, precision=precision, trust_remote_code=trust_remote_code)
        core: Any = getattr(self.model[0], "auto_model", None)
        self.context = context_length(core)
        if max_length is not None and max_length > self.context:
            raise UserError(
                f"{max_length} tokens are more than the context of {folder.name}; give at most {self.context}"
            )
        if max_length is not None:
            try:
                self.model.max_seq_length = max_length
            except AttributeError:
                raise UserError(
                    f"{folder.name} reads texts to their end and cannot be limited to {max_length} tokens; leave the "
                    "limit out"
                ) from None
            self._read_first_tokens()
        self.max_length = min(self.model.max_seq_length or self.context, self.context)
        if not normalize:
            drop_normalization(self.model)

    def _read_first_tokens(self) -> None:
        if isinstance(self.model.tokenizer, PreTrainedTokenizerBase):
            self.model.tokenizer.truncation_side = "right"

    @property
    def identity(self) -> str:
        """A string of the files and settings that the vectors depend on besides the text, its type and the prompts."""
        length = "" if self.normalize else ":not normalized"
        end = ":last tokens" if getattr(self.model.tokenizer, "truncation_side", "right") == "left" else ""
        return f"{self.folder.revision}:{self.max_length}:{self.precision}{length}{end}"

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
        names = {"query": ("query",), "document": ("document", "passage", "corpus"), None: ()}[prompt_type]
        name = next((name for name in names if name in self.prompts), self.model.default_prompt_name)
        prompt = self.prompts.get(name) if name else None
        return self.model.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []

    @torch.inference_mode()
    def __call__(self, texts: list[str], prompt_type: PromptType | None) -> list[np.ndarray]:
        """Return a matrix `(1, d)` for each text."""
        ways: dict[PromptType | None, Callable[..., Any]] = {
            "query": self.model.encode_query,
            "document": self.model.encode_document,
            None: self.model.encode,
        }
        vectors: list[np.ndarray] = [np.empty(0)] * len(texts)
        for batch in budget_batches(self._count_tokens(texts), self.batch_tokens, padded=True):
            with autocast(self.model.device, self.precision):
                encoded = ways[prompt_type]([texts[i] for i in batch], batch_size=len(batch), show_progress_bar=False)
            for i, vector in zip(batch, encoded, strict=True):
                vectors[i] = vector[None]
        return vectors

    def _count_tokens(self, texts: list[str]) -> list[int]:
        tokenizer = self.model.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # of static word vectors, whose texts need little memory
            return [len(text) for text in texts]
        beginnings = tokenize_beginnings(tokenizer, texts, self.max_length)
        return [min(len(ids), self.max_length) for ids in beginnings]


class ChunkEncoder(Encoder):
    """Encode each text as one vector per chunk of `max_length` tokens, without overlap.

    The special tokens and the prompt count towards `max_length`. The row of a chunk is the model's pooled vector before
    any normalization, times the number of tokens in the chunk: with mean pooling, the sum of its token vectors. The sum
    of the rows of a text then has the direction of the token-weighted mean over its chunks, and each row has the
    direction of its chunk, so that both chunking baselines share the same rows.

    Raises:
        UserError: as for `Encoder`, or the first module of the folder does not read token ids alone.
    """

    pads = False

    def __init__(self, folder: ModelFolder, *args: Any, **kwargs: Any):
        super().__init__(folder, *args, **kwargs)
        from sentence_transformers.sentence_transformer.modules import Transformer

        if not isinstance(self.model[0], Transformer):
            kind = type(self.model[0]).__name__
            raise UserError(
                f"chunks are read by a transformer, and {folder.name} begins with a {kind}; evaluate it without chunks"
            )
        self._read_first_tokens()  # the first chunk is the beginning, whatever the folder would cut off
        drop_normalization(self.model)

    @property
    def identity(self) -> str:
        return f"{super().identity}:chunks"

    @torch.inference_mode()
    def __call__(self, texts: list[str], prompt_type: PromptType | None) -> list[np.ndarray]:
        """Return a matrix `(chunks, d)` for each text."""
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
            features = padded([chunks[i] for i in batch], tokenizer.pad_token_id or 0)
            tokens = features["attention_mask"].sum(1, keepdim=True)
            features = {key: value.to(self.model.device) for key, value in features.items()}
            if prompt:
                features["prompt_length"] = lead + len(prompt)  # type: ignore[assignment]  # the one that is no tensor
            with autocast(self.model.device, self.precision):
                pooled = self.model(features)["sentence_embedding"][:, : self.dimension]
            rows[batch] = (pooled.float().cpu() * tokens).numpy()
        owners = np.asarray(encoded["overflow_to_sample_mapping"])
        return [rows[owners == i] for i in range(len(texts))]


def check_one_vector(folder: ModelFolder) -> None:
    """Check that sentence-transformers would load a folder as the model that it was saved as.

    Raises:
        UserError: it was saved as a cross-encoder, or as a model of sparse or of several vectors; loaded as a model of
            one vector, it would be another model.
    """
    settings = folder.path / "config_sentence_transformers.json"
    try:
        kind = json.loads(settings.read_text(encoding="utf-8")).get("model_type") if settings.is_file() else None
    except (ValueError, AttributeError):
        return  # loading says what is wrong with the file
    if kind not in (None, "SentenceTransformer"):
        raise UserError(f"{folder.name} is saved as a {kind}, which does not give one vector per text")


def load_served(folder: ModelFolder, trust_remote_code: bool) -> Any:
    """Return the model that sentence-transformers' `SentenceTransformer` loads from a folder.

    The module that our folders have among those of sentence-transformers is taken from this package, as their encoder
    is: sentence-transformers itself would load the folder's code, and not without `trust_remote_code`.

    Args:
        folder: the model's files.
        trust_remote_code: run the code in the folder of another model.

    Raises:
        UserError: sentence-transformers is not installed.
    """
    try:
        # slow to import, and part of the extra 'eval' only
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(f"encoding texts needs the extra 'eval' ({error.name} is missing)") from None

    class Served(SentenceTransformer):
        def _load_module_class_from_ref(self, class_ref: str, *args: Any, **kwargs: Any) -> type:
            if class_ref == TOKEN_VECTORS_REFERENCE:
                return TokenVectors
            return super()._load_module_class_from_ref(class_ref, *args, **kwargs)

    return Served(str(folder.path), trust_remote_code=trust_remote_code)


def drop_normalization(model: Any) -> None:
    """Take the modules at the end of a sentence-transformers model away that scale vectors to unit length."""
    from sentence_transformers.sentence_transformer.modules import Normalize

    while isinstance(model[-1], Normalize):
        del model[-1]


def padded(rows: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows of token ids on the right; a tokenizer without a padding token could not.

    Args:
        rows: token ids of each text.
        pad_token_id: what is written where the mask is 0.

    Returns:
        `input_ids` and `attention_mask`, both `(rows, longest)` int64.
    """
    longest = max(map(len, rows))
    ids = [row + [pad_token_id] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


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
