"""Draw the results of eval/mteb_long.py: lines against context length, bars for tasks without lengths.

python eval/plot.py --results_dir runs/eval --output report.png
"""

from dataclasses import dataclass, field

from common.arguments import parse
from common.errors import run
from eval.report.length_plot import draw_scores
from eval.report.results import read_scores


@dataclass
class Arguments:
    """Options of the script."""

    results_dir: str = field(metadata={"help": "the output_dir of eval/mteb_long.py"})
    output: str = field(metadata={"help": "the PNG file", "output": "file"})


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    draw_scores(read_scores(arguments.results_dir), arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    run(main)
