"""Embedding on a cluster: actors hold the model, and Ray Data hands them documents and writes what they return.

Ray reads and writes Parquet. Its checkpoint keeps the ids of the documents whose file is whole, and leaves these out
when the same command is started again; a file that was not whole is removed then. An actor or a machine that dies in
between is replaced, and what it was reading is read again.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.data_files import PARQUET_SUFFIX
from common.errors import UserError, reading
from retrieval.documents.document import Document
from retrieval.documents.sources import ID_COLUMNS, Columns, Skipped, document_of_row
from retrieval.documents.storage import Storage
from retrieval.embedding.plan import DOCUMENTS, Plan, codec_of, write_complete
from retrieval.embedding.table import import_arrow, schema_of, to_table
from retrieval.index.identity import check_model, load_model
from retrieval.index.reading import document_reader

CHECKPOINT = "checkpoint"
# Documents that an actor is handed at a time.
BATCH_DOCUMENTS = 64


def import_ray() -> Any:
    """Import Ray with its Data.

    Raises:
        UserError: it is not installed, or too old.
    """
    try:
        import ray.data.checkpoint
        import ray.exceptions
    except ImportError as error:
        raise UserError(f"--engine ray needs the extra 'ray' ({error}): pip install -e '.[ray]'") from None
    return ray


@dataclass(frozen=True)
class Work:
    """What an actor has to know.

    Args:
        model: folder or Hub id of the model, which each machine finds.
        plan: of the embedding.
        output: folder or URL of the output, where the codec of token vectors is.
        columns: what the columns of the data are; the id is named.
        batch_tokens: tokens in one forward pass.
    """

    model: str
    plan: Plan
    output: str
    columns: Columns
    batch_tokens: int


class Embedder:
    """An actor that holds the model.

    Args:
        work: what it has to know.

    Raises:
        UserError: the machine has another model than the plan.
    """

    def __init__(self, work: Work):
        model = load_model(work.model)
        check_model(model, work.plan.model, work.output)
        self.columns = work.columns
        self.reader = document_reader(model, work.plan.settings, work.batch_tokens)
        self.reader.codec = codec_of(Storage(work.output)) or self.reader.codec
        self.schema = schema_of(work.plan.settings, model.config.hidden_size, self.reader.codec)

    def __call__(self, rows: Any) -> Any:
        """Embed some documents.

        Args:
            rows: a `pyarrow.Table` of the data.

        Returns:
            A table of their records, which keeps the column of ids as it was.
        """
        name, skipped = self.columns.id or "id", list[Skipped]()
        documents: list[Document] = []
        kept: list[int] = []
        for row, values in enumerate(rows.to_pylist()):
            place = f"the row with {name} {values[name]!r}"
            for document in document_of_row(place, "", values, self.columns, skipped):
                documents.append(document)
                kept.append(row)
        table = to_table(list(self.reader(documents)), self.schema)
        ids = rows.column(name).take(import_arrow().array(kept, "int64"))
        if name in table.schema.names:
            return table.set_column(table.schema.get_field_index(name), rows.schema.field(name), ids)
        return table.append_column(rows.schema.field(name), ids)


def embed_with_ray(data: Sequence[str], work: Work, actors: int | None = None, address: str | None = None) -> bool:
    """Embed documents on a cluster.

    Args:
        data: Parquet files and folders of them, or URLs, all of one file system that each machine reaches.
        work: what the actors have to know.
        actors: how many; None: as many as there are GPUs, or nearly as many as CPUs.
        address: of the cluster; None: the one that is connected, or that this machine is part of, or this machine.

    Returns:
        True, when all documents are embedded.

    Raises:
        UserError: the data are none that Ray reads here, ids repeat, or what an actor raised.
    """
    ray, output = import_ray(), Storage(work.output)
    files, system = _files(data)
    id_column, target = _id_column(files[0], system, work.columns), _system_of(output)
    work = replace(work, columns=Columns(work.columns.text, id_column))
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    resources = ray.cluster_resources()
    gpus, cpus, nodes = int(resources.get("GPU", 0)), int(resources.get("CPU", 1)), len(ray.nodes())
    size = actors or gpus or max(nodes, cpus - nodes)
    context = ray.data.DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = ray.data.checkpoint.CheckpointConfig(
        id_column,
        f"{output.path.rstrip('/')}/{CHECKPOINT}",
        delete_checkpoint_on_success=False,
        override_filesystem=target,
    )
    try:
        ray.data.read_parquet(files, filesystem=system).map_batches(
            Embedder,
            fn_constructor_args=(work,),
            batch_size=min(BATCH_DOCUMENTS, work.plan.shard_documents),
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=size),
            # Reading and writing need the CPUs: actors that took them all would wait for documents for ever.
            num_cpus=0,
            num_gpus=1 if gpus else None,
        ).write_parquet(
            f"{output.path.rstrip('/')}/{DOCUMENTS}", filesystem=target, min_rows_per_file=work.plan.shard_documents
        )
    except ray.exceptions.RayError as error:
        found = _user_error(error)
        if found is None:
            raise
        raise found from error
    finally:
        context.checkpoint_config = before
    _finish(output, id_column)
    return True


def _files(data: Sequence[str]) -> tuple[list[str], Any]:
    """Return the paths of the Parquet files of the data, and the file system of pyarrow that they are in."""
    files: list[str] = []
    systems: list[Storage] = []
    for name in data:
        storage = Storage(name)
        found = list(storage.sizes(ending=PARQUET_SUFFIX))
        if not found:
            raise UserError(f"{name}: no such Parquet file, and no folder with one; --engine ray reads nothing else")
        files += [f"{storage.path.rstrip('/')}/{file}" if file else storage.path for file in found]
        systems.append(storage)
    if any(storage.system != systems[0].system for storage in systems):
        raise UserError("--data names several file systems, and --engine ray reads from one; copy them together")
    return files, _system_of(systems[0])


def _system_of(storage: Storage) -> Any:
    """Return the file system of a folder as pyarrow knows it."""
    import_arrow()
    import pyarrow.fs

    if storage.is_local:
        return pyarrow.fs.LocalFileSystem()
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(storage.system))


def _id_column(file: str, system: Any, columns: Columns) -> str:
    """Return the column of ids, which Ray's checkpoint needs."""
    arrow = import_arrow()
    with reading(file), system.open_input_file(file) as opened:
        names = arrow.parquet.read_schema(opened).names
    chosen = columns.id or next((column for column in ID_COLUMNS if column in names), None)
    if chosen not in names:
        raise UserError(
            f"{file}: the column {chosen or 'id'} is missing, and --engine ray needs ids; it has {', '.join(names)}; "
            "name another with --id_column, or write one"
        )
    return str(chosen)


def _user_error(error: BaseException) -> UserError | None:
    """Return the mistake of the user that an error of Ray was caused by; None if it was none.

    The cause of an exception is lost between processes, and is left in the text of the traceback alone.
    """
    told = re.findall(r"^\s*common\.errors\.UserError: (.+)$", str(error), re.MULTILINE)
    return UserError(told[-1]) if told else None


def _finish(output: Storage, id_column: str) -> None:
    """Write down which files are the whole, after a look at whether each id is there once."""
    arrow = import_arrow()
    sizes = output.sizes(DOCUMENTS, PARQUET_SUFFIX)
    files: list[tuple[str, int, int]] = []
    seen: set[Any] = set()
    total = 0
    for name, size in sizes.items():
        with output.open(f"{DOCUMENTS}/{name}") as opened:
            ids = arrow.parquet.read_table(opened, columns=[id_column]).column(0).to_pylist()
        files.append((name, size, len(ids)))
        seen.update(ids)
        total += len(ids)
    if len(seen) < total:
        raise UserError(
            f"{output.root}: {total:,} documents have {len(seen):,} ids ({id_column}), and --engine ray tells "
            "documents apart by them; give each an id of its own, and name another --output_dir"
        )
    write_complete(output, files)
