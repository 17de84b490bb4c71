"""The files with which sentence-transformers loads a folder, for one vector a text and for a vector a token.

`SentenceTransformer` and `MultiVectorEncoder` run one list of modules over a dictionary of features: the first reads
`sentence_embedding` at the end, the second `token_embeddings` where `attention_mask` is set. A list of

    Transformer, Pooling, TokenVectors[, Normalize]

serves both. `Transformer` hands on one tensor of an output, from which the token vectors cannot be computed: its states
are weighted by `token_weighting`, and head and query weights are parameters of the encoder, of which there is no second
copy. So it calls `states_with_token_vectors`, which attaches the token vectors to the states, and `TokenVectors` puts
them in place after the states have been pooled.

This file is copied beside the module that it defines when sentence-transformers saves a model, and imports no other.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The names of poolings in sentence-transformers.
ST_POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken", "weighted_mean": "weightedmean_tokens"}
# Its names of similarities of one vector.
ST_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
# What makes a folder one of `MultiVectorEncoder` is its name as the type of the model, with which `SentenceTransformer`
# would not run the modules, or, where there is no type, this architecture in config.json: it stands behind ours, which
# is the first and the only one that transformers knows. With neither, a random projection would be appended.
MULTI_VECTOR_MARK = "HF_ColBERT"
# The attribute of the states that holds the token vectors and their mask.
ATTACHED = "token_vectors_and_mask"
# How modules.json names `TokenVectors`, which is found in the folder itself.
TOKEN_VECTORS_REFERENCE = "hub_sentence_transformers_longembed.TokenVectors"


def states_with_token_vectors(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    task: str | None = None,
) -> Tensor:
    """Return the last states of a padded batch, with the token vectors attached to them for `TokenVectors`.

    sentence-transformers calls it, as its settings of `Transformer` say, instead of `forward`.

    Args:
        model: the encoder.
        input_ids: `(B, S)`.
        attention_mask: `(B, S)`, non-zero on real tokens.
        token_type_ids: `(B, S)`; zeros if None.
        task: `query` gives the vectors of query tokens, everything else those of a document.

    Returns:
        `(B, S, d)`.
    """
    output = model(
        input_ids,
        attention_mask=attention_mask,
        token_type_ids=token_type_ids,
        token_vectors="query" if task == "query" else "document",
    )
    states = output.last_hidden_state
    setattr(states, ATTACHED, (output.token_vectors, output.token_mask))
    return states


class TokenVectors(torch.nn.Module):
    """Module of sentence-transformers that replaces the states by the token vectors that are attached to them."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Set `token_embeddings` to the token vectors `(B, S, k)` and `attention_mask` to their mask.

        Args:
            features: those that `Transformer` and `Pooling` have left.

        Raises:
            ValueError: the states are not those of a LongEmbed model.
        """
        attached = getattr(features["token_embeddings"], ATTACHED, None)
        if attached is None:
            raise ValueError(
                "TokenVectors finds no token vectors: a module before it has changed the token states, or they are of "
                "another model; move it behind the Transformer module of a LongEmbed model"
            )
        features["token_embeddings"], features["attention_mask"] = attached
        return features

    def get_embedding_dimension(self) -> int | None:
        """Return the width of the token vectors to `MultiVectorEncoder`, and None to `SentenceTransformer`.

        Both ask the modules from the end on, and `SentenceTransformer` goes on to the pooling after a None.
        """
        asking: Any = sys._getframe(1).f_locals.get("self")
        if getattr(asking, "model_type", None) != "MultiVectorEncoder":
            return None
        config = asking[0].auto_model.config
        return config.token_dim or config.hidden_size

    @classmethod
    def load(cls, name_or_path: str, **where: Any) -> "TokenVectors":
        """Return a new module: it has no settings and no weights.

        Args:
            name_or_path: the folder of the model, or its id on the Hub.
            **where: the options with which other modules find their files.
        """
        return cls()

    def save(self, folder: str, **options: Any) -> None:
        """Make the folder of the model, which is being saved, one of both classes again.

        The class that saves writes its own name as the type of the model, which the other one does not load. The folder
        of an adapter has no config.json, and stays of the class that saves it; this file is missing there.

        Args:
            folder: the folder of this module, inside that of the model.
            **options: how weights are saved, of which there are none.
        """
        root = Path(folder).absolute().parent
        if not (root / Path(__file__).name).exists():
            shutil.copyfile(__file__, root / Path(__file__).name)
        if not (root / "config.json").exists():
            return
        settings = read_json(root / "config_sentence_transformers.json")
        settings.pop("model_type", None)
        if settings.get("similarity_fn_name") in (None, "maxsim"):  # of token vectors, where nothing else is said
            settings["similarity_fn_name"] = read_json(root / "config.json").get("similarity_fn_name", "cosine")
        write_json(root / "config_sentence_transformers.json", settings)


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: object) -> None:
    """Write `content` to a JSON file."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sentence_transformers_files(config: Any, token_vectors: bool = True) -> dict[str, object]:
    """Return the contents of the JSON files with which sentence-transformers loads the folder of a model, by name.

    Args:
        config: the config of the model.
        token_vectors: whether the folder holds our code, which gives token vectors.
    """
    kinds = ["Transformer", "Pooling", *["TokenVectors"] * token_vectors, *["Normalize"] * config.normalize]
    modules: list[dict[str, Any]] = [
        # Old and new releases both understand these names.
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    transformer: dict[str, Any] = {"max_seq_length": config.max_position_embeddings, "do_lower_case": False}
    if token_vectors:
        modules[0]["kwargs"] = ["task"]
        modules[2]["type"] = TOKEN_VECTORS_REFERENCE
        method = {"method": states_with_token_vectors.__name__, "method_output_name": None}
        transformer |= {"modality_config": {"text": method}, "module_output_name": "token_embeddings"}
    modes = {f"pooling_mode_{name}": name == ST_POOLINGS[config.pooling] for name in ST_POOLINGS.values()}
    return {
        "modules.json": modules,
        "sentence_bert_config.json": transformer,
        "1_Pooling/config.json": {"word_embedding_dimension": config.hidden_size, **modes, "include_prompt": True},
        "config_sentence_transformers.json": {
            "prompts": config.prompts,
            "default_prompt_name": config.default_prompt_name,
            "similarity_fn_name": config.similarity_fn_name,
        },
    }


def find_saving_sentence_transformer(encoder: torch.nn.Module) -> Any | None:
    """Return the model of sentence-transformers that is saving an encoder, which its first module holds, or None.

    It writes all files but those of the encoder itself, and calls `save_pretrained` of the encoder as any other caller
    would, so that only the stack tells.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        model = frame.f_locals.get("self")
        is_theirs = str(frame.f_globals.get("__name__", "")).startswith("sentence_transformers.")
        is_saving = is_theirs and frame.f_code.co_name == "save" and hasattr(model, "prompts")
        if is_saving and any(module is encoder for module in model[0].modules()):
            return model
        frame = frame.f_back  # None above the first frame
    return None


def adopt_settings(config: Any, model: Any) -> None:
    """Set in a config what `encode` must know to give the vectors of a model of sentence-transformers.

    Args:
        config: the config of the encoder inside.
        model: the model of sentence-transformers. If it has modules or a pooling that a config cannot name, a warning
            says so.
    """
    config.prompts = {name: prompt or "" for name, prompt in model.prompts.items()}
    config.default_prompt_name = model.default_prompt_name
    if getattr(model, "similarity_fn_name", None) in ST_SIMILARITIES:  # that of MultiVectorEncoder is of token vectors
        config.similarity_fn_name = model.similarity_fn_name
    kinds = [type(module).__name__ for module in model]
    config.normalize = config.normalize and "Pooling" not in kinds
    others = []
    for kind, module in [*zip(kinds, model, strict=True)][1:]:
        of_vectors = getattr(module, "module_input_name", "sentence_embedding") == "sentence_embedding"
        if kind == "Normalize" and of_vectors:
            config.normalize = True
        elif kind == "Pooling" and module.include_prompt and pooling_name(module) == config.pooling:
            continue
        elif kind == "Pooling" and module.include_prompt and pooling_name(module) and config.token_weighting == "none":
            config.pooling = pooling_name(module)
        elif kind != "TokenVectors":
            others.append(kind)
    if getattr(model, "truncate_dim", None) is not None:
        others.append(f"truncate_dim={model.truncate_dim}")
    if others:
        logger.warning(
            f"`encode` of the model that AutoModel loads does not know of {', '.join(others)}; load this folder with "
            f"{type(model).__name__}"
        )


def pooling_name(module: Any) -> str | None:
    """Return our name of the pooling of a sentence-transformers module; None: we have no such pooling."""
    mode = module.pooling_mode if hasattr(module, "pooling_mode") else module.get_pooling_mode_str()
    return next((ours for ours, legacy in ST_POOLINGS.items() if legacy.split("_")[0] == mode), None)
