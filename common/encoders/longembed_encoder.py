"""Encoders of our own models' other outputs: a vector a passage (late chunks), and a vector a token.

sentence-transformers has no late chunks, so that these encoders call `model.encode`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from common.encoders.encoder import Encoder
from common.encoders.model_folder import ModelFolder
from common.encoders.quantization import int8_weights
from common.encoders.text_vectors import PromptType
from common.errors import UserError, reading
from common.provenance import device_kind
from modeling_longembed import LongEmbedModel


class LongEmbedEncoder:
    """Load a model of ours, and describe it as a `TextEncoder`.

    Args:
        folder: the model's files.
        precision: `float32`, `bfloat16`, or `int8`: the weights of linear layers in 8 bits, on the CPU.
        batch_tokens: token budget of a forward pass.

    Raises:
        UserError: the folder does not hold a model of ours, or it does not load.
    """

    # What decides the vectors, beside the code of the model; see `common.provenance`.
    CODE: ClassVar[tuple[str, ...]] = ("common.encoders.longembed_encoder", "common.encoders.quantization")

    def __init__(self, folder: ModelFolder, precision: str = "float32", batch_tokens: int = 16384):
        if folder.model_type != "longembed":
            raise UserError(
                f"{folder.name} is no LongEmbed model, and only these have vectors of tokens or late chunks from one "
                "reading; convert it with LongEmbedModel.from_encoder first, or name a MultiVectorEncoder"
            )
        with reading(f"the model in {folder.path} does not load", folder.path):
            self.model = LongEmbedModel.from_pretrained(folder.path).eval()
            self.tokenizer = self.model.encode_tokenizer
        self.model.to("cpu" if precision == "int8" else device_kind())
        if precision == "int8":
            int8_weights(self.model)
        self.folder, self.precision, self.batch_tokens = folder, precision, batch_tokens
        self.computed_by = folder.computed_by(*self.CODE, precision=precision)
        self.max_length = self.model.config.max_position_embeddings

    @property
    def prompts(self) -> dict[str, str | None]:
        """The prompts that the model puts in front of texts, by their name."""
        return dict(self.model.config.prompts)

    def _encode(self, texts: list[str], prompt_type: PromptType | None, **output: Any) -> Any:
        names = {"query": ("query",), "document": ("document", "passage", "corpus"), None: ()}[prompt_type]
        return self.model.encode(
            texts,
            prompt_name=next((name for name in names if name in self.prompts), None),
            batch_tokens=self.batch_tokens,
            precision="float32" if self.precision == "int8" else self.precision,
            show_progress_bar=False,
            **output,
        )


class LateChunkEncoder(LongEmbedEncoder):
    """Encode each document as one vector per passage, pooled from states that have seen the whole document.

    A query is one vector.

    Args:
        folder, precision, batch_tokens: as for `LongEmbedEncoder`.
        chunk_tokens: tokens of a passage (late chunking, Günther et al. 2024, arXiv:2409.04701).

    Raises:
        UserError: as for `LongEmbedEncoder`.
    """

    def __init__(self, folder: ModelFolder, chunk_tokens: int, precision: str = "float32", batch_tokens: int = 16384):
        super().__init__(folder, precision, batch_tokens)
        self.chunk_tokens = chunk_tokens

    @property
    def identity(self) -> str:
        """A string of the files and settings that the vectors depend on besides the text, its type and the prompts."""
        return f"{self.folder.revision}:{self.precision}:late chunks:{self.chunk_tokens}"

    @property
    def dimension(self) -> int:
        """The width d of a vector."""
        return self.model.config.hidden_size

    def __call__(self, texts: list[str], prompt_type: PromptType | None) -> list[np.ndarray]:
        """Return a matrix `(passages, d)` for each text, `(1, d)` for queries; a text without tokens has a row of 0."""
        if prompt_type == "query":
            return [vector[None] for vector in self._encode(texts, prompt_type)]
        passages = self._encode(texts, prompt_type, late_chunk_tokens=self.chunk_tokens)
        return [rows if len(rows) else np.zeros((1, self.dimension), np.float32) for rows in passages]


class LongEmbedTokenEncoder(LongEmbedEncoder):
    """Encode each text as one vector per token, for late interaction; those of a query are weighted by the model.

    Attributes:
        keep_vectors: if set, it is called with documents and their one vectors `(n, d)`, which come from the same
            reading.
    """

    similarity_fn_name = "maxsim"
    keep_vectors: Callable[[list[str], np.ndarray], None] | None = None

    @property
    def identity(self) -> str:
        """A string of the files and settings that the vectors depend on besides the text, its type and the prompts."""
        return f"{self.folder.revision}:{self.precision}:tokens"

    @property
    def dimension(self) -> int:
        """The width k of a token vector."""
        return self.model.config.token_dim or self.model.config.hidden_size

    @property
    def is_ordered(self) -> bool:
        """Whether the dimensions of a vector are in the order of their importance: a head puts them so."""
        return self.model.config.token_dim is not None

    def check_dim(self, dim: int) -> None:
        """Check that the first `dim` dimensions of a token vector can stand for all of them.

        Raises:
            UserError: the model has no head that puts them in order, or fewer of them.
        """
        if self.model.config.token_dim is None:
            raise UserError(
                f"{self.folder.name} has no token head, whose first dimensions matter most; leave dim={dim} out, or "
                "make a head with training/token_output.py"
            )
        if dim > self.dimension:
            raise UserError(f"{self.folder.name} has token vectors of {self.dimension} dimensions, fewer than {dim}")

    def __call__(self, texts: list[str], prompt_type: PromptType | None) -> list[np.ndarray]:
        """Return a matrix `(tokens, k)` for each text; special tokens are left out."""
        if prompt_type != "document" or self.keep_vectors is None:
            return self._encode(texts, prompt_type, output_value="tokens", is_query=prompt_type == "query")
        vectors, matrices = self._encode(texts, prompt_type, output_value="both", is_query=False)
        self.keep_vectors(texts, vectors)
        return matrices

    def gives_vectors_of(self, encoder: Encoder) -> bool:
        """Return whether an encoder of the same folder gives the one vectors that come with the token vectors.

        It reads the folder as sentence-transformers does, and somebody may have changed the settings for that.

        Args:
            encoder: encodes each text as one vector.
        """
        if encoder.max_length != self.max_length:
            return False
        probe = ["The deposit is returned within thirty days."]
        own: np.ndarray = self._encode(probe, "document")[0]
        served = encoder(probe, "document")[0][0]
        return own.shape == served.shape and np.allclose(own, served, rtol=0, atol=1e-4 * np.linalg.norm(served))
