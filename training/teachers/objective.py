"""The objective of a student of teachers: the distance of its vectors, behind heads, from theirs, or of its scores."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from training.objectives.heads import projection
from training.objectives.losses.correlation import SoftCCA, dcca
from training.objectives.losses.embedding_distillation import embedding_cosine, embedding_mse, max_margin_mse
from training.objectives.losses.soft_targets import margin_mse, soft_targets
from training.teachers.arguments import TeachingArguments

Metrics = dict[str, Tensor]
Targets = dict[str, tuple[Tensor, Tensor]]  # by role: vectors or scores `(N, width)`, and which rows count, `(N,)`


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


def _unit(vectors: Tensor, wanted: bool) -> Tensor:
    return F.normalize(vectors, dim=-1) if wanted else vectors


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cosine_similarity(student.detach().float(), teacher.detach().float(), dim=-1).mean()
