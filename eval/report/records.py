"""What a script has measured so far, in one JSON file: the same command again measures only what is missing."""

import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_write


class Records:
    """Rows `{"case": ..., **values}` of a JSON file that is written whole after each of them.

    Args:
        path: the file; it need not be there yet.

    Raises:
        UserError: a file that is not one of ours.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            self.rows = {_key(row["case"]): row for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} holds no results of this script ({error!r}); give another --output_dir") from None

    def find(self, case: dict[str, Any]) -> dict[str, Any] | None:
        """The row of a case: all that its numbers depend on. None if it has not been measured."""
        return self.rows.get(_key(case))

    def add(self, case: dict[str, Any], **values: Any) -> dict[str, Any]:
        """Keep the values of a case, and return its row."""
        row = self.rows[_key(case)] = {"case": case, **values}
        atomic_write(self.path, json.dumps(list(self.rows.values()), indent=1))
        return row


def _key(case: dict[str, Any]) -> str:
    return json.dumps(case, sort_keys=True)
