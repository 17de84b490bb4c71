"""Records of documents as rows of a table of Arrow, which Parquet keeps: a row a document.

- `id`, `text`, `metadata` and `marks`, the last two as JSON; from Ray `id` may be a number, as it was in the data, and
  a column of another name that holds the ids stays too;
- `starts` and `ends`, the characters of each passage, and `token_starts` and `token_ends`, the rows of its tokens in
  `codes`;
- `vectors`, a list of the passages' vectors, float32 of unit length;
- `codes`, a list of the codes of the document's tokens.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from modeling_longembed.output_token_codes_longembed import TokenCodec
from retrieval.documents.document import Document, Mark
from retrieval.index.manifest import Settings
from retrieval.index.shards import Record

# Columns of lists.
RAGGED = ("starts", "ends", "token_starts", "token_ends", "vectors", "codes")


def import_arrow() -> Any:
    """Import pyarrow with its Parquet.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("embedded documents are Parquet, which needs pyarrow: pip install -e '.[files]'") from None
    return pyarrow


def schema_of(settings: Settings, hidden_size: int, codec: TokenCodec) -> Any:
    """Return the schema of the table.

    Args:
        settings: what is kept of a document.
        hidden_size: width of a vector.
        codec: of the token vectors; one that knows their width.
    """
    arrow = import_arrow()
    fields = [(name, arrow.string()) for name in ("id", "text", "metadata", "marks")]
    fields += [(name, arrow.list_(arrow.int64())) for name in RAGGED[:4]]
    if "vector" in settings.parts:
        fields.append(("vectors", arrow.list_(arrow.list_(arrow.float32(), hidden_size))))
    if "tokens" in settings.parts:
        code = codec.encode(torch.zeros(1, codec.dim or hidden_size)).numpy()
        fields.append(("codes", arrow.list_(arrow.list_(arrow.from_numpy_dtype(code.dtype), code.shape[1]))))
    return arrow.schema(fields)


def to_table(records: Sequence[Record], schema: Any) -> Any:
    """Make a table of records.

    Args:
        records: the records.
        schema: what `schema_of` returned.

    Returns:
        A `pyarrow.Table`, a row a record.
    """
    arrow = import_arrow()
    documents = [record.document for record in records]
    columns: dict[str, Any] = {
        "id": [document.id for document in documents],
        "text": [document.text for document in documents],
        "metadata": [json.dumps(dict(document.metadata), ensure_ascii=False) for document in documents],
        "marks": [json.dumps([[m.start, m.kind, m.value] for m in document.marks]) for document in documents],
        "starts": [record.passages[:, 0] for record in records],
        "ends": [record.passages[:, 1] for record in records],
        "token_starts": [record.passage_tokens[:, 0] for record in records],
        "token_ends": [record.passage_tokens[:, 1] for record in records],
    }
    for name in ("vectors", "codes"):
        if name in schema.names:
            kind = schema.field(name).type
            arrays = [getattr(record, name) for record in records]
            ends = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
            flat = np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.empty(0, np.float32)
            values = arrow.array(flat, kind.value_type.value_type)
            rows = arrow.FixedSizeListArray.from_arrays(values, kind.value_type.list_size)
            columns[name] = arrow.ListArray.from_arrays(ends, rows, type=kind)
    arrays = [
        arrow.array(columns[field.name], field.type) if isinstance(columns[field.name], list) else columns[field.name]
        for field in schema
    ]
    return arrow.table(arrays, schema=schema)


def from_table(table: Any) -> Iterator[Record]:
    """Yield the records of a table.

    Args:
        table: a `pyarrow.Table` or `pyarrow.RecordBatch` of rows as `to_table` makes them.
    """
    columns = {name: table.column(name).to_pylist() for name in ("id", "text", "metadata", "marks")}
    ragged = {name: _ragged(table.column(name)) for name in RAGGED if name in table.schema.names}
    for row in range(table.num_rows):
        marks = tuple(Mark(*mark) for mark in json.loads(columns["marks"][row]))
        metadata = json.loads(columns["metadata"][row])
        found = {name: values[row] for name, values in ragged.items()}
        yield Record(
            Document(str(columns["id"][row]), columns["text"][row], metadata, marks),
            np.stack([found["starts"], found["ends"]], 1),
            np.stack([found["token_starts"], found["token_ends"]], 1),
            found.get("vectors"),
            found.get("codes"),
        )


def _ragged(column: Any) -> list[np.ndarray]:
    """Return the array `(n,)` or `(n, k)` of each row of a column of lists."""
    if hasattr(column, "combine_chunks"):
        column = column.combine_chunks()
    arrow = import_arrow()
    values = column.flatten()
    width = values.type.list_size if arrow.types.is_fixed_size_list(values.type) else None
    flat = (values if width is None else values.flatten()).to_numpy(zero_copy_only=False)
    ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
    return np.split(flat if width is None else flat.reshape(-1, width), ends[:-1])
