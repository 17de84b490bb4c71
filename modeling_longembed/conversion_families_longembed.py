"""The architectures of transformers that can be converted to and from a LongEmbed model, in one table.

`FAMILIES` maps the config fields and modules of each architecture to ours, and lists which of our fields it fixes.
`from_encoder` reads checkpoints with it, `to_native` writes them.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

# Fields that have the same name in every architecture and here.
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        names: our config field -> theirs, for fields with the same meaning (in addition to `SIZES`).
        constants: values of our config fields that the architecture fixes.
        outside, attention, feed_forward, head: our module name -> theirs, outside the layers, in layer `{n}`, and in
            the masked-language-model head. A triple `(name, part, parts)` is one part of a fused projection.
        reserved_rows: number of unused rows at the start of the position table (RoBERTa), from their config.
        read: our config fields that are not copies, from their config; raises ValueError for features that a LongEmbed
            config cannot express.
        write: their config fields that are not copies, from our config: the inverse of `read`.
        older_names: fields under the names of older releases, which serving software still reads, from our config. It
            is empty if the older names cannot express the model, so that such software rejects it instead of computing
            something else.
    """

    names: dict[str, str]
    constants: dict
    outside: dict
    attention: dict
    feed_forward: dict
    head: dict
    reserved_rows: Callable = lambda original: 0
    read: Callable = lambda original: {}
    write: Callable = lambda config: {}
    older_names: Callable = lambda config: {}

    def fields(self, original) -> dict:
        """Return our config fields, given a config of this architecture."""
        same = {name: name for name in SIZES} | self.names
        fields = {ours: getattr(original, theirs) for ours, theirs in same.items()}
        fields["max_position_embeddings"] -= self.reserved_rows(original)
        return fields | self.constants | self.read(original)

    def native_fields(self, config) -> dict:
        """Return their config fields, given our config; features that the architecture cannot express are lost."""
        same = {name: name for name in SIZES} | self.names
        return {theirs: getattr(config, ours) for ours, theirs in same.items()} | self.write(config)

    def modules(self, num_layers: int) -> dict[str, str | tuple[str, int, int]]:
        """Return our name of each module of the encoder -> theirs, or their `(name, part, parts)`."""
        modules = dict(self.outside)
        for layer in range(num_layers):  # a layer of theirs is two sublayers of ours, attention first
            for sublayer, names in ((2 * layer, self.attention), (2 * layer + 1, self.feed_forward)):
                for ours, theirs in names.items():
                    name, *part = theirs if isinstance(theirs, tuple) else (theirs,)
                    name = name.format(n=layer)
                    modules[f"layers.{sublayer}.{ours}"] = (name, *part) if part else name
        return modules


def refuse(condition: bool, feature: str):
    """Reject a checkpoint with a feature that a LongEmbed config cannot express.

    Raises:
        ValueError: the condition holds.
    """
    if condition:
        raise ValueError(f"this checkpoint cannot be converted: LongEmbed cannot express {feature}")


# Values that switch a feature off.
OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
# Fields of a config.json that no output depends on, whatever their values: heads, training, generation, bookkeeping.
INERT_FIELDS = re.compile(
    r"_.*|.*(dropout|_pdrop|_token_ids?|version|_checkpointing)|(pooler|classifier|summary|output|task|sparse)_.*"
    r"|(finetuning_task|task_specific_params|num_labels|_?num_labels|problem_type|architectures|auto_map|torch_dtype)"
    r"|(use_cache|use_flash_attn|use_xentropy|use_memory_efficient_attention|unpad_inputs|fused_bias_fc|reference_compile"
    r"|fused_dropout_add_ln|dense_seq_output|deterministic_flash_attn|repad_logits_with_grad|tie_weights_|xla_device"
    r"|custom_pipelines|directionality|language|transformers\.js_config|model_max_length|tokenizer_class|name"
    r"|initializer_\w+|pad_vocab_size_multiple|ignore_attention_mask|ffn_div|max_trained_positions|n_positions"
    r"|global_attn_every_n_layers)"  # from which transformers derives `layer_types`
)
# The first words of the names of heads; weights under other names belong to the encoder.
HEADS = re.compile(
    r"(pooler|cls|head|heads|classifier|classification|score|scores|predictions?|decoder|projections?|proj|linear|dense"
    r"|regress\w*|logits?|loss|mlm|lm|nsp|qa|vocab|pre|discriminator|generator|sparse|colbert|seq)(_|\.|$)"
)
# Buffers that older releases wrote into checkpoints; they are computed.
BUFFERS = ("position_ids", "token_type_ids", "inv_freq", "original_inv_freq")


def refuse_unread_fields(fields: dict, original, older_names: dict):
    """Refuse the fields of a checkpoint's config.json that transformers does not read, unless they have no effect.

    The original that a conversion is compared with drops such a feature too, so that no comparison of outputs finds it.

    Args:
        fields: the fields in config.json.
        original: the config of transformers that was read from it.
        older_names: fields that say again, under the names of older releases, what the config says.

    Raises:
        ValueError: a field may change what the model computes.
    """
    read = {field.name for field in dataclasses.fields(original)} | {*original.attribute_map}
    same = older_names | {
        "position_embedding_type": getattr(original, "position_embedding_type", None),  # checked for each family
        **dict.fromkeys(("embedding_size", "emb_size"), original.hidden_size),
        "layer_norm_eps": getattr(original, "norm_eps", None),
        "attention_mode": "longformer",
        "scale_attn_weights": True,
    }
    for name, value in fields.items():
        # What a config of transformers takes out of the fields is no attribute afterwards.
        if name in read or hasattr(type(original), name) or name not in vars(original):
            continue
        harmless = value in OFF or INERT_FIELDS.fullmatch(name) or (name in same and value == same[name])
        refuse(
            not harmless,
            f"{name}={json.dumps(value)}, which {type(original).__name__} of transformers does not read; if it has no "
            "effect on the outputs, take it out of config.json",
        )


def refuse_unread_weights(names: Iterable[str], prefix: str, family: Family, with_head: bool):
    """Refuse the weights of a checkpoint that transformers does not read, unless they belong to a head or a pooler.

    Args:
        names: names of the weights that were not read.
        prefix: name of the encoder in models with a head.
        family: the architecture.
        with_head: whether the masked-language-model head is converted too.

    Raises:
        ValueError: a weight belongs to the encoder, or to the head that is converted.
    """
    inside = [*family.outside.values(), *family.attention.values(), *family.feed_forward.values()]
    roots = {(module if isinstance(module, str) else module[0]).split(".")[0] for module in inside}
    head = {name.rpartition(".")[0] or name for name in family.head.values()} if with_head else set()
    unread = []
    for name in sorted(names):
        own = name.removeprefix(f"{prefix}.")
        if own.rpartition(".")[2] in BUFFERS:
            continue
        of_head = own.startswith(tuple(f"{scope}." for scope in head))
        if own.split(".")[0] in roots or of_head or not HEADS.match(own):
            unread.append(name)
    more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
    refuse(bool(unread), f"the weights {unread[:1]}{more}, which its architecture in transformers does not read")


def rope_by_layer(config) -> list[dict]:
    """Return the RoPE parameters of each attention sublayer; empty for schemes that do not rotate."""
    parameters = config.rope_parameters
    return [parameters.get(kind, parameters) for kind in config.layer_types] if parameters else []


# --- BERT and its relatives: post-norm, learned positions ------------------------------------------------------------


def read_bert(original) -> dict:
    """Return no fields, and reject decoders and positions that are not a table."""
    scheme = getattr(original, "position_embedding_type", "absolute")
    refuse(scheme != "absolute", f"position_embedding_type={scheme!r}")
    for flag in ("is_decoder", "add_cross_attention"):
        refuse(bool(getattr(original, flag, False)), f"{flag}=true")
    return {}


def write_segments(config) -> dict:
    """Return the number of segments, at least 1, because the architecture always has a segment table."""
    return {"type_vocab_size": max(1, config.type_vocab_size)}


def read_mpnet(original) -> dict:
    """Return the number of buckets of the bias by distance, which all layers share."""
    return read_bert(original) | {"relative_attention_num_buckets": original.relative_attention_num_buckets}


BERT_NAMES = {
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "hidden_dropout_prob": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
BERT_EMBEDDINGS = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
BERT = Family(
    names=BERT_NAMES | {"type_vocab_size": "type_vocab_size"},
    constants={},
    outside=BERT_EMBEDDINGS,
    attention={
        "attention.q_proj": "encoder.layer.{n}.attention.self.query",
        "attention.k_proj": "encoder.layer.{n}.attention.self.key",
        "attention.v_proj": "encoder.layer.{n}.attention.self.value",
        "attention.o_proj": "encoder.layer.{n}.attention.output.dense",
        "norm": "encoder.layer.{n}.attention.output.LayerNorm",
    },
    feed_forward={
        "feed_forward.up_proj": "encoder.layer.{n}.intermediate.dense",
        "feed_forward.down_proj": "encoder.layer.{n}.output.dense",
        "norm": "encoder.layer.{n}.output.LayerNorm",
    },
    head={
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "decoder": "cls.predictions.decoder",
    },
    read=read_bert,
    write=write_segments,
)


def reserved_by_padding(original) -> int:
    """Return the number of rows up to that of the padding index, which RoBERTa's positions start after."""
    refuse(original.pad_token_id is None, "RoBERTa's positions without pad_token_id in config.json, usually 1")
    return original.pad_token_id + 1


ROBERTA = replace(
    BERT,
    head={"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "decoder": "lm_head.decoder"},
    # Rows up to the padding index are reserved: the first token reads the row after it.
    reserved_rows=reserved_by_padding,
)
MPNET = Family(
    names=BERT_NAMES,
    constants={"type_vocab_size": 0, "relative_attention_max_distance": 128},
    outside=BERT_EMBEDDINGS | {"relative_attention_bias": "encoder.relative_attention_bias"},
    attention={
        "attention.q_proj": "encoder.layer.{n}.attention.attn.q",
        "attention.k_proj": "encoder.layer.{n}.attention.attn.k",
        "attention.v_proj": "encoder.layer.{n}.attention.attn.v",
        "attention.o_proj": "encoder.layer.{n}.attention.attn.o",
        "norm": "encoder.layer.{n}.attention.LayerNorm",
    },
    feed_forward=BERT.feed_forward,
    head=ROBERTA.head,
    reserved_rows=ROBERTA.reserved_rows,
    read=read_mpnet,
)


def read_longformer(original) -> dict:
    """Return the windows: a total window of W tokens is W // 2 on each side. Callers mark global tokens."""
    windows = original.attention_window
    windows = windows if isinstance(windows, list) else [windows] * original.num_hidden_layers
    pattern = {"type": "sliding", "global_projections": True}
    return read_bert(original) | {"attention_patterns": [pattern | {"window": window // 2} for window in windows]}


LONGFORMER = replace(
    ROBERTA,
    attention=BERT.attention
    | {
        "attention.own.q_proj": "encoder.layer.{n}.attention.self.query_global",
        "attention.own.k_proj": "encoder.layer.{n}.attention.self.key_global",
        "attention.own.v_proj": "encoder.layer.{n}.attention.self.value_global",
    },
    read=read_longformer,
)
# The sinusoidal variant stores its table, so it is read as a learned one.
DISTILBERT = Family(
    names={
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_dropout": "attention_dropout",
    },
    constants={"type_vocab_size": 0, "norm_eps": 1e-12},
    outside=BERT_EMBEDDINGS,
    attention={
        "attention.q_proj": "transformer.layer.{n}.attention.q_lin",
        "attention.k_proj": "transformer.layer.{n}.attention.k_lin",
        "attention.v_proj": "transformer.layer.{n}.attention.v_lin",
        "attention.o_proj": "transformer.layer.{n}.attention.out_lin",
        "norm": "transformer.layer.{n}.sa_layer_norm",
    },
    feed_forward={
        "feed_forward.up_proj": "transformer.layer.{n}.ffn.lin1",
        "feed_forward.down_proj": "transformer.layer.{n}.ffn.lin2",
        "norm": "transformer.layer.{n}.output_layer_norm",
    },
    head={"dense": "vocab_transform", "norm": "vocab_layer_norm", "decoder": "vocab_projector"},
)


# --- NomicBERT: post-norm, rope, SwiGLU ------------------------------------------------------------------------------


def read_nomic(original) -> dict:
    """Return the rotation."""
    return {"rope_parameters": dict(original.rope_parameters)}


def write_nomic(config) -> dict:
    """Return segments, padding and rotation."""
    fields = write_segments(config) | {"pad_token_id": config.pad_token_id or 0}
    rope = rope_by_layer(config)
    return fields | ({"rope_parameters": dict(rope[0])} if rope else {})


def older_names_of_nomic(config) -> dict:
    """Return the field names of the first NomicBERT code, which text-embeddings-inference and vLLM read."""
    rope = rope_by_layer(config)[0]
    if rope["rope_type"] != "default" or config.hidden_act != "silu":
        return {}
    names = {
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "n_positions": config.max_position_embeddings,
        "max_trained_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "swiglu",
        "prenorm": False,
        "rotary_emb_base": rope["rope_theta"],
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
    }
    return names | dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), False)


NOMIC_BERT = Family(
    names=BERT.names | {"head_dim": "head_dim"},
    constants={
        "position_embedding_type": "rope",
        "feed_forward_gated": True,
        "feed_forward_bias": False,
        "attention_bias": False,
    },
    outside={ours: theirs for ours, theirs in BERT_EMBEDDINGS.items() if "position" not in ours},
    attention={
        "attention.q_proj": "layers.{n}.self_attn.q_proj",
        "attention.k_proj": "layers.{n}.self_attn.k_proj",
        "attention.v_proj": "layers.{n}.self_attn.v_proj",
        "attention.o_proj": "layers.{n}.self_attn.o_proj",
        "norm": "layers.{n}.post_attention_layernorm",
    },
    feed_forward={
        # The activated projection is `up` here (`act(up) * gate`) and `gate` there (`act(gate) * up`).
        "feed_forward.up_proj": "layers.{n}.mlp.gate_proj",
        "feed_forward.gate_proj": "layers.{n}.mlp.up_proj",
        "feed_forward.down_proj": "layers.{n}.mlp.down_proj",
        "norm": "layers.{n}.post_mlp_layernorm",
    },
    head={
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.layer_norm",
        "decoder": "cls.predictions.decoder",
    },
    read=read_nomic,
    write=write_nomic,
    older_names=older_names_of_nomic,
)


# --- ModernBERT: pre-norm, rope with one base per layer type, GeGLU, windows alternating with full attention ---------


def read_modernbert(original) -> dict:
    """Return windows and rotations by layer."""
    # transformers' window of W tokens is W // 2 on each side, both ends included.
    window = {"type": "sliding", "window": original.local_attention // 2}
    known = {"full_attention": "full", "sliding_attention": window}
    unknown = sorted(set(original.layer_types) - set(known))
    refuse(bool(unknown), f"layer_types={unknown}")
    return {
        "attention_patterns": [known[layer_type] for layer_type in original.layer_types],
        "rope_parameters": {kind: dict(original.rope_parameters[kind]) for kind in set(original.layer_types)},
    }


def write_modernbert(config) -> dict:
    """Return layer types, windows and rotations."""
    windows = [pattern.window for pattern in config.get_patterns() if pattern.type == "sliding"]
    layer_types = [
        "sliding_attention" if pattern.type == "sliding" else "full_attention" for pattern in config.get_patterns()
    ]
    fields = {
        "layer_types": layer_types,
        "rope_parameters": {kind: dict(rope) for kind, rope in zip(layer_types, rope_by_layer(config), strict=False)},
        "classifier_activation": config.hidden_act,
        # Their defaults are ids in the vocabulary of ModernBERT.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
    }
    return fields | ({"local_attention": 2 * windows[0]} if windows else {})


def older_names_of_modernbert(config) -> dict:
    """Return the fields that preceded `layer_types` and `rope_parameters`; text-embeddings-inference reads them."""
    fields = write_modernbert(config)
    layer_types, rope = fields["layer_types"], fields["rope_parameters"]
    full = [layer for layer, kind in enumerate(layer_types) if kind == "full_attention"]
    period = full[1] if len(full) > 1 else len(layer_types)
    if full != list(range(0, len(layer_types), period)):
        return {}
    # Such software silently ignores biases of the norms and scaled rotations.
    if config.norm_bias or any(parameters["rope_type"] != "default" for parameters in rope.values()):
        return {}
    theta = {kind: parameters["rope_theta"] for kind, parameters in rope.items()}
    return {
        "global_attn_every_n_layers": period,
        "global_rope_theta": theta["full_attention"],
        "local_rope_theta": theta.get("sliding_attention", theta["full_attention"]),
    }


MODERNBERT = Family(
    names={
        "intermediate_size": "intermediate_size",
        "hidden_act": "hidden_activation",
        "norm_eps": "norm_eps",
        "norm_bias": "norm_bias",
        "attention_bias": "attention_bias",
        "feed_forward_bias": "mlp_bias",
        "mlm_head_bias": "classifier_bias",
        "hidden_dropout_prob": "mlp_dropout",
        "attention_dropout": "attention_dropout",
    },
    constants={
        "type_vocab_size": 0,
        "position_embedding_type": "rope",
        "norm_placement": "pre",
        "final_norm": True,
        "first_attention_norm": False,
        "feed_forward_gated": True,
    },
    outside={
        "embeddings.word_embeddings": "embeddings.tok_embeddings",
        "embeddings.norm": "embeddings.norm",
        "final_norm": "final_norm",
    },
    attention={
        "attention.q_proj": ("layers.{n}.attn.Wqkv", 0, 3),
        "attention.k_proj": ("layers.{n}.attn.Wqkv", 1, 3),
        "attention.v_proj": ("layers.{n}.attn.Wqkv", 2, 3),
        "attention.o_proj": "layers.{n}.attn.Wo",
        "norm": "layers.{n}.attn_norm",
    },
    feed_forward={
        "feed_forward.up_proj": ("layers.{n}.mlp.Wi", 0, 2),
        "feed_forward.gate_proj": ("layers.{n}.mlp.Wi", 1, 2),
        "feed_forward.down_proj": "layers.{n}.mlp.Wo",
        "norm": "layers.{n}.mlp_norm",
    },
    head={"dense": "head.dense", "norm": "head.norm", "decoder": "decoder"},
    read=read_modernbert,
    write=write_modernbert,
    older_names=older_names_of_modernbert,
)

FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "mpnet": MPNET,
    "longformer": LONGFORMER,
    "modernbert": MODERNBERT,
    "nomic_bert": NOMIC_BERT,
}
