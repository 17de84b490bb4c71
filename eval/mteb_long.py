"""Judge models and baselines on long-document retrieval with MTEB, on the Hub's data or on a local folder.

    python eval/mteb_long.py --model runs/my/final chunk-mean:BAAI/bge-small-en-v1.5:512 bm25 \\
        --data_dir my_tasks --output_dir runs/eval

Results land in MTEB's own files under `<output_dir>/results/`; the table is printed and written to
`<output_dir>/table.md`. The same command again repeats nothing that is finished; a killed one goes on.
docs/guides/evaluate.md says what the numbers mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import mteb
from mteb.abstasks import AbsTask
from mteb.models.model_meta import ModelMeta
from rich.console import Console

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from common.precision import ENCODER_PRECISIONS, resolve_precision
from common.vector_cache import VectorCache
from eval.models.judged import JudgedModel
from eval.models.quantization import VECTORS
from eval.report.results import AtomicResultCache, Score, as_markdown, as_table
from eval.tasks.retrieval import get_tasks, load


@dataclass
class ModelArguments:
    """What to judge, and where the results go."""

    model: list[str] = field(
        metadata={
            "help": "models by folder or Hub id; baselines: truncate:PATH:N, chunk-mean:PATH:N, chunk-max:PATH:N, bm25"
        }
    )
    output_dir: str = field(metadata={"help": "folder of the results, and of the vectors that are computed once"})
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of a text that a model reads; baselines say theirs themselves"}
    )
    precision: str = field(
        default="float32",
        metadata={
            "help": "float32, as published figures are; bfloat16; auto: bfloat16 where the processor is fast in it; "
            "int8: the weights of linear layers in 8 bits, on the CPU"
        },
    )
    vectors: str = field(
        default="float32",
        metadata={
            "help": "how vectors of documents are stored: float32, int8, or binary; those of queries stay as they are"
        },
    )
    batch_tokens: int = field(
        default=16384, metadata={"help": "tokens in one forward pass; lower it to use less memory"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with a model; our own models need none"}
    )


@dataclass
class Arguments(ModelArguments):
    """And on what."""

    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "names of MTEB tasks, or of sub-folders of data_dir; default: LongEmbed's six, or all sub-folders"
        },
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "folder with one folder a task; default: the Hub's data"}
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "what the table shows, by MTEB's names: hit_rate_at_1 mrr_at_10; default: nDCG"},
    )


def judge(arguments: Arguments) -> list[Score]:
    """Run what is not finished yet, and return the scores of all models on all tasks, in the order asked for.

    Args:
        arguments: as on the command line.

    Raises:
        UserError: a model, a task or a file that is not as it must be; told before anything long begins where possible.
    """
    return run_tasks(arguments, get_tasks(arguments.tasks, arguments.data_dir), arguments.metrics)


def run_tasks(arguments: ModelArguments, tasks: Sequence[AbsTask], metrics: Sequence[str] = ()) -> list[Score]:
    """Run what is not finished of any of MTEB's tasks, and return the scores of all models on all of them, in order.

    Args:
        arguments: as on the command line.
        tasks: what to judge on.
        metrics: MTEB's names of what to return; none: each task's main score.

    Raises:
        UserError: a model or an argument that is not as it must be, or a metric that a task does not have.
    """
    if arguments.max_length is not None and arguments.max_length < 8:
        raise UserError(f"--max_length {arguments.max_length} is too short for any text; give at least 8 tokens")
    if arguments.batch_tokens < 1:
        raise UserError(f"--batch_tokens {arguments.batch_tokens} must be positive")
    datasets.disable_progress_bars()  # of tables that are written in a moment; encoding shows its own
    if arguments.vectors not in VECTORS:
        raise UserError(f"--vectors {arguments.vectors} is not one of {', '.join(VECTORS)}")
    precision = resolve_precision(arguments.precision, ENCODER_PRECISIONS)
    specs = [
        JudgedModel.parse(text, arguments.max_length, precision).storing(arguments.vectors) for text in arguments.model
    ]
    results = AtomicResultCache(arguments.output_dir)
    cache = VectorCache(Path(arguments.output_dir, "vectors.sqlite"))
    todo = {spec: [task for task in tasks if not results.is_complete(task, spec.meta)] for spec in specs}
    todo = {spec: missing for spec, missing in todo.items() if missing}
    if len(todo) > 1:
        for spec in todo:  # a model that does not load is found now, not when the ones before it are done
            spec.load(cache, arguments.batch_tokens, arguments.trust_remote_code)
    for spec, missing in todo.items():
        model = spec.load(cache, arguments.batch_tokens, arguments.trust_remote_code)
        for task in missing:
            print(f"{spec.meta.model_name_with_experiment} on {task.metadata.name}", flush=True)
            load(task)
            mteb.evaluate(
                model,
                task,
                co2_tracker=False,
                cache=results,
                overwrite_strategy="only-missing" if results.is_current(task, spec.meta) else "always",
                show_progress_bar=False,
            )
            task.unload_data()
    scores = []
    for spec, name in zip(specs, distinct_names([spec.meta for spec in specs]), strict=True):
        for task in tasks:
            scores += [replace(score, model=name) for score in results.scores(task, spec.meta, metrics)]
    return scores


def distinct_names(metas: Sequence[ModelMeta]) -> list[str]:
    """What a table calls the models: with the beginning of the revision where two folders have one name, as `final`."""
    named = [(str(meta.model_name_with_experiment), meta.revision or "") for meta in metas]
    revisions = {name: {revision for other, revision in named if other == name} for name, _ in named}
    return [f"{name} {revision[:7]}" if len(revisions[name]) > 1 else name for name, revision in named]


def main() -> None:
    """The script."""
    (arguments,) = parse(Arguments)
    scores = judge(arguments)
    atomic_write(Path(arguments.output_dir, "table.md"), as_markdown(scores))
    Console().print(as_table(scores))


if __name__ == "__main__":
    run(main)
