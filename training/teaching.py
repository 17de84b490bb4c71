"""What a student is asked to take over from its teachers: the arguments, the objective, its gradient, its evaluation.

After Burian (Document embedding using Transformers, thesis, Charles University; code in
dburian/transformer_document_embedding): a structural teacher, which reads a short text well, says what the vector is
to be; a contextual one, which has seen all of a document, says what can be told from it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.errors import UserError
from training.batches import PackedTexts, PairBatch, PairTokenizer, collate_pairs
from training.data import Source
from training.distributed import gather_rows, own_share
from training.encoding import pool
from training.gradient_cache import cached_backward
from training.heads import projection
from training.loop import AccumulateGradient
from training.losses.correlation import SoftCCA, dcca
from training.losses.embedding_distillation import embedding_cosine, embedding_mse, max_margin_mse
from training.losses.soft_targets import margin_mse, soft_targets
from training.pairs import by_row

Metrics = dict[str, Tensor]


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

    def describe(self, teachers: "Teachers") -> dict[str, Any]:
        """What a resumed run must agree in: all that the objective depends on, the teachers by what they are."""
        names = ("structural_teacher", "contextual_teacher", "score_teacher", "score_column", "teacher_cache")
        own = {name: value for name, value in asdict(self).items() if name not in (*names, "teacher_precision")}
        return own | {f"{role}_teacher": teacher.identity for role, teacher in teachers.items()}


class Structural(nn.Module):
    """The student's vectors, behind a head, are to be those of a teacher."""

    def __init__(self, arguments: TeachingArguments, width: int, teacher_width: int) -> None:
        super().__init__()
        self.arguments = arguments
        self.head = projection(width, arguments.structural_head_dims, teacher_width)

    def forward(self, student: Tensor, teacher: Tensor, inside: Tensor) -> tuple[Tensor, Metrics]:
        """Of `(n, d)` and `(n, t)`; `inside` `(n,)` says which texts the teacher reads to their end."""
        counts = inside if self.arguments.structural_mask else torch.ones_like(inside)
        metrics = {"share": counts.float().mean()} if self.arguments.structural_mask else {}
        projected = _unit(self.head(student), self.arguments.normalize_student)
        if not counts.any():
            nothing = projected.sum() * 0.0
            return nothing, metrics | dict.fromkeys(self._names(), nothing.detach())
        own, target = projected[counts], teacher[counts]
        if self.arguments.structural_loss == "max_margin_mse":
            loss, more = max_margin_mse(own, target, gamma=self.arguments.structural_gamma)
        else:
            loss, more = LOSSES[self.arguments.structural_loss](own, target)
        return loss, metrics | more | {"cosine": _cosine(own, target)}

    def _names(self) -> list[str]:
        """Of what is reported beside the loss, so that a batch without any text that counts reports the same."""
        more = ["own_mse", "other_mse"] if self.arguments.structural_loss == "max_margin_mse" else []
        return [*more, "cosine"]


class Contextual(nn.Module):
    """A projection of the student's vectors is to agree with one of a teacher's."""

    def __init__(self, arguments: TeachingArguments, width: int, teacher_width: int) -> None:
        super().__init__()
        self.arguments, wanted = arguments, arguments.contextual_width
        # Correlations do not change under linear maps: dcca needs no projection to a common width.
        out = wanted or (width if arguments.contextual_loss == "dcca" else teacher_width)
        self.head = projection(width, arguments.contextual_head_dims, out)
        self.teacher_head = projection(
            teacher_width, arguments.contextual_teacher_head_dims, teacher_width if wanted is None else wanted
        )
        self.fewest_rows = 1
        self.soft_cca: SoftCCA | None = None
        if arguments.contextual_loss == "soft_cca":
            self.soft_cca = SoftCCA(out, momentum=arguments.sdl_momentum, sdl_weight=arguments.sdl_weight)
            self.fewest_rows = 2
        if arguments.contextual_loss == "dcca":
            self.fewest_rows = 1 + max(out, teacher_width if wanted is None else wanted)

    def forward(self, student: Tensor, teacher: Tensor, inside: Tensor) -> tuple[Tensor, Metrics]:
        """Of `(n, d)` and `(n, t)`."""
        arguments = self.arguments
        projected, target = self.head(student), self.teacher_head(teacher)
        if self.soft_cca is not None:
            return self.soft_cca(projected, target)
        if arguments.contextual_loss == "dcca":
            # At a variance of 1 in every dimension the regularisation means the same for every teacher.
            views = [F.batch_norm(view.double(), None, None, training=True) for view in (projected, target)]
            components = arguments.dcca_components
            return dcca(views[0], views[1], regularization=arguments.dcca_regularization, components=components)
        projected = _unit(projected, arguments.normalize_student)
        loss, metrics = LOSSES[arguments.contextual_loss](projected, target)
        return loss, metrics | {"cosine": _cosine(projected, target)}


class Scores(nn.Module):
    """The student's scores of candidates are to be those of a teacher."""

    def __init__(self, arguments: TeachingArguments) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Metrics]:
        """Of `(n, 1 + candidates, d)`, queries first, and `(n, candidates)`."""
        query, *candidates = F.normalize(student, dim=-1).unbind(1)
        scores = self.arguments.score_scale * torch.stack([(query * text).sum(-1) for text in candidates], dim=1)
        if self.arguments.score_loss == "margin_mse":
            return margin_mse(scores, teacher)
        return soft_targets(scores, teacher, temperature=self.arguments.score_temperature)


LOSSES = {"mse": embedding_mse, "cosine": embedding_cosine}
Targets = dict[str, tuple[Tensor, Tensor]]


class TextTeacher(Protocol):
    """What knows of every row of the data what a student is to give.

    Attributes:
        width: of what it gives: a vector's, or the candidates of a query.
        identity: what that depends on beside the data.
    """

    width: int
    identity: str

    def read_all(self, sources: Iterable[Source]) -> None:
        """Make ready what `read` gives of the rows of all sources; the processes share them out."""

    def read(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Vectors or scores of a batch that holds its texts, float32 `(n, width)`, and which rows count, `(n,)`."""


Teachers = Mapping[str, TextTeacher]  # by role: `structural` and `contextual`, or `score`


class Teaching(nn.Module):
    """The weighted losses of all teachers. Its heads and averages are in the checkpoints, never in the saved model.

    Every process computes the whole loss of the gathered rows: the mean of the processes' gradients is that of one.
    """

    def __init__(self, arguments: TeachingArguments, encoder: nn.Module, widths: dict[str, int]) -> None:
        """Args:
        arguments: of the user.
        encoder: the student.
        widths: of what the teachers give, by role.
        """
        super().__init__()
        config: Any = encoder.config
        self.weights = {"structural": arguments.structural_weight, "contextual": arguments.contextual_weight}
        self.weights["score"] = arguments.score_weight
        self.parts = nn.ModuleDict()
        if "structural" in widths:
            self.parts["structural"] = Structural(arguments, config.hidden_size, widths["structural"])
        if "contextual" in widths:
            self.parts["contextual"] = Contextual(arguments, config.hidden_size, widths["contextual"])
        if "score" in widths:
            self.parts["score"] = Scores(arguments)

    def check_rows(self, option: str, rows: int) -> None:
        """Refuse what would end the run at its first batch.

        Args:
            option: where the rows come from.
            rows: that are looked at at once, over all processes.

        Raises:
            UserError: too few for the loss.
        """
        fewest = max(getattr(part, "fewest_rows", 1) for part in self.parts.values())
        if rows < fewest:
            raise UserError(
                f"{option}: {rows} rows at once, of which --contextual_loss takes at least {fewest} (soft_cca needs a "
                "variance; for dcca no more rows than dimensions correlate with anything); give many more, or for dcca "
                "a smaller --contextual_width"
            )

    def forward(self, student: Tensor, targets: Targets) -> tuple[Tensor, Metrics]:
        """The loss of N rows.

        Args:
            student: `(N, columns, d)`: a text and its translations, of which each is to have the vector of the first;
                or a query and its candidates.
            targets: of each teacher its vectors `(N, t)` and which texts it reads to their end, `(N,)`; or its scores.

        Returns:
            The weighted sum of the losses, each a mean over the columns, and detached metrics of each.
        """
        total, metrics = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32)), Metrics()
        for role, part in self.parts.items():
            vectors, inside = targets[role]
            if role == "score":
                results = [part(student, vectors)]
            else:
                results = [part(column, vectors, inside) for column in student.unbind(1)]
            loss = torch.stack([value for value, _ in results]).mean()
            total = total + self.weights[role] * loss
            metrics[f"{role}_loss"] = loss.detach()
            for name in results[0][1]:
                metrics[f"{role}_{name}"] = torch.stack([more[name].float() for _, more in results]).mean()
        return total, metrics | {"loss": total.detach()}


def teaching_gradient(objective: Teaching, teachers: Teachers) -> AccumulateGradient:
    """The gradient of an objective over the batches of all processes, which hold their texts."""

    def accumulate_gradient(model: nn.Module, batch: PairBatch, scale: float, synchronize: bool) -> Metrics:
        device = batch.text_ids.device
        targets = {
            role: (gather_rows(vectors), gather_rows(inside.float()).bool())
            for role, (vectors, inside) in _read(batch, teachers, device).items()
        }

        def loss(embeddings: Tensor) -> tuple[Tensor, Metrics]:
            value, metrics = objective(gather_rows(by_row(embeddings, batch.pairs)), targets)
            return value * scale, metrics

        metrics = cached_backward(model, batch.chunks, lambda chunk: pool(model, chunk), loss, synchronize=synchronize)
        return metrics | batch.measures()

    return accumulate_gradient


class TeachingEvaluation:
    """Held-out texts of one source, in batches as large as those of training, which the processes share."""

    def __init__(
        self,
        source: Source,
        tokenize: PairTokenizer,
        objective: Teaching,
        teachers: Teachers,
        *,
        batch_size: int,
        batch_tokens: int,
    ) -> None:
        """Args:
        batch_size: rows of a batch, or all that there are; the rest is shared out over the batches.
        batch_tokens: tokens of one packed chunk.
        """
        self.source, self.tokenize, self.objective, self.teachers = source, tokenize, objective, teachers
        rows = np.arange(len(source.rows))
        self.batches = np.array_split(rows, max(1, len(rows) // batch_size))
        self.batch_tokens = batch_tokens

    @torch.no_grad()
    def __call__(self, embed: Callable[[PackedTexts], Tensor], device: torch.device) -> dict[str, float]:
        """The metrics of the objective as `eval_*`: means over the batches."""
        sums: dict[str, float] = {}
        self.objective.eval()
        for number in own_share(len(self.batches)):
            rows = self.batches[number].tolist()
            texts = self.source.texts(rows)
            batch = collate_pairs(texts, self.tokenize, self.batch_tokens, anchor_kind=self.source.anchor_kind)
            batch = replace(batch, texts=texts, source=self.source.name, rows=self.source.numbers(rows))
            vectors = torch.cat([embed(chunk.to(device)).float() for chunk in batch.chunks])
            _, metrics = self.objective(by_row(vectors, batch.pairs), _read(batch, self.teachers, device))
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in metrics.items()}
        self.objective.train()
        shares = gather_object([sums])
        names = next(share for share in shares if share)
        return {f"eval_{name}": sum(share.get(name, 0.0) for share in shares) / len(self.batches) for name in names}


def _read(batch: PairBatch, teachers: Teachers, device: torch.device) -> Targets:
    found = {role: teacher.read(batch) for role, teacher in teachers.items()}
    return {role: (target.to(device), counts.to(device)) for role, (target, counts) in found.items()}


def _unit(vectors: Tensor, wanted: bool) -> Tensor:
    return F.normalize(vectors, dim=-1) if wanted else vectors


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cosine_similarity(student.detach().float(), teacher.detach().float(), dim=-1).mean()
