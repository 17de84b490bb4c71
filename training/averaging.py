"""Average the weights of models that were trained from one start, which keeps more of what each of them knows.

python training/averaging.py --models runs/start/final runs/trained/final --shares 0.6 0.4 --output_dir runs/mean

The models need the same settings and names of weights: a start and what was trained from it, two seeds, or checkpoints
(Wortsman et al. 2022, arXiv:2203.05482 and arXiv:2109.01903). Weights whose names begin with a word of `--keep`, such
as `token_output.query_`, stay those of the first model, and so do its settings, its tokenizer and its prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.arguments import parse
from common.errors import UserError, run
from training.engine.record import record
from training.engine.saving import save
from training.models.encoder import ModelArguments, load_encoder


@dataclass
class AveragingArguments:
    """Which models are averaged, and how much each counts.

    Raises:
        UserError: the shares do not fit the models.
    """

    models: list[str] = field(metadata={"help": "folders or Hub ids of LongEmbed models; the first gives the settings"})
    output_dir: str = field(metadata={"help": "folder of final/, the model", "output": "folder"})
    shares: list[float] = field(
        default_factory=list, metadata={"help": "share of each model, which add up to 1; equal ones if not given"}
    )
    keep: list[str] = field(
        default_factory=list, metadata={"help": "beginnings of the names of weights that stay those of the first model"}
    )

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise UserError(f"--models {' '.join(self.models)}: give at least two, of which the mean is taken")
        self.shares = self.shares or [1 / len(self.models)] * len(self.models)
        if len(self.shares) != len(self.models) or abs(sum(self.shares) - 1) > 1e-6:
            given = " ".join(map(str, self.shares))
            raise UserError(f"--shares {given}: give one for each of the {len(self.models)} models, 1 in all")


def averaged(
    weights: Sequence[Mapping[str, Tensor]], shares: Sequence[float], keep: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return the weighted mean of weights, summed in float64.

    Args:
        weights: of each model, by name.
        shares: how much each model counts.
        keep: beginnings of names whose weights are those of the first model.
    """
    mean = {}
    for name, first in weights[0].items():
        if name.startswith(tuple(keep)) or not first.is_floating_point():
            mean[name] = first
        else:
            terms = (share * own[name].double() for share, own in zip(shares, weights, strict=True))
            mean[name] = torch.stack([*terms]).sum(0).to(first.dtype)
    return mean


def main(argv: Sequence[str] | None = None) -> None:
    """Average with the command-line options `argv`; None: those of the process.

    Raises:
        UserError: a model has other weights than the first.
    """
    (args,) = parse(AveragingArguments, argv=argv)
    models: list[Any] = [load_encoder(ModelArguments(model_name_or_path=name))[0] for name in args.models]
    weights = [model.state_dict() for model in models]
    shapes = [{name: tensor.shape for name, tensor in own.items()} for own in weights]
    for name, own in zip(args.models, shapes, strict=True):
        if other := sorted(key for key in {*own, *shapes[0]} if own.get(key) != shapes[0].get(key)):
            raise UserError(
                f"--models {name}: has another {other[0]} than {args.models[0]}; average models of one start"
            )
    models[0].load_state_dict(averaged(weights, args.shares, args.keep))
    output_dir = Path(args.output_dir).absolute()
    output_dir.mkdir(parents=True, exist_ok=True)
    print(save(models[0], output_dir, title=output_dir.name, made=record((args,))))


if __name__ == "__main__":
    run(main)
