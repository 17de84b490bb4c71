"""`model.encode`: texts to vectors, without padding, so that a vector does not depend on the rest of the batch."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .hub_longembed import HubModel
from .output_pooling_longembed import pool
from .packing_longembed import split_documents

logger = logging.get_logger(__name__)


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def budget_batches(
    lengths: Sequence[int], batch_tokens: int, *, longest_first: bool = True, padded: bool = False
) -> list[list[int]]:
    """Divide documents greedily into batches of at most `batch_tokens` tokens; a longer document is a batch of its own.

    Args:
        lengths: tokens of each document.
        batch_tokens: tokens of a batch.
        longest_first: start with the longest documents, so that a lack of memory shows at once; otherwise keep the
            given order.
        padded: count a batch as if all its documents were padded to its longest one.

    Returns:
        Indices into `lengths`, one list per batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i]) if longest_first else range(len(lengths))
    batches: list[list[int]] = []
    total = longest = 0
    for index in order:
        total, longest = total + lengths[index], max(longest, lengths[index])
        if not batches or (longest * (len(batches[-1]) + 1) if padded else total) > batch_tokens:
            batches.append([])
            total = longest = lengths[index]
        batches[-1].append(index)
    return batches


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the special tokens that a tokenizer puts before and after a text, e.g. `[CLS]` and `[SEP]`."""
    marked = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
    ids, special = marked["input_ids"], marked["special_tokens_mask"]
    words = [position for position, flag in enumerate(special) if not flag] or [len(ids) - 1]
    return ids[: words[0]], ids[words[-1] + 1 :]


def tokenize_texts(model: HubModel, texts: list[str], prompt: str = "", overflow: str = "warn") -> list[list[int]]:
    """Tokenize texts with special tokens, and cut off what exceeds the context, but not the closing special token.

    Args:
        model: the model, whose `encode_tokenizer` is used.
        texts: any strings; an empty one gives only the special tokens.
        prompt: text that is put in front of every text.
        overflow: if texts exceed the context, `warn` logs how much was cut off, `error` raises.

    Returns:
        The token ids of each text.

    Raises:
        ValueError: a text is longer than the context, and `overflow` is `error`.
    """
    limit = model.config.max_position_embeddings
    encoded = model.encode_tokenizer(
        [prompt + text for text in texts], add_special_tokens=True, truncation=False, verbose=False
    )
    rows = encoded["input_ids"]
    cut = [len(row) - limit for row in rows if len(row) > limit]
    if cut:
        message = (
            f"{len(cut)} of {len(rows)} texts are longer than the context of {limit} tokens "
            f"(max_position_embeddings); {sum(cut)} of {sum(map(len, rows))} tokens"
        )
        if overflow == "error":
            raise ValueError(f"{message} would be cut off; split them, or extend the model")
        logger.warning(f"{message} were cut off at the end")
        _, closing = special_tokens_around(model.encode_tokenizer)
        rows = [row if len(row) <= limit else row[: limit - len(closing)] + closing for row in rows]
    return rows


@torch.no_grad()
def encode_texts(
    model: HubModel,
    texts: str | list[str],
    prompt_name: str | None = None,
    batch_tokens: int = 16_384,
    normalize: bool | None = None,
    truncate_dim: int | None = None,
    late_chunk_tokens: int | None = None,
    overflow: str = "warn",
    output: str = "numpy",
    precision: str = "auto",
    show_progress_bar: bool | None = None,
):
    """Encode texts of any length up to the context as vectors.

    Args:
        model: the encoder.
        texts: one string, or a list of strings.
        prompt_name: key in `config.prompts` (`query`, `document`) of the prompt in front of each text; None:
            the one that `config.default_prompt_name` names, which is none for most models.
        batch_tokens: largest number of tokens in one forward pass, which determines the memory. Texts are sorted by
            length and packed without padding.
        normalize: scale vectors to unit length, after truncation; None: as `config.normalize` says.
        truncate_dim: number of leading dimensions to keep (for models trained with Matryoshka losses); None: all.
        late_chunk_tokens: return one vector for each passage of this many tokens, pooled from states that have seen the
            whole document (late chunking, Günther et al. 2024, arXiv:2409.04701); None: one vector per text.
        overflow: if texts exceed the context, `warn` logs how much was cut off, `error` raises.
        output: `numpy` or `torch`.
        precision: `float32`, `bfloat16` (matrix products in bfloat16 under autocast), or `auto`: bfloat16 where the
            processor multiplies it in hardware.
        show_progress_bar: whether a progress bar is shown; None: if there is more than one batch.

    Returns:
        fp32 vectors `(len(texts), dim)` in the order of `texts`, or `(dim,)` for one string. With `late_chunk_tokens`,
        a list of `(passages, dim)`, or `(passages, dim)` for one string.

    Raises:
        ValueError: an argument has a value that is not allowed, or a text is too long and `overflow` is `error`.
    """
    for name, value, allowed in (
        ("overflow", overflow, ("warn", "error")),
        ("output", output, ("numpy", "torch")),
        ("precision", precision, ("auto", "float32", "bfloat16")),
        ("prompt_name", prompt_name, (None, *model.config.prompts)),
    ):
        if value not in allowed:
            raise ValueError(f"encode: {name}={value!r}; choose from {', '.join(map(repr, allowed))}")
    for name, size, optional in (
        ("batch_tokens", batch_tokens, False),
        ("truncate_dim", truncate_dim, True),
        ("late_chunk_tokens", late_chunk_tokens, True),
    ):
        if not (optional and size is None) and (not isinstance(size, int) or size < 1):
            raise ValueError(f"encode: {name}={size!r}; give a whole number of at least 1")
    if truncate_dim is not None and truncate_dim > model.config.hidden_size:
        raise ValueError(
            f"encode: truncate_dim={truncate_dim} is more than the {model.config.hidden_size} dimensions of the model"
        )
    prompt_name = model.config.default_prompt_name if prompt_name is None else prompt_name
    normalize = model.config.normalize if normalize is None else normalize
    single = isinstance(texts, str)
    texts = [texts] if isinstance(texts, str) else list(texts)
    if wrong := [n for n, text in enumerate(texts) if not isinstance(text, str)]:
        raise ValueError(f"encode: text {wrong[0]} is a {type(texts[wrong[0]]).__name__}, not a string")
    if half := [n for n, text in enumerate(texts) if re.search("[\ud800-\udfff]", text)]:
        raise ValueError(
            f"encode: text {half[0]} holds half a character, a surrogate such as \\ud83d without the other half"
        )
    was_training = model.training
    model.eval()
    try:
        rows = (
            tokenize_texts(model, texts, model.config.prompts[prompt_name] if prompt_name else "", overflow)
            if texts
            else []
        )
        vectors = encode_rows(model, rows, batch_tokens, late_chunk_tokens, precision, show_progress_bar)
    finally:
        model.train(was_training)
    vectors = [finish_vectors(part, normalize, truncate_dim) for part in vectors]
    if single or late_chunk_tokens:
        parts = [part.numpy() if output == "numpy" else part for part in vectors]
        if not single:
            return parts
        return parts[0] if late_chunk_tokens else parts[0][0]
    width = truncate_dim or model.config.hidden_size
    stacked = torch.cat(vectors) if vectors else torch.zeros(0, width)
    return stacked.numpy() if output == "numpy" else stacked


def encode_rows(model: HubModel, rows, batch_tokens, late_chunk_tokens, precision, show_progress_bar) -> list[Tensor]:
    """Compute the vectors of tokenized documents; see `encode_texts`.

    Args:
        model: the encoder.
        rows: the token ids of each document.
        batch_tokens: largest number of tokens in one forward pass.
        late_chunk_tokens: number of tokens per passage, or None.
        precision: `float32`, `bfloat16` or `auto`.
        show_progress_bar: whether a progress bar is shown; None: if there is more than one batch.

    Returns:
        `(1, d)`, or `(passages, d)`, for each document, in the order of `rows`.
    """
    device = model.device
    batches = budget_batches([len(row) for row in rows], batch_tokens)
    half = precision == "bfloat16" or (
        precision == "auto" and model.dtype == torch.float32 and is_fast_in_bfloat16(device)
    )
    vectors: list[Tensor] = [torch.empty(0)] * len(rows)
    hidden = show_progress_bar is False or (show_progress_bar is None and len(batches) < 2)
    with logging.tqdm(
        total=sum(map(len, rows)), unit="token", unit_scale=True, desc="encode", disable=hidden
    ) as progress:
        for batch in batches:
            lengths = torch.tensor([len(rows[index]) for index in batch], dtype=torch.int32)
            cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device)
            input_ids = torch.tensor(
                [token for index in batch for token in rows[index]], dtype=torch.long, device=device
            )[None]
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                states = model(input_ids, cu_seq_lens_q=cu_seqlens, max_length_q=int(lengths.max()), return_dict=True)
            if late_chunk_tokens is None:
                parts = states.pooler_output.float().cpu().split(1)
            else:
                passages = split_documents(cu_seqlens, late_chunk_tokens)
                counts = (lengths + late_chunk_tokens - 1) // late_chunk_tokens
                pooled = pool(states.last_hidden_state[0], passages, model.config.pooling)
                parts = pooled.float().cpu().split(counts.tolist())
            for index, part in zip(batch, parts, strict=True):
                vectors[index] = part
            progress.update(int(lengths.sum()))
    return vectors


def finish_vectors(vectors: Tensor, normalize: bool, truncate_dim: int | None) -> Tensor:
    """Return vectors `(n, d)` with the first `truncate_dim` dimensions, at unit length if `normalize` is set."""
    vectors = vectors[:, :truncate_dim]
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors.clone()
