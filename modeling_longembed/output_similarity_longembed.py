"""`model.similarity`: how alike queries and documents are, by one vector each or by a vector a token (MaxSim)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .hub_longembed import HubModel
from .output_maxsim_longembed import maxsim
from .output_token_codes_longembed import TokenCodec

SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda queries, documents: normalize(queries, dim=-1) @ normalize(documents, dim=-1).T,
    "dot": lambda queries, documents: queries @ documents.T,
    "euclidean": lambda queries, documents: -torch.cdist(queries, documents),
    "manhattan": lambda queries, documents: -torch.cdist(queries, documents, p=1),
}


def similarity(
    model: HubModel,
    queries: Any,
    documents: Any,
    mean: bool = False,
    memory_mb: float = 256,
    codec: TokenCodec | None = None,
) -> Tensor:
    """Compare every query with every document.

    What was encoded with `output_value="tokens"` is compared by MaxSim: the sum over the tokens of the query of the
    largest inner product with a token of the document. Plain vectors are compared by `config.similarity_fn_name`.
    Computed on the model's device; differentiable.

    Args:
        model: the model that made the vectors.
        queries: NumPy arrays or tensors. Token vectors: a list with `(tokens, k)` for each query; a list of one for one
            query. Plain vectors: `(Q, d)`, a list of `(d,)`, or `(d,)` for one query.
        documents: the same of the documents, of the same kind.
        mean: divide MaxSim by the number of tokens of the query; for token vectors only.
        memory_mb: MiB that MaxSim takes at a time beside its input and output, whatever the lengths.
        codec: what the token vectors of the documents were encoded with, if they are codes. They are decoded some at a
            time, a long document at once. One that has seen no vectors, such as `TokenCodec("binary")`, takes the width
            of the queries.

    Returns:
        `(Q, D)` fp32 or wider, on the CPU; larger is more alike. 0 for token vectors of a text without tokens.

    Raises:
        ValueError: token vectors are compared with plain ones, widths differ, an array has another shape, or codes are
            given for queries, or without the codec that made them.
    """
    (queries, by_tokens), (documents, documents_by_tokens) = _texts("queries", queries), _texts("documents", documents)
    if queries and documents and by_tokens != documents_by_tokens:
        kinds = {True: "token vectors", False: "plain vectors"}
        raise ValueError(
            f"similarity: queries are {kinds[by_tokens]} and documents {kinds[documents_by_tokens]}; encode both "
            "alike, and put the token vectors of one text into a list: [vectors]"
        )
    if any(row.dtype in (torch.int8, torch.uint8) for row in queries):
        raise ValueError("similarity: the queries are codes; give their vectors, only documents are kept as codes")
    if codec is None and any(row.dtype in (torch.int8, torch.uint8) for row in documents):
        raise ValueError("similarity: the documents are codes; give the TokenCodec that made them as codec=")
    if codec is not None and not documents_by_tokens and documents:
        raise ValueError("similarity: codec= is for codes of token vectors, and the documents are plain vectors")
    if codec is not None and not codec.is_ready:
        raise ValueError(f"similarity: this {codec.kind} codec has seen no sample; give the one that made the codes")
    of_documents: set[Any] = {codec.dim if codec is not None else row.shape[-1] for row in documents} - {None}
    widths = sorted({row.shape[-1] for row in queries} | of_documents)
    if len(widths) > 1:
        raise ValueError(
            f"similarity: vectors of {' and '.join(map(str, widths))} dimensions cannot be compared; encode queries "
            "and documents with the same token_dim or truncate_dim"
        )
    if not queries and not documents:
        return torch.zeros(0, 0)
    if by_tokens or documents_by_tokens:
        if codec is not None and codec.dim is None:
            codec = TokenCodec(codec.kind, dim=next(iter(widths), None))
        return _similarity_of_tokens(queries, documents, mean, int(memory_mb * 2**20), model.device, codec)
    if mean:
        raise ValueError("similarity: mean=True is for token vectors, and these are plain vectors; leave it out")
    packed = [
        torch.cat([torch.atleast_2d(row) for row in rows] or [torch.zeros(0, *widths)]).to(model.device)
        for rows in (queries, documents)
    ]
    wide = [side.to(torch.promote_types(side.dtype, torch.float32)) for side in packed]
    return SIMILARITIES[model.config.similarity_fn_name](*wide).cpu()


def _texts(side: str, vectors: Any) -> tuple[list[Tensor], bool]:
    """Return the arrays of one side, and whether they are token vectors; an empty list may be either."""
    several = isinstance(vectors, (list, tuple)) or vectors.ndim == 3
    rows = [torch.as_tensor(row) for row in (vectors if several else [vectors])]
    dimensions = {row.ndim for row in rows}
    if len(dimensions) > 1 or not dimensions <= {1, 2}:
        raise ValueError(
            f"similarity: {side} hold arrays of {' and '.join(map(str, sorted(dimensions)))} dimensions; give token "
            "vectors as a list of (tokens, k) arrays, and plain vectors as (n, d)"
        )
    return rows, several and dimensions == {2}


def _similarity_of_tokens(
    queries: Sequence[Tensor],
    documents: Sequence[Tensor],
    mean: bool,
    memory: int,
    device: torch.device,
    codec: TokenCodec | None,
) -> Tensor:
    """Compute MaxSim in runs of queries and documents that are packed in a quarter of `memory` each, in bytes."""
    codec = None if codec is None else codec.to(device)
    rows = []
    for query_run in _runs(queries, memory // 4):
        packed = _packed(query_run, device)
        scores = [
            maxsim(*packed, *_packed(run, device, codec), memory_mb=memory / 2**21, mean=mean).cpu()
            for run in _runs(documents, memory // 4, codec)
        ]
        rows.append(torch.cat(scores, dim=1) if scores else torch.zeros(len(query_run), 0))
    return torch.cat(rows) if rows else torch.zeros(0, len(documents))


def _runs(texts: Sequence[Tensor], bytes_of_run: int, codec: TokenCodec | None = None) -> Iterator[Sequence[Tensor]]:
    """Divide texts into runs whose token vectors have at most this size; a larger text is a run of its own."""
    first = size = 0
    for number, vectors in enumerate(texts):
        own = 4 * len(vectors) * codec.dim if codec and codec.dim else vectors.nbytes
        if number > first and size + own > bytes_of_run:
            yield texts[first:number]
            first, size = number, 0
        size += own
    if texts:
        yield texts[first:]


def _packed(texts: Sequence[Tensor], device: torch.device, codec: TokenCodec | None = None) -> tuple[Tensor, Tensor]:
    """Pack token vectors to `(T, k)` with cumulative lengths; those of one text are not copied."""
    lengths = torch.tensor([0, *(len(vectors) for vectors in texts)])
    packed = (texts[0] if len(texts) == 1 else torch.cat(list(texts))).to(device)
    return codec.decode(packed) if codec else packed, lengths.cumsum(0)
