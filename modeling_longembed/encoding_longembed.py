"""`model.encode`: texts to vectors, without padding, so that a vector does not depend on the rest of the batch.

Texts are read window by window, so that neither their number nor their length in all decides the memory: while one
window is encoded, a thread tokenises the next.
"""

import re
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import chain
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .encoding_choices_longembed import EncodingChoices
from .encoding_file_longembed import VectorFile, map_vectors
from .encoding_tokens_longembed import cut_off, special_tokens_around, tokenize_beginnings
from .hub_longembed import HubModel
from .output_pooling_longembed import pool
from .output_token_codes_longembed import TokenCodec
from .packing_longembed import split_documents

logger = logging.get_logger(__name__)

# Characters in a window for each token of a batch, about sixteen batches: enough to sort texts by their length.
CHARACTERS_PER_BATCH_TOKEN = 64
# Texts in a window, however short they are: their vectors are all in memory.
TEXTS_PER_WINDOW = 4096


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


def tokenize_texts(model: HubModel, texts: list[str], prompt: str = "", overflow: str = "warn") -> list[list[int]]:
    """Tokenize texts with special tokens, and cut off what exceeds the context, but not the closing special token.

    Args:
        model: the model, whose `encode_tokenizer` is used.
        texts: any strings; an empty one gives only the special tokens.
        prompt: text that is put in front of every text.
        overflow: if texts exceed the context, `warn` logs how many are cut off, `error` raises.

    Returns:
        The token ids of each text.

    Raises:
        ValueError: a text is longer than the context, and `overflow` is `error`.
    """
    windows = read_windows(model, iter([list(texts)] if texts else []), prompt, overflow)
    return [ids.tolist() for window in windows for ids in window]


def read_windows(model: HubModel, windows: Iterator[list[str]], prompt: str, overflow: str) -> Generator[list[array]]:
    """Tokenize windows of texts, each while the caller works on the one before.

    The texts are read from `windows` in the thread of the caller, and tokenized in another.

    Args:
        model: the model, whose `encode_tokenizer` is used.
        windows: lists of texts.
        prompt: text that is put in front of every text.
        overflow: if texts exceed the context, `warn` logs at the end how many are cut off, `error` raises.

    Yields:
        The token ids of each text of a window.

    Raises:
        ValueError: a text is no string, or longer than the context if `overflow` is `error`.
    """
    tokenizer, limit = model.encode_tokenizer, model.config.max_position_embeddings
    _, closing_tokens = special_tokens_around(tokenizer)
    context = f"the context of {limit} tokens (max_position_embeddings)"
    read = cut = longest = 0

    def tokenize(texts: list[str], first: int) -> list[array]:
        nonlocal cut, longest
        rows = []
        for number, text in enumerate(texts, first):
            if not isinstance(text, str):
                raise ValueError(f"encode: text {number} is a {type(text).__name__}, not a string")
            if re.search("[\ud800-\udfff]", text):
                raise ValueError(
                    f"encode: text {number} holds half a character, a surrogate such as \\ud83d without the other half"
                )
        beginnings = tokenize_beginnings(tokenizer, texts, limit, prompt)
        for number, (text, ids) in enumerate(zip(texts, beginnings, strict=True), first):
            if len(ids) > limit:
                if overflow == "error":
                    raise ValueError(
                        f"encode: text {number} is longer than {context} and would be cut off; split it, or extend the "
                        "model"
                    )
                cut, longest = cut + 1, max(longest, len(text))
            rows.append(cut_off(ids, limit, closing_tokens))
        return rows

    try:
        with ThreadPoolExecutor(1, "encode") as thread:
            ahead: Future[list[array]] | None = None
            failure: Exception | None = None
            while True:
                window = None
                try:
                    window = next(windows, None)
                except Exception as error:  # what was read before it comes first
                    failure = error
                following = None if window is None else thread.submit(tokenize, window, read)
                read += len(window or ())
                if ahead is not None:
                    yield ahead.result()
                if failure is not None:
                    raise failure
                if following is None:
                    break
                ahead = following
    finally:
        if cut:
            logger.warning(
                f"{cut} of {read} texts are longer than {context} and were cut off at the end; the longest has "
                f"{longest} characters"
            )


def divide_into_windows(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Divide texts into windows, in their order, each read when it is asked for.

    Args:
        texts: any strings.
        characters: a window ends with the text that brings it to this size, or after `TEXTS_PER_WINDOW` texts.

    Yields:
        The texts of a window.
    """
    window, size = [], 0
    for text in texts:
        window.append(text)
        size += len(text) if isinstance(text, str) else 0
        if size >= characters or len(window) == TEXTS_PER_WINDOW:
            yield window
            window, size = [], 0
    if window:
        yield window


def encode_texts(
    model: HubModel,
    texts: str | Iterable[str],
    prompt_name: str | None = None,
    batch_tokens: int = 16_384,
    normalize: bool | None = None,
    truncate_dim: int | None = None,
    late_chunk_tokens: int | None = None,
    overflow: str = "warn",
    output: str = "numpy",
    precision: str = "auto",
    show_progress_bar: bool | None = None,
    output_file: str | PathLike | None = None,
    output_value: str = "vector",
    is_query: bool | None = None,
    token_dim: int | None = None,
    token_pooling: int | None = None,
    token_precision: str | TokenCodec = "float32",
):
    """Encode texts of any length up to the context as vectors, one a text, one a token, or both from one reading.

    Args:
        model: the encoder.
        texts: one string, or any number of strings: a list, a column, a generator.
        prompt_name: key in `config.prompts` (`query`, `document`) of the prompt in front of each text; None:
            the one that `config.default_prompt_name` names, which is none for most models.
        batch_tokens: largest number of tokens in one forward pass, which determines the memory. Texts are sorted by
            length within a window of about sixteen batches, and packed without padding.
        normalize: scale vectors to unit length, after truncation; None: as `config.normalize` says. Token vectors
            always have unit length, those of a query times their weights.
        truncate_dim: number of leading dimensions to keep (for models trained with Matryoshka losses); None: all.
        late_chunk_tokens: return one vector for each passage of this many tokens, pooled from states that have seen the
            whole document (late chunking, Günther et al. 2024, arXiv:2409.04701); None: one vector per text.
        overflow: if texts exceed the context, `warn` logs how many were cut off, `error` raises.
        output: `numpy` or `torch`.
        precision: of the arithmetic: `float32`, `bfloat16` (matrix products in bfloat16 under autocast), or `auto`:
            bfloat16 where the processor multiplies it in hardware.
        show_progress_bar: whether a progress bar is shown; None: if there is more than one batch.
        output_file: write the vectors to this file in NumPy's format (`vectors.npy`) as they come, and return them
            memory-mapped from there. The file appears under its name when it is whole.
        output_value: `vector`; `tokens`, a vector for each token but those that are left out, to be compared by MaxSim
            (`model.similarity`); or `both`.
        is_query: whether token vectors are those of queries, which have weights (`config.query_token_weights`); None:
            if the prompt is that of queries.
        token_dim: number of leading dimensions of token vectors to keep (the head has them in the order of their
            importance); None: all.
        token_pooling: keep one vector of so many of a document, 1 to 32: similar ones are merged (`pool_tokens`); None:
            all. To know which tokens a vector stands for, call `pool_tokens` on all vectors.
        token_precision: of the token vectors that are returned: `float32`, `float16`, `binary` (documents only: the
            signs, eight in a byte), or a `TokenCodec` that was fitted to a sample, whose codes are returned.

    Returns:
        fp32 vectors `(len(texts), dim)` in the order of `texts`, or `(dim,)` for one string. With `late_chunk_tokens`,
        a list of `(passages, dim)`, or `(passages, dim)` for one string. With `tokens`, a list of `(tokens, k)`, or
        `(tokens, k)` for one string. With `both`, a pair of the two.

    Raises:
        ValueError: an argument has a value that is not allowed, a text is no string, or a text is too long and
            `overflow` is `error`.
    """
    convert, single = converter(output), isinstance(texts, str)
    if output_file is not None and (single or late_chunk_tokens is not None):
        raise ValueError(
            "encode: output_file takes one vector for each of several texts; leave it out for one string and with "
            "late_chunk_tokens"
        )
    if output_file is not None and output_value != "vector":
        raise ValueError(
            f"encode: output_file takes one vector for each text, not output_value={output_value!r}; write what "
            "encode_stream returns for each text, or index the texts"
        )
    texts = [texts] if isinstance(texts, str) else texts
    width = truncate_dim or model.config.hidden_size
    choices = EncodingChoices.of(locals())
    with Progress(show_progress_bar, len(texts) if isinstance(texts, Sized) else None) as progress:
        windows = encode_windows(model, texts, choices, progress.update)
        with closing(windows):
            if output_file is not None:
                with VectorFile(output_file, width) as file:
                    for window in windows:
                        file.write(torch.cat([vectors for vectors, _ in window]))
                return convert(map_vectors(output_file, file.count, width))
            # Of a long stream a window is stacked at a time: a tensor a text would take more memory than its numbers.
            stacked, passages = [torch.zeros(0, width)], []
            tokens: Any = []
            for window in windows:
                if choices.has_tokens:
                    tokens += [convert(part) for _, part in window]
                if choices.has_vectors and late_chunk_tokens is not None:
                    passages += [convert(vectors) for vectors, _ in window]
                elif choices.has_vectors:
                    stacked.append(torch.cat([vectors for vectors, _ in window]))
    vectors = passages if late_chunk_tokens is not None else convert(torch.cat(stacked))
    if single:
        vectors, tokens = (value[0] if len(value) else None for value in (vectors, tokens))
    return {"vector": vectors, "tokens": tokens, "both": (vectors, tokens)}[output_value]


def encode_stream(
    model: HubModel,
    texts: Iterable[str],
    prompt_name: str | None = None,
    batch_tokens: int = 16_384,
    normalize: bool | None = None,
    truncate_dim: int | None = None,
    late_chunk_tokens: int | None = None,
    overflow: str = "warn",
    output: str = "numpy",
    precision: str = "auto",
    output_value: str = "vector",
    is_query: bool | None = None,
    token_dim: int | None = None,
    token_pooling: int | None = None,
    token_precision: str | TokenCodec = "float32",
) -> Iterator[Any]:
    """Encode texts as they come, in memory that does not depend on their number.

        for text, vector in zip(texts, model.encode_stream(texts)):
            ...

    Texts are read two windows ahead of the vectors that are returned; see `divide_into_windows`. A generator that is
    not read to its end stops reading and tokenizing when it is closed.

    Args:
        model: the encoder.
        texts: any number of strings, which need not be in memory: a list, a column, a generator.
        prompt_name, batch_tokens, normalize, truncate_dim, late_chunk_tokens, overflow: as in `encode_texts`.
        output, precision, output_value, is_query: as in `encode_texts`.
        token_dim, token_pooling, token_precision: as in `encode_texts`.

    Returns:
        An iterator over the vectors `encode` would return, in the order of `texts`: `(dim,)` for each text, with
        `late_chunk_tokens` `(passages, dim)`; with `tokens` `(tokens, k)`, with `both` a pair.

    Raises:
        ValueError: as in `encode_texts`; about a text, when it is read.
    """
    convert = converter(output)
    if isinstance(texts, str):
        raise ValueError("encode: a stream takes several texts, and this is one string; give [text], or call encode")
    choices = EncodingChoices.of(locals())
    windows = encode_windows(model, texts, choices)

    def vectors() -> Iterator[Any]:
        with closing(windows):
            for window in windows:
                for part, tokens in window:
                    if not choices.has_vectors:
                        yield convert(tokens)
                        continue
                    vector = convert(part if late_chunk_tokens else part[0])
                    yield (vector, convert(tokens)) if choices.has_tokens else vector

    return vectors()


def converter(output: str) -> Callable[[Tensor], Any]:
    """Return the function that makes of a tensor what `encode` returns.

    Args:
        output: `numpy` or `torch`.

    Raises:
        ValueError: it is neither.
    """
    if output not in ("numpy", "torch"):
        raise ValueError(f"encode: output={output!r}; choose from 'numpy', 'torch'")
    return Tensor.numpy if output == "numpy" else Tensor.detach


def encode_windows(
    model: HubModel,
    texts: Iterable[str],
    choices: EncodingChoices,
    report: Callable[[int], None] = lambda count: None,
) -> Any:
    """Check the choices of `encode_texts`, and return a generator of what it computes, window by window.

    Args:
        model: the encoder.
        texts: any strings.
        choices: as in `encode_texts`.
        report: is called after each forward pass with the number of its texts.

    Returns:
        A generator of lists, with a pair for each text of a window: `(1, dim)` or `(passages, dim)`, and the token
        vectors `(tokens, k)`; empty where it is not asked for.

    Raises:
        ValueError: a choice has a value that is not allowed.
    """
    choices.check(model.config)
    if not isinstance(choices.token_precision, str):  # a codec: its tables are copied once, and not for each batch
        choices = replace(choices, token_precision=choices.token_precision.to(model.device))
    _, prompt = choices.prompt(model.config)

    def compute() -> Iterator[list[tuple[Tensor, Tensor]]]:
        windows = divide_into_windows(texts, CHARACTERS_PER_BATCH_TOKEN * choices.batch_tokens)
        # Without texts no tokenizer is needed.
        first = next(windows, None)
        if first is None:
            return
        with closing(read_windows(model, chain([first], windows), prompt, choices.overflow)) as rows_of_windows:
            for rows in rows_of_windows:
                yield encode_rows(model, rows, choices, report)

    return compute()


@torch.no_grad()
def encode_rows(
    model: HubModel, rows: Sequence[array], choices: EncodingChoices, report: Callable[[int], None]
) -> list[tuple[Tensor, Tensor]]:
    """Compute the vectors of tokenized documents; see `encode_texts`.

    Args:
        model: the encoder; it is in evaluation mode while it computes.
        rows: the token ids of each document.
        choices: as in `encode_texts`.
        report: is called after each forward pass with the number of its documents.

    Returns:
        For each document, in the order of `rows`, `(1, d)` or `(passages, d)`, and its token vectors `(tokens, k)`.
    """
    device, size = model.device, choices.late_chunk_tokens if choices.has_vectors else None
    half = choices.precision == "bfloat16" or (
        choices.precision == "auto" and model.dtype == torch.float32 and is_fast_in_bfloat16(device)
    )
    side = choices.side(model.config)
    outputs: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for batch in budget_batches([len(row) for row in rows], choices.batch_tokens):
            lengths = torch.tensor([len(rows[index]) for index in batch], dtype=torch.int32)
            cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device)
            ids = array("i")
            for index in batch:
                ids.extend(rows[index])
            input_ids = torch.tensor(ids, dtype=torch.long, device=device)[None]
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                states = model(
                    input_ids,
                    cu_seq_lens_q=cu_seqlens,
                    max_length_q=int(lengths.max()),
                    token_vectors=side,
                    return_dict=True,
                )
            parts = tokens = [torch.empty(0, 0)] * len(batch)
            if choices.has_vectors:
                pooled, counts = states.pooler_output, torch.ones_like(lengths)
                if size is not None:
                    passages, counts = split_documents(cu_seqlens, size), (lengths + size - 1) // size
                    pooled = pool(states.last_hidden_state[0], passages, model.config.pooling)
                parts = [
                    choices.finish_vectors(part, model.config) for part in pooled.float().cpu().split(counts.tolist())
                ]
            if choices.has_tokens:
                mask = states.token_mask[0]
                before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))  # vectors before each token
                tokens = choices.finish_tokens(states.token_vectors[0][mask], before[cu_seqlens.long()])
            for index, part, vectors in zip(batch, parts, tokens, strict=True):
                outputs[index] = (part, vectors)
            report(len(batch))
    finally:
        model.train(was_training)
    return outputs


class Progress:
    """A progress bar over texts that may appear after the work has begun.

    Args:
        show: whether it is shown; None: from the second batch on.
        total: number of texts; None: unknown.
    """

    def __init__(self, show: bool | None, total: int | None) -> None:
        # What the bar shows is counted here: where transformers' bars are off, theirs has no numbers.
        self.show, self.total, self.batches, self.waiting = show, total, 0, 0
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int) -> None:
        """Note that a batch of `count` texts is done."""
        self.batches, self.waiting = self.batches + 1, self.waiting + count
        if self.bar is None and (self.show or (self.show is None and self.batches > 1)):
            self.bar = logging.tqdm(total=self.total, unit="text", desc="encode")
        if self.bar is not None:
            self.bar.update(self.waiting)
            self.waiting = 0
