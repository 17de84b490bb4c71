"""What `--model` may name where texts are encoded or ranked: models, and what a user would pick instead.

| name | what |
|---|---|
| `PATH` or Hub id | a model: one of ours, or any that sentence-transformers loads |
| `truncate:PATH:N` | the same, reading the first N tokens of every text |
| `chunk-mean:PATH:N` | one vector: the token-weighted mean over chunks of N tokens (special tokens included) |
| `chunk-max:PATH:N` | one vector a chunk; a document's score is that of its best chunk |
| `bm25` | word statistics: Lucene's BM25 with k1 = 1.5, b = 0.75, English stop words, no stemming |

Queries are treated like documents, but for chunk-max, where a query is one vector: the mean over its chunks.
"""

from dataclasses import dataclass
from typing import TypeVar

from common.encoders import ChunkEncoder, Encoder
from common.errors import UserError
from common.model_folder import ModelFolder

_Spec = TypeVar("_Spec", bound="ModelSpec")


@dataclass(frozen=True)
class ModelSpec:
    """One value of `--model`, parsed and found, but not loaded.

    Attributes:
        kind: `model`, `truncate`, `chunk-mean`, `chunk-max` or `bm25`.
        folder: the model's files; None for `bm25`.
        tokens: N of `truncate` and the chunk baselines; for a model the `--max_length`; None: what the model is set to.
        precision: `float32` or `bfloat16`.
    """

    kind: str
    folder: ModelFolder | None = None
    tokens: int | None = None
    precision: str = "float32"

    @classmethod
    def parse(cls: type[_Spec], text: str, max_length: int | None = None, precision: str = "float32") -> _Spec:
        """Read one value of `--model`.

        Args:
            text: see the module's table.
            max_length: tokens that a model reads; baselines say theirs themselves.
            precision: `float32` or `bfloat16`.

        Raises:
            UserError: a form that the table does not have, or a model that is not there.
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

    def load_encoder(self, batch_tokens: int, trust_remote_code: bool, normalize: bool = True) -> Encoder:
        """What makes vectors of texts; `bm25` has no such thing.

        Raises:
            UserError: it does not load, or `tokens` is more than its context.
        """
        assert self.folder is not None
        kind = ChunkEncoder if self.kind.startswith("chunk") else Encoder
        return kind(self.folder, self.tokens, self.precision, batch_tokens, trust_remote_code, normalize)
