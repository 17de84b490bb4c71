"""Command-line options of late interaction, which contrastive training and the distillation of scores share."""

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from common.conditions import Not
from common.errors import UserError
from training.objectives.losses.token_vectors import TokenVectors, for_scoring

MAXSIM = ("maxsim", "meanmaxsim")
NOT_MAXSIM = {"similarity": Not(*MAXSIM)}  # the condition of options that need one vector a text
Similarity = Literal["cosine", "maxsim", "meanmaxsim"]
SIMILARITY = {
    "help": "how a query and a document are compared. cosine: of one vector a text; maxsim: late interaction, the sum "
    "over the query's tokens of the largest cosine with a token of the document, times the token's weight if the model "
    "has weights of query tokens; meanmaxsim: its mean over the query's tokens"
}


@dataclass(kw_only=True)
class TokenArguments:
    """How texts are compared (`similarity`), and what of their token vectors trains."""

    similarity: Similarity = field(default="cosine", metadata=SIMILARITY)
    token_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "sizes of the token vectors to train: their first dimensions, such as 64 32, become token vectors "
            "of their own (Matryoshka, with the losses of all sizes added); for a model with a token head",
            "applies": {"similarity": MAXSIM},
        },
    )
    token_pooling: int = field(
        default=1,
        metadata={
            "help": "pool the token vectors of documents before they are scored, as encode(token_pooling=...) does: "
            "the average number of tokens that share a vector",
            "within": "[1, 32]",
            "applies": {"similarity": MAXSIM},
        },
    )
    token_weights_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "peak learning rate of the weights of query tokens; default --learning_rate, at which a table "
            "hardly moves",
            "within": "(0, inf)",
            "applies": {"similarity": MAXSIM},
        },
    )

    @property
    def by_tokens(self) -> bool:
        """Whether texts are compared by their token vectors."""
        return self.similarity in MAXSIM

    @property
    def reads_tokens(self) -> bool:
        """Whether the loss reads token vectors."""
        return self.by_tokens

    @property
    def mean(self) -> bool:
        """Whether a score of late interaction is a mean over the query's tokens."""
        return self.similarity == "meanmaxsim"

    def check_model(self, encoder: Any) -> None:
        """Check that a model has what the options train.

        Args:
            encoder: the encoder, maybe wrapped for LoRA.

        Raises:
            UserError: it has no token vectors, or none of a size.
        """
        if self.reads_tokens and not hasattr(encoder, "token_output"):
            raise UserError(
                "late interaction: the code in the model's folder is of an earlier version, which gives one vector a "
                "text; leave out maxsim"
            )
        if not self.token_dims:
            return
        width = encoder.config.token_dim
        if width is None:
            raise UserError(
                f"--token_dims {self.token_dims[0]}: this model has no token head, whose first dimensions hold most; "
                "fit one with training/token_output.py --token_dim, or leave out --token_dims"
            )
        if too_wide := [dim for dim in self.token_dims if not 0 < dim <= width]:
            raise UserError(f"--token_dims {too_wide[0]}: must be from 1 to {width}, the size of the token vectors")

    def groups(self, encoder: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give the weights of query tokens that train a group of their own, without decay.

        Its learning rate is `--token_weights_learning_rate`, if that is given. The group does not depend on it, so that
        a resumed run can have another one.

        Args:
            encoder: the encoder, whose trainable parameters have been selected.
            groups: the optimiser's parameter groups of the encoder.

        Returns:
            The groups.

        Raises:
            UserError: there is a learning rate, but no weights that train.
        """
        rate = self.token_weights_learning_rate
        output: nn.Module | None = getattr(encoder, "token_output", None)
        named = [] if output is None else list(output.named_parameters())
        weights = [parameter for name, parameter in named if name.startswith("query_") and parameter.requires_grad]
        if not weights and rate is None:
            return groups
        if not weights:
            raise UserError(
                f"--token_weights_learning_rate {rate}: no weights of query tokens train; give the model some with "
                "training/token_output.py --query_token_weights table or state, with --tuning full"
            )
        own = {id(parameter) for parameter in weights}
        others = [group | {"params": [p for p in group["params"] if id(p) not in own]} for group in groups]
        group: dict[str, Any] = {"params": weights, "weight_decay": 0.0}
        return [*others, group if rate is None else group | {"lr": rate}]

    def report_frozen(self, encoder: Any) -> None:
        """Say on stderr if a model has a token head or weights of query tokens, and none of them trains.

        Args:
            encoder: the encoder, whose trainable parameters have been selected.
        """
        output: nn.Module | None = getattr(encoder, "token_output", None)
        parameters = [] if output is None else list(output.parameters())
        if self.by_tokens and parameters and not any(parameter.requires_grad for parameter in parameters):
            print(
                "the token head and the weights of query tokens stay as they are: only --tuning full trains them",
                file=sys.stderr,
            )

    def for_scoring(self, vectors: Tensor, count: Tensor, queries: int) -> TokenVectors:
        """Return texts as they are scored, from `vectors` of tokens, a text's `count`, and how many are `queries`."""
        return for_scoring(vectors, count, queries, mean=self.mean, pooling=self.token_pooling)
