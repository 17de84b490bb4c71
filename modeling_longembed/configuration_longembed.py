"""The configuration: four independent choices (positions, attention pattern, layout, output) and the sizes.

Invalid combinations are rejected here, when the config is built, with a message that names the fields and the remedy.
"""

from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from typing import ClassVar, Literal

from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import strict  # without it nothing is validated

from .hub_sentence_transformers_longembed import MULTI_VECTOR_MARK
from .layout_registry_longembed import expand_layout
from .pattern_registry_longembed import build_pattern, upgrade_entry
from .position_base_longembed import PositionScheme
from .position_buckets_longembed import check_buckets
from .position_schemes_longembed import get_scheme
from .tensor_parallel_longembed import tensor_parallel_plan


def unwrap_validation_errors(cls: type) -> type:
    """Class decorator over `strict`: raise the original message as a ValueError.

    `strict` itself wraps the message of a validation error in several lines of its own.
    """
    strict_init = cls.__init__  # type: ignore[misc]  # a class decorator gets the class itself, not an instance

    @wraps(strict_init)
    def __init__(self, **kwargs):
        try:
            strict_init(self, **kwargs)
        except Exception as error:
            if not isinstance(error.__cause__, (TypeError, ValueError)):
                raise
            raise ValueError(str(error.__cause__).split(". Errors:")[0]) from error

    cls.__init__ = __init__  # type: ignore[misc]  # as above
    return cls


@unwrap_validation_errors
@strict
class LongEmbedConfig(PretrainedConfig):
    """Configuration of a LongEmbed encoder.

    Args:
        vocab_size: number of rows of the token table.
        type_vocab_size: number of rows of the segment table; 0: the model has no segments.
        hidden_size: model width d.
        num_attention_heads: number of attention heads H.
        head_dim: width of a head; None: `hidden_size // num_attention_heads`.
        intermediate_size: inner width of the feed-forward sublayers.
        num_hidden_layers: number of attention sublayers. It follows from `sublayer_pattern` if that is a string of
            letters; for a layout given by name it is the number of attention and feed-forward pairs (default 6).
        sublayer_pattern: the layout, one letter per sublayer: `s` for self-attention, `f` for feed-forward. It can also
            be a name: `interleaved` (the default, `sfsf...`), `sandwich(k)` or `par(p)`.
        attention_patterns: which keys a query sees, one entry per attention sublayer, or one entry for all: a name or
            `{"type": name, **parameters}`. See `pattern_registry_longembed`.
        training_attention_patterns: the patterns that the same weights use in training, as in S2-Attn of LongLoRA
            (train with `shifted`, infer with `full`); None: those of `attention_patterns`.
        is_causal: whether a token sees earlier tokens only.
        layer_types: transformers' name for each attention sublayer; derived from `attention_patterns`, leave it out.
        max_position_embeddings: context length in tokens; `encode` cuts off longer texts and logs a warning.
        position_embedding_type: `absolute` (learned table), `sinusoidal`, `rope`, `alibi`, `relative` (Transformer-XL)
            or `none` (NoPE: the causal mask is the only source of order).
        relative_attention_num_buckets: number of buckets of a learned bias by distance that is added to the position
            scheme (T5, MPNet); 0: no such bias.
        relative_attention_max_distance: distance in tokens from which all keys share the last bucket.
        rope_parameters: RoPE parameters in transformers' format, either flat or one dict per layer type
            (`full_attention`, `sliding_attention`, `chunked_attention`).
        position_extension: how the positions of documents beyond the original context are computed:
            `{"method": ..., "original_max_position_embeddings": ...}`. Methods of `absolute` and `sinusoidal`:
            `repeat`, `interpolate`, `group`, `restart` (with `period`). Methods of `rope`: `linear`, `dynamic`, `ntk`,
            `theta` (with `rope_theta`), `yarn`, `group` (Self-Extend, with `neighbours`). `factor` defaults to the new
            length divided by the original length. With `keep_short` (default true) a document that fits into the
            original context gets the positions of the original model.
        norm_placement: `post` (as in BERT) or `pre` (as in ModernBERT).
        norm_eps: epsilon of the layer norms.
        norm_bias: whether the layer norms have a bias.
        embedding_norm: whether there is a layer norm after the embeddings.
        final_norm: whether there is a layer norm after the last sublayer.
        first_attention_norm: whether the first sublayer has a layer norm.
        hidden_act: activation of the feed-forward sublayers.
        feed_forward_gated: whether they are gated, `down(act(up(x)) * gate(x))`, as ModernBERT's GeGLU.
        attention_bias: whether the attention projections have a bias.
        feed_forward_bias: whether the feed-forward projections have a bias.
        hidden_dropout_prob: dropout probability of the embeddings and of the output of each sublayer.
        attention_dropout: dropout probability of the attention weights.
        initializer_range: standard deviation of the initial weights.
        scaled_initialization: whether output projections start with the standard deviation
            `initializer_range / sqrt(number of sublayers)`, as in Megatron.
        layerdrop: probability of dropping a layer in training (LayerDrop).
        layerdrop_unit: what is dropped: `layer` (an attention sublayer with the feed-forward sublayers after it) or
            `sublayer`.
        mlm_head_bias: whether the dense layer of the masked-language-model head has a bias.
        pooling: how the token states of a document become one vector: `mean`, `cls`, `last` or `weighted_mean`
            (weights 1 to L).
        token_weighting: `generalized_max` weights the token states of a document before a mean, so that frequent
            content does not dominate rare content (see `token_weights` in `output_pooling_longembed`); or `none`.
        token_weighting_regularization: regularization strength of the token weights; the larger it is, the closer the
            weights are to those of plain pooling.
        token_weighting_power: power of a token's entry in the table of `query_token_weights` that its state is
            multiplied by before a mean, such as 0.25, so that rare words count more in the vector of a text; 0: the
            table has no part in it.
        token_dim: width of the vectors of single tokens, for late interaction; None: the token states themselves, which
            need no head.
        token_head: what makes token vectors of states: `linear`, or `mlp`, two layers.
        token_skip_punctuation: whether tokens of punctuation marks alone have no vector, as special tokens never have.
        query_token_weights: what the vector of a query token is multiplied by, so that MaxSim counts it more or less:
            `none`, `idf` (a table over the vocabulary that stays as it is), `table` (the same, trained) or `state` (the
            trained table times `2 * sigmoid(w . h + b)` of the state).
        token_min_weight: tokens of documents have no vector if their entry in the table of `query_token_weights` is
            smaller: words as frequent as these are hardly looked for. With 0 all tokens of words have one.
        prompts: text that is put in front of an input, by the name of the prompt; evaluation and inference use the
            names `query` and `document`.
        default_prompt_name: name of the prompt that `encode` uses where none is asked for; None: no prompt.
        normalize: whether `encode` scales vectors to unit length where nothing else is asked for.
        similarity_fn_name: how vectors of this model are compared: `cosine`, `dot`, `euclidean` or `manhattan`.
        original_model: name of the model that the weights come from, for the model card.
        license: license of the weights, for the model card.
        pad_token_id: id of the padding token; None: there is none.
        tie_word_embeddings: whether the masked-language-model head shares the weights of the token table.

    Raises:
        ValueError: the fields cannot be combined; the message names them and says what to use.
    """

    model_type = "longembed"
    attribute_map: ClassVar[dict[str, str]] = {"num_layers": "num_hidden_layers"}

    vocab_size: int = 30522
    type_vocab_size: int = 2
    hidden_size: int = 384
    num_attention_heads: int = 12
    head_dim: int | None = None
    intermediate_size: int = 1536
    num_hidden_layers: int | None = None
    sublayer_pattern: str | None = None
    attention_patterns: str | dict | list = "full"
    training_attention_patterns: str | dict | list | None = None
    is_causal: bool = False
    layer_types: list[str] | None = None
    max_position_embeddings: int = 512
    position_embedding_type: str = "absolute"
    relative_attention_num_buckets: int = 0
    relative_attention_max_distance: int = 128
    rope_parameters: dict | None = None
    position_extension: dict | None = None
    norm_placement: Literal["post", "pre"] = "post"
    norm_eps: float = 1e-12
    norm_bias: bool = True
    embedding_norm: bool = True
    final_norm: bool = False
    first_attention_norm: bool = True
    hidden_act: str = "gelu"
    feed_forward_gated: bool = False
    attention_bias: bool = True
    feed_forward_bias: bool = True
    hidden_dropout_prob: float | int = 0.1
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    scaled_initialization: bool = False
    layerdrop: float | int = 0.0
    layerdrop_unit: Literal["layer", "sublayer"] = "layer"
    mlm_head_bias: bool = True
    pooling: Literal["mean", "cls", "last", "weighted_mean"] = "mean"
    token_weighting: Literal["none", "generalized_max"] = "none"
    token_weighting_regularization: float | int = 50.0
    token_weighting_power: float | int = 0.0
    token_dim: int | None = None
    token_head: Literal["linear", "mlp"] = "linear"
    token_skip_punctuation: bool = False
    query_token_weights: Literal["none", "idf", "table", "state"] = "none"
    token_min_weight: float | int = 0.0
    prompts: dict | None = None
    default_prompt_name: str | None = None
    normalize: bool = True
    similarity_fn_name: Literal["cosine", "dot", "euclidean", "manhattan"] = "cosine"
    original_model: str | None = None
    license: str | None = None
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if unknown := sorted(
            key for key in kwargs if key.startswith("_") and key not in ("_name_or_path", "_commit_hash")
        ):
            raise ValueError(f"config.json: {unknown[0]!r} is not a field of LongEmbedConfig; remove it")
        known = [field.name for field in fields(self)]
        for key in kwargs:  # transformers accepts any name, so that a misspelled field would go unnoticed
            if nearest := get_close_matches(key, known, n=1, cutoff=0.9):
                raise ValueError(f"{key!r} is not a field of LongEmbedConfig; did you mean {nearest[0]!r}?")
        if self.sublayer_pattern is None or not set(self.sublayer_pattern) <= set("sf"):
            layers = 6 if self.num_hidden_layers is None else self.num_hidden_layers
            if layers < 1:
                raise ValueError(f"num_hidden_layers={layers}; give at least 1")
            self.sublayer_pattern = expand_layout(self.sublayer_pattern or "interleaved", layers)
            self.num_hidden_layers = None  # it was the number of pairs; the letters decide from here on
        if "s" not in self.sublayer_pattern:
            raise ValueError(
                f"sublayer_pattern={self.sublayer_pattern!r} has no attention sublayer 's'; give at least one"
            )
        attention_sublayers = self.sublayer_pattern.count("s")
        if self.num_hidden_layers not in (None, attention_sublayers):
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} but sublayer_pattern={self.sublayer_pattern!r} has "
                f"{attention_sublayers} attention sublayers; leave num_hidden_layers out"
            )
        self.num_hidden_layers = attention_sublayers
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.attention_patterns = self._complete_patterns("attention_patterns")
        if self.training_attention_patterns is not None:
            self.training_attention_patterns = self._complete_patterns("training_attention_patterns")
        patterns = self.get_patterns()
        derived = [pattern.layer_type for pattern in patterns]
        if self.layer_types not in (None, derived):
            raise ValueError(
                f"layer_types={self.layer_types} contradicts attention_patterns, which it is derived from; "
                "remove layer_types"
            )
        self.layer_types = derived
        self.prompts = {"query": "", "document": ""} | (self.prompts or {})
        for name, text in self.prompts.items():
            if not isinstance(text, str):
                raise ValueError(f"prompts: {name!r} is {text!r}; give the text to put before an input")
        if self.default_prompt_name not in (None, *self.prompts):
            raise ValueError(
                f"default_prompt_name={self.default_prompt_name!r} is none of the prompts "
                f"{', '.join(map(repr, self.prompts))}; use one of these or leave it out"
            )
        if self.position_extension is not None:
            self.position_extension = self.position_scheme.complete_extension(self)
        super().__post_init__(**kwargs)
        # Set after transformers' own initialisation, because some releases add module names that we do not have.
        self.base_model_tp_plan = tensor_parallel_plan(self)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build a config as transformers does, and validate fields that are changed at load like those in the file."""
        # Entries of an earlier version lack the parameters that were added since.
        config_dict = config_dict | {
            name: [upgrade_entry(entry) for entry in config_dict[name]]
            for name in ("attention_patterns", "training_attention_patterns")
            if isinstance(config_dict.get(name), list)
        }
        # transformers sets the arguments of `from_pretrained` on the finished config, after `__post_init__`.
        changes = {name: kwargs.pop(name) for name in cls.__annotations__ if name in kwargs}
        if "attention_patterns" in changes:
            changes.setdefault("layer_types", None)  # derived from the new patterns
        return super().from_dict(config_dict | changes, **kwargs)

    def to_diff_dict(self) -> dict:
        """Return the content of config.json: for a model, its architecture and the mark of `MultiVectorEncoder`."""
        content = super().to_diff_dict()
        if architectures := content.get("architectures"):
            content["architectures"] = list(dict.fromkeys([*architectures, MULTI_VECTOR_MARK]))
        return content

    def _complete_patterns(self, name: str) -> list[dict]:
        """Return the field `name` as one complete entry, with all parameters, per attention sublayer."""
        entries, expected = getattr(self, name), str(self.sublayer_pattern).count("s")
        entries = entries if isinstance(entries, list) else [entries]
        for_all = len(entries) == 1
        if for_all:
            entries = entries * expected
        if len(entries) != expected:
            raise ValueError(
                f"{name} has {len(entries)} entries but sublayer_pattern={self.sublayer_pattern!r} has {expected} "
                "attention sublayers; give one entry for each, or one for all"
            )
        patterns = [build_pattern(entry, number, for_all) for number, entry in enumerate(entries)]
        return [{"type": pattern.type, **vars(pattern)} for pattern in patterns]

    def convert_rope_params_to_dict(self, **kwargs):
        """Read `rope_parameters` as transformers does, if the position scheme uses them.

        Raises:
            ValueError: `rope_parameters` are set, but the position scheme does not use them.
        """
        if self.position_scheme.rotates:
            given = set(self.rope_parameters or {})
            kwargs = super().convert_rope_params_to_dict(**kwargs)
            if given.intersection(self.layer_types):
                # transformers before 5.18 puts a default rope_theta beside the parameters of each kind of sublayer.
                self.rope_parameters = {name: self.rope_parameters[name] for name in given}
            return kwargs
        if self.rope_parameters:
            raise ValueError(
                f"rope_parameters are set but position_embedding_type={self.position_embedding_type!r}; "
                "remove them or set 'rope'"
            )
        return kwargs

    def validate_rope(self):
        """Check the RoPE parameters as transformers does, and report a missing key as a ValueError.

        Raises:
            ValueError: a key is missing.
        """
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from error

    def validate_sizes(self):
        """Check that sizes are positive, that they fit together, and that probabilities and names are valid.

        Raises:
            ValueError: a field is out of range.
        """
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give at least 1")
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not num_attention_heads={self.num_attention_heads} "
                f"times head_dim={self.head_dim}"
            )
        for name in ("hidden_dropout_prob", "attention_dropout", "layerdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give a probability, at least 0 and below 1")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} is not below vocab_size={self.vocab_size}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is none of transformers' activations, such as 'gelu'")

    def validate_pooling(self):
        """Check that token weights are used only with a pooling that averages tokens.

        Raises:
            ValueError: the pooling takes a single token, a number is out of range, or there is no table of weights.
        """
        for name, off in (("token_weighting", "none"), ("token_weighting_power", 0)):
            value = getattr(self, name)
            if value != off and self.pooling in ("cls", "last"):
                raise ValueError(
                    f"{name}={value!r} weights the tokens of a mean, and pooling={self.pooling!r} "
                    f"takes a single token; use pooling='mean', or {name}={off!r}"
                )
        if not 0 <= self.token_weighting_power < float("inf"):
            raise ValueError(f"token_weighting_power={self.token_weighting_power}; give 0 or a positive number")
        if self.token_weighting_power and self.query_token_weights == "none":
            raise ValueError(
                f"token_weighting_power={self.token_weighting_power} but there are no query_token_weights, whose table "
                "it is a power of; set query_token_weights, or leave it out"
            )
        if not 0 < self.token_weighting_regularization < float("inf"):
            raise ValueError(
                f"token_weighting_regularization={self.token_weighting_regularization}; give a positive number"
            )

    def validate_token_vectors(self):
        """Check that there are the head and the weights that other fields describe.

        Raises:
            ValueError: a number is out of range, or there is no head, or no table of weights.
        """
        if self.token_dim is not None and not 1 <= self.token_dim <= self.hidden_size:
            raise ValueError(
                f"token_dim={self.token_dim}; give at least 1 and at most hidden_size={self.hidden_size}, or leave it "
                "out for the token states themselves"
            )
        if self.token_dim is None and self.token_head != "linear":
            raise ValueError(
                f"token_head={self.token_head!r} but token_dim is not set, so that there is no head; set token_dim"
            )
        if not 0 <= self.token_min_weight < float("inf"):
            raise ValueError(f"token_min_weight={self.token_min_weight}; give 0 or a positive number")
        if self.token_min_weight and self.query_token_weights == "none":
            raise ValueError(
                f"token_min_weight={self.token_min_weight} but there are no query_token_weights, whose table tells "
                "which tokens are left out; set query_token_weights, or leave it out"
            )

    def validate_positions(self):
        """Check that the position scheme can be computed with these sizes and patterns."""
        check_buckets(self)
        self.position_scheme.check(self)

    def validate_attention(self):
        """Check that every pattern can be combined with the other fields and does not exceed the context.

        Raises:
            ValueError: a pattern cannot be used.
        """
        if self.is_causal and self.pooling == "cls":
            raise ValueError(
                "is_causal=true lets the first token see nothing but itself; set pooling to 'mean' or 'last'"
            )
        for pattern, trained in zip(self.get_patterns(), self.get_training_patterns(), strict=True):
            for which in (pattern, trained):
                which.check(self)
                for name in ("window", "size"):  # a size beyond the context has no effect
                    if (value := getattr(which, name, 0)) > self.max_position_embeddings:
                        raise ValueError(
                            f"attention_patterns: {name}={value} of {which.type!r} is more than "
                            f"max_position_embeddings={self.max_position_embeddings}; use 'full' or a smaller one"
                        )
            if trained != pattern and (trained.own_weights or pattern.own_weights):
                raise ValueError(
                    f"training_attention_patterns: {trained.type!r} cannot replace {pattern.type!r} in training, "
                    "because one of the two has weights of its own; leave training_attention_patterns out"
                )

    @property
    def extends_by_groups(self) -> bool:
        """Whether positions are extended by Self-Extend, which computes two scores for every pair of tokens."""
        return self.position_scheme.merges_scores(self)

    @property
    def position_scheme(self) -> PositionScheme:
        """The position scheme named by `position_embedding_type`; raises ValueError if there is none."""
        return get_scheme(self.position_embedding_type)

    def get_patterns(self) -> list:
        """Return the attention patterns, one object per attention sublayer."""
        return [build_pattern(entry) for entry in self.attention_patterns]

    def get_training_patterns(self) -> list:
        """Return the attention patterns in training, one object per attention sublayer."""
        return [build_pattern(entry) for entry in self.training_attention_patterns or self.attention_patterns]
