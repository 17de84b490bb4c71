"""What MTEB's leaderboard takes: a module that describes and loads a model, and results in its repository's layout."""

import importlib.util
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mteb
from mteb import ResultCache
from mteb.models.model_meta import ModelMeta

from common.errors import UserError
from eval.report.hub_results import TaskScores

OUTPUTS = {"": "one vector", "-tokens": "a vector a token"}  # suffix of the name on the leaderboard -> output
MOST_BYTES = 10_000_000  # of a file in MTEB's repository of results

MODULE = '''from __future__ import annotations

from typing import Any

from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.sentence_transformer_wrapper import (
    MultiVectorWrapper,
    SentenceTransformerEncoderWrapper,
)

_COMMON: dict[str, Any] = {common}


def load_token_vectors(
    model: str, revision: str | None = None, device: str | None = None, **kwargs: Any
) -> MultiVectorWrapper:
    """Load the token vectors of a repository, whose name in MTEB ends with -tokens."""
    return MultiVectorWrapper(
        model.removesuffix("-tokens"), revision=revision, device=device, **kwargs
    )


{variable} = ModelMeta(
    loader=SentenceTransformerEncoderWrapper,
    name="{name}",
    model_type=["dense"],
    embed_dim={dimension},
    similarity_fn_name=ScoringFunction.COSINE,
    **_COMMON,
)

{variable}_tokens = ModelMeta(
    loader=load_token_vectors,
    name="{name}-tokens",
    model_type=["late-interaction"],
    embed_dim={token_dimension},
    similarity_fn_name=ScoringFunction.MAX_SIM,
    **_COMMON,
)
'''


def module_source(
    config: Mapping[str, Any], parameters: int, name: str, revision: str, release_date: str, datasets: Sequence[str]
) -> str:
    """Return the source of the module for `mteb/models/model_implementations/`, for both outputs of a model.

    Args:
        config: of the model's folder.
        parameters: number of weights.
        name: id of the model on the Hub.
        revision: its commit there.
        release_date: `YYYY-MM-DD`.
        datasets: MTEB's names of tasks whose training data the model was trained on, beside those of its base.

    Raises:
        UserError: MTEB does not know the base, so that its training data would be left out.
    """
    base = config.get("original_model")
    if base is not None and base not in mteb.models.model_implementations.MODEL_REGISTRY:
        raise UserError(f"MTEB does not know {base}, the base of {name}, and so not what it was trained on")
    of_base = mteb.get_model_meta(base).training_datasets if base else set()
    common: dict[str, Any] = {
        "loader_kwargs": {"trust_remote_code": True},
        "languages": ["eng-Latn"],
        "open_weights": True,
        "revision": revision,
        "release_date": release_date,
        "n_parameters": parameters,
        "n_embedding_parameters": config["vocab_size"] * config["hidden_size"],
        "memory_usage_mb": round(parameters * 4 / 2**20),
        "max_tokens": config["max_position_embeddings"],
        "license": config.get("license"),
        "reference": f"https://huggingface.co/{name}",
        "framework": ["Sentence Transformers", "PyTorch", "safetensors", "Transformers"],
        "use_instructions": any((config.get("prompts") or {}).values()),
        "adapted_from": base,
        "training_datasets": sorted({*(of_base or ()), *datasets}),
        "public_training_code": None,
        "public_training_data": None,
    }
    lines = [
        f"    {json.dumps(key)}: {'set(' * (key == 'training_datasets')}{value!r}{')' * (key == 'training_datasets')},"
        for key, value in common.items()
    ]
    return MODULE.format(
        common="\n".join(["{", *lines, "}"]),
        variable=name.rpartition("/")[2].replace("-", "_").replace(".", "_"),
        name=name,
        dimension=config["hidden_size"],
        token_dimension=config.get("token_dim") or config["hidden_size"],
    )


def read_module(path: Path) -> tuple[ModuleType, list[ModelMeta]]:
    """Import a module as MTEB does, and return what it describes.

    Args:
        path: the file.

    Returns:
        The module, and its models: one vector, then token vectors.

    Raises:
        UserError: the installed release of mteb has no loader of token vectors.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"the leaderboard's loaders need a later mteb ({error.msg}); pip install -U mteb") from None
    return module, [value for value in vars(module).values() if isinstance(value, ModelMeta)]


class Clone(ResultCache):
    """MTEB's cache of results with its remote repository as it is on this disk, which nothing is fetched into."""

    def download_from_remote(self, *args: Any, **kwargs: Any) -> Path:
        """Return the folder of the repository; a new one, with nothing in it, if there is none.

        Args:
            *args: as in MTEB, not used.
            **kwargs: likewise.
        """
        if not self.remote_repo_path.exists():
            self.remote_repo_path.mkdir(parents=True)
            git(self.remote_repo_path, "init", "--quiet", "--initial-branch", "main")
            git(self.remote_repo_path, *IDENTITY, "commit", "--quiet", "--allow-empty", "--message", "an empty start")
        for key, value in (IDENTITY[1].split("="), IDENTITY[3].split("=")):
            git(self.remote_repo_path, "config", key, value)
        return self.remote_repo_path


IDENTITY = ("-c", "user.name=longembed", "-c", "user.email=longembed@localhost")


def git(folder: Path, *words: str) -> str:
    """Run git in a folder and return what it prints.

    Args:
        folder: a repository.
        *words: of the command.
    """
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout


def accepted(scores: Sequence[TaskScores], metas: Sequence[ModelMeta]) -> tuple[list[tuple[ModelMeta, Any]], list[str]]:
    """Choose the results that the leaderboard accepts.

    Args:
        scores: of the model.
        metas: what the leaderboard knows it as: one vector, and token vectors.

    Returns:
        Pairs of a description and a result, and a sentence for each result that is left out.
    """
    known = dict(zip(OUTPUTS.values(), metas, strict=True))
    kept, left = [], []
    for one in scores:
        name = f"{one.result.task_name}, {one.output}"
        if one.is_local:
            left.append(
                f"{name}: evaluated on local files ({one.result.dataset_revision[:14]}), not on data of the Hub"
            )
        elif one.output not in known:
            left.append(f"{name}: the leaderboard has one vector and a vector a token as the model gives them")
        elif missing := one.result.get_missing_evaluations(mteb.get_task(one.result.task_name)):
            left.append(f"{name}: has not been evaluated on {', '.join(missing)}")
        elif one.result.dataset_revision != mteb.get_task(one.result.task_name).metadata.revision:
            left.append(f"{name}: was evaluated on another revision of the data; evaluate again")
        else:
            kept.append((known[one.output], one.result))
    return kept, left


def commit_results(kept: Sequence[tuple[ModelMeta, Any]], folder: Path) -> str:
    """Have MTEB commit results to a clone of its repository, and return the difference.

    Args:
        kept: pairs of a description and a result.
        folder: of MTEB's cache; `remote/` in it is the clone, or an empty repository is made.

    Returns:
        What `git show` says of the commit; empty if the repository has all of the results.

    Raises:
        UserError: a file is larger than the repository allows.
    """
    cache = Clone(folder)
    for meta, result in kept:
        cache.save_to_cache(result, meta)
        path = cache.get_task_result_path(result.task_name, meta)
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: has more than {MOST_BYTES // 10**6} MB, which the leaderboard refuses")
    metas = list({meta.name: meta for meta, _ in kept}.values())
    if not metas or cache.submit_results(metas)["status"] == "no_changes":
        return ""
    return git(cache.remote_repo_path, "show", "--stat", "--patch", "--format=%s%n%n%b")
