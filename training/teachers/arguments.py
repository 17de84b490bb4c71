"""Command-line options of distillation: the teachers, and the losses of the student against them.

The two kinds of embedding teachers follow Burian (Document embedding using Transformers, thesis, Charles University;
code in dburian/transformer_document_embedding). A structural teacher embeds short texts well, and the student's vectors
should equal its vectors. A contextual teacher has read whole documents, and the student's vectors should carry the same
information.
"""

from dataclasses import dataclass, field
from typing import Literal

from common.conditions import GIVEN, Not
from common.errors import UserError
from training.objectives.token_arguments import SIMILARITY, Similarity, TokenArguments


@dataclass
class TeachingArguments(TokenArguments):
    """The teachers and the losses against them, among them that of scores by a `similarity`.

    Raises:
        UserError: there is no teacher, or two options contradict each other.
    """

    structural_teacher: str | None = field(
        default=None,
        metadata={
            "help": "teacher whose vectors the student learns: a folder or Hub id, truncate:PATH:N, chunk-mean:PATH:N, "
            "or paragraph-vector:FOLDER"
        },
    )
    structural_loss: Literal["mse", "cosine", "max_margin_mse"] = field(
        default="mse",
        metadata={
            "help": "loss against the structural teacher; max_margin_mse also increases the distance from its vectors "
            "of the other documents of the batch",
            "applies": {"structural_teacher": GIVEN},
        },
    )
    structural_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the structural loss",
            "within": "[0, inf)",
            "applies": {"structural_teacher": GIVEN},
        },
    )
    structural_gamma: float = field(
        default=1.0,
        metadata={
            "help": "weight of the other documents in max_margin_mse",
            "within": "[0, inf)",
            "applies": {"structural_loss": "max_margin_mse"},
        },
    )
    structural_mask: bool = field(
        default=False,
        metadata={
            "help": "leave texts out of the structural loss that are longer than the teacher's window",
            "applies": {"structural_teacher": GIVEN},
        },
    )
    structural_head_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "widths of hidden layers between the student's vector and the structural loss; default: a linear "
            "projection if the teacher has another width, else nothing",
            "within": "[1, inf)",
            "applies": {"structural_teacher": GIVEN},
        },
    )
    late_chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "chunk alignment (Dewey): the late chunks of so many tokens that the student makes of one reading "
            "of a text learn the structural teacher's vectors of the texts of these chunks, by the same loss",
            "within": "[1, inf)",
            "applies": {"structural_loss": ("mse", "cosine")},
        },
    )
    late_chunk_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the loss of the chunks",
            "within": "[0, inf)",
            "applies": {"late_chunk_tokens": GIVEN},
        },
    )
    contextual_teacher: str | None = field(
        default=None,
        metadata={"help": "teacher whose information the student learns, in the formats of --structural_teacher"},
    )
    contextual_loss: Literal["mse", "cosine", "soft_cca", "dcca"] = field(
        default="soft_cca",
        metadata={
            "help": "loss against the contextual teacher; soft_cca and dcca compare the vectors up to a projection of "
            "both",
            "applies": {"contextual_teacher": GIVEN},
        },
    )
    contextual_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the contextual loss",
            "within": "[0, inf)",
            "applies": {"contextual_teacher": GIVEN},
        },
    )
    contextual_head_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "as --structural_head_dims, for the contextual loss",
            "within": "[1, inf)",
            "applies": {"contextual_teacher": GIVEN},
        },
    )
    contextual_teacher_head_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "widths of hidden layers between the teacher's vector and soft_cca or dcca",
            "within": "[1, inf)",
            "applies": {"contextual_loss": ("soft_cca", "dcca")},
        },
    )
    contextual_width: int | None = field(
        default=None,
        metadata={
            "help": "width of both projections of soft_cca and dcca; default: the teacher's width, for dcca each "
            "model's own",
            "within": "[1, inf)",
            "applies": {"contextual_loss": ("soft_cca", "dcca")},
        },
    )
    sdl_momentum: float = field(
        default=0.95,
        metadata={
            "help": "decay of the running covariance of earlier batches in soft_cca",
            "within": "[0, 1]",
            "applies": {"contextual_loss": "soft_cca", "sdl_weight": Not(0.0)},
        },
    )
    sdl_weight: float = field(
        default=0.03,
        metadata={
            "help": "weight of the decorrelation of dimensions in soft_cca",
            "within": "[0, inf)",
            "applies": {"contextual_loss": "soft_cca"},
        },
    )
    dcca_regularization: float = field(
        default=1e-3,
        metadata={
            "help": "number added to the variances of dcca, which are 1",
            "within": "[0, inf)",
            "applies": {"contextual_loss": "dcca"},
        },
    )
    dcca_components: int | None = field(
        default=None,
        metadata={
            "help": "number of canonical correlations in the loss of dcca; default: all",
            "within": "[1, inf)",
            "applies": {"contextual_loss": "dcca"},
        },
    )
    score_teacher: str | None = field(
        default=None,
        metadata={
            "help": "cross-encoder, a folder or Hub id, whose scores the student learns: of the first of "
            "--text_columns, a query, with each of the others, its candidates"
        },
    )
    score_column: str | None = field(
        default=None,
        metadata={"help": "column of the data that holds such scores as a list of numbers, instead of --score_teacher"},
    )
    score_loss: Literal["kl", "margin_mse"] = field(
        default="kl",
        metadata={
            "help": "loss against the scores. kl: divergence between the distributions over candidates; margin_mse: "
            "squared error of the differences between the first candidate's score and the others'",
            "applies": [{"score_teacher": GIVEN}, {"score_column": GIVEN}],
        },
    )
    score_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the score loss",
            "within": "[0, inf)",
            "applies": [{"score_teacher": GIVEN}, {"score_column": GIVEN}],
        },
    )
    similarity: Similarity = field(
        default="cosine",
        metadata=SIMILARITY | {"applies": [{"score_teacher": GIVEN}, {"score_column": GIVEN}]},
    )
    score_scale: float | None = field(
        default=None,
        metadata={
            "help": "factor between the similarity of a query and a candidate and the student's score; default 20, "
            "with --similarity maxsim 1",
            "within": "(0, inf)",
            "applies": [{"score_teacher": GIVEN}, {"score_column": GIVEN}],
        },
    )
    score_temperature: float = field(
        default=1.0,
        metadata={
            "help": "temperature of kl, which divides the scores of teacher and student",
            "within": "(0, inf)",
            "applies": {"score_loss": "kl"},
        },
    )
    normalize_teacher: bool = field(
        default=True,
        metadata={
            "help": "scale the teachers' vectors to unit length",
            "applies": [{"structural_teacher": GIVEN}, {"contextual_teacher": GIVEN}],
        },
    )
    normalize_student: bool = field(
        default=True,
        metadata={
            "help": "scale the student's vectors to unit length, behind the head, in all losses but soft_cca and dcca",
            "applies": [{"structural_teacher": GIVEN}, {"contextual_loss": ("mse", "cosine")}],
        },
    )
    teacher_precision: Literal["float32", "bfloat16", "auto"] = field(
        default="float32",
        metadata={
            "help": "precision of embedding teachers; auto: bfloat16 where the device is fast at it",
            "applies": [{"structural_teacher": GIVEN}, {"contextual_teacher": GIVEN}],
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "file that caches the teachers' vectors; default: teachers.sqlite in --output_dir",
            "applies": [{"structural_teacher": GIVEN}, {"contextual_teacher": GIVEN}, {"score_teacher": GIVEN}],
        },
    )

    def __post_init__(self) -> None:
        embeds = self.structural_teacher is not None or self.contextual_teacher is not None
        if not embeds and not self.scores:
            raise UserError(
                "no teacher: give --structural_teacher, --contextual_teacher, --score_teacher or --score_column"
            )
        if (embeds and self.scores) or (self.score_teacher and self.score_column):
            raise UserError(
                "--structural_teacher and --contextual_teacher are of texts and their translations, --score_teacher "
                "and --score_column of a query and its candidates; give one kind, and of scores one source"
            )
        if self.score_scale is None:
            self.score_scale = 1.0 if self.similarity == "maxsim" else 20.0
        if self.contextual_loss in ("mse", "cosine") and (self.contextual_teacher_head_dims or self.contextual_width):
            raise UserError(
                f"--contextual_loss {self.contextual_loss}: a head on the teacher's side would learn to give one "
                "vector for all; give --contextual_head_dims alone, or soft_cca or dcca"
            )
        unbounded = self.structural_loss == "max_margin_mse" and self.structural_gamma >= 1
        if unbounded and not self.normalize_student:
            raise UserError(
                f"--structural_gamma {self.structural_gamma}: without unit length max_margin_mse has no minimum from 1 "
                "on, and vectors grow for ever; leave out --no_normalize_student or give less than 1"
            )

    @property
    def scores(self) -> bool:
        """Whether the columns of the data are a query and its candidates."""
        return self.score_teacher is not None or self.score_column is not None
