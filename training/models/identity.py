"""Hashes that tell whether two models, or two tokenizers, compute the same, wherever they were loaded from."""

import hashlib
import json

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Fields of a config that have no influence on an embedding.
IGNORED_FIELDS = {
    "hidden_dropout_prob",
    "attention_dropout",
    "layerdrop",
    "layerdrop_unit",
    "_name_or_path",
    "transformers_version",
}
# Fields that earlier versions of a config do not have, with the value that stands for what they computed.
LATER_FIELDS = {
    "token_dim": None,
    "token_head": "linear",
    "token_skip_punctuation": False,
    "query_token_weights": "none",
    "token_min_weight": 0.0,
    "token_weighting_power": 0.0,
}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all that the token ids of a whole text depend on.

    The truncation and padding of the last call, which a fast tokenizer remembers, are no part of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return json.dumps(json.loads(backend.to_str()) | {"truncation": None, "padding": None})


def model_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, without: str | None = None) -> str:
    """Return a hash of all that an embedding depends on: weights, config and tokenizer.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        without: what the names of weights begin with that are left out, such as those of a new head.
    """
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in IGNORED_FIELDS and not (name in LATER_FIELDS and value == LATER_FIELDS[name])
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(tokenizer_identity(tokenizer).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if without is not None and name.startswith(without):
            continue
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:40]
