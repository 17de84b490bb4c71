"""The files that sentence-transformers keeps beside a checkpoint, key by key: taken over, without effect or refused."""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerFast

from .conversion_families_longembed import refuse
from .conversion_files_longembed import ANY, check_settings, read_settings, read_text
from .conversion_token_vectors_longembed import token_vector_choices
from .hub_sentence_transformers_longembed import ST_POOLINGS, ST_SIMILARITIES

# Where sentence-transformers looks for the settings of its Transformer module; the first file that exists counts.
TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
MODEL_FILE = "config_sentence_transformers.json"
# Values that are accepted, for each key of each file.
MODULE = {"idx": ANY, "name": ANY, "path": ANY, "type": ANY}
MODEL = {
    "model_type": ("SentenceTransformer", "MultiVectorEncoder"),
    "prompts": ANY,
    "default_prompt_name": ANY,
    "similarity_fn_name": (None, *ST_SIMILARITIES, "maxsim", "meanmaxsim"),  # the latter of token vectors
    "__version__": ANY,
    "requirements": ANY,
}
TRANSFORMER = {
    "max_seq_length": ANY,
    "do_lower_case": ANY,
    "transformer_task": ("feature-extraction",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    "module_output_name": ("token_embeddings",),
    "unpad_inputs": ANY,  # how vectors are computed, not which
}
# Settings of `MultiVectorEncoder` that say how much of a text is read.
LENGTHS = {"query_length": ANY, "document_length": ANY}
# Arguments of `from_pretrained` in the settings of the Transformer module, which say how it is loaded.
LOADING = {
    **dict.fromkeys(("trust_remote_code", "dtype", "torch_dtype", "attn_implementation", "device_map"), ANY),
    **dict.fromkeys(("low_cpu_mem_usage", "use_safetensors", "use_cache", "use_fast", "add_pooling_layer"), ANY),
    "model_max_length": ANY,
}
LOADING_KEYS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
POOLING = {
    "embedding_dimension": ANY,
    "word_embedding_dimension": ANY,
    "pooling_mode": ANY,
    "include_prompt": (True,),
    **{f"pooling_mode_{mode}": ANY for mode in ("cls_token", "lasttoken")},
    **{f"pooling_mode_{mode}_tokens": ANY for mode in ("max", "mean", "mean_sqrt_len", "weightedmean")},
}
NORMALIZE = dict.fromkeys(("module_input_name", "module_output_name"), ("sentence_embedding",))
DROPOUT = {"dropout": ANY}  # it has no effect outside of training
# The modules that a checkpoint may have behind Transformer and Pooling, with the keys of their files.
LATER_MODULES: dict[str, dict] = {"Normalize": NORMALIZE, "Dropout": DROPOUT}


def sentence_transformers_choices(name_or_path: str, chosen: set[str], **hub) -> dict[str, Any]:
    """Return the config fields that a sentence-transformers checkpoint was trained with.

    Args:
        name_or_path: Hub id or folder.
        chosen: the fields that the caller chose, for which no setting is read.
        **hub: options of `from_pretrained` to find files.

    Returns:
        The fields; none for a checkpoint without `modules.json`, which is no model of sentence-transformers. Beside
        them `do_lower_case` and `max_seq_length`, which are no fields of a config.

    Raises:
        ValueError: the checkpoint has a module or a setting that a LongEmbed model does not have.
    """
    text = read_text(name_or_path, "modules.json", **hub)
    if text is None:
        return {}
    modules = json.loads(text)
    for module in modules:
        check_settings("modules.json", module, MODULE)
        library = module["type"].split(".")[0]
        refuse(library != "sentence_transformers", f"the module {module['type']}, which is code of its own")
    refuse(
        re.search(r'"model_type":\s*"ColBERT"', read_text(name_or_path, MODEL_FILE, **hub) or "") is not None,
        "what PyLate saves: load it with sentence-transformers' MultiVectorEncoder, save it, and convert that folder",
    )
    settings = read_settings(name_or_path, MODEL_FILE, MODEL, **hub) or {}
    if settings.get("model_type") == "MultiVectorEncoder":
        transformer = read_transformer(name_or_path, modules[0]["path"], LENGTHS, **hub)
        choices = token_vector_choices(name_or_path, modules, **hub)
        lengths = (transformer.get(name) for name in ("document_length", "max_seq_length"))
        choices["max_seq_length"] = next((length for length in lengths if length), None)
        choices["do_lower_case"] = transformer.get("do_lower_case")
        if chosen & {"token_dim", "token_head"}:  # another head
            choices = {key: value for key, value in choices.items() if key != "token_head_weights"}
    else:
        choices = vector_choices(name_or_path, modules, chosen, **hub)
        choices["similarity_fn_name"] = settings.get("similarity_fn_name")
    if choices.get("similarity_fn_name") not in ST_SIMILARITIES:
        choices["similarity_fn_name"] = "cosine"
    if "prompts" not in chosen:
        choices["prompts"] = prompts_by_name(settings.get("prompts") or {})
        choices["default_prompt_name"] = settings.get("default_prompt_name")
    return {name: value for name, value in choices.items() if name not in chosen and value is not None}


def vector_choices(name_or_path: str, modules: list[dict], chosen: set[str], **hub) -> dict[str, Any]:
    """Return the config fields of the vector that `SentenceTransformer` gives, and how it reads a text.

    Args:
        name_or_path: Hub id or folder.
        modules: the entries of modules.json.
        chosen: the fields that the caller chose, for which no setting is read.
        **hub: options of `from_pretrained` to find files.

    Raises:
        ValueError: there is a module or a setting that a LongEmbed model does not have.
    """
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    for kind in kinds:
        refuse(kind not in ("Transformer", "Pooling", *LATER_MODULES), f"the sentence-transformers module {kind}")
    refuse(
        kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= set(LATER_MODULES),
        f"the sentence-transformers modules {', '.join(kinds)} in this order",
    )
    transformer = read_transformer(name_or_path, modules[0]["path"], {}, **hub)
    choices = {key: transformer.get(key) for key in ("do_lower_case", "max_seq_length")}
    if "pooling" not in chosen:
        choices["pooling"] = read_pooling(name_or_path, modules[1]["path"], **hub)
    choices["normalize"] = "Normalize" in kinds
    for kind, module in zip(kinds[2:], modules[2:], strict=True):
        read_settings(name_or_path, f"{module['path']}/config.json", LATER_MODULES[kind], **hub)
    return choices


def read_transformer(name_or_path: str, folder: str, more: dict, **hub) -> dict:
    """Return the settings of the Transformer module in `folder`.

    Args:
        name_or_path: Hub id or folder.
        folder: that of the module.
        more: the values that are accepted beside those of `TRANSFORMER`, for each key.
        **hub: options of `from_pretrained` to find files.

    Raises:
        ValueError: a setting is not accepted.
    """
    for name in TRANSFORMER_FILES:
        file = f"{folder}/{name}" if folder else name
        settings = read_settings(name_or_path, file, TRANSFORMER | more | dict.fromkeys(LOADING_KEYS, ANY), **hub)
        if settings is not None:
            for key in LOADING_KEYS:
                check_settings(f"{key} in {file}", settings.get(key) or {}, LOADING)
            return settings
    return {}


def read_pooling(name_or_path: str, folder: str, **hub) -> str:
    """Return our name of the pooling in `folder`; raises ValueError if there is none."""
    settings = read_settings(name_or_path, f"{folder}/config.json", POOLING, **hub) or {}
    modes = settings.get("pooling_mode")
    if modes is None:  # older releases have one key for each mode; if none is set, they take the mean
        modes = [key.removeprefix("pooling_mode_") for key in settings if "_mode_" in key and settings[key]] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    known = {theirs: ours for ours, legacy in ST_POOLINGS.items() for theirs in (legacy, legacy.split("_")[0])}
    refuse(
        len(modes) != 1 or modes[0] not in known, f"the pooling {sorted(modes)}; pass pooling= to choose one of ours"
    )
    return known[modes[0]]


def prompts_by_name(prompts: dict[str, str | None]) -> dict[str, str]:
    """Return the prompts of a checkpoint, with one for documents.

    sentence-transformers promises that `encode_document` takes the first of `document`, `passage` and `corpus`. Newer
    releases write `document` into each file, so that it counts if it is there, even if it is empty.
    """
    named = {name: text or "" for name, text in prompts.items()}
    for_documents = [named[name] for name in ("document", "passage", "corpus") if name in named]
    return {"document": for_documents[0]} | named if for_documents else named


def lowercased(tokenizer):
    """Return a tokenizer that writes all text in lower case first, as `do_lower_case` of sentence-transformers does.

    It is of the class that loads `tokenizer.json` as it is: the classes of architectures, such as BERT's, build their
    own normalizer when they are loaded again.

    Args:
        tokenizer: a tokenizer of transformers.

    Raises:
        ValueError: the tokenizer is none of the tokenizers library.
    """
    refuse(not tokenizer.is_fast, f"do_lower_case=true with a {type(tokenizer).__name__}")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer = state["normalizer"]
    if normalizer and tokenizer.backend_tokenizer.normalizer.normalize_str("A") == "a":
        return tokenizer
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Lowercase"}, *([normalizer] * bool(normalizer))],
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(state)),
        model_input_names=tokenizer.model_input_names,
        model_max_length=tokenizer.model_max_length,
        **tokenizer.special_tokens_map,
    )
