"""What an index was built with, and whether a model gives the same vectors: another one is refused."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.encoders.longembed_encoder import LongEmbedEncoder
from common.encoders.model_folder import ModelFolder
from common.errors import UserError
from common.provenance import computed_by

# The vector of this text is kept, and computed again where the code or a library is another one.
PROBE = "How far is it from the river to the old mill, and who decided that the bridge had to be green?"
LEAST_COSINE = 0.999
# Fields of a config on which no vector depends.
_WITHOUT_INFLUENCE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map")


def load_model(model: Any) -> Any:
    """Return a model of ours, loaded if it is the name of one.

    Args:
        model: a folder, a Hub id, or a model that is loaded.

    Raises:
        UserError: there is no such model, or it is none of ours.
    """
    if not isinstance(model, str | Path):
        if not hasattr(model, "encode_tokenizer"):
            raise UserError(
                f"a {type(model).__name__} is no LongEmbed model; give one, its folder or its id on the Hub"
            )
        return model
    return LongEmbedEncoder(ModelFolder.find(str(model)), precision="auto").model


def describe_model(model: Any) -> dict[str, Any]:
    """Describe a loaded model for the manifest.

    Args:
        model: a model of ours with its tokenizer.

    Returns:
        Its name, hashes of its weights, its settings and its tokenizer, its prompts and widths, what computes with it,
        and the vector of `PROBE`.
    """
    config = model.config
    tokenizer = json.loads(model.tokenizer.backend_tokenizer.to_str())
    settings = {name: value for name, value in config.to_diff_dict().items() if name not in _WITHOUT_INFLUENCE}
    return {
        "name": _source(model),
        "weights": _weights_hash(model),
        "settings": _json_hash(settings),
        "tokenizer": _json_hash({key: tokenizer[key] for key in tokenizer if key not in ("truncation", "padding")}),
        "prompts": dict(config.prompts),
        "hidden_size": config.hidden_size,
        "token_dim": config.token_dim,
        "computed_by": computed_by("modeling_longembed"),
        "probe": [round(float(value), 5) for value in _probe(model)],
    }


def check_model(model: Any, expected: Mapping[str, Any], place: str) -> None:
    """Check that a model gives the vectors that an index was built with.

    Args:
        model: a model of ours with its tokenizer.
        expected: what `describe_model` said of the model that built the index.
        place: the index, for errors.

    Raises:
        UserError: another model, tokenizer or prompt, or code that computes other vectors.
    """
    found = describe_model(model)
    for key, what in (
        ("weights", "weights"),
        ("settings", "settings in its config.json"),
        ("tokenizer", "tokenizer"),
        ("prompts", "prompts"),
    ):
        if found[key] != expected[key]:
            raise UserError(
                f"{place} was built with the model {expected['name']}, and {found['name']} has other {what}; open the "
                "index with that model, or build it again"
            )
    if found["computed_by"] != expected["computed_by"]:
        cosine = float(np.dot(found["probe"], expected["probe"]))
        if cosine < LEAST_COSINE:
            raise UserError(
                f"{place} was built by other code or libraries, with which the model gave other vectors (cosine "
                f"{cosine:.3f} for the same text); install the versions that its manifest names, or build it again"
            )


def _source(model: Any) -> str:
    name = model.name_or_path or "a model that was not loaded from a folder"
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(raw.numpy())
    return digest.hexdigest()


def _probe(model: Any) -> np.ndarray:
    return model.encode(PROBE, precision="float32", normalize=True)
