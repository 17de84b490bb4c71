"""Embedded documents that are whole, for an index or for other programs."""

from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError, one_line
from retrieval.documents.storage import Storage
from retrieval.embedding.plan import COMPLETE, DOCUMENTS, Plan, codec_of, read_json
from retrieval.embedding.table import from_table, import_arrow
from retrieval.index.shards import Record


class Embedded:
    """What `retrieval.embed` has written.

    Args:
        folder: its output folder, or the URL of it.

    Raises:
        UserError: there is none, or it is not finished or damaged.
    """

    def __init__(self, folder: str | Path):
        self.storage = Storage(folder)
        plan, complete = Plan.read(self.storage), read_json(self.storage, COMPLETE)
        if plan is None:
            raise UserError(f"{folder} holds no embedded documents; name the --output_dir of retrieval.embed")
        if complete is None:
            raise UserError(
                f"{folder}: not all documents are embedded; start the command that embeds them again, which goes on "
                "where it stopped"
            )
        self.plan, self.codec = plan, codec_of(self.storage)
        self.files = complete["files"]
        sizes = self.storage.sizes(DOCUMENTS)
        for file in self.files:
            if sizes.get(file["name"]) != file["size"]:
                raise UserError(
                    f"{folder}/{DOCUMENTS}/{file['name']}: it has {sizes.get(file['name'], 0):,} bytes instead of "
                    f"{file['size']:,}; copy the folder again"
                )

    def __len__(self) -> int:
        """Return the number of documents."""
        return sum(file["documents"] for file in self.files)

    def records(self) -> Iterator[Record]:
        """Yield the documents with all that is kept of them, in the order of the files.

        Raises:
            UserError: a file is damaged.
        """
        arrow = import_arrow()
        for file in self.files:
            name = f"{DOCUMENTS}/{file['name']}"
            try:
                with self.storage.open(name) as opened, arrow.parquet.ParquetFile(opened) as table:
                    for batch in table.iter_batches(batch_size=64):
                        yield from from_table(batch)
            except (arrow.ArrowException, OSError) as error:
                raise UserError(f"{self.storage.root}/{name}: is damaged: {one_line(error)}") from None
