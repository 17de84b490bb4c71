"""Encoders of the late-interaction models of others: what sentence-transformers' `MultiVectorEncoder` loads."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

from common.encoders.model_folder import ModelFolder
from common.encoders.precision import autocast
from common.encoders.quantization import int8_weights
from common.encoders.text_vectors import PromptType
from common.errors import UserError, reading
from modeling_longembed.encoding_longembed import budget_batches
from modeling_longembed.encoding_tokens_longembed import tokenize_beginnings


class MultiVectorTokenEncoder:
    """Encode each text as one vector per token, as `MultiVectorEncoder(folder)` does.

    Args:
        folder: the model's files.
        max_length: number of tokens that are read of a text; None: the folder's own settings.
        precision: `float32`, `bfloat16` (autocast), or `int8`: the weights of linear layers in 8 bits, on the CPU.
        batch_tokens: token budget of a forward pass.
        trust_remote_code: run the code in the folder.

    Raises:
        UserError: sentence-transformers is not installed or too old, or the model does not load.
    """

    CODE: ClassVar[tuple[str, ...]] = (  # what decides the vectors; see `common.provenance`
        "common.encoders.multi_vector_encoder",
        "common.encoders.precision",
        "common.encoders.quantization",
        "modeling_longembed.encoding_longembed",
    )

    def __init__(
        self,
        folder: ModelFolder,
        max_length: int | None = None,
        precision: str = "float32",
        batch_tokens: int = 16384,
        trust_remote_code: bool = False,
    ):
        try:
            from sentence_transformers import MultiVectorEncoder
        except ImportError as error:
            raise UserError(
                f"late interaction needs the extra 'eval' with sentence-transformers 6 or later ({error})"
            ) from None
        with reading(f"the model in {folder.path} does not load", folder.path):
            self.model = MultiVectorEncoder(str(folder.path), trust_remote_code=trust_remote_code).eval()
        if precision == "int8":
            int8_weights(self.model.to("cpu"))
        if max_length is not None:
            self.model.max_seq_length = max_length
        self.folder, self.precision, self.batch_tokens = folder, precision, batch_tokens
        self.computed_by = folder.computed_by(*self.CODE, precision=precision, trust_remote_code=trust_remote_code)
        self.max_length = self.model.max_seq_length

    @property
    def identity(self) -> str:
        """A string of the files and settings that the vectors depend on besides the text, its type and the prompts."""
        return f"{self.folder.revision}:{self.max_length}:{self.precision}:tokens"

    @property
    def dimension(self) -> int:
        """The width k of a token vector."""
        return int(self.model.get_embedding_dimension() or 0)

    @property
    def prompts(self) -> dict[str, str | None]:
        """The prompts that the model puts in front of texts, by their name."""
        return self.model.prompts

    @property
    def similarity_fn_name(self) -> str:
        """`maxsim`, or `meanmaxsim`, which is divided by the number of tokens of the query."""
        return self.model.similarity_fn_name

    @property
    def is_ordered(self) -> bool:
        """Whether the dimensions of a vector are in the order of their importance, which a folder does not say."""
        return False

    def check_dim(self, dim: int) -> None:
        """Check that a token vector has `dim` dimensions.

        Raises:
            UserError: it has fewer.
        """
        if dim > self.dimension:
            raise UserError(f"{self.folder.name} has token vectors of {self.dimension} dimensions, fewer than {dim}")

    @torch.inference_mode()
    def __call__(self, texts: list[str], prompt_type: PromptType | None) -> list[np.ndarray]:
        """Return a matrix `(tokens, k)` for each text, without the tokens that the model leaves out."""
        encode: Callable[..., Any] = self.model.encode_query if prompt_type == "query" else self.model.encode_document
        limit = self.max_length or 1 << 31
        counts = [min(len(ids), limit) for ids in tokenize_beginnings(self.model.tokenizer, texts, limit)]
        vectors: list[np.ndarray] = [np.empty(0)] * len(texts)
        for batch in budget_batches(counts, self.batch_tokens, padded=True):
            with autocast(self.model.device, self.precision):
                found = encode([texts[i] for i in batch], batch_size=len(batch), show_progress_bar=False)
            for i, matrix in zip(batch, found, strict=True):
                vectors[i] = matrix.float().cpu().numpy()
        return vectors
