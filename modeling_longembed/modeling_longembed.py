"""The encoder: embeddings, a list of residual sublayers read off `config.sublayer_pattern`, and pooling.

Shapes: B documents, S tokens of the longest document in a padded batch, T packed tokens, R rows that the sublayers
compute (the T tokens and the rows that a pattern inserts between them), d model width, H heads, D head size, V size of
the vocabulary. Padding is removed once, before the embeddings, and restored once, after the last sublayer.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput
from transformers.utils import can_return_tuple

from .attention_longembed import DEFAULT_KERNEL, LayerContext, LongEmbedAttention, ResidualLinear, check_kernel
from .configuration_longembed import LongEmbedConfig
from .conversion_longembed import convert_encoder
from .encoding_longembed import encode_stream, encode_texts, tokenize_texts
from .export_native_longembed import export_native
from .export_onnx_longembed import export_onnx
from .hub_longembed import HubModel
from .hub_sentence_transformers_longembed import states_with_token_vectors
from .layout_layerdrop_longembed import draw_layers, prune_to_layers, prune_to_sublayers, skip_layer
from .output_pooling_longembed import pool, token_weights
from .output_similarity_longembed import similarity
from .output_token_fitting_longembed import fit_query_token_weights, fit_token_head
from .output_token_spans_longembed import token_spans
from .output_tokens_longembed import LongEmbedTokenOutput, check_side, left_out_ids
from .packing_longembed import PackedDocuments
from .pattern_adaptive_span_longembed import find_adaptive_spans, total_span_penalty
from .pattern_base_longembed import TokenSequence
from .pattern_memory_longembed import Memory, Stream
from .position_base_longembed import Positions
from .position_buckets_longembed import bucket_bias, build_buckets
from .position_extension_longembed import extend_model_context
from .position_switching_longembed import switch_position_scheme
from .tensor_parallel_longembed import check_parallelism


class LongEmbedEmbeddings(nn.Module):
    """Token, position and segment embeddings of packed tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = config.position_scheme.build_table(config)
        self.token_type_embeddings = None
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        # One pattern object per type is enough: sublayers of one type share the modules and the inserted rows.
        self.patterns = {pattern.type: pattern for pattern in config.get_patterns()}
        for pattern in self.patterns.values():
            for name, module in pattern.build_embeddings(config).items():
                self.add_module(name, module)
        self.norm = None
        if config.embedding_norm:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def prepare(
        self, inputs: Tensor, token_type_ids: Tensor | None, token_index: Tensor, documents: PackedDocuments
    ) -> TokenSequence:
        """Look up the word vectors and let the patterns insert rows between the tokens.

        Args:
            inputs: token ids `(B, S)` or word vectors `(B, S, d)`; packed: `(1, T)` or `(1, T, d)`.
            token_type_ids: segment ids, `(B, S)` or `(1, T)`; zeros if None.
            token_index: `(T,)`, position of each token in its document.
            documents: the packed documents.

        Returns:
            The rows that the sublayers compute.
        """
        words = documents.pack(inputs)
        if inputs.ndim == 2:
            words = self.word_embeddings(words)
        segments = torch.zeros_like(token_index) if token_type_ids is None else documents.pack(token_type_ids)
        places = self.config.position_scheme.places(self.config, documents, token_index)
        sequence = TokenSequence(documents, words, segments, places)
        for pattern in self.patterns.values():
            sequence = pattern.prepare_sequence(self, sequence)
        return sequence

    def forward(self, sequence: TokenSequence) -> Tensor:
        """Add segment and position embeddings to the word vectors of all rows; return `(R, d)`."""
        hidden_states = sequence.words
        if self.token_type_embeddings is not None:
            hidden_states = hidden_states + self.token_type_embeddings(sequence.segments)
        scheme = self.config.position_scheme
        hidden_states = scheme.embed(hidden_states, sequence.places, self.position_embeddings)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        return self.dropout(hidden_states)


# Largest number of inner states of a feed-forward sublayer that are computed at once on a CPU (16 MB in fp32). malloc
# requests blocks of more than 32 MB from the system each time, and for a long document the page faults would cost as
# much as the arithmetic.
MAX_INNER_STATES = 2**22


class LongEmbedFeedForward(nn.Module):
    """`down(act(up(x)))`, or gated: `down(act(up(x)) * gate(x))` (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.feed_forward_bias)
        self.gate_proj = None
        if config.feed_forward_gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.feed_forward_bias)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, bias=config.feed_forward_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = max(1, MAX_INNER_STATES // self.up_proj.out_features)
        if _benefits_from_chunks(hidden_states) and len(hidden_states) > rows:
            return torch.cat([self._transform(chunk) for chunk in hidden_states.split(rows)])
        return self._transform(hidden_states)

    def _transform(self, hidden_states: Tensor) -> Tensor:
        inner = self.act(self.up_proj(hidden_states))
        if self.gate_proj is not None:
            inner = inner * self.gate_proj(hidden_states)
        return self.down_proj(inner)


def _benefits_from_chunks(hidden_states: Tensor) -> bool:
    """Return whether rows are computed faster in chunks: on a CPU, in inference, outside a compiled graph."""
    return hidden_states.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class LongEmbedSublayer(GradientCheckpointingLayer):
    """One residual sublayer, attention or feed-forward: `norm(x + f(x))` (post) or `x + f(norm(x))` (pre).

    Args:
        config: the config of the model.
        pattern: the attention pattern; None: the sublayer is a feed-forward one.
        training_pattern: the attention pattern in training; None: the same.
        has_norm: whether there is a norm.
    """

    def __init__(self, config, pattern=None, training_pattern=None, has_norm: bool = True):
        super().__init__()
        self.norm_placement = config.norm_placement
        self.attention = LongEmbedAttention(config, pattern, training_pattern) if pattern is not None else None
        self.feed_forward = LongEmbedFeedForward(config) if pattern is None else None
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias) if has_norm else nn.Identity()
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, context: LayerContext) -> tuple[Tensor, list[Tensor] | None]:
        """Compute `(T, d)` from `(T, d)`, and the attention weights of each document if there are any."""
        states = self.norm(hidden_states) if self.norm_placement == "pre" else hidden_states
        weights = None
        if self.attention is not None:
            states, weights = self.attention(states, context)
        elif self.feed_forward is not None:
            states = self.feed_forward(states)
        hidden_states = hidden_states + self.dropout(states)
        return self.norm(hidden_states) if self.norm_placement == "post" else hidden_states, weights


class LongEmbedPreTrainedModel(HubModel):
    """Base class of the models: loading, saving, conversion and initialisation."""

    config_class = LongEmbedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongEmbedSublayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    # Methods that are defined as functions in the module of their subject.
    to_native = export_native
    extend_context = extend_model_context
    switch_positions = switch_position_scheme
    keep_layers = prune_to_layers
    keep_sublayers = prune_to_sublayers
    adaptive_spans = find_adaptive_spans
    span_penalty = total_span_penalty

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str,
        max_position_embeddings: int | None = None,
        position_extension: dict | str | None = None,
        attention_patterns: list | dict | str | None = None,
        attn_implementation: str | None = None,
        **kwargs,
    ):
        """Turn a pretrained encoder into a long-document model; see `convert_encoder` in `conversion_longembed`.

        Args:
            name_or_path: Hub id or folder of the encoder.
            max_position_embeddings: new context in tokens; None: the original one.
            position_extension: how documents beyond the original context are read.
            attention_patterns: which keys a query sees; None: the original's.
            attn_implementation: name of the attention kernel.
            **kwargs: further config fields, and the options with which files are found.
        """
        choices = (max_position_embeddings, position_extension, attention_patterns, attn_implementation)
        return convert_encoder(cls, name_or_path, *choices, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialise a module as transformers does, and our own parameters; parameters of a checkpoint are kept."""
        super()._init_weights(module)
        std = self.config.initializer_range
        self.config.position_scheme.initialize(module, std)
        if isinstance(module, LongEmbedTokenOutput):
            module.initialize()
        # Megatron (Shoeybi et al. 2019, section 5.1): divide by the square root of the number of residual additions.
        if self.config.scaled_initialization and isinstance(module, ResidualLinear):
            init.normal_(module.weight, std=std / len(self.config.sublayer_pattern) ** 0.5)

    @torch.no_grad()
    def initialize_weights(self):
        """Initialise as transformers does, then the patterns' own weights, which depend on the rest of the sublayer."""
        super().initialize_weights()
        self.initialize_own_weights()

    @torch.no_grad()
    def initialize_own_weights(self):
        """Initialise the patterns' own weights, given the other weights of their sublayers."""
        for module in self.modules():
            if isinstance(module, LongEmbedAttention):
                module.pattern.initialize(module)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """Resize the word embeddings as transformers does, and the query weights: a new token is as rare as any."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        output = cast(LongEmbedTokenOutput, self.base_model.token_output)
        if output.query_table is not None:
            table, rows = output.query_table.detach(), embeddings.num_embeddings
            output.set_table(torch.cat([table[:rows], table.abs().max().expand(max(0, rows - len(table)))]))
        return embeddings

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Check the kernel; the default is the packed kernel, where transformers would choose padded SDPA."""
        name = requested_attention or DEFAULT_KERNEL
        check_kernel(name, self.config)
        return super().get_correct_attn_implementation(name, is_init_check)


@dataclass
class LongEmbedModelOutput(BaseModelOutputWithPooling):
    """The output of transformers, and what a long document adds.

    Attributes:
        memory: the memory of documents that are encoded in chunks.
        token_vectors: `(B, S, k)`, a vector a token, if asked for.
        token_mask: `(B, S)` bool, which tokens have one.
    """

    memory: Memory | None = None
    token_vectors: Tensor | None = None
    token_mask: Tensor | None = None


class LongEmbedModel(LongEmbedPreTrainedModel):
    """A long-document encoder: `pooler_output` is the vector of each document, `token_vectors` those of its tokens."""

    tokenize = tokenize_texts
    encode = encode_texts
    encode_stream = encode_stream
    similarity = similarity
    to_onnx = export_onnx
    token_spans = token_spans
    fit_token_head = fit_token_head
    fit_query_token_weights = fit_query_token_weights
    states_with_token_vectors = states_with_token_vectors

    def __init__(self, config):
        super().__init__(config)
        check_parallelism(config)
        self.embeddings = LongEmbedEmbeddings(config)
        self.relative_attention_bias = build_buckets(config)
        patterns = zip(config.get_patterns(), config.get_training_patterns(), strict=True)
        self.layers = nn.ModuleList(
            LongEmbedSublayer(
                config, *(next(patterns) if kind == "s" else ()), has_norm=index > 0 or config.first_attention_norm
            )
            for index, kind in enumerate(config.sublayer_pattern)
        )
        self.final_norm = None
        if config.final_norm:
            self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.weighs_tokens = True  # False: states as they are, whatever the config says
        self.token_output = LongEmbedTokenOutput(config)
        self._left_out: tuple | None = None  # see `left_out_tokens`
        self.layers_of_batch: list[bool] | None = None  # set by `layers_drawn_once`
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.word_embeddings = cast(nn.Embedding, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        memory: Memory | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        token_vectors: str | Tensor | None = None,
        **kwargs,
    ) -> LongEmbedModelOutput:
        """Encode a padded batch, or packed documents.

        Args:
            input_ids: `(B, S)`; packed: `(1, T)`.
            attention_mask: `(B, S)`, non-zero on real tokens; padding may be anywhere.
            token_type_ids: shape of `input_ids`; zeros if None.
            position_ids: shape of `input_ids`, positions in the document; counted from 0 in each document if None.
            inputs_embeds: `(B, S, d)`, word vectors instead of `input_ids`.
            global_attention_mask: shape of `input_ids`, non-zero on tokens that see and are seen everywhere (sliding
                patterns).
            cu_seq_lens_q: `(B + 1,)` int32, cumulative lengths: the input is packed. The name is transformers' own.
            max_length_q: length of the longest packed document in tokens; counted if None.
            memory: the memory that the previous call returned, if the input is the next chunk of every document;
                `new_memory()` for the first chunk. None: the input is whole documents.
            output_attentions: return the weights of each attention sublayer, `(B, H, S, S)`; needs the kernel `eager`.
            output_hidden_states: return the embeddings and the states after each SUBLAYER, `(B, S, d)`. In the layout
                `sfsf...` every second entry corresponds to a layer of the original. The last entry is taken after the
                final norm, if there is one.
            token_vectors: return a vector a token too, as for texts that are a `query` or a `document`; `(B,)` bool,
                which texts are queries, if both are among them; None: do not.
            **kwargs: `return_dict=False` gives a tuple; everything else is ignored.

        Returns:
            `last_hidden_state` `(B, S, d)`, zeros at padding (packed: `(1, T, d)`), weighted by
            `config.token_weighting`, and `pooler_output` `(B, d)`, one vector per document by `config.pooling`, not
            normalised. With `memory`, `pooler_output` is the embedding of all chunks read so far, and `memory` is the
            one to pass with the next chunk. With `token_vectors`, `token_vectors` `(B, S, k)` (packed: `(1, T, k)`),
            fp32 or wider: unit vectors, for a query times the weights of `config.query_token_weights`; and
            `token_mask` `(B, S)` bool (packed: `(1, T)`), False at padding and at tokens that are left out (special
            tokens and, if `config.token_skip_punctuation`, punctuation), whose vectors are zero.

        Raises:
            ValueError: the inputs contradict each other, the kernel cannot compute this model, or token vectors are
                asked for and there is no tokenizer to tell which tokens are left out.
        """
        config, inputs = self.config, inputs_embeds if input_ids is None else input_ids
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        self._check_pass(memory, position_ids, output_attentions)
        check_side(token_vectors, input_ids is not None)

        documents = PackedDocuments.from_inputs(
            inputs, attention_mask, global_attention_mask, cu_seq_lens_q, max_length_q
        )
        stream = None
        if memory is not None:
            attentions = [layer.attention for layer in self.layers if layer.attention is not None]
            stream = Stream(config, attentions, memory, documents, self.training)
            documents = stream.documents
        token_index = documents.token_index
        if position_ids is not None:
            token_index = documents.pack(position_ids.expand(inputs.shape[:2]))

        sequence = self.embeddings.prepare(inputs, token_type_ids, token_index, documents)
        hidden_states = self.embeddings(sequence)  # (R, d) from here to the end of the sublayers
        positions = self._positions(documents, token_index, hidden_states)
        if sequence.source is not None:
            positions = positions.at(sequence.source)
        context = LayerContext(sequence.documents, positions, stream)
        all_hidden_states, all_weights = [hidden_states], []
        for layer, is_used in zip(self.layers, self.layers_of_batch or self.draw_layers(), strict=True):
            weights = None
            if is_used:
                hidden_states, weights = layer(hidden_states, context=context)
            else:
                hidden_states = skip_layer(layer, hidden_states)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            if output_attentions and weights is not None:
                all_weights.append(documents.unpack_weights(sequence.weights_of_tokens(weights)))
        if self.final_norm is not None:
            all_hidden_states[-1] = hidden_states = self.final_norm(hidden_states)

        hidden_states = sequence.of_tokens(hidden_states)  # (T, d)
        vectors = token_mask = None
        if token_vectors is not None:
            left_out = self.left_out_tokens(hidden_states.device)
            side = token_vectors
            if isinstance(side, Tensor):
                side = side.repeat_interleave(documents.cu_seqlens.diff(), output_size=len(hidden_states))
            packed = self.token_output(hidden_states, documents.pack(inputs), left_out, side)
            vectors, token_mask = map(documents.unpack, packed)
        hidden_states = self._weigh_tokens(hidden_states, documents, input_ids)
        if stream is None:
            pooled = pool(hidden_states, documents.cu_seqlens, config.pooling)
        else:
            pooled, memory = stream.finish(hidden_states)
        states = (documents.unpack(sequence.of_tokens(states)) for states in all_hidden_states)
        return LongEmbedModelOutput(
            last_hidden_state=documents.unpack(hidden_states),
            pooler_output=pooled,
            memory=memory,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            token_vectors=vectors,
            token_mask=token_mask,
        )

    def left_out_tokens(self, device: torch.device) -> Tensor:
        """Return which ids of the vocabulary have no token vector, bool `(V,)`, as the model's tokenizer says.

        This is read off the tokenizer, which every model folder has, and again when another tokenizer is set or gets
        more tokens. It is no buffer: it would have to be computed anew after a model has been loaded.

        Args:
            device: where it is needed.

        Raises:
            ValueError: the model has no tokenizer.
        """
        tokenizer, config = self.tokenizer, self.config
        state = (
            tokenizer,
            len(tokenizer),
            tuple(tokenizer.all_special_ids),
            config.token_skip_punctuation,
            config.vocab_size,
        )
        if self._left_out is None or self._left_out[0] != state:
            left_out = torch.zeros(config.vocab_size, dtype=torch.bool)
            ids = left_out_ids(tokenizer, config.token_skip_punctuation)
            left_out[[number for number in ids if number < config.vocab_size]] = True
            self._left_out = (state, left_out)
        if self._left_out[1].device != device:
            self._left_out = (state, self._left_out[1].to(device))
        return self._left_out[1]

    def new_memory(self, batch_size: int = 1) -> Memory:
        """Return the empty memory that `forward` takes with the first chunk of `batch_size` documents.

            memory = model.new_memory()
            for chunk in input_ids.split(8192, dim=1):
                output = model(chunk, memory=memory)
                memory = output.memory
            embedding = output.pooler_output

        gives the same vector as `model(input_ids).pooler_output`, but holds one chunk at a time. All attention
        sublayers must have the pattern `memory` or `block`, and the length of every chunk but the last of a document
        must be a multiple of their sizes.
        """
        return Memory.empty(self.config, batch_size, self.training, self.dtype, self.device)

    def _check_pass(self, memory: Memory | None, position_ids: Tensor | None, output_attentions: bool) -> None:
        """Raise ValueError if the options of a forward pass cannot be combined."""
        kernel = self.config._attn_implementation
        if output_attentions and kernel != "eager":
            raise ValueError(
                "attention weights exist in the eager kernel only; call model.set_attn_implementation('eager') first"
            )
        if memory is not None and (position_ids is not None or output_attentions):
            raise ValueError(
                "memory: positions continue from the previous chunk, and attention weights extend beyond this chunk; "
                "leave position_ids and output_attentions out"
            )
        if self.training and self.config.training_attention_patterns is not None:
            check_kernel(kernel, self.config, training=True)

    def draw_layers(self) -> list[bool]:
        """Return which sublayers are computed in this forward pass: all, except under LayerDrop in training."""
        if self.training and self.config.layerdrop:
            return draw_layers(self.config.sublayer_pattern, self.config.layerdrop, self.config.layerdrop_unit)
        return [True] * len(self.layers)

    def _positions(self, documents: PackedDocuments, token_index: Tensor, hidden_states: Tensor) -> Positions:
        """Return what positions contribute to attention, computed once for all sublayers."""
        positions = self.config.position_scheme.prepare(self.config, documents, token_index, hidden_states)
        if self.relative_attention_bias is not None:
            positions.bias = bucket_bias(self.config, self.relative_attention_bias)
        return positions

    def _weigh_tokens(self, hidden_states: Tensor, documents: PackedDocuments, input_ids: Tensor | None) -> Tensor:
        """Multiply the states `(T, d)` by the weights of `config.token_weighting` and `token_weighting_power`."""
        config, weights = self.config, None
        if self.weighs_tokens and config.token_weighting_power:
            if input_ids is None:
                raise ValueError(
                    f"token_weighting_power={config.token_weighting_power} needs input_ids: inputs_embeds do not tell "
                    "which words they are of"
                )
            weights = self.token_output.rarity(documents.pack(input_ids), config.token_weighting_power)
        if self.weighs_tokens and config.token_weighting != "none":
            weights = token_weights(hidden_states, documents, config.token_weighting_regularization, weights)
        return hidden_states if weights is None else hidden_states * weights[:, None].to(hidden_states.dtype)


@dataclass
class LongEmbedMaskedLMOutput(MaskedLMOutput):
    """The output of transformers with the memory of documents that are encoded in chunks."""

    memory: Memory | None = None


class LongEmbedMaskedLMHead(nn.Module):
    """Dense, activation, norm, and the projection to the vocabulary, tied to the word embeddings."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlm_head_bias)
        self.act = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.norm(self.act(self.dense(hidden_states))))


class LongEmbedForMaskedLM(LongEmbedPreTrainedModel):
    """The encoder under a masked-language-model head."""

    _tied_weights_keys = {"head.decoder.weight": "model.embeddings.word_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = LongEmbedModel(config)
        self.model.weighs_tokens = False  # the weights are for embeddings; the head reads unweighted states
        self.head = LongEmbedMaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Linear):
        self.head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        only_predicted: bool = False,  # not "labelled": the Trainer takes a name with "label" for a column of labels
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> LongEmbedMaskedLMOutput:
        """Compute the vocabulary scores of every token.

        Args:
            input_ids, attention_mask, **kwargs: as in `LongEmbedModel.forward`.
            labels: `(B, S)`, -100 where nothing is predicted.
            only_predicted: project the P positions that have a label to the vocabulary, and no others: the logits of a
                whole long document may not fit into memory.
            num_items_in_batch: number that the sum of the cross-entropy is divided by, which transformers' `Trainer`
                gives: the labels of all batches that it accumulates; None: the number P of labels here.

        Returns:
            `loss` (mean cross-entropy, if labels are given), `logits` (`(B, S, V)`, packed `(1, T, V)`; `(P, V)` with
            `only_predicted`), and `memory` as in the encoder.

        Raises:
            ValueError: `only_predicted` without labels.
        """
        if only_predicted and labels is None:
            raise ValueError("only_predicted=True needs labels, which say where logits are computed")
        outputs = self.model(input_ids, attention_mask=attention_mask, **kwargs, return_dict=True)
        hidden_states, loss = outputs.last_hidden_state, None
        chosen = None if labels is None else labels != -100
        logits = self.head(hidden_states[chosen] if only_predicted else hidden_states)
        if labels is not None:
            predicted = logits if only_predicted else logits[chosen]
            loss = nn.functional.cross_entropy(
                predicted.float(), labels[chosen], reduction="mean" if num_items_in_batch is None else "sum"
            )
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return LongEmbedMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            memory=outputs.memory,
        )


# With this, saving writes `auto_map` and copies these files, so that trust_remote_code loads the folder anywhere.
LongEmbedConfig.register_for_auto_class()
LongEmbedModel.register_for_auto_class("AutoModel")
LongEmbedForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
