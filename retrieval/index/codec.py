"""The codec of the token vectors of an index: fitted to the first documents, kept in a file beside the codes."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.encoders.kept_tokens import SAMPLE_DOCUMENTS, SAMPLE_VECTORS, UNFITTED
from common.errors import reading
from modeling_longembed.output_token_codes_longembed import TokenCodec
from retrieval.documents.document import Document
from retrieval.index.reading import DocumentReader
from retrieval.index.shards import Record


def fit_codec(documents: Iterator[Document], reader: DocumentReader) -> tuple[TokenCodec | None, list[Record]]:
    """Make the codec of token vectors, and fit it to the first documents if it depends on them.

    Args:
        documents: the documents, of which as many are taken as are needed.
        reader: reads them, without a codec of its own so far.

    Returns:
        The codec, None if there was no token; and the records of the documents that have been taken, in codes.
    """
    settings, config = reader.settings, reader.model.config
    precision = settings.token_precision
    # Dimensions in the order of their importance, as of a head, vary the less the later; rotated, all vary alike.
    codec = TokenCodec(precision, rotate=precision == "binary" and config.token_dim is not None)
    records: list[Record] = []
    sample: list[torch.Tensor] = []
    if precision in UNFITTED:
        sample = [torch.zeros(1, settings.token_dim or config.token_dim or config.hidden_size)]
    while not sample and (first := list(islice(documents, SAMPLE_DOCUMENTS))):
        read = list(reader(first))
        records += read
        found = (torch.from_numpy(record.codes) for record in read if record.codes is not None)
        sample += [codes[:: max(1, len(codes) // SAMPLE_VECTORS)] for codes in found if len(codes)]
    if not sample:
        return None, records
    codec.fit(torch.cat(sample))
    return codec, [
        replace(record, codes=codec.encode(torch.from_numpy(record.codes)).numpy())
        for record in records
        if record.codes is not None
    ]


def write_codec(path: Path, codec: TokenCodec) -> None:
    """Write a codec of token vectors.

    Args:
        path: of the file.
        codec: the codec.
    """
    state = codec.state()
    tables = {key: value.contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
    save_file(tables, path, {"kind": codec.kind, "dim": str(codec.dim)})


def read_codec(path: Path) -> TokenCodec:
    """Read a codec of token vectors.

    Args:
        path: of the file.

    Raises:
        UserError: the file is damaged.
        FileNotFoundError: there is none.
    """
    if not path.exists():
        raise FileNotFoundError(str(path))
    with reading(f"{path}", path), safe_open(path, framework="pt") as file:
        about = file.metadata()
        tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return TokenCodec.from_state({"kind": about["kind"], "dim": about["dim"], **tables})
