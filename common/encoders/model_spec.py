"""The values of `--model` where texts are encoded or ranked: models, and the baselines that they are compared with.

| value | meaning |
|---|---|
| `PATH` or Hub id | a model of ours, or any model that sentence-transformers loads |
| `truncate:PATH:N` | the same model, reading the first N tokens of every text |
| `chunk-mean:PATH:N` | one vector: the token-weighted mean over chunks of N tokens (special tokens included) |
| `chunk-max:PATH:N` | one vector per chunk; the score of a document is that of its best chunk |
| `bm25` | no model: Lucene's BM25 with k1 = 1.5, b = 0.75, English stop words, no stemming |

Queries are treated like documents, except that for chunk-max a query is one vector, the mean over its chunks.
"""

from dataclasses import dataclass
from typing import TypeVar

from common.encoders.encoder import ChunkEncoder, Encoder, encoder_computed_by
from common.encoders.model_folder import ModelFolder
from common.errors import UserError
from common.provenance import computed_by

_Spec = TypeVar("_Spec", bound="ModelSpec")


@dataclass(frozen=True)
class ModelSpec:
    """A value of `--model` whose files have been found, but not loaded.

    Attributes:
        kind: `model`, `truncate`, `chunk-mean`, `chunk-max` or `bm25`.
        folder: the model's files; None for `bm25`.
        tokens: N of `truncate` and the chunk baselines; the `--max_length` of a model; None: the model's own setting.
        precision: `float32`, `bfloat16` or `int8`.
    """

    kind: str
    folder: ModelFolder | None = None
    tokens: int | None = None
    precision: str = "float32"

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
        if kind not in ("truncate", "chunk-mean", "chunk-max"):
            return cls("model", ModelFolder.find(text), max_length, precision)
        path, _, tokens = rest.rpartition(":")
        if not path or not tokens.isdigit() or int(tokens) < 8:
            raise UserError(f"--model {text}: write {kind}:PATH:N with N tokens, at least 8, such as {kind}:PATH:256")
        return cls(kind, ModelFolder.find(path), int(tokens), precision)

    def computed_by(self, trust_remote_code: bool) -> dict[str, str]:
        """Describe what computes vectors, or the scores of `bm25`, without loading the model.

        Args:
            trust_remote_code: whether the code in the model's folder may run.

        Returns:
            As `common.provenance.computed_by`.
        """
        if self.folder is None:
            return computed_by("common.bm25", libraries=("bm25s", "numpy"))
        return encoder_computed_by(self.folder, self.precision, trust_remote_code)

    def load_encoder(self, batch_tokens: int, trust_remote_code: bool, normalize: bool = True) -> Encoder:
        """Load the encoder, which every kind but `bm25` has.

        Args:
            batch_tokens: token budget of a forward pass.
            trust_remote_code: run the code in the model's folder.
            normalize: scale the vectors to unit length, as for `Encoder`.

        Returns:
            An `Encoder`, or a `ChunkEncoder` for the chunk baselines.

        Raises:
            UserError: the model does not load, or `tokens` exceeds its context.
        """
        assert self.folder is not None
        kind = ChunkEncoder if self.kind.startswith("chunk") else Encoder
        return kind(self.folder, self.tokens, self.precision, batch_tokens, trust_remote_code, normalize)
