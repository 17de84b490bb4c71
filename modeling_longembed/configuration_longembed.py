"""The configuration: four independent choices (positions, attention pattern, layout, output) and the sizes.

What cannot be combined is refused here, when the config is built, with the fields and the remedy in the message.
"""

from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from typing import ClassVar, Literal

from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import strict  # without it nothing is validated

from .layout_registry_longembed import expand_layout
from .pattern_registry_longembed import build_pattern
from .position_base_longembed import PositionScheme
from .position_buckets_longembed import check_buckets
from .position_schemes_longembed import get_scheme
from .tensor_parallel_longembed import tensor_parallel_plan


def with_errors_of_one_sentence(cls: type) -> type:
    """Class decorator over `strict`: the ValueError has the sentence of the mistake alone.

    `strict` itself wraps a mistake in lines of its own.
    """
    strict_init = cls.__init__  # type: ignore[misc]  # of the class itself, which is what a class decorator is given

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


@with_errors_of_one_sentence
@strict
class LongEmbedConfig(PretrainedConfig):
    """Configuration of a LongEmbed encoder.

    Args:
        vocab_size, type_vocab_size: rows of the token and segment tables; 0 segments: no such table.
        hidden_size, num_attention_heads, intermediate_size: widths d, H, and of the feed-forward sublayer.
        sublayer_pattern: the layout, one letter a sublayer: `s` self-attention, `f` feed-forward; or by name,
            `interleaved` (the default, `sfsf...`), `sandwich(k)`, `par(p)`, of `num_hidden_layers` pairs.
        num_hidden_layers: attention sublayers; follows from the letters of `sublayer_pattern`.
        layerdrop: probability to leave out a layer in training (LayerDrop); layerdrop_unit: `layer`, an attention and
            the feed-forwards after it, or `sublayer`.
        scaled_initialization: Megatron's: output projections start at `initializer_range / sqrt(sublayers)`.
        attention_patterns: which keys a query sees, one entry an attention sublayer (or one entry for all): a name or
            `{"type": name, **parameters}`, see `pattern_registry_longembed`.
        training_attention_patterns: what the same weights use while they train (S2-Attn of LongLoRA: train `shifted`,
            serve `full`); None: the same.
        is_causal: no token sees a later one.
        max_position_embeddings: context length in tokens; what is longer is cut off (and said) by `encode`.
        position_embedding_type: `absolute` (learned table), `sinusoidal`, `rope`, `alibi`, `relative` (Transformer-XL),
            `none` (NoPE: the causal mask is the only order).
        relative_attention_num_buckets, relative_attention_max_distance: a learned bias by distance beside the scheme
            (MPNet, T5); 0: none.
        rope_parameters: transformers' form, flat or one dict a layer type (`full_attention`, `sliding_attention`,
            `chunked_attention`).
        position_extension: how documents beyond the original context are read: `{"method": ...,
            "original_max_position_embeddings": ...}`. absolute and sinusoidal: repeat, interpolate, group, restart
            (`period`); rope: linear, dynamic, ntk, theta (`rope_theta`), yarn, group (Self-Extend, `neighbours`).
            `factor` defaults to new over original length. `keep_short` (default true): a document that fits the
            original context is read as the original model read it.
        norm_placement: `post` (BERT) or `pre` (ModernBERT).
        embedding_norm, final_norm, first_attention_norm: whether these norms exist. norm_bias, attention_bias,
            feed_forward_bias: biases.
        hidden_act, feed_forward_gated: activation; gated: `down(act(up(x)) * gate(x))`, ModernBERT's GeGLU.
        pooling: how a document becomes one vector: `mean`, `cls`, `last`, `weighted_mean` (weights 1..L).
        token_weighting: `generalized_max` weighs the token states of a document before a mean, so that what it says
            over and over does not drown what it says once; see `token_weights` in `output_pooling_longembed`.
        token_weighting_regularization: how often a token may come before it counts less; the larger, the nearer to
            plain pooling.
        prompts: text put before an input of a kind; evaluation and serving use the names `query` and `document`.
        original_model, license: where the weights came from and under which licence, for the model card.

    Raises:
        ValueError: a combination that cannot work; the message names the fields and what to use.
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
    prompts: dict | None = None
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
        for key in kwargs:  # transformers takes any name; ours are long, and a slip in one would go unnoticed
            if nearest := get_close_matches(key, known, n=1, cutoff=0.9):
                raise ValueError(f"{key!r} is not a field of LongEmbedConfig; did you mean {nearest[0]!r}?")
        if self.sublayer_pattern is None or not set(self.sublayer_pattern) <= set("sf"):
            layers = 6 if self.num_hidden_layers is None else self.num_hidden_layers
            if layers < 1:
                raise ValueError(f"num_hidden_layers={layers}; give at least 1")
            self.sublayer_pattern = expand_layout(self.sublayer_pattern or "interleaved", layers)
            self.num_hidden_layers = None  # of a named layout the pairs, from which the letters follow
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
        if self.position_extension is not None:
            self.position_extension = self.position_scheme.complete_extension(self)
        super().__post_init__(**kwargs)
        # Under transformers' name for it, and after transformers, some releases of which add names we do not have.
        self.base_model_tp_plan = tensor_parallel_plan(self)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build as transformers does; a field that is changed at load is completed and checked like one in the file."""
        # transformers sets what is passed to `from_pretrained` on the finished config, past `__post_init__`.
        changes = {name: kwargs.pop(name) for name in cls.__annotations__ if name in kwargs}
        if "attention_patterns" in changes:
            changes.setdefault("layer_types", None)  # derived anew
        return super().from_dict(config_dict | changes, **kwargs)

    def _complete_patterns(self, name: str) -> list[dict]:
        """Return the field `name` with one entry per attention sublayer and every parameter of each."""
        entries, expected = getattr(self, name), str(self.sublayer_pattern).count("s")
        entries = entries if isinstance(entries, list) else [entries]
        if len(entries) == 1:
            entries = entries * expected
        if len(entries) != expected:
            raise ValueError(
                f"{name} has {len(entries)} entries but sublayer_pattern={self.sublayer_pattern!r} has {expected} "
                "attention sublayers; give one entry for each, or one for all"
            )
        patterns = [build_pattern(entry) for entry in entries]
        return [{"type": pattern.type, **vars(pattern)} for pattern in patterns]

    def convert_rope_params_to_dict(self, **kwargs):
        """Read `rope_parameters` as transformers does, for models that rotate; others have none.

        Raises:
            ValueError: the position scheme does not rotate, and there are rope_parameters.
        """
        if self.position_scheme.rotates:
            return super().convert_rope_params_to_dict(**kwargs)
        if self.rope_parameters:
            raise ValueError(
                f"rope_parameters are set but position_embedding_type={self.position_embedding_type!r}; "
                "remove them or set 'rope'"
            )
        return kwargs

    def validate_rope(self):
        """Check the rotation as transformers does; a missing key is a mistake of the user.

        Raises:
            ValueError: a key is missing.
        """
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from error

    def validate_sizes(self):
        """Check that widths are positive and fit together.

        Raises:
            ValueError: they do not.
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
        """Check that weights of tokens belong to a mean.

        Raises:
            ValueError: they do not, or the regularization is not positive.
        """
        if self.token_weighting != "none" and self.pooling in ("cls", "last"):
            raise ValueError(
                f"token_weighting={self.token_weighting!r} weighs the tokens of a mean, and pooling={self.pooling!r} "
                "takes one; use pooling='mean', or token_weighting='none'"
            )
        if not 0 < self.token_weighting_regularization < float("inf"):
            raise ValueError(
                f"token_weighting_regularization={self.token_weighting_regularization}; give a positive number"
            )

    def validate_positions(self):
        """Check that the position scheme can be computed with these sizes and patterns."""
        check_buckets(self)
        self.position_scheme.check(self)

    def validate_attention(self):
        """Check that every pattern can be combined with the rest, and reaches no further than the context.

        Raises:
            ValueError: one cannot.
        """
        if self.is_causal and self.pooling == "cls":
            raise ValueError(
                "is_causal=true lets the first token see nothing but itself; set pooling to 'mean' or 'last'"
            )
        for pattern, trained in zip(self.get_patterns(), self.get_training_patterns(), strict=True):
            for which in (pattern, trained):
                which.check(self)
                for name in ("window", "size"):  # beyond the context it has an effect nowhere: a slip, not a choice
                    if (value := getattr(which, name, 0)) > self.max_position_embeddings:
                        raise ValueError(
                            f"attention_patterns: {name}={value} of {which.type!r} is more than "
                            f"max_position_embeddings={self.max_position_embeddings}; use 'full' or a smaller one"
                        )
            if trained != pattern and (trained.own_weights or pattern.own_weights):
                raise ValueError(
                    f"training_attention_patterns: {trained.type!r} cannot stand in for {pattern.type!r}, because one "
                    "of the two has weights of its own; leave training_attention_patterns out"
                )

    @property
    def extends_by_groups(self) -> bool:
        """Whether Self-Extend computes two scores for every pair of tokens."""
        return self.position_scheme.merges_scores(self)

    @property
    def position_scheme(self) -> PositionScheme:
        """The scheme that is called `position_embedding_type`; raises ValueError if there is none."""
        return get_scheme(self.position_embedding_type)

    def get_patterns(self) -> list:
        """Return the attention patterns, one object per attention sublayer."""
        return [build_pattern(entry) for entry in self.attention_patterns]

    def get_training_patterns(self) -> list:
        """Return the attention patterns in training, one object per attention sublayer."""
        return [build_pattern(entry) for entry in self.training_attention_patterns or self.attention_patterns]
