"""The values of `--model` where texts are encoded or ranked: models, and the baselines that they are compared with.

| value | meaning |
|---|---|
| `PATH` or Hub id | a model of ours, or any model that sentence-transformers loads |
| `truncate:PATH:N` | the same model, reading the first N tokens of every text |
| `chunk-mean:PATH:N` | one vector: the token-weighted mean over chunks of N tokens (special tokens included) |
| `chunk-max:PATH:N` | one vector per chunk; the score of a document is that of its best chunk |
| `PATH@vector` | the same as `PATH`: one vector per text |
| `PATH@chunks:N` | one vector per passage of N tokens, from one reading of the document (late chunks; our models) |
| `PATH@tokens` | one vector per token, compared by MaxSim; a `MultiVectorEncoder` folder needs no `@tokens` |
| `PATH@tokens:dim=64,pool=4,precision=binary` | the same with these `TokenSettings` |
| `bm25` | no model: Lucene's BM25 with k1 = 1.5, b = 0.75, English stop words, no stemming |
| `hybrid:VALUE:W` | W times the scores of any of the above, and 1 - W times those of `bm25` |

Queries are treated like documents, except that for chunk-max and chunks a query is one vector; of chunk-max, the mean
over its chunks.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from common.encoders.encoder import ChunkEncoder, Encoder
from common.encoders.kept_tokens import SCORES_CODE, TokenEncoder
from common.encoders.longembed_encoder import LateChunkEncoder, LongEmbedTokenEncoder
from common.encoders.model_folder import ModelFolder
from common.encoders.multi_vector_encoder import MultiVectorTokenEncoder
from common.encoders.token_settings import TokenSettings
from common.errors import UserError
from common.provenance import code_hash, computed_by

_Spec = TypeVar("_Spec", bound="ModelSpec")


@dataclass(frozen=True)
class ModelSpec:
    """A value of `--model` whose files have been found, but not loaded.

    Attributes:
        kind: `model`, `truncate`, `chunk-mean`, `chunk-max`, `chunks`, `tokens` or `bm25`.
        folder: the model's files; None for `bm25`.
        tokens: N of `truncate` and of the kinds with chunks; the `--max_length` of a model; None: the model's own
            setting.
        precision: `float32`, `bfloat16` or `int8`.
        token_settings: how token vectors are kept; None for all kinds but `tokens`.
        hybrid: weight of the scores, the rest being those of BM25; None: there are no others.
    """

    kind: str
    folder: ModelFolder | None = None
    tokens: int | None = None
    precision: str = "float32"
    token_settings: TokenSettings | None = None
    hybrid: float | None = None

    @classmethod
    def parse(cls: type[_Spec], text: str, max_length: int | None = None, precision: str = "float32") -> _Spec:
        """Parse a value of `--model`.

        Args:
            text: the value; see the table at the top of this module.
            max_length: number of tokens that a model reads; baselines have their own N.
            precision: `float32`, `bfloat16` or `int8`.

        Returns:
            An instance of the class that this is called on.

        Raises:
            UserError: the table has no such form, or the model does not exist.
        """
        if text == "bm25":
            return cls("bm25")
        kind, _, rest = text.partition(":")
        if kind == "hybrid":
            inner, _, weight = rest.rpartition(":")
            if inner in ("", "bm25") or inner.startswith("hybrid:") or not _is_share(weight):
                raise UserError(
                    f"--model {text}: write hybrid:MODEL:W with a model and its weight from 0 to 1 beside BM25, such "
                    "as hybrid:runs/my/final@tokens:0.5"
                )
            return replace(cls.parse(inner, max_length, precision), hybrid=float(weight))
        if kind not in ("truncate", "chunk-mean", "chunk-max"):
            return cls._parse_output(text, max_length, precision)
        path, _, tokens = rest.rpartition(":")
        if not path or not tokens.isdecimal() or int(tokens) < 8:
            raise UserError(f"--model {text}: write {kind}:PATH:N with N tokens, at least 8, such as {kind}:PATH:256")
        return cls(kind, ModelFolder.find(path), int(tokens), precision)

    @classmethod
    def _parse_output(cls: type[_Spec], text: str, max_length: int | None, precision: str) -> _Spec:
        """Parse `PATH`, or `PATH@OUTPUT` with its settings; a path may have an @ too."""
        path, _, asked = text.rpartition("@")
        if not path or "/" in asked or Path(text).is_dir():
            path, asked = text, ""
        output, _, settings = asked.partition(":")
        # What is wrong in the value is told before a model is downloaded.
        right = {
            "": not settings,
            "vector": not settings,
            "chunks": settings.isdecimal() and int(settings) > 0,
            "tokens": True,
        }
        if not right.get(output):
            raise UserError(
                f"--model {text}: write {path}@vector, {path}@chunks:N with chunks of N tokens, or {path}@tokens"
            )
        token_settings = TokenSettings.parse(settings if output == "tokens" else "", f"--model {text}")
        folder = ModelFolder.find(path)
        if output == "":
            output = "tokens" if folder.is_late_interaction else "vector"
        if output == "vector":
            return cls("model", folder, max_length, precision)
        if max_length is not None and folder.model_type == "longembed":
            raise UserError(
                f"--model {text}: --max_length {max_length} limits only models that are read as one vector a text; "
                "leave it out"
            )
        if output == "chunks":
            return cls("chunks", folder, int(settings), precision)
        return cls("tokens", folder, max_length, precision, token_settings)

    @property
    def has_one_vector(self) -> bool:
        """Whether there is one vector of a text, and so a similarity of two texts of any kind."""
        return self.kind in ("model", "truncate", "chunk-mean") and self.hybrid is None

    def computed_by(self, trust_remote_code: bool) -> dict[str, str]:
        """Describe what computes vectors and the scores that depend on them, without loading the model.

        Args:
            trust_remote_code: whether the code in the model's folder may run.

        Returns:
            As `common.provenance.computed_by`.
        """
        words = computed_by("common.bm25", libraries=("bm25s", "numpy"))
        if self.folder is None:
            return words
        code = self._encoder_class.CODE
        found = self.folder.computed_by(*code, precision=self.precision, trust_remote_code=trust_remote_code)
        if self.kind == "tokens":
            found["scores"] = code_hash(*SCORES_CODE)
        return found if self.hybrid is None else found | {f"words: {key}": by for key, by in words.items()}

    @property
    def _encoder_class(self) -> type[Encoder | LateChunkEncoder | LongEmbedTokenEncoder | MultiVectorTokenEncoder]:
        assert self.folder is not None
        if self.kind == "chunks":
            return LateChunkEncoder
        if self.kind == "tokens":
            return MultiVectorTokenEncoder if self.folder.is_late_interaction else LongEmbedTokenEncoder
        return ChunkEncoder if self.kind.startswith("chunk") else Encoder

    def load_encoder(self, batch_tokens: int, trust_remote_code: bool, normalize: bool = True) -> Encoder:
        """Load the encoder of one vector per text, or of those of chunks that were read one by one.

        Args:
            batch_tokens: token budget of a forward pass.
            trust_remote_code: run the code in the model's folder.
            normalize: scale the vectors to unit length, as for `Encoder`.

        Returns:
            An `Encoder`, or a `ChunkEncoder` for the chunk baselines.

        Raises:
            UserError: the model does not load, `tokens` exceeds its context, or this is another kind.
        """
        assert self.folder is not None
        if self.kind in ("chunks", "tokens") or self.hybrid is not None:
            what = self.kind if self.hybrid is None else "hybrid"
            raise UserError(
                f"{self.folder.name}: {what} is asked for, and this script compares one vector a text; give the "
                "model, truncate:PATH:N or chunk-mean:PATH:N"
            )
        kind = ChunkEncoder if self.kind.startswith("chunk") else Encoder
        return kind(self.folder, self.tokens, self.precision, batch_tokens, trust_remote_code, normalize)

    def load_chunk_encoder(self, batch_tokens: int) -> LateChunkEncoder:
        """Load the encoder of `chunks`, as `load_encoder` does those of other kinds."""
        assert self.folder is not None
        assert self.tokens is not None
        return LateChunkEncoder(self.folder, self.tokens, self.precision, batch_tokens)

    def load_token_encoder(self, batch_tokens: int, trust_remote_code: bool) -> TokenEncoder:
        """Load the encoder of `tokens`, as `load_encoder` does those of other kinds."""
        assert self.folder is not None
        if self.folder.is_late_interaction:
            return MultiVectorTokenEncoder(self.folder, self.tokens, self.precision, batch_tokens, trust_remote_code)
        return LongEmbedTokenEncoder(self.folder, self.precision, batch_tokens)


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
