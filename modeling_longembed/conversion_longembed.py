"""Conversion of a pretrained encoder: rename the weights, translate the config, and keep the outputs.

`FAMILIES` defines for each architecture which config fields it fixes and how its modules are named. The steps in this
module (copying weights, extending the position table, comparing the outputs) are the same for all.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from .conversion_families_longembed import (
    FAMILIES,
    ROBERTA,
    Family,
    refuse,
    refuse_unread_fields,
    refuse_unread_weights,
)
from .conversion_files_longembed import read_text
from .conversion_settings_longembed import lowercased, sentence_transformers_choices
from .hub_files_longembed import check_tokenizer, find_file, load_tokenizer
from .hub_longembed import HubModel
from .pattern_registry_longembed import build_pattern
from .position_extension_longembed import default_method
from .position_table_longembed import extended_position_table

# Largest difference between original and converted outputs due to rounding, in fp32, relative to the largest state.
TOLERANCE = 1e-5
# Length in tokens of the longest document on which two models are compared.
COMPARED_LENGTH = 1024
# The fields that a caller may choose; all other fields follow from the checkpoint.
CHOICES = (
    "max_position_embeddings",
    "position_extension",
    "attention_patterns",
    "training_attention_patterns",
    "pooling",
    "token_weighting",
    "token_weighting_regularization",
    "token_weighting_power",
    "token_dim",
    "token_head",
    "token_skip_punctuation",
    "query_token_weights",
    "prompts",
    "default_prompt_name",
    "normalize",
    "similarity_fn_name",
    "hidden_dropout_prob",
    "attention_dropout",
    "layerdrop",
    "layerdrop_unit",
    "original_model",
)


class MissingHeadError(ValueError):
    """A checkpoint without a masked-language-model head cannot become a masked language model."""


def converted_fields(original, family: Family, choices: dict) -> dict:
    """Return the config fields of the converted model.

    Args:
        original: the config of the checkpoint, which fixes most fields.
        family: the architecture of the checkpoint.
        choices: the fields that the caller chose.

    Returns:
        The fields; missing ones have their defaults.

    Raises:
        ValueError: a pattern cannot start from the weights of another encoder.
    """
    fields = family.fields(original)
    context, theirs = fields["max_position_embeddings"], fields.get("attention_patterns", [])
    fields |= choices
    patterns = fields.get("attention_patterns", "full")
    patterns = patterns if isinstance(patterns, list) else [patterns]
    if shared := sorted(pattern.type for pattern in map(build_pattern, patterns) if pattern.shares_query_key):
        raise ValueError(
            f"attention_patterns: {shared[0]!r} has one projection for query and key, and the checkpoint has two; "
            "choose another pattern, or train a model with this one from a LongEmbedConfig"
        )
    if "attention_patterns" in choices and set(fields.get("rope_parameters") or {}) & {*ALLOWED_LAYER_TYPES}:
        fields["rope_parameters"] = rope_of_patterns(fields["rope_parameters"], theirs, patterns)
    extension = fields.get("position_extension")
    if isinstance(extension, str):
        extension = {"method": extension}
    new_context = fields["max_position_embeddings"]
    if extension is None and isinstance(new_context, int) and new_context > context:
        extension = {"method": default_method(fields.get("position_embedding_type", "absolute"), patterns)}
    if extension is not None:
        fields["position_extension"] = {"original_max_position_embeddings": context} | extension
    return fields


def rope_of_patterns(rope_parameters: dict, theirs: list, ours: list) -> dict:
    """Return RoPE parameters by layer type for a checkpoint whose sublayers get other patterns.

    Every sublayer keeps the rotation that it was trained with.

    Args:
        rope_parameters: RoPE parameters of the checkpoint by layer type.
        theirs: attention patterns of the checkpoint, one per sublayer.
        ours: attention patterns of the converted model, one per sublayer or one for all.

    Returns:
        RoPE parameters of the converted model by layer type.

    Raises:
        ValueError: sublayers that were trained with different rotations would share a layer type.
    """
    rotations: dict[str, dict] = {}
    for before, after in zip(theirs, ours * len(theirs) if len(ours) == 1 else ours, strict=False):
        trained, layer_type = rope_parameters[build_pattern(before).layer_type], build_pattern(after).layer_type
        if rotations.setdefault(layer_type, trained) != trained:
            raise ValueError(
                f"attention_patterns: {build_pattern(after).type!r} would give one rotation to sublayers that "
                "were trained with different rope_parameters (full and sliding attention); change only one of the two "
                "kinds, or give them patterns of different kinds"
            )
    return rotations


def take(weights: dict[str, Tensor], theirs, suffix: str) -> Tensor | None:
    """Return one tensor of the checkpoint, or its part of a fused projection; None if the checkpoint has none.

    Args:
        weights: state dict of the checkpoint.
        theirs: name of the module, or `(name, part, parts)`.
        suffix: `weight` or `bias`.
    """
    name, part, parts = theirs if isinstance(theirs, tuple) else (theirs, 0, 1)
    tensor = weights.get(f"{name}.{suffix}")
    return None if tensor is None else tensor.chunk(parts)[part]


def converted_weights(weights: dict[str, Tensor], reserved_rows: int, family: Family, config) -> dict[str, Tensor]:
    """Convert the state dict of the original base model to that of our encoder.

    Args:
        weights: the original state dict.
        reserved_rows: number of unused rows at the start of the position table.
        family: the architecture of the original.
        config: the config of the converted model.

    Returns:
        Our state dict; the patterns' own weights may be missing.
    """
    ours = {}
    for mine, theirs in family.modules(config.num_hidden_layers).items():
        for suffix in ("weight", "bias"):
            if (tensor := take(weights, theirs, suffix)) is not None:
                ours[f"{mine}.{suffix}"] = tensor
    for pattern in set(config.get_patterns()):
        ours |= pattern.derive_weights(ours)
    table = "embeddings.position_embeddings.weight"
    if table in ours:
        ours[table] = extended_position_table(ours[table][reserved_rows:], config)
    return ours


def comparable_length(config, original_fields: dict, has_new_weights: bool = False) -> int:
    """Return the longest document in tokens for which the outputs must equal those of the original; 0: none.

    Args:
        config: the config of the converted model.
        original_fields: the fields that a conversion without any choices of the caller gives.
        has_new_weights: whether the patterns' own weights are initial ones, not those of the checkpoint.
    """
    extension, context = config.position_extension, original_fields["max_position_embeddings"]
    context = min(context, config.max_position_embeddings)
    if extension is not None:
        if extension["method"] == "restart":
            context = min(context, extension["period"])
        elif not extension["keep_short"] and extension["method"] != "repeat":
            return 0
    adds_tokens = {pattern.adds_tokens for pattern in config.get_patterns()}
    if len(adds_tokens) == 2:
        return 0  # sublayers of the other patterns see the added tokens, which the original does not have
    theirs = original_fields.get("attention_patterns", ["full"] * config.num_hidden_layers)
    patterns = [pattern.at_start if has_new_weights else pattern for pattern in config.get_patterns()]
    pairs = {(ours, build_pattern(entry)) for ours, entry in zip(patterns, theirs, strict=True)}
    while context and any(a != b and not (a.sees_all(context) and b.sees_all(context)) for a, b in pairs):
        context -= 1
    return context


@torch.no_grad()
def largest_difference(original_model, model, length: int, global_tokens: bool = False) -> float:
    """Compute the largest absolute difference between two models' outputs on a padded batch of random documents.

    If outputs exceed 1, the difference is relative to the largest, because rounding errors grow with the values.

    Args:
        original_model: a model of transformers.
        model: the converted model.
        length: length of the longest document in tokens.
        global_tokens: whether some tokens are marked as global in both.

    Returns:
        The difference.
    """
    lengths = [length, max(1, length // 3), 1]
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, model.config.vocab_size, (len(lengths), length), generator=generator)
    pad = original_model.config.pad_token_id or 0
    # RoBERTa computes positions from the padding id, so that no real token may have it.
    input_ids[input_ids == pad] = (pad + 1) % model.config.vocab_size
    attention_mask = torch.tensor([[1] * n + [0] * (length - n) for n in lengths])
    input_ids = torch.where(attention_mask == 1, input_ids, pad)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if global_tokens:
        inputs["global_attention_mask"] = torch.zeros_like(input_ids)
        inputs["global_attention_mask"][:, [0, length // 2]] = 1
    if segments := model.config.type_vocab_size:
        inputs["token_type_ids"] = torch.randint(0, segments, input_ids.shape, generator=generator)
    theirs, ours = original_model(**inputs)[0], model(**inputs)[0]
    scale = max(1.0, theirs[attention_mask == 1].abs().max().item())
    return ((theirs - ours)[attention_mask == 1].abs().max() / scale).item()


def checkpoint_license(name_or_path: str, **hub) -> str | None:
    """Return the `license` in the front matter of the checkpoint's card, None if there is none."""
    parts = (read_text(name_or_path, "README.md", errors="replace", **hub) or "").split("---")
    line = r"""^license:\s*["']?([^\s"'#\[{]+)["']?\s*(?:#.*)?$"""
    found = re.search(line, parts[1], re.MULTILINE) if len(parts) > 2 and not parts[0].strip() else None
    return found.group(1) if found else None


def encoder_folder(name_or_path: str, **hub) -> str:
    """Return where in a checkpoint the encoder is: a subfolder, or an empty text for the checkpoint itself.

    Old releases of sentence-transformers kept it in a subfolder, such as `0_Transformer`.

    Args:
        name_or_path: Hub id or folder.
        **hub: options of `from_pretrained` to find files.

    Raises:
        ValueError: the checkpoint is an adapter, not a whole encoder, or needs code of its own.
    """
    folder, config = "", read_text(name_or_path, "config.json", **hub)
    # An adapter has no config.json; and offline the cache of a whole encoder does not say that it has no adapter.
    asked = config is None or Path(name_or_path).is_dir()
    if asked and (adapter := read_text(name_or_path, "adapter_config.json", **hub)) is not None:
        base = json.loads(adapter).get("base_model_name_or_path")
        raise ValueError(
            f"{name_or_path} is an adapter of {base}, not a whole encoder: load it on that model, merge it with "
            "merge_and_unload() and save it, then convert the folder"
        )
    if config is None:
        modules = json.loads(read_text(name_or_path, "modules.json", **hub) or "[]")
        folder = next((module["path"] for module in modules if module.get("path", "").startswith("0_")), "")
        config = read_text(name_or_path, "config.json", subfolder=folder, **hub)
    fields = json.loads(config or "{}")  # that there is none is said by transformers
    if "auto_map" in fields and fields.get("model_type") not in FAMILIES:
        raise ValueError(
            f"this checkpoint cannot be converted: it runs code of its own ({fields.get('model_type')!r}), and "
            f"LongEmbed reads {', '.join(FAMILIES)}"
        )
    return folder


def convert_encoder(
    cls: type[HubModel],
    name_or_path: str,
    max_position_embeddings: int | None = None,
    position_extension: dict | str | None = None,
    attention_patterns: list | dict | str | None = None,
    attn_implementation: str | None = None,
    **kwargs,
):
    """Turn a pretrained encoder into a long-document model.

    Within the original context the outputs equal those of the original, as far as the chosen patterns see the same
    keys. The conversion compares them and prints the largest difference.

    Args:
        name_or_path: Hub id or folder of a BERT, RoBERTa, XLM-R, DistilBERT, MPNet, Longformer, ModernBERT or NomicBERT
            checkpoint; also one of sentence-transformers, whose settings that shape a vector are taken over.
        max_position_embeddings: new context in tokens; None: the original one.
        position_extension: a method or `{"method": ..., ...}` as in `LongEmbedConfig`. None for a longer context:
            `restart` if all sublayers attend in blocks of one size, else `repeat` for learned positions and `dynamic`
            for rope.
        attention_patterns: as in `LongEmbedConfig`; None: those of the original. The landmark of `landmark` starts as
            the mean of all word vectors. A pattern's own weights that are missing in the checkpoint get their initial
            values (`global_projections` are copies, `adaptive` starts at its `initial_span`).
        attn_implementation: name of the attention kernel, as in `from_pretrained`.
        **kwargs: `training_attention_patterns`, `pooling`, `token_weighting`, `token_weighting_regularization`,
            `token_weighting_power`, `token_dim` and `token_head` (which start at random; `fit_token_head` of the model
            starts them at an optimum instead), `token_skip_punctuation`, `query_token_weights` (all 1 at the start),
            `prompts`, `default_prompt_name`, `normalize`, `similarity_fn_name`, `hidden_dropout_prob`,
            `attention_dropout`, `layerdrop`, `layerdrop_unit`, `original_model` (a name for the card); and the options
            of `from_pretrained` to find files: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        The model in fp32 and evaluation mode, with the original's tokenizer as `model.tokenizer`.

    Raises:
        ValueError: the checkpoint has a feature that a LongEmbed model cannot express (named in the message), the
            choices cannot be combined, or the outputs differ from those of the original.
        OSError: a file of the checkpoint cannot be read, or whether it exists could not be found out.
    """
    hub = {name: kwargs.pop(name) for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
    if unknown := sorted(set(kwargs) - set(CHOICES)):
        raise ValueError(
            f"from_encoder: {unknown[0]!r} is fixed by the checkpoint or unknown; you may choose {', '.join(CHOICES)}"
        )
    folder = encoder_folder(name_or_path, **hub)
    encoder_hub = hub | ({"subfolder": folder} if folder else {})
    # Said explicitly, because transformers would ask on the terminal, and advise an option that does not exist here.
    original = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **encoder_hub)
    if original.model_type not in FAMILIES:
        raise ValueError(
            f"this checkpoint cannot be converted: its architecture is {original.model_type!r}; "
            f"LongEmbed reads {', '.join(FAMILIES)}"
        )
    family = FAMILIES[original.model_type]
    choices = kwargs | {
        "max_position_embeddings": max_position_embeddings,
        "position_extension": position_extension,
        "attention_patterns": attention_patterns,
    }
    choices = {name: value for name, value in choices.items() if value is not None}
    trained = sentence_transformers_choices(name_or_path, set(choices), **hub)
    do_lower_case, read_length = trained.pop("do_lower_case", False), trained.pop("max_seq_length", None)
    token_head: dict[str, Tensor] = trained.pop("token_head_weights", {})
    original_fields = converted_fields(original, family, {})
    fields = converted_fields(original, family, trained | choices)
    config_class: Any = cls.config_class
    raw_fields, _ = type(original).get_config_dict(name_or_path, **encoder_hub)
    refuse_unread_fields(raw_fields, original, family.older_names(config_class(**original_fields)))
    # A local path is of no use to readers of the published config.
    name = Path(name_or_path).resolve().name if Path(name_or_path).exists() else str(name_or_path)
    config = config_class(**{"original_model": name, "license": checkpoint_license(name_or_path, **hub)} | fields)

    with_head = cls._tied_weights_keys is not None  # the masked-language model; the encoder has no tied weights
    auto = AutoModelForMaskedLM if with_head else AutoModel
    # transformers takes weights that it does not get for missing, and would read those of an older file.
    any(find_file(name_or_path, f"model.safetensors{suffix}", **encoder_hub) for suffix in ("", ".index.json"))
    try:
        original_model, loading = auto.from_pretrained(
            name_or_path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **encoder_hub
        )
    except Exception as error:
        if (
            type(error).__name__ != "SafetensorError"
        ):  # by name: the loader of remote code lets nothing else be imported
            raise
        raise ValueError(
            f"the weights of {name_or_path} are damaged ({error}): cut short, or a git-lfs pointer that git lfs pull "
            "replaces; copy or download them again"
        ) from None
    original_model.eval()
    missing, prefix = loading["missing_keys"], f"{original_model.base_model_prefix}." if with_head else ""
    refuse_unread_weights(loading["unexpected_keys"], original_model.base_model_prefix, family, with_head)
    model = cls._from_config(config, attn_implementation=attn_implementation, dtype=torch.float32).eval()
    # transformers initialises missing weights of a damaged checkpoint at random; leave these out.
    theirs = {k: v for k, v in original_model.base_model.state_dict(prefix=prefix).items() if k not in missing}
    theirs = {name.removeprefix(prefix): tensor for name, tensor in theirs.items()}
    weights = converted_weights(theirs, family.reserved_rows(original), family, config)
    weights |= {f"token_output.head.{name}": tensor for name, tensor in token_head.items()}
    if with_head:
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
        weights |= converted_head_weights(original_model, family, missing)
    absent, unexpected = model.load_state_dict(weights, strict=False)
    absent = [name for name in absent if name not in model.all_tied_weights_keys]
    # No other encoder has weights of token vectors.
    absent = [name for name in absent if "token_output." not in name]
    # The patterns' own weights depend on the choice of patterns, so that they may be missing or unused.
    new, unused = ([name for name in names if ".own." in name] for names in (absent, unexpected))
    if unmatched := [name for name in [*absent, *unexpected] if name not in (*new, *unused)]:
        raise ValueError(
            "this checkpoint cannot be converted: it has no weights, or we have no place, for "
            f"{', '.join(unmatched[:3])}"
        )
    if new:
        model.initialize_own_weights()
        model.load_state_dict(weights, strict=False)  # keep those that the checkpoint has
    model.tie_weights()
    for names, outcome in ((new, "are not in the checkpoint and start new"), (unused, "are left out")):
        if names:
            print(f"longembed: {len(names)} weights that belong to attention patterns {outcome}, such as {names[0]}")
    report_difference(
        model,
        original_model,
        comparable_length(config, original_fields, bool(new)),
        # Global tokens are compared only if all global projections come from the checkpoint.
        not new and all(getattr(pattern, "global_projections", False) for pattern in config.get_patterns()),
    )
    if (tokenizer := load_tokenizer(name_or_path, **encoder_hub)) is not None:
        check_tokenizer(tokenizer, config.vocab_size)
        model.tokenizer = converted_tokenizer(tokenizer, do_lower_case, read_length, config)
    return model


def converted_tokenizer(tokenizer, do_lower_case: bool, read_length: int | None, config):
    """Return the tokenizer of the converted model, which reads as much as the model and what the original reads.

    Args:
        tokenizer: the tokenizer of the checkpoint.
        do_lower_case: whether sentence-transformers writes texts in lower case before they are tokenized.
        read_length: number of tokens after which sentence-transformers cuts a text off; None: the tokenizer's.
        config: the config of the converted model.

    Raises:
        ValueError: the tokenizer reads texts in a way that a LongEmbed model does not.
    """
    side = tokenizer.truncation_side
    refuse(side != "right", f"truncation_side={side!r} in tokenizer_config.json: it cuts off the end of long texts")
    segments = tokenizer("a", add_special_tokens=True).get("token_type_ids", [])
    refuse(
        bool(config.type_vocab_size) and any(segments),
        f"a tokenizer that gives the segments {segments} to a single text: it reads texts as segment 0",
    )
    tokenizer = lowercased(tokenizer) if do_lower_case else tokenizer
    context, read_length = config.max_position_embeddings, read_length or tokenizer.model_max_length
    if read_length < context:
        print(f"longembed: the original cuts texts off after {read_length} tokens, this model after {context}")
    tokenizer.model_max_length = context
    return tokenizer


def converted_head_weights(original_model, family: Family, missing: set[str]) -> dict[str, Tensor]:
    """Convert the masked-language-model head of a checkpoint.

    Args:
        original_model: the model with its head.
        family: its architecture.
        missing: names of the weights that the checkpoint does not have.

    Returns:
        State dict of our head, under the prefix `head.`.

    Raises:
        MissingHeadError: the checkpoint has no head.
        ValueError: the head has a feature that a LongEmbed model cannot express.
    """
    config, layers = original_model.config, family.fields(original_model.config)["hidden_act"]
    activation = "gelu" if family.head is ROBERTA.head else getattr(config, "classifier_activation", layers)
    refuse(
        activation != layers,
        f"a masked-language-model head with the activation {activation!r} over layers with {layers!r}",
    )
    absent = sorted(name for name in missing if name.startswith(tuple(family.head.values())))
    if absent:
        raise MissingHeadError(
            f"this checkpoint cannot be converted: it has no masked-language-model head ({absent[0]} is missing); "
            "convert with LongEmbedModel"
        )
    weights = original_model.state_dict()
    named = ((mine, theirs, suffix) for mine, theirs in family.head.items() for suffix in ("weight", "bias"))
    return {
        f"head.{mine}.{suffix}": x for mine, theirs, suffix in named if (x := take(weights, theirs, suffix)) is not None
    }


def report_difference(model: HubModel, original_model, length: int, global_tokens: bool):
    """Compare the converted model with the original and print the largest difference.

    Args:
        model: the converted model.
        original_model: the original.
        length: length of the longest document of the comparison in tokens; 0: nothing is compared.
        global_tokens: whether some tokens are marked as global in both.

    Raises:
        ValueError: the outputs differ.
    """
    name = model.config.original_model
    if length == 0:
        print(
            f"longembed: {name} converted; with these choices no outputs equal those of the original, so nothing was "
            "compared"
        )
        return
    length = min(length, COMPARED_LENGTH)
    encoder: Any = model.base_model
    weighs_tokens, encoder.weighs_tokens = encoder.weighs_tokens, False  # compare the unweighted states
    difference = largest_difference(original_model, model, length, global_tokens)
    encoder.weighs_tokens = weighs_tokens
    print(
        f"longembed: {name} converted; largest difference from the original on documents of up to {length} tokens: "
        f"{difference:.1e}"
    )
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the conversion of {name} changed its outputs by {difference:.1e}, more than {TOLERANCE:.0e}: it has "
            "a feature that was not recognised; please report it with the checkpoint's config.json"
        )
