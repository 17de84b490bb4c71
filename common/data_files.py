"""Names of data: which files hold rows, and what is the id of a data set on the Hub."""

import re
from typing import Any

from common.errors import UserError, one_line

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson")
PARQUET_SUFFIX = ".parquet"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Check whether a name that is no path may be that of a dataset on the Hub."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith((*JSON_SUFFIXES, PARQUET_SUFFIX))


def load_hub_dataset(name: str, split: str, streaming: bool = False) -> Any:
    """Load a dataset of the Hub, or what is in the cache of it.

    Args:
        name: `org/name[@config]`.
        split: the split.
        streaming: read rows when they are asked for, instead of all of them first.

    Returns:
        A `datasets.Dataset`, memory-mapped; with `streaming` a `datasets.IterableDataset`.

    Raises:
        UserError: it cannot be loaded, or the package datasets is not installed.
    """
    try:
        import datasets  # slow to import, and part of extras only
    except ImportError:
        raise UserError(f"{name}: the Hub's datasets need the package datasets: pip install datasets") from None
    repository, _, config = name.partition("@")
    try:
        return datasets.load_dataset(repository, config or None, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # Of a dataset whose files differ in their columns the cause says so.
        reason = one_line(error.__cause__ or error)
        raise UserError(f"{name}: is neither a local file nor loadable from the Hub: {reason}") from None
