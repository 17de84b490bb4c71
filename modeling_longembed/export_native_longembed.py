"""Native export: write a model as an architecture of transformers, if one can express all choices of its config.

Such a folder holds no code, so that software for a fixed list of architectures can serve it. Whether an architecture
can express a config is found by a round trip: the config is translated to the architecture's fields and read back, and
every field must have the same meaning as before.
"""

import copy
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from .attention_longembed import DEFAULT_KERNEL
from .conversion_families_longembed import FAMILIES, Family, rope_by_layer
from .conversion_longembed import COMPARED_LENGTH, TOLERANCE, largest_difference
from .hub_longembed import HubModel, summarize_patterns
from .hub_sentence_transformers_longembed import ST_POOLINGS
from .packing_longembed import PackedDocuments
from .pattern_registry_longembed import build_pattern
from .position_rope_longembed import extended_rope_parameters, unscaled_rope_theta
from .position_table_longembed import position_ids, sinusoidal_embeddings

# The architectures in the order in which they are tried: those that servers know best come first.
NATIVE = {"bert": "BERT", "modernbert": "ModernBERT", "nomic_bert": "NomicBERT"}
# Fields that no output in evaluation depends on, or that are stored in other files.
IGNORED_FIELDS = (
    "attribute_map",
    "layer_types",  # derived from attention_patterns
    "training_attention_patterns",
    "layerdrop",
    "layerdrop_unit",
    "scaled_initialization",
    "hidden_dropout_prob",
    "attention_dropout",
    "initializer_range",
    "pad_token_id",
    "pooling",
    "prompts",
    "default_prompt_name",
    "normalize",
    "similarity_fn_name",
    "original_model",
    "license",
)
HEAD_FIELDS = ("mlm_head_bias", "tie_word_embeddings")
# Special tokens in a native config, and those of the tokenizer that they are set to: the first that it has.
SPECIAL_TOKENS = {"bos": ("bos", "cls"), "eos": ("eos", "sep"), "cls": ("cls", "bos"), "sep": ("sep", "eos")}

CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
{license}---

# {title}

A long-document embedding model with the architecture of {architecture}: one vector for a document of up to {context:,}
tokens, pooling `{pooling}`.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{title}")
documents = model.encode(["a long document ..."], prompt_name="document")
queries = model.encode(["a question"], prompt_name="query")
```

There is no code in this repository. It was written by longembed's `to_native`.
"""


def without_extension(config):
    """Return a copy of the config that expresses the same positions without `position_extension`, where possible.

    It is possible if positions do not depend on the length of the document: they are then rows of a learned table or
    angles of one rotation.
    """
    config = copy.deepcopy(config)
    extension, length = config.position_extension, config.max_position_embeddings
    applies = extension is not None and extension["original_max_position_embeddings"] < length
    depends_on_length = applies and extension["keep_short"]
    if config.position_embedding_type in ("absolute", "sinusoidal"):
        if not depends_on_length or extension["method"] in ("repeat", "restart"):
            config.position_embedding_type, config.position_extension = "absolute", None
    elif extension is not None and not depends_on_length:
        if not extension["keep_short"]:
            if extension["method"] not in ("linear", "yarn", "ntk", "theta"):
                return config
            config.rope_parameters = {
                kind: extended_rotation(config, parameters)
                for kind, parameters in zip(config.layer_types, rope_by_layer(config), strict=True)
            }
        config.position_extension = None
    return config


def extended_rotation(config, parameters: dict) -> dict:
    """Return the RoPE parameters of an extended config for transformers, which has no name for `ntk` and `theta`."""
    parameters = extended_rope_parameters(config.position_extension, parameters, config.max_position_embeddings)
    if parameters["rope_type"] in ("ntk", "theta"):
        return {"rope_type": "default", "rope_theta": unscaled_rope_theta(parameters, config.head_dim)}
    return parameters


def position_table(encoder) -> Tensor:
    """Return the vector that is added at each position of a document, `(max_position_embeddings, d)`."""
    config, length = encoder.config, encoder.config.max_position_embeddings
    documents = PackedDocuments(torch.tensor([0, length], dtype=torch.int32), length)
    places = position_ids(config, documents, torch.arange(length))
    if config.position_embedding_type == "sinusoidal":
        return sinusoidal_embeddings(places, config.hidden_size).to(encoder.dtype)
    return encoder.embeddings.position_embeddings.weight[places]


def meaning(config) -> dict[str, Any]:
    """Return fields and values such that configs with equal values give the same outputs in evaluation."""
    fields = {name: getattr(config, name) for name in type(config).__annotations__ if name not in IGNORED_FIELDS}
    length = config.max_position_embeddings
    fields["attention_patterns"] = [
        # A window that is as long as the context is full attention.
        build_pattern("full") if x.is_mask and not x.own_weights and x.sees_all(length) else x
        for x in config.get_patterns()
    ]
    fields["rope_parameters"] = rope_by_layer(config)
    return fields


def inexpressible_fields(config, native_config, family: Family, with_head: bool) -> list[str]:
    """Find the fields of our config that change their meaning in a round trip through the native config.

    Args:
        config: our config.
        native_config: its translation.
        family: the family of the native architecture.
        with_head: whether the fields of the masked-language-model head count.

    Returns:
        The names of the fields.
    """
    ours, theirs = meaning(config), meaning(type(config)(**family.fields(native_config)))
    if theirs["type_vocab_size"] == 1 and not ours["type_vocab_size"]:
        del ours["type_vocab_size"]  # one row of zeros
    return [name for name in ours if ours[name] != theirs[name] and (with_head or name not in HEAD_FIELDS)]


def native_config_of(config, with_head: bool):
    """Return the config of the first architecture in `NATIVE` that can express all of ours.

    Args:
        config: our config.
        with_head: whether the masked-language-model head is exported too.

    Raises:
        ValueError: there is none; the message names the fields that the closest one cannot express.
    """
    if config.pooling not in ST_POOLINGS:
        known = ", ".join(ST_POOLINGS)
        raise ValueError(f"to_native: sentence-transformers has no pooling={config.pooling!r}; it has {known}")
    plain = without_extension(config)
    nearest: tuple[str, list[str]] | None = None
    for model_type in NATIVE:
        family = FAMILIES[model_type]
        try:
            native_config = AutoConfig.for_model(model_type, **family.native_fields(plain))
            fields = inexpressible_fields(plain, native_config, family, with_head)
        except Exception as error:
            # An odd head_dim cannot be rotated, and older releases have no ModernBERT with a single layer type.
            if not isinstance(error, ValueError) and not isinstance(error.__cause__, (TypeError, ValueError)):
                raise
            continue
        if not fields:
            for name, value in family.older_names(plain).items():
                setattr(native_config, name, value)
            return native_config
        if nearest is None or len(fields) < len(nearest[1]):
            nearest = NATIVE[model_type], fields
    architecture, lost_fields = nearest or ("BERT", [])
    values = {name: repr(getattr(config, name)) for name in lost_fields}
    if "attention_patterns" in values:
        values["attention_patterns"] = summarize_patterns(config.attention_patterns)
    lost_values = " and ".join(f"{name}={value}" for name, value in values.items())
    raise ValueError(
        f"to_native: {architecture}, the nearest architecture of transformers, has no {lost_values}; "
        "publish this model with save_pretrained, which adds the code that it needs"
    )


def native_weights(model, family: Family) -> dict[str, Tensor]:
    """Return the state dict of the native base model: the inverse of `converted_weights`."""
    ours = model.state_dict()
    if "embeddings.position_embeddings" in family.outside:
        ours["embeddings.position_embeddings.weight"] = position_table(model)
    if "embeddings.token_type_embeddings" in family.outside:
        none = ours["embeddings.word_embeddings.weight"].new_zeros(1, model.config.hidden_size)
        ours.setdefault("embeddings.token_type_embeddings.weight", none)
    return renamed(ours, family.modules(model.config.num_hidden_layers))


def renamed(ours: dict[str, Tensor], modules: dict) -> dict[str, Tensor]:
    """Rename tensors by `modules` (our module to theirs), and concatenate the parts of a fused projection."""
    parts_of: dict[str, list[Tensor]] = {}
    for mine, theirs in sorted(modules.items(), key=lambda item: item[1][1:] if isinstance(item[1], tuple) else ()):
        name = theirs[0] if isinstance(theirs, tuple) else theirs
        for suffix in ("weight", "bias"):
            if f"{mine}.{suffix}" in ours:
                parts_of.setdefault(f"{name}.{suffix}", []).append(ours[f"{mine}.{suffix}"])
    return {name: torch.cat(parts) for name, parts in parts_of.items()}


@torch.no_grad()
def export_native(model: HubModel, path: str | Path) -> None:
    """Write the model as BERT, ModernBERT or NomicBERT, the first of them that can express all choices of its config.

    The folder holds no code and needs no `trust_remote_code`. It has weights, config, tokenizer, the files of
    sentence-transformers (pooling, normalization, prompts) and a short model card. What was written is loaded and
    compared with this model, and the largest difference is printed.

    Args:
        model: the model, with or without the masked-language-model head.
        path: a folder that does not exist or is empty.

    Raises:
        ValueError: none of the three can express the config (the message names the fields), the folder is not empty, or
            the outputs differ. Nothing is written then.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"to_native: {path} exists and is not an empty folder; give a new one")
    with_head = model._tied_weights_keys is not None
    native_config = native_config_of(model.config, with_head)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Write the folder under a temporary name first, so that `path` is either complete or absent.
    folder = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        with torch.random.fork_rng(devices=[]):  # its random initial weights are overwritten
            native_model(model, native_config, with_head).save_pretrained(folder)
        model._write_tokenizer(folder, token_vectors=False)
        (folder / "README.md").write_text(native_card(model, path.name, native_config), encoding="utf-8")
        length = min(model.config.max_position_embeddings, COMPARED_LENGTH)
        difference = difference_from_native(model, folder, with_head, length)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"to_native: what was written changes the outputs by {difference:.1e}, more than {TOLERANCE:.0e}: "
                "the model has a feature that was not recognised; please report it with its config.json"
            )
        os.replace(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    architecture = NATIVE[native_config.model_type]
    print(
        f"longembed: {path} written as {architecture}; largest difference from this model on documents of up to "
        f"{length} tokens: {difference:.1e}"
    )


def native_class(with_head: bool) -> Any:
    """Return the Auto class that builds the native model."""
    return AutoModelForMaskedLM if with_head else AutoModel


def native_model(model: Any, native_config, with_head: bool):
    """Build the native model with our weights.

    Args:
        model: our model.
        native_config: the config of the native model, whose special tokens are set here.
        with_head: whether it has the masked-language-model head.
    """
    if model.has_tokenizer():
        for name, choices in SPECIAL_TOKENS.items():
            tokens = (getattr(model.tokenizer, f"{choice}_token_id") for choice in choices)
            if hasattr(native_config, f"{name}_token_id"):
                setattr(native_config, f"{name}_token_id", next((x for x in tokens if x is not None), None))
    native = native_class(with_head).from_config(native_config, dtype=model.dtype)
    family, prefix = FAMILIES[native_config.model_type], f"{native.base_model_prefix}." if with_head else ""
    weights = {f"{prefix}{name}": x for name, x in native_weights(model.base_model, family).items()}
    if (pooler := getattr(native, "pooler", None)) is not None:
        # BERT's dense layer over the first token is no part of the embedding. With zeros transformers does not call it
        # missing, and nobody takes its output for a vector.
        weights |= {f"pooler.{name}": torch.zeros_like(tensor) for name, tensor in pooler.state_dict().items()}
    if with_head:
        weights |= renamed(model.head.state_dict(), family.head)
    native.load_state_dict(weights, strict=False)
    return native


def difference_from_native(model: HubModel, folder: Path, with_head: bool, length: int) -> float:
    """Compute the largest difference of the outputs of a model and of its native form, on the CPU in fp32 or wider.

    Args:
        model: our model.
        folder: the folder of the native model.
        with_head: whether the models have the masked-language-model head.
        length: length of the longest document of the comparison in tokens.

    Returns:
        The largest absolute difference.
    """
    dtype = torch.promote_types(model.dtype, torch.float32)
    ours: Any = copy.deepcopy(model)
    ours = ours.to("cpu", dtype).eval()
    ours.set_attn_implementation(DEFAULT_KERNEL)
    native = native_class(with_head).from_pretrained(folder, dtype=dtype, local_files_only=True)
    return largest_difference(native, ours, length)


def native_card(model: HubModel, title: str, native_config) -> str:
    """Return the card of a model, with a title and the architecture of `native_config`."""
    return CARD.format(
        license=f"license: {model.config.license}\n" if model.config.license else "",
        title=title,
        architecture=NATIVE[native_config.model_type],
        context=model.config.max_position_embeddings,
        pooling=model.config.pooling,
    )
