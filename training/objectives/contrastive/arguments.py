"""Command-line options of the contrastive objectives, and which objective takes which option."""

from dataclasses import dataclass, field
from typing import Literal

from common.conditions import GIVEN, NOT_GIVEN, Not
from common.errors import UserError
from training.objectives.token_arguments import NOT_MAXSIM, SIMILARITY, Similarity, TokenArguments

GROUP_COLUMN = "group"  # of the data, for the debiasing term

TEMPERED = ("info_nce", "simcse", "nt_xent", "sup_con", "momentum")  # the objectives that have a temperature


@dataclass
class ObjectiveArguments(TokenArguments):
    """The training objective, the `similarity` that it reads, and its options.

    Raises:
        UserError: two options contradict each other.
    """

    objective: Literal["info_nce", "simcse", "nt_xent", "sup_con", "vicreg", "momentum"] = field(
        default="info_nce",
        metadata={
            "help": "training objective. info_nce: classify the positive among all documents of the batch; simcse: "
            "the same for two dropout views of one text; nt_xent: classify the other view among all views of the "
            "batch, behind a projection head (SimCLR); sup_con: pull texts with the same label together; vicreg: "
            "make two views agree and keep dimensions varied and uncorrelated, behind an expander; momentum: "
            "classify the positive among a queue of earlier keys (MoCo, Contriever)"
        },
    )
    similarity: Similarity = field(
        default="cosine", metadata=SIMILARITY | {"applies": {"objective": ("info_nce", "simcse")}}
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "similarities are divided by the temperature; default 0.05, for nt_xent 0.1, for sup_con 0.07, "
            "with --similarity maxsim 1",
            "within": "(0, inf)",
            "applies": {"objective": TEMPERED},
        },
    )
    learnable_temperature: bool = field(
        default=False,
        metadata={
            "help": "train the temperature; --temperature is its initial value",
            "applies": {"objective": TEMPERED},
        },
    )
    symmetric: bool = field(
        default=False,
        metadata={
            "help": "also classify the query of each document among all queries of the batch",
            "applies": {"objective": ("info_nce", "simcse")},
        },
    )
    negative_weight: float = field(
        default=0.0,
        metadata={
            "help": "logarithm of the weight of a row's own hard negatives, added to their scores; 0 is neutral, "
            "--negative_weight=-inf leaves them out",
            "within": "[-inf, inf)",
            "applies": {"objective": "info_nce"},
        },
    )
    guide_model: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub id of a model that detects false negatives (GISTEmbed): a document that it scores "
            "higher than the positive is not used as a negative",
            "applies": {"objective": ("info_nce", "simcse")},
        },
    )
    false_negative_margin: float | None = field(
        default=None,
        metadata={
            "help": "a document counts as a false negative if its cosine exceeds the positive's by more than this "
            "margin. Cosines come from --guide_model (default margin 0), or without one from the model in training "
            "(by default no false negatives are detected; with --similarity maxsim they are MaxSim scores)",
            "applies": {"objective": ("info_nce", "simcse")},
        },
    )
    false_negative_relative: bool = field(
        default=False,
        metadata={
            "help": "interpret --false_negative_margin as a fraction of the positive's cosine",
            "applies": [{"guide_model": GIVEN}, {"false_negative_margin": GIVEN}],
        },
    )
    head_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "layer widths of the projection head of nt_xent (default: the model's width, then 128) or of the "
            "expander of vicreg (default: 8192 8192 8192); 0: no head",
            "applies": {"objective": ("nt_xent", "vicreg")},
        },
    )
    vicreg_invariance_weight: float = field(
        default=25.0,
        metadata={"help": "weight of the squared distance between the two views", "applies": {"objective": "vicreg"}},
    )
    vicreg_variance_weight: float = field(
        default=25.0,
        metadata={
            "help": "weight of the hinge that keeps each dimension's standard deviation above 1",
            "applies": {"objective": "vicreg"},
        },
    )
    vicreg_covariance_weight: float = field(
        default=1.0,
        metadata={"help": "weight of the squared covariances between dimensions", "applies": {"objective": "vicreg"}},
    )
    queue_size: int = field(
        default=131072,
        metadata={
            "help": "number of keys in the queue of negatives",
            "within": "[1, inf)",
            "applies": {"objective": "momentum"},
        },
    )
    momentum: float = field(
        default=0.9995,
        metadata={
            "help": "share of the momentum encoder's weights that is kept at each update",
            "within": "[0, 1]",
            "applies": {"objective": "momentum"},
        },
    )
    matryoshka_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "embedding sizes to train: the first dimensions of an embedding, such as 384 256 128, become "
            "embeddings of their own",
            "applies": NOT_MAXSIM,
        },
    )
    matryoshka_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "loss weights of --matryoshka_dims; default 1 each", "applies": {"matryoshka_dims": GIVEN}},
    )
    spread_out_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of the regulariser that spreads embeddings over the unit sphere",
            "within": "[0, inf)",
            "applies": NOT_MAXSIM,
        },
    )
    debias_weight: float = field(
        default=0.0,
        metadata={
            "help": f"weight of the regulariser that hides the column {GROUP_COLUMN!r} from a linear probe",
            "within": "[0, inf)",
            "applies": NOT_MAXSIM,
        },
    )
    teach_vector_by: Literal["maxsim", "meanmaxsim"] | None = field(
        default=None,
        metadata={
            "help": "the model's own late interaction teaches its one vector a text: the divergence between the scores "
            "of both over the documents of the batch is added to the loss, without gradient to the token vectors",
            "applies": {"objective": ("info_nce", "simcse")},
        },
    )
    teach_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the loss of --teach_vector_by",
            "within": "[0, inf)",
            "applies": {"teach_vector_by": GIVEN},
        },
    )
    objective_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the objective itself beside --teach_vector_by; 0: nothing but what it teaches",
            "within": "[0, inf)",
            "applies": {"teach_vector_by": GIVEN},
        },
    )
    teach_bm25_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of BM25 in the scores of the teacher: a combination of both, each scaled from 0 to 1 over "
            "the documents of the batch. Words count as in the documents of the training data; needs the extra search",
            "within": "[0, 1]",
            "applies": {"teach_vector_by": GIVEN, "streaming": NOT_GIVEN},
        },
    )
    teach_temperature: float | None = field(
        default=None,
        metadata={
            "help": "the teacher's scores are divided by this temperature; default 1 for maxsim, 0.05 for meanmaxsim, "
            "whose scores are those of cosines, and with --teach_bm25_weight",
            "within": "(0, inf)",
            "applies": {"teach_vector_by": GIVEN},
        },
    )
    teach_vector_temperature: float = field(
        default=0.05,
        metadata={
            "help": "the cosines of the vectors that are taught are divided by this temperature",
            "within": "(0, inf)",
            "applies": {"teach_vector_by": GIVEN},
        },
    )
    objective_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "peak learning rate of the temperature or the projection head; default --learning_rate",
            "within": "(0, inf)",
            "applies": [{"learnable_temperature": True}, {"objective": ("nt_xent", "vicreg"), "head_dims": Not([0])}],
        },
    )

    def __post_init__(self) -> None:
        if self.by_tokens and self.teach_vector_by not in (None, self.similarity):
            raise UserError(
                f"--teach_vector_by {self.teach_vector_by}: the model learns to score by {self.similarity}; give that"
            )
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka_dims):
            raise UserError(
                f"--matryoshka_weights: {len(self.matryoshka_weights)} weights for {len(self.matryoshka_dims)} "
                "--matryoshka_dims; give one each"
            )

    @property
    def reads_tokens(self) -> bool:
        """Whether the loss reads token vectors."""
        return self.by_tokens or self.teach_vector_by is not None

    @property
    def mean(self) -> bool:
        """Whether a score of late interaction is a mean over the query's tokens."""
        return "meanmaxsim" in (self.similarity, self.teach_vector_by)

    @property
    def temperature_of_teacher(self) -> float:
        """What the scores of `teach_vector_by` are divided by."""
        return self.teach_temperature or (0.05 if self.mean or self.teach_bm25_weight else 1.0)
