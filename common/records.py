"""Resumable results: one JSON file of what a script has measured so far.

The same command again measures only the cases that are missing from the file.
"""

import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_write


class Records:
    """Rows `{"case": ..., **values}` of a JSON file, which is written whole after each new row.

    Args:
        path: the file; it is made with the first row.

    Raises:
        UserError: the file was not written by this class.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            self.rows = {_key(row["case"]): row for row in rows}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} holds no results of this script ({error!r}); give another --output_dir") from None

    def find(self, case: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row of a case (everything that its values depend on), or None if it has not been measured."""
        return self.rows.get(_key(case))

    def add(self, case: dict[str, Any], **values: Any) -> dict[str, Any]:
        """Write the values of a case, in place of earlier ones, and return its row."""
        row = self.rows[_key(case)] = {"case": case, **values}
        atomic_write(self.path, json.dumps(list(self.rows.values()), indent=1))
        return row


def _key(case: dict[str, Any]) -> str:
    return json.dumps(dict(case.items()), sort_keys=True)
