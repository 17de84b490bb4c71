"""The objective of a student: the distances of its vectors, behind heads, from its teachers' vectors or scores."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from training.objectives.contrastive.blocks import Metrics
from training.objectives.heads import projection
from training.objectives.losses.correlation import SoftCCA, dcca
from training.objectives.losses.embedding_distillation import embedding_cosine, embedding_mse, max_margin_mse
from training.objectives.losses.matryoshka import matryoshka
from training.objectives.losses.similarity import similarity_of_candidates
from training.objectives.losses.soft_targets import margin_mse, soft_targets
from training.objectives.losses.token_vectors import TokenVectors
from training.teachers.arguments import TeachingArguments

LOSSES = {"mse": embedding_mse, "cosine": embedding_cosine}
# By role (structural, contextual, score or chunk): vectors or scores `(N, width)`, and which have a target, `(N,)`.
Targets = dict[str, tuple[Tensor, Tensor]]


class Structural(nn.Module):
    """The student's vectors, behind a head, should equal the teacher's.

    Args:
        arguments: parsed command-line options.
        width: width of the student's vectors.
        teacher_width: width of the teacher's vectors.
    """

    def __init__(self, arguments: TeachingArguments, width: int, teacher_width: int) -> None:
        super().__init__()
        self.arguments = arguments
        self.head = projection(width, arguments.structural_head_dims, teacher_width)

    def forward(self, student: Tensor, teacher: Tensor, inside: Tensor) -> tuple[Tensor, Metrics]:
        """Compute the structural loss.

        Args:
            student: `(n, d)`, not normalised.
            teacher: `(n, t)`.
            inside: `(n,)`, whether each text fits into the teacher's window.

        Returns:
            The loss, and detached scalars.
        """
        counted = inside if self.arguments.structural_mask else torch.ones_like(inside)
        metrics = {"share": counted.float().mean()} if self.arguments.structural_mask else {}
        projected = _unit_if(self.arguments.normalize_student, self.head(student))
        if not counted.any():
            zero = projected.sum() * 0.0
            return zero, metrics | dict.fromkeys(self._metric_names(), zero.detach())
        own, target = projected[counted], teacher[counted]
        if self.arguments.structural_loss == "max_margin_mse":
            loss, more = max_margin_mse(own, target, gamma=self.arguments.structural_gamma)
        else:
            loss, more = LOSSES[self.arguments.structural_loss](own, target)
        return loss, metrics | more | {"cosine": _mean_cosine(own, target)}

    def _metric_names(self) -> list[str]:
        """Return the names of the metrics, so that a batch without any counted text reports the same ones."""
        more = ["own_mse", "other_mse"] if self.arguments.structural_loss == "max_margin_mse" else []
        return [*more, "cosine"]


class Contextual(nn.Module):
    """A projection of the student's vectors should agree with a projection of the teacher's.

    Args:
        arguments: parsed command-line options.
        width: width of the student's vectors.
        teacher_width: width of the teacher's vectors.
    """

    def __init__(self, arguments: TeachingArguments, width: int, teacher_width: int) -> None:
        super().__init__()
        self.arguments, common_width = arguments, arguments.contextual_width
        # Correlations do not change under linear maps: dcca needs no projection to a common width.
        out = common_width or (width if arguments.contextual_loss == "dcca" else teacher_width)
        teacher_out = teacher_width if common_width is None else common_width
        self.head = projection(width, arguments.contextual_head_dims, out)
        self.teacher_head = projection(teacher_width, arguments.contextual_teacher_head_dims, teacher_out)
        self.fewest_rows = 1
        self.soft_cca: SoftCCA | None = None
        if arguments.contextual_loss == "soft_cca":
            self.soft_cca = SoftCCA(out, momentum=arguments.sdl_momentum, sdl_weight=arguments.sdl_weight)
            self.fewest_rows = 2
        if arguments.contextual_loss == "dcca":
            self.fewest_rows = 1 + max(out, teacher_out)

    def forward(self, student: Tensor, teacher: Tensor, inside: Tensor) -> tuple[Tensor, Metrics]:
        """Compute the contextual loss.

        Args:
            student: `(n, d)`, not normalised.
            teacher: `(n, t)`.
            inside: `(n,)`, not used: a contextual teacher is asked about whole documents.

        Returns:
            The loss, and detached scalars.
        """
        arguments = self.arguments
        projected, target = self.head(student), self.teacher_head(teacher)
        if self.soft_cca is not None:
            return self.soft_cca(projected, target)
        if arguments.contextual_loss == "dcca":
            # With a variance of 1 in every dimension the regularisation has the same effect for every teacher.
            views = [F.batch_norm(view.double(), None, None, training=True) for view in (projected, target)]
            components = arguments.dcca_components
            return dcca(views[0], views[1], regularization=arguments.dcca_regularization, components=components)
        projected = _unit_if(arguments.normalize_student, projected)
        loss, metrics = LOSSES[arguments.contextual_loss](projected, target)
        return loss, metrics | {"cosine": _mean_cosine(projected, target)}


class Scores(nn.Module):
    """The student's scores of candidates, which are scaled cosines or MaxSim, should equal the teacher's."""

    def __init__(self, arguments: TeachingArguments) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, student: Tensor | TokenVectors, teacher: Tensor) -> tuple[Tensor, Metrics]:
        """Compute the score loss.

        Args:
            student: `(n, 1 + candidates, d)`, the query's vector first, not normalised; or `(n, 1 + candidates)` texts
                as token vectors.
            teacher: `(n, candidates)` scores.

        Returns:
            The loss, and detached scalars; with `--token_dims` the sum over their sizes.
        """
        texts = student if isinstance(student, TokenVectors) else F.normalize(student, dim=-1)
        dims, scale = self.arguments.token_dims, self.arguments.score_scale
        assert scale is not None  # TeachingArguments give it a default

        def loss(texts: Any) -> tuple[Tensor, Metrics]:
            scores = similarity_of_candidates(texts[:, 0], texts[:, 1:]) * scale
            if self.arguments.score_loss == "margin_mse":
                return margin_mse(scores, teacher)
            return soft_targets(scores, teacher, temperature=self.arguments.score_temperature)

        return (matryoshka(loss, dims) if dims else loss)(texts)


class Teaching(nn.Module):
    """The weighted sum of the losses against all teachers.

    Its heads and running averages are in the checkpoints of a run and never in the saved model. Every process computes
    the whole loss of the gathered rows; the mean of the processes' gradients is then the gradient of one process.

    Args:
        arguments: parsed command-line options.
        encoder: the student.
        widths: by role of a teacher, the width of its vectors or its number of candidates.

    Raises:
        UserError: the student has no token vectors of a size that they ask for.
    """

    def __init__(self, arguments: TeachingArguments, encoder: nn.Module, widths: dict[str, int]) -> None:
        super().__init__()
        config: Any = encoder.config
        arguments.check_model(encoder)
        self.arguments = arguments
        self.weights = {"structural": arguments.structural_weight, "contextual": arguments.contextual_weight}
        self.weights |= {"score": arguments.score_weight, "chunk": arguments.late_chunk_weight}
        self.pooling: str = config.pooling
        self.parts = nn.ModuleDict()
        if "structural" in widths:
            self.parts["structural"] = Structural(arguments, config.hidden_size, widths["structural"])
        if "contextual" in widths:
            self.parts["contextual"] = Contextual(arguments, config.hidden_size, widths["contextual"])
        if "score" in widths:
            self.parts["score"] = Scores(arguments)

    def check_rows(self, option: str, rows: int) -> None:
        """Check that a batch has enough rows for the losses, before the first batch is read.

        Args:
            option: the option that determines the number of rows, for the error message.
            rows: number of rows of a batch, over all processes.

        Raises:
            UserError: there are too few rows.
        """
        fewest = max(getattr(part, "fewest_rows", 1) for part in self.parts.values())
        if rows < fewest:
            raise UserError(
                f"{option}: {rows} rows at once, of which --contextual_loss takes at least {fewest} (soft_cca needs a "
                "variance; for dcca no more rows than dimensions correlate with anything); give many more, or for dcca "
                "a smaller --contextual_width"
            )

    def forward(
        self, student: Tensor | TokenVectors, targets: Targets, chunks: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """Compute the loss of N rows.

        Args:
            student: `(N, columns, d)`: a text and its translations, which all learn the teacher's vector of the first;
                or a query and its candidates, maybe `(N, columns)` texts as token vectors.
            targets: by role the teacher's vectors `(N, t)` or scores `(N, candidates)`, and which texts fit into its
                window, `(N,)`; of `chunk` those of M chunks.
            chunks: `(M, d)`, the late chunks of the first column that have a text, not normalised.

        Returns:
            The weighted sum of the losses, each a mean over the columns, that of the chunks a mean over all chunks, and
            detached scalars by role.
        """
        total, metrics = torch.zeros(()), Metrics()
        found: dict[str, list[tuple[Tensor, Metrics]]] = {}
        for role, part in self.parts.items():
            vectors, inside = targets[role]
            if role == "score":
                found[role] = [part(student, vectors)]
            else:
                assert isinstance(student, Tensor)
                found[role] = [part(column, vectors, inside) for column in student.unbind(1)]
        if chunks is not None:
            found["chunk"] = [self.parts["structural"](chunks, *targets["chunk"])]
        for role, results in found.items():
            loss = torch.stack([value for value, _ in results]).mean()
            total = total + self.weights[role] * loss
            metrics[f"{role}_loss"] = loss.detach()
            for name in results[0][1]:
                metrics[f"{role}_{name}"] = torch.stack([more[name].float() for _, more in results]).mean()
        return total, metrics | {"loss": total.detach()}


def _unit_if(normalize: bool, vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1) if normalize else vectors


def _mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cosine_similarity(student.detach().float(), teacher.detach().float(), dim=-1).mean()
