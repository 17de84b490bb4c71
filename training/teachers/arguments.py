"""What a student is asked to take over from its teachers, as the user says it.

After Burian (Document embedding using Transformers, thesis, Charles University; code in
dburian/transformer_document_embedding): a structural teacher, which reads a short text well, says what the vector is
to be; a contextual one, which has seen all of a document, says what can be told from it.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from common.errors import UserError


@dataclass
class TeachingArguments:
    """The teachers, and what is asked of the student."""

    structural_teacher: str | None = field(
        default=None,
        metadata={
            "help": "whose vectors the student's are to be: a folder or Hub id, truncate:PATH:N, chunk-mean:PATH:N, or "
            "paragraph-vector:FOLDER"
        },
    )
    structural_loss: Literal["mse", "cosine", "max_margin_mse"] = field(
        default="mse",
        metadata={"help": "max_margin_mse: and far from those of the other documents of the batch"},
    )
    structural_weight: float = field(default=1.0, metadata={"help": "of the structural loss"})
    structural_gamma: float = field(default=1.0, metadata={"help": "of max_margin_mse: weight of the other documents"})
    structural_mask: bool = field(
        default=False, metadata={"help": "a text that the structural teacher does not read to its end does not count"}
    )
    structural_head_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "widths of hidden layers between the student's vector and the structural loss; if not given, a "
            "linear projection where the teacher has another width, and else nothing"
        },
    )
    contextual_teacher: str | None = field(
        default=None, metadata={"help": "of which the student is to tell the same, in the same forms"}
    )
    contextual_loss: Literal["mse", "cosine", "soft_cca", "dcca"] = field(
        default="soft_cca", metadata={"help": "soft_cca, dcca: agree up to a projection of both"}
    )
    contextual_weight: float = field(default=1.0, metadata={"help": "of the contextual loss"})
    contextual_head_dims: list[int] = field(
        default_factory=list, metadata={"help": "as --structural_head_dims, before the contextual loss"}
    )
    contextual_teacher_head_dims: list[int] = field(
        default_factory=list, metadata={"help": "of soft_cca and dcca: the same on the teacher's side"}
    )
    contextual_width: int | None = field(
        default=None,
        metadata={
            "help": "of soft_cca and dcca: width of both projections; the teacher's, dcca: their own if not given"
        },
    )
    sdl_momentum: float = field(default=0.95, metadata={"help": "of soft_cca: share of earlier batches' covariance"})
    sdl_weight: float = field(default=0.03, metadata={"help": "of soft_cca: of the decorrelation of dimensions"})
    dcca_regularization: float = field(default=1e-3, metadata={"help": "of dcca: added to variances, which are 1"})
    dcca_components: int | None = field(
        default=None, metadata={"help": "of dcca: correlations that count; default: all"}
    )
    score_teacher: str | None = field(
        default=None,
        metadata={
            "help": "a cross-encoder, folder or Hub id: of the first of --text_columns, a query, and each of the other "
            "ones the student is to give its scores"
        },
    )
    score_column: str | None = field(
        default=None, metadata={"help": "the same from the data: a column that holds a list of numbers"}
    )
    score_loss: Literal["kl", "margin_mse"] = field(
        default="kl",
        metadata={
            "help": "kl: the distribution over the candidates; margin_mse: how far the first is above each other"
        },
    )
    score_weight: float = field(default=1.0, metadata={"help": "of that loss"})
    score_scale: float = field(default=20.0, metadata={"help": "the student's score is so many times the cosine"})
    score_temperature: float = field(default=1.0, metadata={"help": "of kl: by which the scores of both are divided"})
    normalize_teacher: bool = field(default=True, metadata={"help": "teachers' vectors have unit length"})
    normalize_student: bool = field(
        default=True, metadata={"help": "the student's have, behind the head, in all losses but soft_cca and dcca"}
    )
    teacher_precision: Literal["float32", "bfloat16", "auto"] = field(
        default="float32", metadata={"help": "that embedding teachers compute in; auto: bfloat16 where it is fast"}
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "file of the teachers' vectors; teachers.sqlite in --output_dir if not given"}
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
        for name in ("score_scale", "score_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)}: must be a number of more than 0")
        weights = ("structural_weight", "contextual_weight", "score_weight", "sdl_weight")
        for name in (*weights, "structural_gamma", "dcca_regularization"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)}: must be a number of at least 0")
        for name in ("structural_head_dims", "contextual_head_dims", "contextual_teacher_head_dims"):
            if any(dim < 1 for dim in getattr(self, name)):
                raise UserError(f"--{name} {' '.join(map(str, getattr(self, name)))}: each must be at least 1")
        for name in ("contextual_width", "dcca_components"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} {value}: must be at least 1")
        if not 0 <= self.sdl_momentum <= 1:
            raise UserError(f"--sdl_momentum {self.sdl_momentum}: must be from 0 to 1")
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
        """Whether the columns are a query and its candidates."""
        return self.score_teacher is not None or self.score_column is not None

    def describe(self) -> dict[str, Any]:
        """What a resumed run must agree in beside the teachers, which may have another name and be the same."""
        names = ("structural_teacher", "contextual_teacher", "score_teacher", "score_column")
        others = (*names, "teacher_cache", "teacher_precision")
        return {name: value for name, value in asdict(self).items() if name not in others}
