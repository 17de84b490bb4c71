"""Evaluation of models on MTEB tasks: runs what is missing, and returns the scores of all models on all tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import mteb
from mteb.abstasks import AbsTask

from common.encoders.precision import ENCODER_PRECISIONS, resolve_precision
from common.encoders.vector_cache import VectorCache
from common.errors import UserError
from common.provenance import computed_by
from eval.models.mteb_models import EvaluatedModel
from eval.models.quantization import VECTORS
from eval.report.results import AtomicResultCache, Score, distinct_names
from eval.tasks.query_scores import noting_query_scores
from eval.tasks.retrieval import get_tasks, load


@dataclass
class EvaluationArguments:
    """Which models to evaluate, how they encode, and where the results go."""

    model: list[str] = field(
        metadata={
            "help": "models, as folders or Hub ids; baselines: truncate:PATH:N, chunk-mean:PATH:N, chunk-max:PATH:N, "
            "bm25; other outputs: PATH@chunks:N, PATH@tokens, PATH@tokens:dim=64,pool=4,precision=binary; with BM25: "
            "hybrid:MODEL:W, where W is the weight of the model"
        }
    )
    output_dir: str = field(metadata={"help": "folder of the results and of the cached vectors", "output": "folder"})
    max_length: int | None = field(
        default=None, metadata={"help": "maximum tokens of a text that a model reads; baselines have their own N"}
    )
    precision: str = field(
        default="float32",
        metadata={
            "help": "float32, in which published figures were measured; bfloat16; auto: bfloat16 if the processor is "
            "fast in it; int8: linear layers with 8-bit weights, on the CPU"
        },
    )
    vectors: str = field(
        default="float32",
        metadata={"help": "storage of document vectors: float32, int8 or binary; query vectors stay in float32"},
    )
    batch_tokens: int = field(
        default=16384, metadata={"help": "tokens in one forward pass; lower it to use less memory"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with a model; LongEmbed models need none"}
    )


@dataclass
class RetrievalArguments(EvaluationArguments):
    """On which retrieval tasks, by which metrics."""

    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "names of MTEB tasks, or of sub-folders of data_dir; default: LongEmbed's six, or all sub-folders"
        },
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "folder with one sub-folder for each task; default: data from the Hub"}
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "MTEB's names of the metrics in the table: hit_rate_at_1 mrr_at_10; default: nDCG"},
    )


def evaluate_retrieval(arguments: RetrievalArguments) -> list[Score]:
    """Evaluate models on retrieval tasks; what has been evaluated before is read from the results.

    Args:
        arguments: parsed command-line options.

    Returns:
        The scores of all models on all tasks, in the requested order.

    Raises:
        UserError: a model, a task or a file is not valid; raised before any encoding where possible.
    """
    return evaluate_tasks(arguments, get_tasks(arguments.tasks, arguments.data_dir), arguments.metrics)


def evaluate_tasks(
    arguments: EvaluationArguments, tasks: Sequence[AbsTask], metrics: Sequence[str] = ()
) -> list[Score]:
    """Evaluate models on any of MTEB's tasks; what has been evaluated before is read from the results.

    Args:
        arguments: parsed command-line options.
        tasks: the tasks.
        metrics: MTEB's names of the metrics to return; none: each task's main score.

    Returns:
        The scores of all models on all tasks, in the given order.

    Raises:
        UserError: a model or an option is not valid, or a task does not have a metric.
    """
    if arguments.max_length is not None and arguments.max_length < 8:
        raise UserError(f"--max_length {arguments.max_length} is too short for any text; give at least 8 tokens")
    if arguments.batch_tokens < 1:
        raise UserError(f"--batch_tokens {arguments.batch_tokens} must be positive")
    datasets.disable_progress_bars()  # they are for tables that are written at once; encoding shows its own
    if arguments.vectors not in VECTORS:
        raise UserError(f"--vectors {arguments.vectors} is not one of {', '.join(VECTORS)}")
    precision = resolve_precision(arguments.precision, ENCODER_PRECISIONS)
    models = [
        EvaluatedModel.parse(text, arguments.max_length, precision).storing(arguments.vectors)
        for text in arguments.model
    ]
    judged_by = computed_by("eval.models", "eval.tasks", "common.encoders.text_vectors", libraries=("mteb",))
    results = {
        model: AtomicResultCache(
            arguments.output_dir, model.computed_by(arguments.trust_remote_code) | {"judged_by": judged_by}
        )
        for model in models
    }
    cache = VectorCache(Path(arguments.output_dir, "vectors.sqlite"))
    missing = {model: [task for task in tasks if not results[model].is_complete(task, model.meta)] for model in models}
    missing = {model: left for model, left in missing.items() if left}
    if len(missing) > 1:
        for model in missing:  # a model that does not load is reported now, not after the ones before it
            model.load(cache, arguments.batch_tokens, arguments.trust_remote_code)
    for model, left in missing.items():
        loaded = model.load(cache, arguments.batch_tokens, arguments.trust_remote_code)
        results[model].costs = loaded.costs
        for task in left:
            loaded.costs.clear()
            print(f"{model.meta.model_name_with_experiment} on {task.metadata.name}", flush=True)
            load(task)
            with noting_query_scores(task) as results[model].query_scores:
                mteb.evaluate(
                    loaded,
                    task,
                    co2_tracker=False,
                    cache=results[model],
                    overwrite_strategy="only-missing" if results[model].is_current(task, model.meta) else "always",
                    show_progress_bar=False,
                )
            task.unload_data()
    scores = []
    names = distinct_names([(str(m.meta.model_name_with_experiment), m.meta.revision or "") for m in models])
    for model, name in zip(models, names, strict=True):
        for task in tasks:
            scores += [replace(score, model=name) for score in results[model].scores(task, model.meta, metrics)]
    return scores
