"""The choices of `model.encode`, which are checked before a text is read, and what they make of a document's states."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .output_token_codes_longembed import BITS, TokenCodec
from .output_token_pooling_longembed import MAX_FACTOR, pool_packed_tokens
from .output_tokens_longembed import truncate_tokens

# Precisions that no sample of vectors is needed for; others are given as a codec that was fitted to one.
TOKEN_PRECISIONS = ("float32", "float16", "binary")


@dataclass(frozen=True)
class EncodingChoices:
    """What is computed of each text, as the arguments of `encode_texts` of the same names say.

    Attributes:
        prompt_name: key of the prompt.
        batch_tokens: tokens in one forward pass.
        normalize: whether vectors have unit length.
        truncate_dim: number of leading dimensions of a vector.
        late_chunk_tokens: tokens of a passage.
        overflow: what happens to texts beyond the context.
        precision: of the arithmetic.
        output_value: `vector`, `tokens` or `both`.
        is_query: whether the texts are queries.
        token_dim: number of leading dimensions of a token vector.
        token_pooling: tokens that share a vector.
        token_precision: how token vectors are kept.
    """

    prompt_name: str | None = None
    batch_tokens: int = 16_384
    normalize: bool | None = None
    truncate_dim: int | None = None
    late_chunk_tokens: int | None = None
    overflow: str = "warn"
    precision: str = "auto"
    output_value: str = "vector"
    is_query: bool | None = None
    token_dim: int | None = None
    token_pooling: int | None = None
    token_precision: str | TokenCodec = "float32"

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "EncodingChoices":
        """Return the choices among the arguments of a function, by their names."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    @property
    def has_vectors(self) -> bool:
        """Whether there is one vector a text, or one a passage."""
        return self.output_value != "tokens"

    @property
    def has_tokens(self) -> bool:
        """Whether there is a vector a token."""
        return self.output_value != "vector"

    def check(self, config: Any) -> None:
        """Check the choices for a model with this config.

        Raises:
            ValueError: one has a value that is not allowed.
        """
        for name, allowed in (
            ("overflow", ("warn", "error")),
            ("precision", ("auto", "float32", "bfloat16")),
            ("prompt_name", (None, *config.prompts)),
            ("output_value", ("vector", "tokens", "both")),
            ("is_query", (None, True, False)),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"encode: {name}={value!r}; choose from {', '.join(map(repr, allowed))}")
        for name in ("batch_tokens", "truncate_dim", "late_chunk_tokens", "token_dim", "token_pooling"):
            size = getattr(self, name)
            if not (name != "batch_tokens" and size is None) and (not isinstance(size, int) or size < 1):
                raise ValueError(f"encode: {name}={size!r}; give a whole number of at least 1")
        if self.truncate_dim is not None and self.truncate_dim > config.hidden_size:
            raise ValueError(
                f"encode: truncate_dim={self.truncate_dim} is more than the {config.hidden_size} dimensions of the "
                "model"
            )
        for name, needs, met in (
            ("token_dim", "tokens", self.has_tokens),
            ("token_pooling", "tokens", self.has_tokens),
            ("token_precision", "tokens", self.has_tokens),
            ("is_query", "tokens", self.has_tokens),
            ("normalize", "vector", self.has_vectors),
            ("truncate_dim", "vector", self.has_vectors),
            ("late_chunk_tokens", "vector", self.has_vectors),
        ):
            if not met and getattr(self, name) != getattr(EncodingChoices, name):
                raise ValueError(
                    f"encode: {name}={getattr(self, name)!r} has no effect on output_value={self.output_value!r}; "
                    f"leave it out, or ask for {needs!r} or 'both'"
                )
        if self.token_dim is not None and config.token_dim is None:
            raise ValueError(
                f"encode: token_dim={self.token_dim}, but this model has no token head, whose first dimensions matter "
                "most; leave it out, or make a head with model.fit_token_head(documents)"
            )
        if self.token_dim is not None and self.token_dim > config.token_dim:
            raise ValueError(
                f"encode: token_dim={self.token_dim} is more than the {config.token_dim} dimensions of the token head"
            )
        self._check_compression(config)

    def _check_compression(self, config: Any) -> None:
        """Raise ValueError if token vectors cannot be made as small as asked."""
        # A codec is known by its kind: that of a model loaded as remote code is of another class than the package's.
        precision = self.token_precision
        kind = precision if isinstance(precision, str) else getattr(precision, "kind", None)
        if kind not in BITS:
            raise ValueError(
                f"encode: token_precision={precision!r}; choose from {', '.join(map(repr, TOKEN_PRECISIONS))}, or give "
                "a TokenCodec"
            )
        if isinstance(precision, str) and kind not in TOKEN_PRECISIONS:
            raise ValueError(
                f"encode: token_precision={precision!r} needs a sample of token vectors; give "
                f"TokenCodec({precision!r}).fit(sample) of output_token_codes_longembed instead of its name"
            )
        width = self.token_dim or config.token_dim or config.hidden_size
        if not isinstance(precision, str) and not (precision.is_ready and precision.dim in (None, width)):
            state = f"takes {precision.dim} dimensions" if precision.is_ready else "has seen no sample"
            raise ValueError(
                f"encode: the {kind} codec of token_precision {state}, and the token vectors have {width} dimensions; "
                "call its fit with such vectors of some documents"
            )
        if self.token_pooling is not None and self.token_pooling > MAX_FACTOR:
            raise ValueError(f"encode: token_pooling={self.token_pooling}; give a whole number of at most {MAX_FACTOR}")
        if self.side(config) == "query" and (self.token_pooling is not None or kind not in ("float32", "float16")):
            name = "token_pooling" if self.token_pooling is not None else "token_precision"
            raise ValueError(
                f"encode: {name}={self.token_pooling or kind!r} is for documents: each word of a query counts, and its "
                "vector stays in full; leave it out for queries"
            )

    def prompt(self, config: Any) -> tuple[str | None, str]:
        """Return the name of the prompt and its text, `""` if there is none."""
        name = config.default_prompt_name if self.prompt_name is None else self.prompt_name
        return name, "" if name is None else config.prompts[name]

    def side(self, config: Any) -> str | None:
        """Return whether token vectors are those of a `query` or of a `document`; None: there are none."""
        if not self.has_tokens:
            return None
        is_query = self.prompt(config)[0] == "query" if self.is_query is None else self.is_query
        return "query" if is_query else "document"

    def finish_vectors(self, vectors: Tensor, config: Any) -> Tensor:
        """Return vectors `(n, d)` with the requested dimensions, and at unit length if that is asked for."""
        vectors = vectors[:, : self.truncate_dim]
        unit_length = config.normalize if self.normalize is None else self.normalize
        return torch.nn.functional.normalize(vectors, dim=-1) if unit_length else vectors.clone()

    def finish_tokens(self, vectors: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
        """Return token vectors in the requested dimensions, number and precision, on the CPU.

        Args:
            vectors: `(T, k)`, packed.
            cu_seqlens: `(D + 1,)` int, cumulative numbers of vectors of the texts.

        Returns:
            The vectors or codes of each text.
        """
        vectors = vectors if self.token_dim is None else truncate_tokens(vectors, self.token_dim)
        if self.token_pooling is not None:
            vectors, _, cu_seqlens = pool_packed_tokens(vectors, cu_seqlens, self.token_pooling)
        codec = self.token_precision
        codes = (TokenCodec(codec) if isinstance(codec, str) else codec).encode(vectors).cpu()
        # Copies, so that the vectors of one text do not keep those of a whole batch in memory.
        return [part.clone() for part in codes.split(cu_seqlens.diff().tolist())]
