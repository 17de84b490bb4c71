"""The plan of an embedding: with which model and settings, and how the documents are divided; it never changes.

It is the first that is written into the output folder, and all processes that work on it, at whatever time, hold to it.
The folder holds:

- `plan.json`, and `codec.safetensors` of the token vectors, if there are any;
- `documents/*.parquet`, a row a document, see `retrieval.embedding.table`;
- what says which of these files are whole: `done/*.json` of the engines `local` and `accelerate`, `checkpoint/` of Ray;
- `complete.json`, written last: the files that are the whole.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from modeling_longembed.output_token_codes_longembed import TokenCodec
from retrieval.documents.document import Document
from retrieval.documents.storage import Storage
from retrieval.index.codec import fit_codec, read_codec, write_codec
from retrieval.index.identity import check_model, describe_model
from retrieval.index.manifest import Settings
from retrieval.index.reading import DocumentReader

FORMAT, VERSION = "longembed-embedded", 1
PLAN, CODEC, COMPLETE, DOCUMENTS = "plan.json", "codec.safetensors", "complete.json", "documents"


@dataclass(frozen=True)
class Plan:
    """What all processes that embed some documents hold to.

    Args:
        settings: what is kept of a document.
        model: what documents are read with; see `retrieval.index.identity`.
        shard_documents: number of documents in a file.
        order: `given`, the documents of a file follow one another in the data; `any`, as Ray hands them out.
    """

    settings: Settings
    model: Mapping[str, Any]
    shard_documents: int
    order: str

    @classmethod
    def read(cls, output: Storage) -> "Plan | None":
        """Read the plan in a folder; None if there is none.

        Args:
            output: the folder.

        Raises:
            UserError: it is damaged, or of another program or version.
        """
        content = read_json(output, PLAN)
        if content is None:
            return None
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise UserError(f"{output.root}/{PLAN} is of another program or version; name another folder")
        try:
            settings = Settings(**{**content["settings"], "parts": tuple(content["settings"]["parts"])})
            return cls(settings, content["model"], content["shard_documents"], content["order"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{output.root}/{PLAN} is damaged ({error!r}); remove the folder") from None


def read_json(output: Storage, name: str) -> dict[str, Any] | None:
    """Read a file of JSON in a folder; None if there is none.

    Args:
        output: the folder.
        name: of the file.

    Raises:
        UserError: it is damaged.
    """
    data = output.read(name)
    if data is None:
        return None
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{output.root}/{name} is damaged; remove it and start the same command again")
    return content


def write_complete(output: Storage, files: Iterable[tuple[str, int, int]]) -> None:
    """Write down that all documents are embedded.

    Args:
        output: the folder.
        files: the name of each file that is part of the whole, its bytes, and how many documents it holds.
    """
    content = [{"name": name, "size": size, "documents": documents} for name, size, documents in files]
    output.write(COMPLETE, json.dumps({"files": content}, indent=1).encode())


def begin(
    output: Storage, model: Any, reader: DocumentReader, documents: Iterable[Document], shard_documents: int, order: str
) -> Plan:
    """Write the plan into a folder, or hold to the one that is there.

    Args:
        output: the folder.
        model: what documents are read with, loaded.
        reader: reads them; it gets the codec of the token vectors.
        documents: the documents, the first of which the codec is fitted to.
        shard_documents: number of documents in a file.
        order: of the documents, see `Plan`.

    Returns:
        The plan.

    Raises:
        UserError: there is a plan of something else.
    """
    plan = Plan.read(output)
    if plan is None:
        plan = Plan(reader.settings, describe_model(model), shard_documents, order)
        if "tokens" in plan.settings.parts:
            codec, _ = fit_codec(iter(documents), reader)
            if codec is not None:
                with output.file(CODEC) as path:
                    write_codec(path, codec)
        content = {"format": FORMAT, "version": VERSION, **asdict(plan)}
        output.write(PLAN, json.dumps(content, indent=1).encode())
    else:
        check_model(model, plan.model, output.root)
        for what, found, asked in (
            ("settings", plan.settings, reader.settings),
            ("--shard_documents", plan.shard_documents, shard_documents),
            ("order of documents", plan.order, order),
        ):
            if found != asked:
                raise UserError(
                    f"{output.root} was begun with other {what} ({found} instead of {asked}); a file must hold the "
                    "same documents in each run: start the command as it was, or name another --output_dir"
                )
    reader.codec = codec_of(output) or reader.codec
    return plan


def codec_of(output: Storage) -> TokenCodec | None:
    """Read the codec of the token vectors in a folder; None if there is none.

    Args:
        output: the folder.

    Raises:
        UserError: it is damaged.
    """
    data = output.read(CODEC)
    if data is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, CODEC)
        path.write_bytes(data)
        return read_codec(path)
