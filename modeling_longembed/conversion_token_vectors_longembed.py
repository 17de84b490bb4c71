"""Models of a vector a token that `MultiVectorEncoder` of sentence-transformers saved: their head and their skip list.

Its modules are Transformer, one or two Dense over the token states, MultiVectorMask and Normalize. The head becomes
`token_dim` and `token_head` with its weights. What differs is said in docs/guides/convert.md: special tokens have no
vector here, and punctuation that is left out is left out of queries too.
"""

import string
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import load_state_dict

from .conversion_families_longembed import refuse
from .conversion_files_longembed import ANY, read_settings
from .hub_files_longembed import find_file

TOKENS = ("token_embeddings",)
DENSE = {
    "in_features": ANY,
    "out_features": ANY,
    "bias": (False,),
    "activation_function": ANY,
    "module_input_name": (None, *TOKENS),  # what `MultiVectorEncoder` takes where nothing is said
    "module_output_name": (None, *TOKENS),
    "use_residual": (False, True),
}
MASK = {"skiplist_words": ANY, "skiplist_tasks": (["document"], ["query", "document"]), "keep_only_token_ids": (None,)}
NORMALIZE = {"module_input_name": TOKENS, "module_output_name": (None, *TOKENS)}
IDENTITY, GELU = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.GELU"


def token_vector_choices(name_or_path: str, modules: list[dict], **hub) -> dict[str, Any]:
    """Return the config fields of the token vectors that `MultiVectorEncoder` gives.

    Args:
        name_or_path: Hub id or folder.
        modules: the entries of modules.json.
        **hub: options of `from_pretrained` to find files.

    Returns:
        The fields, and as `token_head_weights` the tensors of `token_output.head` by name.

    Raises:
        ValueError: there is a module or a setting that a LongEmbed model does not have.
    """
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    heads = kinds[1:-2]
    refuse(
        kinds != ["Transformer", *heads, "MultiVectorMask", "Normalize"] or heads not in ([], ["Dense"], ["Dense"] * 2),
        f"the sentence-transformers modules {', '.join(kinds)} in this order",
    )
    paths = [module["path"] for module in modules]
    mask = read_settings(name_or_path, f"{paths[-2]}/config.json", MASK, **hub) or {}
    words = mask.get("skiplist_words") or []
    refuse(
        bool(words) and set(words) != set(string.punctuation),
        f"a skip list of other words than punctuation marks ({', '.join(words[:3])} ...)",
    )
    read_settings(name_or_path, f"{paths[-1]}/config.json", NORMALIZE, **hub)
    layers = [read_layer(name_or_path, path, **hub) for path in paths[1:-2]]
    choices: dict[str, Any] = {"token_skip_punctuation": bool(words)}
    return choices | (head_of(layers) if layers else {})


def read_layer(name_or_path: str, folder: str, **hub) -> tuple[Tensor, bool]:
    """Return the matrix `(out, in)` of a dense layer, and whether a GELU follows it.

    Args:
        name_or_path: Hub id or folder.
        folder: that of the layer.
        **hub: options of `from_pretrained` to find files.

    Raises:
        ValueError: the layer has another activation or a bias, or its weights are not in safetensors.
    """
    settings = read_settings(name_or_path, f"{folder}/config.json", DENSE, **hub) or {}
    activation = settings.get("activation_function")
    residual = bool(settings.get("use_residual"))
    refuse(
        activation not in (IDENTITY, GELU) or (residual and activation == GELU),
        f"a dense layer with the activation {activation}{' and a residual connection' if residual else ''}",
    )
    path = find_file(name_or_path, f"{folder}/model.safetensors", **hub)
    refuse(path is None, f"a dense layer whose weights are not in {folder}/model.safetensors; save the model anew")
    weights = load_state_dict(str(path))
    matrix = weights["linear.weight"].float()
    if residual:  # of the input itself where it is as wide as the output
        matrix = matrix + weights.get("residual.weight", torch.eye(*matrix.shape)).float()
    return matrix, activation == GELU


def head_of(layers: list[tuple[Tensor, bool]]) -> dict[str, Any]:
    """Return the fields and the weights of the head that computes what these layers do.

    Args:
        layers: the matrix `(out, in)` of each, and whether a GELU follows it.

    Raises:
        ValueError: there is no such head.
    """
    *inner, (matrix, last) = layers
    hidden_size = layers[0][0].shape[1]
    refuse(last, "a GELU behind the last dense layer of a head")
    refuse(len(matrix) > hidden_size, f"token vectors of {len(matrix)} dimensions from states of {hidden_size}")
    if not inner or not inner[0][1]:  # two layers without an activation between them are one
        weights = {"weight": matrix @ inner[0][0] if inner else matrix}
        return {"token_dim": len(matrix), "token_head": "linear", "token_head_weights": weights}
    dense, missing = inner[0][0], 2 * hidden_size - len(inner[0][0])
    refuse(missing < 0, f"a head with {len(dense)} inner units over states of {hidden_size}; 2 x {hidden_size} at most")
    weights = {  # inner units that are always 0 fill the rest
        "dense.weight": torch.nn.functional.pad(dense, (0, 0, 0, missing)),
        "projection.weight": torch.nn.functional.pad(matrix, (0, missing)),
    }
    return {"token_dim": len(matrix), "token_head": "mlp", "token_head_weights": weights}
